"""What ``mics bench`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mics.anatomy.recipe import MOST_RANKS
from mics.benching.options import OWN_ENGINES, Dilation, Name, Workload
from mics.quantities import Within

_SIZES = tuple(f"{2**n}KiB" for n in range(6, 17, 2))


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
class Comparison:
    """Options of every comparison of engines."""

    partition: Annotated[int, Within(1, MOST_RANKS)]
    """Ranks per partition group, for mics and HSDP."""

    gpus_per_node: Annotated[int | None, Within(1, MOST_RANKS)] = None
    """Ranks joined by the fast link; what the launcher says by default."""

    engines: tuple[Name, ...] = OWN_ENGINES
    """Engines to run; the others are compared with the first. DeepSpeed's need `make
    bench-environments`."""

    steps: Annotated[int, Within(1, 1_000_000)] = 5
    """Turns of each that count, of a step; one more warms up."""

    in_a_row: Annotated[int, Within(1, 1_000)] = 1
    """Steps that an engine takes in one turn, each a part of what is timed: what one step leaves
    for the next to wait for then travels beside it."""

    collectives: Literal["auto", "flat", "hierarchical"] = "auto"
    """How mics gathers and reduces: as measured, or in this form."""

    overlap: bool = True
    """Let mics gather and reduce beside computation, on the CPU."""

    link: str | None = None
    """Rate of a node's slow link (200mbit), for the floor; a lab's own is known."""

    out: Path | None = None
    """JSON file to write; a picture of the same name (.png) goes beside it."""


@dataclass(frozen=True)
class Train(Comparison):
    """Train the same model with several engines, steps interleaved, and compare.

    In a lab: `mics lab run --nodes 4 --gpus-per-node 2 -- mics bench train --partition 2`.
    """

    workload: Workload = field(default_factory=Workload)


@dataclass(frozen=True)
class Dilated(Comparison):
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
