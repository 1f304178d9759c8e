"""Sequences of several sources, exactly in the proportion of their weights.

[Note: within one sequence]
Weights are whole numbers, their sum is the period: behind every period each source has given as
many sequences as its weight. Inside of it the n-th sequence of a source with a share w has a window
of positions, from floor((n - 1) / w) to ceil(n / w), and whoever's window ends first comes first.
For one taker of windows of this form that rule keeps all of them (Baruah, Cohen, Plaxton and
Varvel, "Proportionate progress", 1996), so that after any number of positions every source is less
than one sequence away from its share. Which source stands at a position follows from the position
alone: there is no state to keep, and no layout of ranks to depend on.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np
import torch
from numpy.typing import NDArray

from mics.errors import DataError
from mics.training.data.stream import Batch, Stream

_LONGEST = 2**17
"""Sequences of a period, at most: so many are put in order when a run starts, in a second."""


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as the smallest whole numbers in the same proportion.

    Raises:
        DataError: their period would be too long; says which ones would do.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    numbers = [int(weight * scale) for weight in exact]
    common = gcd(*numbers)
    numbers = [number // common for number in numbers]
    if sum(numbers) > _LONGEST:
        whole = sum(exact)
        near = [max(1, round(1000 * weight / whole)) for weight in exact]
        raise DataError(
            "The weights of data.sources have no short period.",
            numbers=f"In whole numbers they are {', '.join(f'{n:,}' for n in numbers[:8])}: "
            f"{sum(numbers):,} sequences until each source has its share, {_LONGEST:,} at most.",
            write=f"weights of fewer digits, such as {', '.join(map(str, near[:8]))}",
        )
    return numbers


def period_of(weights: Sequence[int]) -> NDArray[np.int64]:
    """Which source stands at each position of a period; see [Note: within one sequence]."""
    period = sum(weights)
    released: dict[int, list[tuple[int, int, int]]] = {
        0: [(-(-period // weight), source, 1) for source, weight in enumerate(weights)]
    }
    ready: list[tuple[int, int, int]] = []  # where its window ends, source, which of its sequences
    order = np.empty(period, np.int64)
    for position in range(period):
        for one in released.pop(position, ()):
            heapq.heappush(ready, one)
        _, source, number = heapq.heappop(ready)
        order[position] = source
        weight = weights[source]
        if number < weight:
            begins = max(position + 1, number * period // weight)
            ends = -(-(number + 1) * period // weight)
            released.setdefault(begins, []).append((ends, source, number + 1))
    return order


@dataclass(frozen=True)
class Ingredient:
    """A stream and its share of the sequences."""

    stream: Stream
    share: float


class Mixture:
    """The sequences of several streams in the proportion of their weights, as one stream.

    Args:
        streams: one or more, each with an endless order of its own.
        weights: whole numbers, one for each.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[int]) -> None:
        self._streams = list(streams)
        self._weights = np.asarray(weights, np.int64)
        self._order = period_of(weights)
        self._earlier = np.empty_like(self._order)  # sequences of the same source in the period
        for source in range(len(streams)):
            here = self._order == source
            self._earlier[here] = np.arange(here.sum())
        period = len(self._order)
        counts = [stream.num_sequences for stream in streams]
        self._first = np.cumsum([0, *counts])[:-1]
        self.num_tokens = sum(stream.num_tokens for stream in streams)
        # Positions before any source begins anew: an epoch of the first that does.
        self.num_sequences = min(
            n * period // weight for n, weight in zip(counts, weights, strict=True)
        )
        rates = [stream.bytes_per_token for stream in streams]
        known = [rate for rate in rates if rate is not None]
        shares = [weight / period for weight in weights]
        self.parts = [Ingredient(*pair) for pair in zip(streams, shares, strict=True)]
        self.bytes_per_token = (
            sum(rate * share for rate, share in zip(known, shares, strict=True))
            if len(known) == len(rates)
            else None
        )

    def counts(self, position: int) -> list[int]:
        """How many sequences of each source stand before a position."""
        periods, rest = divmod(position, len(self._order))
        inside = np.bincount(self._order[:rest], minlength=len(self._streams))
        return [int(n) for n in periods * self._weights + inside]

    def sequences(self, position: int, count: int) -> list[int]:
        """Which sequences stand there, numbered through all sources in their order."""
        numbers = np.empty(count, np.int64)
        for source, rows, first in self._parts(position, count):
            found = self._streams[source].sequences(first, len(rows))
            numbers[rows] = np.asarray(found) + self._first[source]
        return [int(n) for n in numbers]

    def batch(self, position: int, count: int) -> Batch:
        """The sequences at ``position`` to ``position + count - 1``."""
        parts = [
            (rows, self._streams[source].batch(first, len(rows)))
            for source, rows, first in self._parts(position, count)
        ]
        where = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in parts])))
        return Batch(
            torch.cat([batch.inputs for _, batch in parts])[where],
            torch.cat([batch.labels for _, batch in parts])[where],
        )

    def _parts(self, position: int, count: int) -> list[tuple[int, NDArray[np.int64], int]]:
        """Each source that is there: its number, its rows, and its own first position."""
        periods, places = np.divmod(np.arange(position, position + count), len(self._order))
        sources = self._order[places]
        own = periods * self._weights[sources] + self._earlier[places]
        found = []
        for source in np.unique(sources).tolist():
            (rows,) = np.nonzero(sources == source)
            found.append((source, rows, int(own[rows[0]])))  # they follow each other
        return found
