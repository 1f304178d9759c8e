"""The engines that a step is simulated for: what each splits, sends and waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mics.simulation.schedule import Sync

EngineName = Literal[
    "mics",
    "fsdp2",
    "hsdp every micro-step",
    "hsdp deferred",
    "ddp",
    "zero2",
    "zero3",
    "zero2 0.5.6",
    "zero3 0.5.6",
]


@dataclass(frozen=True)
class Profile:
    """How an engine runs a step.

    Args:
        about: one line.
        sharded: parameters are split over the partition ("partition"), all ranks ("world") or not.
        reduces: gradients are reduce-scattered every micro-step, over the same ranks.
        sync: hop 2.
        coalesced: a unit's parameters travel as one message.
        stay: parameters of fewer elements are not split, so not gathered.
        bucket: elements of gradients that are reduced as one message; 0 reduces unit by unit.
        lowers: gradients are reduced in the dtype of computation.
        overlaps: hop 1 runs beside computation.
        host: seconds of the host per message, which hold up the GPU.
        two_stages: hierarchical collectives where a group spans nodes.
        joins: hop 2 of small units is one message.
        at_end: parameters are gathered after the optimizer step.
    """

    about: str
    sharded: Literal["partition", "world", "no"]
    reduces: bool = True
    sync: Sync = "last"
    coalesced: bool = True
    stay: int = 0
    bucket: int = 0
    lowers: bool = False
    overlaps: bool = True
    host: float = 0.0
    two_stages: bool = False
    joins: bool = False
    at_end: bool = False


PROFILES: dict[EngineName, Profile] = {
    "mics": Profile(
        "partition groups, the faster of flat and hierarchical, hop 2 once a step",
        "partition",
        two_stages=True,
        joins=True,
    ),
    "fsdp2": Profile("FSDP2 full shard over all ranks", "world", sync="never"),
    "hsdp every micro-step": Profile(
        "FSDP2 HSDP, an all-reduce over the replicas every micro-step", "partition", sync="every"
    ),
    "hsdp deferred": Profile("FSDP2 HSDP, hop 2 once a step", "partition"),
    "ddp": Profile("DDP with no_sync, a whole replica on every rank", "no", reduces=False),
    # Today's are the defaults of DeepSpeed 0.19.8 (runtime/engine.py, runtime/zero/config.py,
    # stage3.py and partitioned_param_coordinator.py).
    "zero2": Profile(
        "DeepSpeed ZeRO-2 of today: gradients reduced over all ranks every micro-step, in the "
        "dtype of computation, 5e8 at once, beside nothing",
        "no",
        sync="never",
        bucket=500_000_000,
        lowers=True,
        overlaps=False,
        at_end=True,
    ),
    "zero3": Profile(
        "DeepSpeed ZeRO-3 of today: a gather per parameter of 1e5 elements or more, gradients in "
        "the dtype of computation, 5e8 at once",
        "world",
        sync="never",
        coalesced=False,
        stay=100_000,
        bucket=500_000_000,
        lowers=True,
    ),
    "zero2 0.5.6": Profile(
        "DeepSpeed ZeRO-2 of 2021: nothing overlaps, messages in buckets",
        "no",
        sync="never",
        overlaps=False,
        host=0.3e-3,
        at_end=True,
    ),
    "zero3 0.5.6": Profile(
        "DeepSpeed ZeRO-3 of 2021: a message per parameter, nothing overlaps, each costs the host",
        "world",
        sync="never",
        coalesced=False,
        overlaps=False,
        host=0.3e-3,
    ),
}
