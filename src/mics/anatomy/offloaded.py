"""What leaves the device for the host when blocks' activations do, read from a trace.

A block takes with it what it saves: its input, and what else stays alive when it has run, without
its output, which is the next block's input. With checkpointing that is its input alone. Of what
enters the first block only as much is counted as enters the second: the rest, masks and positions,
the root keeps. Storages that are too small to leave (``sharding/offload.py``) are counted.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from mics.anatomy.trace import ROOT, Trace

PINNED = 2
"""torch rounds a pinned buffer up to a power of two: at most so many times what it holds."""


@lru_cache(maxsize=256)
def leaving(trace: Trace, checkpointing: bool) -> tuple[int, ...]:
    """Count the bytes that every block saves, which leave while the next one computes.

    Args:
        trace: of a micro-step.
        checkpointing: blocks save their inputs alone.
    """
    entering = list(trace.block_inputs)
    entering[0] = min(entering[:2])
    if checkpointing:
        return tuple(entering)
    grown = [0] * len(entering)
    for segment, following in pairwise(trace.segments):
        if segment.unit != ROOT and segment.direction == "forward":
            grown[segment.unit] = following.start - segment.start
    handed_on = [*entering[1:], entering[-1]]
    return tuple(
        inputs + max(more - output, 0)
        for inputs, more, output in zip(entering, grown, handed_on, strict=True)
    )


def away(trace: Trace, checkpointing: bool) -> list[int]:
    """Count what is on the host alone when block n runs backward; last, when the loss is computed.

    A block's own and those of the one before it, which backward comes to next, are on the device.
    """
    each = leaving(trace, checkpointing)
    gone = [sum(each[: max(block - 1, 0)]) for block in range(len(each))]
    return [*gone, sum(each[:-1])]


def pinned_bytes(trace: Trace, checkpointing: bool) -> int:
    """Count the bytes of the host's memory that a GPU takes at most, pinned and rounded up."""
    return PINNED * sum(leaving(trace, checkpointing))
