"""How long a traced segment computes on a GPU.

``t = max(FLOPs / (peak e(FLOPs)), bytes / (bandwidth e(bytes)))`` for every kernel, e from steps of
its size: small kernels do not fill a GPU. The steps are Calculon's defaults (Isaev et al., SC'23),
capped by the largest product anybody measured on the chip. One factor per software stack,
calibrated at one published figure and printed, stands for all that a kernel's size does not say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from mics.simulation.hardware import Gpu
from mics.simulation.trace import Operator, Segment, Trace

_PRODUCT = ((128e9, 0.95), (16e9, 0.90), (1e9, 0.60), (0.0, 0.10))
_MEMORY = ((100e6, 0.90), (10e6, 0.75), (1e6, 0.60), (0.0, 0.30))
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
        """Of the micro-step."""
        return sum(self.forward) + sum(self.backward) + self.before + self.between + self.after


@lru_cache(maxsize=256)
def times(trace: Trace, gpu: Gpu, *, stack: float = 1.0, checkpointing: bool = False) -> Times:
    """Of every segment of a trace.

    Args:
        trace: of a micro-step.
        gpu: it runs on.
        stack: what of the modelled rate the software reaches.
        checkpointing: every backward of a block begins with its forward.
    """
    blocks = len(trace.block_inputs)
    forward, backward = [0.0] * blocks, [0.0] * blocks
    root = {"before": 0.0, "between": 0.0, "after": 0.0}
    known: dict[int, float] = {}  # equal lists of operators are one object
    where = "before"
    for segment in trace.segments:
        seconds = known.get(id(segment.operators))
        if seconds is None:
            seconds = known[id(segment.operators)] = _seconds(segment.operators, gpu) / stack
        if segment.unit < 0:
            root[where] += seconds
        else:
            spent = forward if segment.direction == "forward" else backward
            spent[segment.unit] += seconds
            where = _behind(segment, blocks)
    if checkpointing:
        backward = [b + f for b, f in zip(backward, forward, strict=True)]
    return Times(tuple(forward), tuple(backward), **root)


def _behind(segment: Segment, blocks: int) -> str:
    if segment.direction == "forward":
        return "between" if segment.unit == blocks - 1 else "before"
    return "after" if segment.unit == 0 else "between"


def _seconds(operators: Iterable[Operator], gpu: Gpu) -> float:
    cap = (gpu.achieved or 0.8 * gpu.peak) / gpu.peak
    total = 0.0
    for op in operators:
        product = op.flops / (gpu.peak * min(_step(_PRODUCT, op.flops), cap)) if op.flops else 0.0
        memory = 0.0
        if gpu.bandwidth is not None and op.num_bytes:
            memory = op.num_bytes / (gpu.bandwidth * _step(_MEMORY, op.num_bytes))
        total += max(product, memory) + _KERNEL
    return total


def _step(steps: tuple[tuple[float, float], ...], size: float) -> float:
    return next(share for least, share in steps if size >= least)
