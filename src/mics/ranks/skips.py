"""Is a step to be taken? A rule that gives the same answer on every rank, from the same numbers.

A step is skipped when its loss or the norm of its gradient is not finite, and, where that is asked
for, when one of them is a spike: more than a factor above the median of those of the latest steps
that were taken. The medians are of taken steps only, so that a spike does not become what is usual,
and the rule says nothing of spikes before it has seen ``FEWEST`` of them, while norms still fall.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mics.errors import ConfigError

WINDOW = 64
"""The latest taken steps whose medians are what is usual."""
FEWEST = 16
"""Taken steps before anything is a spike."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one step; the same on every rank.

    Args:
        take: whether the optimizer steps.
        why: it does not; empty if it does.
        in_a_row: steps skipped so far without one taken in between, this one too.
        loss: mean over the ranks, ``None`` where nothing was to be predicted.
        norm: of the gradient.
    """

    take: bool
    why: str
    in_a_row: int
    loss: float | None
    norm: float


class SkipRule:
    """Judges the steps of one run, in order.

    Args:
        spike_loss: a loss this many times the median of the latest ones is a spike; 0: none is.
        spike_norm: the same of the norm.

    Raises:
        ConfigError: a factor is neither 0 nor above 1.
    """

    def __init__(self, *, spike_loss: float = 0.0, spike_norm: float = 0.0) -> None:
        for name, factor in (("spike_loss", spike_loss), ("spike_norm", spike_norm)):
            if not (factor == 0 or 1 < factor < math.inf):
                raise ConfigError(
                    f"{name} is how many times the usual a spike is.",
                    numbers=f"{name} = {factor}.",
                    write=f"{name}=0 for none, or a number above 1, such as 10",
                )
        self._factors = {"loss": spike_loss, "norm": spike_norm}
        self._taken: dict[str, deque[float]] = {
            name: deque(maxlen=WINDOW) for name in self._factors
        }
        self._in_a_row = 0

    @property
    def looks_for_spikes(self) -> bool:
        """Whether it skips more than what is not finite."""
        return any(self._factors.values())

    @property
    def in_a_row(self) -> int:
        """Steps skipped so far without one taken in between."""
        return self._in_a_row

    def judge(self, loss: float | None, norm: float) -> Verdict:
        """Say whether a step is taken, and remember it.

        Args:
            loss: the same on every rank; ``None`` where nothing was to be predicted.
            norm: of the gradient, the same on every rank.
        """
        numbers = {"norm": norm} if loss is None else {"loss": loss, "norm": norm}
        why = self._why_not(numbers)
        if why:
            self._in_a_row += 1
            return Verdict(False, why, self._in_a_row, loss, norm)
        self._in_a_row = 0
        for name, number in numbers.items():
            self._taken[name].append(number)
        return Verdict(True, "", 0, loss, norm)

    def _why_not(self, numbers: Mapping[str, float]) -> str:
        for name, number in numbers.items():
            if not math.isfinite(number):
                return f"not finite: {name} {number}"
        for name, number in numbers.items():
            before, factor = self._taken[name], self._factors[name]
            if not factor or len(before) < FEWEST:
                continue
            usual = statistics.median(before)
            if number > factor * usual > 0:
                return (
                    f"spike: {name} {number:.4g}, {number / usual:.1f} times the median "
                    f"{usual:.4g} of the {len(before)} latest steps taken"
                )
        return ""

    def begin_anew(self) -> None:
        """Steps are taken again from an earlier state: no step was skipped just before."""
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold of it, as JSON has it."""
        return {
            "in_a_row": self._in_a_row,
            **{name: list(numbers) for name, numbers in self._taken.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the rule whose ``state_dict`` this is.

        Raises:
            ConfigError: it is none.
        """
        try:
            in_a_row = int(state["in_a_row"])
            taken = {name: [float(number) for number in state[name]] for name in self._taken}
        except (KeyError, TypeError, ValueError) as error:
            raise _no_state(f"{type(error).__name__}: {error}") from None
        numbers = [number for each in taken.values() for number in each]
        if in_a_row < 0 or not all(map(math.isfinite, numbers)):
            raise _no_state(f"in_a_row = {in_a_row}, {len(numbers)} numbers, not all are finite")
        self._in_a_row = in_a_row
        for name, each in taken.items():
            self._taken[name] = deque(each, maxlen=WINDOW)


def _no_state(why: str) -> ConfigError:
    return ConfigError(
        "This is no state of a rule that skips steps.",
        numbers=f"{why}.",
        write="what its state_dict() has returned",
    )
