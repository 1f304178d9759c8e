"""What ``mics plan`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mics.anatomy.recipe import (
    MICRO_BATCHES,
    MOST_AHEAD,
    MOST_BATCH,
    MOST_FRAGMENTATION,
    MOST_MICRO_BATCH,
    MOST_MICRO_STEPS,
    MOST_RANKS,
    MOST_SEQUENCE,
    Machine,
    Recipe,
)
from mics.commands.cluster_options import ClusterOptions
from mics.hardware.cluster import MOST_NODES
from mics.planning.ranking import TOP
from mics.quantities import Within


@dataclass(frozen=True)
class Config:
    """Simulate every legal way to train a model on a cluster; print those that fit, the best first.

    Needs no GPU and makes no weight. A cluster is a node of the catalogue (`mics plan --list`), a
    file of your own, three numbers, or what `mics bench collectives --out` measured.
    """

    where: Annotated[ClusterOptions, tyro.conf.arg(name="")] = field(default_factory=ClusterOptions)

    model: str = "bert-10b"
    """A preset (`mics train --models`), config.json, a folder with one, or a hub name."""

    nodes: Annotated[int, Within(1, MOST_NODES)] = 8
    """Number of nodes."""

    sequence: Annotated[int | None, Within(1, MOST_SEQUENCE)] = None
    """Tokens of one sequence; the model's positions by default, at most 4096."""

    global_batch: Annotated[int | None, Within(1, MOST_BATCH)] = None
    """Sequences per step, from which the micro-steps follow; by default those of the fastest way,
    with --micro-steps. Every way does the same work."""

    micro_steps: Annotated[int | None, Within(1, MOST_MICRO_STEPS)] = None
    """Micro-steps per step, instead of --global-batch; 4 by default."""

    micro_batch: Annotated[tuple[int, ...], Within(1, MOST_MICRO_BATCH)] = MICRO_BATCHES
    """Micro-batches to try: sequences of a GPU and micro-step."""

    partition: Annotated[tuple[int, ...], Within(1, MOST_RANKS)] = ()
    """Partition sizes p to try; every legal one by default."""

    checkpointing: Literal["both", "none", "full"] = "both"
    """Recompute every block in backward: "full"; "both" tries it with and without."""

    offload: Literal["auto", "none", "full"] = "auto"
    """Keep what blocks save for backward on the host, where its link is known; with checkpointing
    their inputs. "auto" where it does not fit otherwise."""

    optimizer: Literal["adamw", "adamw-fused", "sgd-momentum", "sgd"] = "adamw-fused"
    """Whose states are kept; `mics train` has adamw-fused, torch.optim.AdamW is adamw by itself."""

    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of gradients on the wire, in hop 1 and in hop 2."""

    hop_two: Literal["fp32", "bf16", "fp8", "int8"] | None = None
    """What mics' replicas exchange of gradients once a step; as --reduce-dtype by default."""

    error_feedback: bool = True
    """Keep what fp8 and int8 round away, in 4 bytes for each value."""

    dealt_states: bool = False
    """Deal optimizer states to the replicas: their memory is divided by the number of replicas."""

    prefetch: Annotated[int, Within(0, MOST_AHEAD)] = Recipe.prefetch
    """Blocks whose parameters are gathered ahead of the one that computes."""

    stack: str = Recipe.stack
    """How much of a GPU's rate the software reaches: eager, fused, mics-paper."""

    fragmentation: Annotated[float, Within(1, MOST_FRAGMENTATION)] = Machine.fragmentation
    """How many times what is alive the allocator takes: 1.05 is 5 % more."""

    tokens: Annotated[float | None, Within(1, 1e18)] = None
    """Tokens of the whole run (300e9): how long it takes and what it costs, failures included."""

    sweep: str | None = None
    """Also plan for other numbers of nodes: nodes=2..64 (doubling)."""

    by: Literal["time", "cost"] = "time"
    """Which number of nodes of a sweep is best: tokens per second, or dollars per token. On one
    number of nodes both rank alike."""

    top: Annotated[int, Within(1, 1_000_000)] = TOP
    """Lines of the table: so many of the best ways."""

    toml: Path | None = None
    """File (TOML) to write, with which `mics train` runs as planned, and how it is started."""

    json: Path | None = None
    """File (JSON) to write, with all plans."""

    png: Path | None = None
    """File (PNG) to write, a picture of the plans and of other engines."""

    html: Path | None = None
    """File (HTML) to write, a page with choice, price, command, memory, timeline and scaling."""

    list: tyro.conf.FlagCreatePairsOff[bool] = False
    """List GPUs, nodes and software stacks with their sources, and stop."""
