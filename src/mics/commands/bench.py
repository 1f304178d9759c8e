"""``mics bench``: what the links at hand can do, and how near to it collectives and engines are."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro

from mics.benching.collectives import Measured, keep_choices, measure_collectives
from mics.benching.contestants import NAMES, Contestant, Layout, Name, Training
from mics.benching.deepspeed_child import WORK_AROUND, Order
from mics.benching.deepspeed_parent import RELEASES, DeepSpeed, check_environments
from mics.benching.dilated import Dilation, Stretched
from mics.benching.side_by_side import Compared, Stepping, agree, compare, computation_of
from mics.benching.workloads import Workload
from mics.errors import MicsError
from mics.lab.network import bits_per_second
from mics.quantities import MIB, milliseconds, parse_size
from mics.ranks.mesh import groups_of, init_mesh, start
from mics.topology import Topology
from mics.version import __version__

_SIZES = tuple(f"{2**n}KiB" for n in range(6, 17, 2))


@dataclass(frozen=True)
class Collectives:
    """Time all-gather, reduce-scatter and all-reduce, flat and in two stages, beside the floor.

    What is faster in fp32 is kept in the profile that later runs choose by ($MICS_PROFILE); a lab's
    own profile ends with the lab, so measure in one that is up, or set the variable.

    Run it on the ranks that are to be measured: under torchrun, Slurm or MPI, or in a lab:
    `mics lab run --nodes 2 --gpus-per-node 4 -- mics bench collectives`.
    """

    partition: tuple[int, ...] = ()
    """Ranks of the measured groups; by default those of a node, of 2, 4, 8, ... nodes, and all."""

    gpus_per_node: int | None = None
    """Ranks joined by the fast link; what the launcher says by default."""

    sizes: tuple[str, ...] = _SIZES
    """Sizes of the gathered message: 64KiB, 8MiB, ..."""

    repeats: int = 5
    """Calls of each; the median is shown, with quartiles."""

    link: str | None = None
    """Rate of a node's slow link (200mbit), for the floor; a lab's own is known."""

    out: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class _Comparison:
    partition: int
    """Ranks per partition group, for mics and HSDP."""

    gpus_per_node: int | None = None
    """Ranks joined by the fast link; what the launcher says by default."""

    engines: tuple[Name, ...] = tuple(NAMES)
    """Which engines; the first one is what the others are compared with. DeepSpeed's need
    `make bench-environments`."""

    steps: int = 5
    """Steps of each that count; one more warms up."""

    collectives: Literal["auto", "flat", "hierarchical"] = "auto"
    """For mics: measured, or forced."""

    overlap: bool = True
    """For mics, on the CPU: gather and reduce beside computation."""

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
    if isinstance(config, Collectives):
        return _collectives(config)
    if isinstance(config, Dilated):
        return _dilated(config)
    return _train(config)


def _collectives(config: Collectives) -> int:
    link = _link(config.link)
    sizes = [_size(text) for text in config.sizes]
    _at_least_one("repeats", config.repeats)
    world, launched_per_node = start()
    k = config.gpus_per_node or launched_per_node
    partitions = config.partition or _group_sizes(world, k)
    for partition in partitions:
        Topology.from_world(world, k, partition)  # all of them, before the first is measured
    speaks = dist.get_rank() == 0
    if speaks:
        print(_heading(link), flush=True)
    found: list[Measured] = []
    for partition in partitions:
        groups = groups_of(init_mesh(partition=partition, gpus_per_node=k))
        measured = measure_collectives(
            groups,
            sizes,
            repeats=config.repeats,
            link_bits=_bits(link),
            told=lambda one: print(_line(one), flush=True) if speaks else None,
        )
        keep_choices(groups, measured)
        found += measured
    if speaks and config.out is not None:
        facts = _facts(link, world, k, max(partitions)) | {"device": groups.device.type}
        _write(config.out, facts | {"measured": [dataclasses.asdict(one) for one in found]})
    dist.destroy_process_group()
    return 0


def _group_sizes(world: int, k: int) -> tuple[int, ...]:
    """A node, then twice as many nodes each time, then all: what a planner fits latency to."""
    nodes = world // k
    doubling = [k * 2**n for n in range(nodes.bit_length()) if nodes % 2**n == 0]
    return tuple(p for p in sorted({*doubling, world}) if p > 1) or (world,)


def _train(config: Train) -> int:
    title = f"{config.workload.kind}, {config.workload.layers} x {config.workload.hidden}"
    return _compare(config, config.workload, title, {"workload": config.workload})


def _dilated(config: Dilated) -> int:
    link_bits = _bits(_link(config.link))
    if link_bits is None:
        raise MicsError(
            "The factor of a time-dilated workload follows from the rate of a node's link.",
            write="--link 200mbit, or run it in a lab: mics lab run --link 200mbit -- ...",
        )
    work = Stretched(config.dilation, link_bits)
    times = work.arithmetic
    title = f"{config.dilation.model} on {config.dilation.cluster}, times x {times.factor:.1f}"
    return _compare(config, work, title, {"dilation": config.dilation, "arithmetic": times})


def _engine(
    name: Name, config: _Comparison, work: Training, what: dict[str, Any], k: int
) -> Stepping:
    if name in RELEASES:
        stretched = "dilation" in what
        fields = dataclasses.asdict(what["dilation" if stretched else "workload"])
        link_bits = _bits(_link(config.link)) if stretched else None
        scale = what["arithmetic"].scale if stretched else 1.0
        return DeepSpeed(Order(name, fields, link_bits, config.partition, k, scale))
    return Contestant(name, work, Layout(config.partition, k, config.collectives, config.overlap))


def _compare(config: _Comparison, work: Training, title: str, what: dict[str, Any]) -> int:
    link = _link(config.link)
    _at_least_one("steps", config.steps)
    world, launched_per_node = start()
    k = config.gpus_per_node or launched_per_node
    Topology.from_world(world, k, config.partition)  # for every engine, mics among them or not
    check_environments([name for name in config.engines if name in RELEASES])
    engines = [_engine(name, config, work, what, k) for name in config.engines]
    speaks = dist.get_rank() == 0
    compared = compare(
        engines,
        config.steps,
        told=lambda number, name, spent: (
            print(f"round {number}  {name:<24}{spent:.2f} s", file=sys.stderr, flush=True)
            if speaks
            else None
        ),
    )
    same = agree(compared)
    if speaks:
        layout = f"{world // k} nodes x {k} ranks, partition {config.partition}, {link or 'n/a'}"
        notes = _notes(config.engines, scaled="dilation" in what)
        print("\n".join([f"{title}; {layout}", *_table(compared, _bits(link)), *notes]))
        print(f"losses of all engines agree: {'yes' if same else 'NO'}", flush=True)
        if config.out is not None:
            facts = _facts(link, world, k, config.partition)
            facts |= {name: dataclasses.asdict(value) for name, value in what.items()}
            facts |= {"steps": config.steps, "losses agree": same, "notes": notes}
            _write(config.out, facts | {"engines": [dataclasses.asdict(one) for one in compared]})
            _draw(config.out, compared, f"{title}\n{layout}", _bits(link))
    dist.destroy_process_group()
    return 0 if same else 1


def _table(compared: Sequence[Compared], link_bits: float | None) -> list[str]:
    first = compared[0].engine
    rows = [
        f"{'engine':<24}{'step, median (quartiles)':>30}{f'time over {first}':>28}"
        f"{'bytes a node sends':>22}{'over the limit':>16}"
    ]
    computation = computation_of(compared)
    for one in compared:
        spent, ratio = one.seconds, one.ratio
        times = f"{spent.median:.2f} s ({spent.low:.2f} to {spent.high:.2f})"
        ratios = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        sent = "n/a" if one.bytes_sent is None else f"{one.bytes_sent:,}"
        limit = None if computation is None else one.limit(computation, link_bits)
        over = "n/a" if limit is None else f"{spent.median / limit:.2f}"
        rows.append(f"{one.engine:<24}{times:>30}{ratios:>28}{sent:>22}{over:>16}")
    return [*rows, "limit: the larger of computation and bytes sent over the rate of the link"]


def _notes(engines: Sequence[Name], *, scaled: bool) -> list[str]:
    """What must be known of the engines beside their numbers."""
    notes = [
        f"{name}: DeepSpeed {RELEASES[name]}, its defaults in fp32, no clipping"
        for name in engines
        if name in RELEASES
    ]
    if notes and scaled:
        notes.append("DeepSpeed: its sizes in parameters are scaled as the model is")
    if "deepspeed mics" in engines:
        notes.append(f"deepspeed mics: {WORK_AROUND}")
    return notes


def _draw(out: Path, compared: Sequence[Compared], title: str, link_bits: float | None) -> None:
    try:
        from mics.benching.picture import plot_comparison
    except ImportError:
        print("no picture: pip install 'torch-mics[train]' brings matplotlib", file=sys.stderr)
        return
    plot_comparison(compared, out.with_suffix(".png"), title, link_bits)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise MicsError(f"--{name} must be at least 1, got {value}.")


def _link(asked: str | None) -> str | None:
    return asked or os.environ.get("MICS_LAB_LINK")


def _bits(link: str | None) -> float | None:
    return bits_per_second(link) if link else None


def _facts(link: str | None, world: int, gpus_per_node: int, partition: int) -> dict[str, Any]:
    return {
        "command": " ".join(["mics", *_without_out(sys.argv[1:])]),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "mics": __version__,
        "backend": dist.get_backend(),
        "link": link,
        "world": world,
        "gpus_per_node": gpus_per_node,
        "partition": partition,
    }


def _without_out(words: Sequence[str]) -> list[str]:
    """A command line without its file: where a result lies is no part of it."""
    kept = [word for word in words if not word.startswith("--out=")]
    at = kept.index("--out") if "--out" in kept else len(kept)
    return [*kept[:at], *kept[at + 2 :]]


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _heading(link: str | None) -> str:
    return (
        f"floor: bytes that leave a node over {link or 'a link of unknown rate (n/a)'}\n"
        f"{'collective':<16}{'form':<14}{'ranks':>5}{'size':>12}{'time, median (quartiles)':>34}"
        f"{'algbw':>13}{'busbw':>13}{'floor':>11}{'over it':>9}"
    )


def _line(one: Measured) -> str:
    spent = one.seconds
    times = (
        f"{milliseconds(spent.median)} ({milliseconds(spent.low)} to {milliseconds(spent.high)})"
    )
    floor = "n/a" if one.floor is None else milliseconds(one.floor)
    over = "n/a" if one.over_floor is None else f"{one.over_floor:.2f}"
    return (
        f"{one.collective:<16}{one.form:<14}{one.ranks:>5}{one.message_bytes / MIB:>8.2f} MiB"
        f"{times:>34}"
        f"{one.algbw / 1e9:>8.4f} GB/s{one.busbw / 1e9:>8.4f} GB/s{floor:>11}{over:>9}"
    )


def _size(text: str) -> int:
    num_bytes = parse_size(text, units=("KiB", "MiB", "GiB"))
    if num_bytes is None:
        raise MicsError(f"{text!r} is no size.", write="--sizes 64KiB 8MiB")
    return num_bytes
