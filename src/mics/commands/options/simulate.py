"""What ``mics simulate`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mics.anatomy.recipe import (
    MOST_MICRO_BATCH,
    MOST_MICRO_STEPS,
    MOST_RANKS,
    MOST_SEQUENCE,
    MOST_SIGMA,
    Machine,
    Recipe,
)
from mics.commands.cluster_options import ClusterOptions
from mics.quantities import Within
from mics.simulation.profiles import EngineName

_TIMES = Within(1e-6, 1e6)


@dataclass(frozen=True)
class Config:
    """Simulate a step on growing clusters and compare engines. Needs no GPU, makes no weight.

    The partition is the smallest that fits unless --partition names one.
    """

    where: Annotated[ClusterOptions, tyro.conf.arg(name="")] = field(default_factory=ClusterOptions)

    model: str = "bert-10b"
    """A preset (`mics train --models`), config.json, a folder with one, or a hub name."""

    nodes: str = "2..64"
    """Numbers of nodes: a range, doubling, or one number."""

    engines: tuple[EngineName, ...] = (
        "mics",
        "hsdp every micro-step",
        "hsdp deferred",
        "fsdp2",
    )
    """Engines to simulate; the times of the others are set against the first one's."""

    partition: Annotated[int | None, Within(1, MOST_RANKS)] = None
    """Partition size p; the smallest that fits by default."""

    sequence: Annotated[int | None, Within(1, MOST_SEQUENCE)] = None
    """Tokens of one sequence; the model's positions by default, at most 4096."""

    micro_batch: Annotated[int, Within(1, MOST_MICRO_BATCH)] = 8
    """Sequences of a GPU and micro-step."""

    micro_steps: Annotated[int, Within(1, MOST_MICRO_STEPS)] = Recipe.micro_steps
    """Micro-steps per step; with --scaling strong those on the smallest cluster."""

    checkpointing: bool = True
    """Recompute every block in backward."""

    scaling: Literal["weak", "strong"] = "weak"
    """"weak": every GPU keeps its work; "strong": all share that of the smallest cluster."""

    bandwidth: Annotated[float, _TIMES] = 1.0
    """What if links between nodes carried so many times as much: 2 is twice."""

    latency: Annotated[float, _TIMES] = 1.0
    """What if a message between nodes were under way so many times as long."""

    pipelined: tyro.conf.FlagCreatePairsOff[bool] = False
    """What if the two stages of consecutive gathers ran beside each other (mics: on the CPU)."""

    stack: str = Recipe.stack
    """How much of a GPU's rate the software reaches: eager, fused, mics-paper."""

    sigma: Annotated[float, Within(0, MOST_SIGMA)] = Machine.sigma
    """Spread of a micro-step's time over GPUs, as a share of it."""

    json: Path | None = None
    """File (JSON) to write, with all figures."""

    png: Path | None = None
    """File (PNG) to write, a picture of the curves."""

    trace: Path | None = None
    """File (JSON) to write, a timeline of the first engine's step on the smallest cluster, for
    Perfetto or chrome://tracing."""

    validate: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print every published figure beside the simulated one, and stop."""

    out: Path | None = None
    """With --validate: file (Markdown) to write, with the table."""
