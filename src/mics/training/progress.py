"""How far a run has come: what a checkpoint must hold besides tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run is after ``step`` optimizer steps.

    ``position`` is the number of sequences all ranks together have taken from the endless order:
    the whole state of the data. ``tokens`` is how many they were asked to predict.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0

    def after(self, sequences: int, tokens: int) -> Progress:
        """Where the run is one step later."""
        return Progress(self.step + 1, self.position + sequences, self.tokens + tokens)
