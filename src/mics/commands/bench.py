"""``mics bench``: what the links at hand can do, and how near to it collectives and engines are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mics.benching.collectives import keep_choices, measure_collectives
from mics.benching.contestants import Layout
from mics.benching.deepspeed_parent import RELEASES, check_environments
from mics.benching.dilated import Stretched
from mics.benching.session import bits_of, engine_of, link_of, meet, write_results
from mics.benching.side_by_side import Compared, agree, compare
from mics.benching.tables import (
    collectives_heading,
    collectives_line,
    comparison_lines,
    notes_on,
)
from mics.benching.workloads import Language
from mics.commands.numbers import check_numbers
from mics.commands.options.bench import Collectives, Comparison, Config, Dilated, Train
from mics.errors import MicsError
from mics.quantities import parse_size
from mics.ranks.console import progress, show, speaks
from mics.ranks.mesh import groups_of, init_mesh
from mics.ranks.starting import leave_groups

_LARGEST = 2**40


def run(config: Config) -> int:
    """Measure.

    Returns:
        0; 1 when the engines do not agree.

    Raises:
        MicsError: something does not fit.
    """
    check_numbers(config)
    match config:
        case Collectives():
            code = _collectives(config)
        case Train():
            code = _train(config)
        case Dilated():
            code = _dilated(config)
    leave_groups()
    return code


def _collectives(config: Collectives) -> int:
    link = link_of(config.link)
    link_bits = bits_of(link)
    sizes = [_size(text) for text in config.sizes]
    place = meet(config.gpus_per_node, link)
    partitions = config.partition or place.group_sizes()
    place.check(partitions)
    show(collectives_heading(link))
    measured = []
    for partition in partitions:
        groups = groups_of(init_mesh(partition=partition, gpus_per_node=place.gpus_per_node))
        of_group = measure_collectives(
            groups,
            sizes,
            repeats=config.repeats,
            link_bits=link_bits,
            told=lambda one: show(collectives_line(one)),
        )
        keep_choices(groups, of_group)
        measured += of_group
    facts = place.facts(max(partitions)) | {"device": groups.device.type}
    write_results(config.out, facts | {"measured": [asdict(one) for one in measured]})
    return 0


def _train(config: Train) -> int:
    title = f"{config.workload.kind}, {config.workload.layers} x {config.workload.hidden}"
    return _compare(config, Language(config.workload), title, {"workload": config.workload})


def _dilated(config: Dilated) -> int:
    link_bits = bits_of(link_of(config.link))
    if link_bits is None:
        raise MicsError(
            "The factor of a time-dilated workload follows from the rate of a node's link.",
            write="--link 200mbit, or run it in a lab: mics lab run --link 200mbit -- ...",
        )
    work = Stretched(config.dilation, link_bits)
    times = work.arithmetic
    title = f"{config.dilation.model} on {config.dilation.cluster}, times x {times.factor:.1f}"
    return _compare(config, work, title, {"dilation": config.dilation, "arithmetic": times})


def _compare(
    config: Comparison, work: Language | Stretched, title: str, what: dict[str, Any]
) -> int:
    link = link_of(config.link)
    link_bits = bits_of(link)
    place = meet(config.gpus_per_node, link)
    place.check([config.partition])  # for every engine, mics among them or not
    check_environments([name for name in config.engines if name in RELEASES])
    layout = Layout(config.partition, place.gpus_per_node, config.collectives, config.overlap)
    engines = [
        engine_of(name, work, layout, dilation=what.get("dilation"), link_bits=link_bits)
        for name in config.engines
    ]
    compared = compare(
        engines,
        config.steps,
        config.in_a_row,
        told=lambda number, name, spent: progress(f"round {number}  {name:<24}{spent:.2f} s"),
    )
    same = agree(compared)
    k = place.gpus_per_node
    nodes = f"{place.world // k} nodes x {k} ranks"
    where = f"{nodes}, partition {config.partition}, {link or 'n/a'}"
    notes = notes_on(config.engines, scaled=isinstance(work, Stretched))
    show("\n".join([f"{title}; {where}", *comparison_lines(compared, link_bits), *notes]))
    show(f"losses of all engines agree: {'yes' if same else 'NO'}")
    facts = place.facts(config.partition)
    facts |= {name: asdict(value) for name, value in what.items()}
    facts |= {"steps": config.steps, "in a row": config.in_a_row}
    facts |= {"losses agree": same, "notes": notes}
    write_results(config.out, facts | {"engines": [asdict(one) for one in compared]})
    _draw(config.out, compared, f"{title}\n{where}", link_bits)
    return 0 if same else 1


def _draw(out: Path | None, compared: list[Compared], title: str, link_bits: float | None) -> None:
    if out is None or not speaks():
        return
    try:
        from mics.benching.picture import plot_comparison
    except ImportError:
        progress("no picture: pip install 'torch-mics[train]' brings matplotlib")
        return
    plot_comparison(compared, out.with_suffix(".png"), title, link_bits)


def _size(text: str) -> int:
    num_bytes = parse_size(text, units=("KiB", "MiB", "GiB"))
    if num_bytes is None:
        raise MicsError(f"{text!r} is no size.", write="--sizes 64KiB 8MiB")
    if num_bytes > _LARGEST:
        raise MicsError(f"A message has at most 1,024 GiB, got {text}.", write="--sizes 64KiB 8MiB")
    return num_bytes
