"""The record of one micro-step: what each unit computes, and what is alive meanwhile.

``watch.py`` makes it. The memory model and the compute model are made from it; no formula of any
architecture is written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Pass = Literal["forward", "backward"]
ROOT = -1
"""The unit of what lies outside of all blocks."""


@dataclass(frozen=True)
class Operator:
    """One kernel: FLOPs of its product (0 if it has none), and bytes it reads and writes."""

    flops: int
    num_bytes: int


@dataclass(frozen=True)
class Segment:
    """A unit's part of one pass.

    Args:
        unit: number of the block, or ``ROOT``.
        direction: forward or backward.
        start: bytes of activations and their gradients alive before it.
        peak: most bytes alive during it, gradients of parameters included.
        gradients: bytes of gradients of parameters in ``peak``.
        end: bytes alive after it, gradients of a block's parameters not included; those of the
            root stay, as they are reduced last.
        operators: every kernel, in order.
    """

    unit: int
    direction: Pass
    start: int
    peak: int
    gradients: int
    end: int
    operators: tuple[Operator, ...]


@dataclass(frozen=True)
class Trace:
    """A micro-step, segment by segment.

    Args:
        segments: in the order of time.
        block_inputs: per block, bytes that enter it and entered no earlier block: what
            checkpointing keeps.
    """

    segments: tuple[Segment, ...]
    block_inputs: tuple[int, ...]

    # By identity, so that what is worked out from a trace can be kept cheaply.
    __hash__ = object.__hash__

    def flops(self, direction: Pass) -> int:
        """Add up the FLOPs of all products of one pass."""
        return _flops(self, direction, False)

    @property
    def recomputed_flops(self) -> int:
        """FLOPs of the blocks' forward, which checkpointing computes again."""
        return _flops(self, "forward", True)


@lru_cache(maxsize=256)
def _flops(trace: Trace, direction: Pass, blocks_only: bool) -> int:
    chosen = [s for s in trace.segments if s.direction == direction]
    return sum(
        op.flops
        for segment in chosen
        if segment.unit != ROOT or not blocks_only
        for op in segment.operators
    )


def between(first: Trace, second: Trace, share: float) -> Trace:
    """Make the trace whose every figure lies that far from the first to the second, or beyond.

    Sizes and FLOPs are linear in the micro-batch, and so is a peak as long as it is reached at the
    same moment.

    Raises:
        ValueError: they do not have the same segments and kernels.
    """

    def on_line(a: int, b: int) -> int:
        return round(a + (b - a) * share)

    def operators(a: Segment, b: Segment) -> tuple[Operator, ...]:
        return tuple(
            Operator(on_line(x.flops, y.flops), on_line(x.num_bytes, y.num_bytes))
            for x, y in zip(a.operators, b.operators, strict=True)
        )

    known: dict[tuple[int, int], tuple[Operator, ...]] = {}
    segments = []
    for a, b in zip(first.segments, second.segments, strict=True):
        key = (id(a.operators), id(b.operators))
        if key not in known:
            known[key] = operators(a, b)
        figures = (on_line(getattr(a, name), getattr(b, name)) for name in _FIGURES)
        start, peak, gradients, end = figures
        segments.append(Segment(a.unit, a.direction, start, peak, gradients, end, known[key]))
    inputs = tuple(map(on_line, first.block_inputs, second.block_inputs))
    return Trace(tuple(segments), inputs)


_FIGURES = ("start", "peak", "gradients", "end")
