"""Copies of activations to the host and back, beside computation (``sharding/host_copies.py``).

A block's copy out runs while the next block computes, which waits at its end until it is over. In
backward a block waits for its own copy and starts the one of the block that comes next. What the
last block saves is still on the device when its backward begins.
"""

from __future__ import annotations

from collections.abc import Sequence

from mics.hardware.network import Stage
from mics.simulation.rank import Message, Rank
from mics.simulation.schedule import UnitSeconds


class OnHost:
    """The copies that are under way in one micro-step.

    Args:
        rank: whose clock they run on.
        blocks: seconds of every block.
    """

    def __init__(self, rank: Rank, blocks: Sequence[UnitSeconds]) -> None:
        self._rank, self._blocks = rank, blocks
        self._leaving: Message | None = None
        self._coming: Message | None = None

    def end_forward(self, number: int) -> None:
        """Start a block's copy, and wait for that of the block before."""
        before, self._leaving = self._leaving, None
        seconds = self._blocks[number].copy
        if seconds:
            stage = Stage("to host", seconds)
            self._leaving = self._rank.send("to host", (stage,), f"save {number}")
        self._rank.wait(before, 3)

    def begin_backward(self, number: int) -> None:
        """Wait for what a block saved, and start to fetch what the block before it did."""
        self._rank.wait(self._coming, 3)
        self._coming = None
        seconds = self._blocks[number - 1].copy if number else 0.0
        if seconds:
            stage = Stage("from host", seconds)
            self._coming = self._rank.send("from host", (stage,), f"fetch {number - 1}")
