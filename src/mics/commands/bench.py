"""``mics bench``: what the links at hand can do, and how far from it the collectives are."""

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

from mics.benching.collectives import Measured, measure_collectives
from mics.benching.engines import NAMES, Engine, Name
from mics.benching.side_by_side import Compared, agree, compare
from mics.benching.workloads import Workload
from mics.errors import MicsError
from mics.lab.network import bits_per_second
from mics.mesh import groups_of, init_mesh, start
from mics.version import __version__

_SIZES = tuple(f"{2**n}KiB" for n in range(6, 17, 2))


@dataclass(frozen=True)
class Collectives:
    """Time all-gather, reduce-scatter and all-reduce, flat and in two stages, beside the floor.

    Run it on the ranks that are to be measured: under torchrun, Slurm or MPI, or in a lab:
    `mics lab run --nodes 2 --gpus-per-node 4 -- mics bench collectives`.
    """

    partition: int | None = None
    """Ranks of the measured groups; all of them by default."""

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
class Train:
    """Train the same model with several engines, steps interleaved, and compare.

    In a lab: `mics lab run --nodes 4 --gpus-per-node 2 -- mics bench train --partition 2`.
    """

    partition: int
    """Ranks per partition group, for mics and HSDP."""

    gpus_per_node: int | None = None
    """Ranks joined by the fast link; what the launcher says by default."""

    engines: tuple[Name, ...] = tuple(NAMES)
    """Which engines; the first one is what the others are compared with."""

    workload: Workload = field(default_factory=Workload)

    steps: int = 5
    """Steps of each that count; one more warms up."""

    collectives: Literal["auto", "flat", "hierarchical"] = "auto"
    """For mics: measured, or forced."""

    overlap: bool = True
    """For mics, on the CPU: gather and reduce beside computation."""

    out: Path | None = None
    """JSON file to write."""


Config = (
    Annotated[Collectives, tyro.conf.subcommand("collectives")]
    | Annotated[Train, tyro.conf.subcommand("train")]
)


def run(config: Config) -> int:
    """Measure.

    Returns:
        0; 1 when something does not fit.
    """
    try:
        return _collectives(config) if isinstance(config, Collectives) else _train(config)
    except MicsError as error:
        print(f"mics bench: {error}", file=sys.stderr)
        return 1


def _collectives(config: Collectives) -> int:
    link = config.link or os.environ.get("MICS_LAB_LINK")
    link_bits = bits_per_second(link) if link else None
    sizes = [_size(text) for text in config.sizes]
    world, _ = start()
    mesh = init_mesh(partition=config.partition or world, gpus_per_node=config.gpus_per_node)
    groups = groups_of(mesh)
    speaks = dist.get_rank() == 0
    if speaks:
        print(_heading(link), flush=True)
    found = measure_collectives(
        groups,
        sizes,
        repeats=config.repeats,
        link_bits=link_bits,
        told=lambda one: print(_line(one), flush=True) if speaks else None,
    )
    if speaks and config.out is not None:
        facts = _facts(link, world, groups.gpus_per_node, groups.shard.size())
        _write(config.out, facts | {"measured": [dataclasses.asdict(one) for one in found]})
    dist.destroy_process_group()
    return 0


def _train(config: Train) -> int:
    world, launched_per_node = start()
    k = config.gpus_per_node or launched_per_node
    engines = [
        Engine(
            name,
            config.workload,
            partition=config.partition,
            gpus_per_node=k,
            collectives=config.collectives,
            overlap=config.overlap,
        )
        for name in config.engines
    ]
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
        print("\n".join(_table(compared)))
        print(f"losses of all engines agree: {'yes' if same else 'NO'}", flush=True)
        if config.out is not None:
            facts = _facts(os.environ.get("MICS_LAB_LINK"), world, k, config.partition)
            facts |= {"workload": dataclasses.asdict(config.workload), "steps": config.steps}
            _write(config.out, facts | {"engines": [dataclasses.asdict(one) for one in compared]})
    dist.destroy_process_group()
    return 0 if same else 1


def _table(compared: Sequence[Compared]) -> list[str]:
    first = compared[0].engine
    rows = [
        f"{'engine':<24}{'step, median (quartiles)':>30}{f'time over {first}':>28}"
        f"{'bytes a node sends':>22}"
    ]
    for one in compared:
        spent, ratio = one.seconds, one.ratio
        times = f"{spent.median:.2f} s ({spent.low:.2f} to {spent.high:.2f})"
        ratios = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        sent = "n/a" if one.bytes_sent is None else f"{one.bytes_sent:,}"
        rows.append(f"{one.engine:<24}{times:>30}{ratios:>28}{sent:>22}")
    return rows


def _facts(link: str | None, world: int, gpus_per_node: int, partition: int) -> dict[str, Any]:
    return {
        "command": " ".join(["mics", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "mics": __version__,
        "backend": dist.get_backend(),
        "link": link,
        "world": world,
        "gpus_per_node": gpus_per_node,
        "partition": partition,
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _heading(link: str | None) -> str:
    return (
        f"floor: bytes that leave a node over {link or 'a link of unknown rate (n/a)'}\n"
        f"{'collective':<16}{'form':<14}{'size':>10}{'time, median (quartiles)':>34}"
        f"{'algbw':>13}{'busbw':>13}{'floor':>11}{'over it':>9}"
    )


def _line(one: Measured) -> str:
    spent = one.seconds
    times = f"{_ms(spent.median)} ({_ms(spent.low)} to {_ms(spent.high)})"
    floor = "n/a" if one.floor is None else _ms(one.floor)
    over = "n/a" if one.over_floor is None else f"{one.over_floor:.2f}"
    return (
        f"{one.collective:<16}{one.form:<14}{one.message_bytes / 2**20:>6.2f} MiB{times:>34}"
        f"{one.algbw / 1e9:>8.4f} GB/s{one.busbw / 1e9:>8.4f} GB/s{floor:>11}{over:>9}"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _size(text: str) -> int:
    for unit, scale in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)):
        if text.endswith(unit) and text.removesuffix(unit).isdigit():
            return int(text.removesuffix(unit)) * scale
    raise MicsError(f"{text!r} is no size.", write="--sizes 64KiB 8MiB")
