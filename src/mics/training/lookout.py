"""Looks for the rank or the link that the others wait for, every now and then, while training."""

from __future__ import annotations

import statistics

import torch.distributed as dist
from torch import nn

from mics.ranks.lateness import Lateness
from mics.sharding.stragglers import Comparison

_STEPS = 10  # between two looks, at least
_SECONDS = 2e-3  # that a look may take, and as much again for every 40 ranks
_SHARE = 5e-4  # of the run that looks may take


class Lookout:
    """Compares the ranks of a run, on every rank at the same steps.

    The ranks' times travel during the step after a look, so that nobody waits for them.

    Args:
        model: sharded by mics.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._under_way: Comparison | None = None
        self._left = _STEPS  # steps until the next look
        self.words: str | None = None
        """Who was slow at the latest look; ``None`` if nobody was."""

    def after_step(self) -> Lateness | None:
        """A step has ended; return what the latest look has found, once. Collective."""
        if dist.get_world_size() == 1:
            return None
        if self._under_way is not None:
            found, self._under_way = self._under_way.result(), None
            self._left = _steps_until_next(found)
            self.words = found.words or None
            return found
        self._left -= 1
        if self._left <= 0:
            self._under_way = Comparison(self._model)
        return None


def _steps_until_next(found: Lateness) -> int:
    """Fast steps are looked at less often. The same on every rank, as the times are."""
    step = statistics.median(one.step for one in found.times.values())
    costs = _SECONDS * (1 + len(found.times) / 40)
    return max(_STEPS, round(costs / (_SHARE * step))) if step > 0 else _STEPS
