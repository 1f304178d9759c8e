"""How long a traced segment computes on a GPU.

``t = max(FLOPs / (peak e(FLOPs)), bytes / (bandwidth e(bytes)))`` for every kernel, e growing with
its size: small kernels do not fill a GPU. Calculon (Isaev et al., SC'23) has steps there, by its
defaults 0.10, 0.60, 0.90 and 0.95 of a peak from 0, 1, 16 and 128 GFLOP on, and 0.30, 0.60, 0.75
and 0.90 of a memory's rate from 0, 1, 10 and 100 MB on. With steps twice the work can take half the
time; so here a power law joins their middles. The most is the largest product anybody measured on
the chip. One factor per software stack, calibrated at one published figure and printed, stands for
all that a kernel's size does not say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from mics.anatomy.trace import Operator, Segment, Trace
from mics.hardware.cluster import UNMEASURED, Gpu

# Sizes (FLOPs; bytes) and efficiencies, at the geometric middle of Calculon's steps; those without
# an end are taken for as wide as their neighbour.
_PRODUCT = ((0.25e9, 0.10), (4e9, 0.60), (45e9, 0.90), (362e9, 0.95))
_MEMORY = ((0.32e6, 0.30), (3.2e6, 0.60), (32e6, 0.75), (316e6, 0.90))
_KERNEL = 2e-6  # seconds between two kernels of a full queue


@dataclass(frozen=True)
class Times:
    """Seconds of a micro-step's computation: per block, and of what is outside of all blocks.

    ``before`` is the root's part ahead of the first block, ``between`` what follows the last one up
    to the first block's backward, ``after`` what comes last.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    before: float
    between: float
    after: float

    @property
    def total(self) -> float:
        """Seconds of the whole micro-step."""
        return sum(self.forward) + sum(self.backward) + self.before + self.between + self.after


@lru_cache(maxsize=256)
def times(trace: Trace, gpu: Gpu, *, stack: float = 1.0, checkpointing: bool = False) -> Times:
    """Work out how long every segment of a trace computes.

    Args:
        trace: of a micro-step.
        gpu: it runs on.
        stack: what of the modelled rate the software reaches.
        checkpointing: every backward of a block begins with its forward.
    """
    blocks = len(trace.block_inputs)
    forward, backward = [0.0] * blocks, [0.0] * blocks
    root = {"before": 0.0, "between": 0.0, "after": 0.0}
    of_operators: dict[int, float] = {}  # equal lists of operators are one object
    where = "before"
    for segment in trace.segments:
        seconds = of_operators.get(id(segment.operators))
        if seconds is None:
            seconds = _seconds(segment.operators, gpu) / stack
            of_operators[id(segment.operators)] = seconds
        if segment.unit < 0:
            root[where] += seconds
        else:
            of_pass = forward if segment.direction == "forward" else backward
            of_pass[segment.unit] += seconds
            where = _behind(segment, blocks)
    if checkpointing:
        backward = [b + f for b, f in zip(backward, forward, strict=True)]
    return Times(tuple(forward), tuple(backward), **root)


def _behind(segment: Segment, blocks: int) -> str:
    if segment.direction == "forward":
        return "between" if segment.unit == blocks - 1 else "before"
    return "after" if segment.unit == 0 else "between"


def _seconds(operators: Iterable[Operator], gpu: Gpu) -> float:
    cap = gpu.achieved / gpu.peak if gpu.achieved else UNMEASURED
    total = 0.0
    for op in operators:
        product = (
            op.flops / (gpu.peak * min(_efficiency(_PRODUCT, op.flops), cap)) if op.flops else 0.0
        )
        memory = 0.0
        if gpu.bandwidth is not None and op.num_bytes:
            memory = op.num_bytes / (gpu.bandwidth * _efficiency(_MEMORY, op.num_bytes))
        total += max(product, memory) + _KERNEL
    return total


def _efficiency(points: Sequence[tuple[float, float]], size: float) -> float:
    """Read the line through the points in logarithms; size over it never falls with size."""
    if size <= points[0][0]:
        return points[0][1]
    for (low, least), (high, most) in pairwise(points):
        if size < high:
            return float(least * (most / least) ** (math.log(size / low) / math.log(high / low)))
    return points[-1][1]
