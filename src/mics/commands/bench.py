"""``mics bench``: what the links at hand can do, and how near to it collectives and engines are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mics.anatomy.recipe import MOST_RANKS
from mics.benching.collectives import keep_choices, measure_collectives
from mics.benching.contestants import NAMES, Layout, Name
from mics.benching.deepspeed_parent import RELEASES, check_environments
from mics.benching.dilated import Dilation, Stretched
from mics.benching.session import bits_of, engine_of, link_of, meet, write_results
from mics.benching.side_by_side import Compared, agree, compare
from mics.benching.tables import (
    collectives_heading,
    collectives_line,
    comparison_lines,
    notes_on,
)
from mics.benching.workloads import Workload
from mics.commands.numbers import check_numbers
from mics.errors import MicsError
from mics.quantities import Within, parse_size
from mics.ranks.console import progress, show, speaks
from mics.ranks.mesh import groups_of, init_mesh
from mics.ranks.starting import leave_groups

_SIZES = tuple(f"{2**n}KiB" for n in range(6, 17, 2))


_LARGEST = 2**40


@dataclass(frozen=True)
class Collectives:
    """Time all-gather, reduce-scatter and all-reduce, flat and hierarchical, beside the floor.

    What is faster in fp32 is kept in the profile that later runs choose by ($MICS_PROFILE); a lab's
    own profile ends with the lab, so measure in one that is up, or set the variable.

    Run it on the ranks that are to be measured: under torchrun, Slurm or MPI, or in a lab:
    `mics lab run --nodes 2 --gpus-per-node 4 -- mics bench collectives`.
    """

    partition: Annotated[tuple[int, ...], Within(1, MOST_RANKS)] = ()
    """Ranks of the measured groups; by default those of a node, of 2, 4, 8, ... nodes, and all."""

    gpus_per_node: Annotated[int | None, Within(1, MOST_RANKS)] = None
    """Ranks joined by the fast link; what the launcher says by default."""

    sizes: tuple[str, ...] = _SIZES
    """Sizes of the gathered message: 64KiB, 8MiB, ..."""

    repeats: Annotated[int, Within(1, 1_000_000)] = 5
    """Calls of each; the median is shown, with quartiles."""

    link: str | None = None
    """Rate of a node's slow link (200mbit), for the floor; a lab's own is known."""

    out: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class _Comparison:
    partition: Annotated[int, Within(1, MOST_RANKS)]
    """Ranks per partition group, for mics and HSDP."""

    gpus_per_node: Annotated[int | None, Within(1, MOST_RANKS)] = None
    """Ranks joined by the fast link; what the launcher says by default."""

    engines: tuple[Name, ...] = tuple(NAMES)
    """Which engines; the first one is what the others are compared with. DeepSpeed's need
    `make bench-environments`."""

    steps: Annotated[int, Within(1, 1_000_000)] = 5
    """Steps of each that count; one more warms up."""

    collectives: Literal["auto", "flat", "hierarchical"] = "auto"
    """How mics gathers and reduces: as measured, or in this form."""

    overlap: bool = True
    """Whether mics gathers and reduces beside computation, on the CPU."""

    link: str | None = None
    """Rate of a node's slow link (200mbit), for the floor; a lab's own is known."""

    out: Path | None = None
    """JSON file to write; a picture of the same name (.png) goes beside it."""


@dataclass(frozen=True)
class Train(_Comparison):
    """Train the same model with several engines, steps interleaved, and compare.

    In a lab: `mics lab run --nodes 4 --gpus-per-node 2 -- mics bench train --partition 2`.
    """

    workload: Workload = field(default_factory=Workload)


@dataclass(frozen=True)
class Dilated(_Comparison):
    """The same with a large model on a real cluster, every time stretched by one stated factor.

    In a lab: `mics lab run --nodes 8 --gpus-per-node 2 --link 100mbit -- mics bench dilated
    --partition 2`.
    """

    dilation: Dilation = field(default_factory=Dilation)


Config = (
    Annotated[Collectives, tyro.conf.subcommand("collectives")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Dilated, tyro.conf.subcommand("dilated")]
)


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
    return _compare(config, config.workload, title, {"workload": config.workload})


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
    config: _Comparison, work: Workload | Stretched, title: str, what: dict[str, Any]
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
    facts |= {"steps": config.steps, "losses agree": same, "notes": notes}
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
