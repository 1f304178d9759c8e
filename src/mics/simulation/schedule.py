"""What one unit takes, and when things happen in a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mics.hardware.network import Stage

Sync = Literal["last", "every", "never"]


@dataclass(frozen=True)
class UnitSeconds:
    """What one unit takes in a micro-step, seconds.

    Args:
        forward: computation.
        backward: computation, recomputed forward included.
        gather: stages of its all-gather.
        reduce: stages of its reduce-scatter.
        sync: stages of its hop 2.
        copy: of what it saves to the host, or back.
    """

    forward: float
    backward: float
    gather: tuple[Stage, ...] = ()
    reduce: tuple[Stage, ...] = ()
    sync: tuple[Stage, ...] = ()
    copy: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """When things happen in a step of an engine.

    Args:
        micro_steps: s.
        gathers: whether blocks are gathered, in forward and in backward.
        prefetch: blocks gathered ahead; 0 waits for each when it is needed.
        in_flight: reductions computation does not wait for; 0 waits for each.
        sync: hop 2 runs on the last micro-step, on every one, or never; beside the backward pass,
            which ends when it has landed.
        pipelined: the next gather's first stage runs beside this one's second.
        host: seconds computation is held up by every message that is started.
        messages: of one unit's gather, and of its reduction.
        slows: where blocks communicate, all computation takes that share longer.
        last: seconds after everything, the optimizer step.
        gathered_at_end: stages of a gather of all parameters after the optimizer step.
        gloo: communication is issued in the order of mics on Gloo, not on a GPU's streams.
    """

    micro_steps: int = 1
    gathers: bool = True
    prefetch: int = 1
    in_flight: int = 1
    sync: Sync = "last"
    pipelined: bool = False
    host: float = 0.0
    messages: int = 1
    slows: float = 0.0
    last: float = 0.0
    gathered_at_end: tuple[Stage, ...] = ()
    gloo: bool = False
