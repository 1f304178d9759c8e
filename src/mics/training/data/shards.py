"""Tokens in files of any number and size as one long array, read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mics.errors import DataError

_MOST_OPEN = 128  # files that are mapped at once; the system's limit is a thousand or so
_SAMPLE = 4096  # ids at both ends of a file that are looked at before the first step
_LOOKED_AT = 64  # files, all over


@dataclass(frozen=True)
class Stretch:
    """Ids that stand one behind the other in a file.

    Args:
        path: the file.
        offset: of the first one, in bytes.
        tokens: how many there are.
        dtype: of an id, as numpy writes it, little-endian: ``<u2``.
    """

    path: Path
    offset: int
    tokens: int
    dtype: str


class Shards:
    """A one-dimensional array of ids, of which no more is in memory than was asked for.

    Args:
        stretches: in their order.
        vocabulary: ids are below it.
    """

    def __init__(self, stretches: Sequence[Stretch], vocabulary: int) -> None:
        self._stretches = [stretch for stretch in stretches if stretch.tokens]
        self._vocabulary = vocabulary
        self._ends = np.cumsum([stretch.tokens for stretch in self._stretches], dtype=np.int64)
        self._opened = lru_cache(maxsize=_MOST_OPEN)(_mapped)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids at ``places``, an array of any shape.

        Raises:
            DataError: an id is none of the vocabulary; names the file.
        """
        which = np.searchsorted(self._ends, places, side="right")
        ids = np.empty(places.shape, np.int64)
        for number in np.unique(which):
            stretch = self._stretches[number]
            here = which == number
            inside = places[here] - (self._ends[number] - stretch.tokens)
            found = self._opened(stretch)[inside]
            if found.size and not 0 <= int(found.min()) <= int(found.max()) < self._vocabulary:
                bad = int(np.argmax((found < 0) | (found >= self._vocabulary)))
                raise _no_id(stretch, int(inside[bad]), int(found[bad]), self._vocabulary)
            ids[here] = found
        return ids

    def part(self, start: int, stop: int) -> Shards:
        """The ids from ``start`` to ``stop - 1``, as an array of their own."""
        parts = []
        for stretch, end in zip(self._stretches, self._ends.tolist(), strict=True):
            begin = end - stretch.tokens
            first, last = max(start, begin), min(stop, end)
            if first < last:
                offset = stretch.offset + (first - begin) * np.dtype(stretch.dtype).itemsize
                parts.append(replace(stretch, offset=offset, tokens=last - first))
        return Shards(parts, self._vocabulary)

    def check(self) -> None:
        """Look at both ends of some files: ids of another tokenizer are seen before the first step.

        Raises:
            DataError: an id is none of the vocabulary; names the file.
        """
        files = len(self._stretches)
        for number in sorted({n * (files - 1) // (_LOOKED_AT - 1) for n in range(_LOOKED_AT)}):
            if files:
                end, tokens = int(self._ends[number]), self._stretches[number].tokens
                width = min(_SAMPLE, tokens)
                self[np.arange(end - tokens, end - tokens + width)]
                self[np.arange(end - width, end)]


def _mapped(stretch: Stretch) -> NDArray[np.integer]:
    dtype = np.dtype(stretch.dtype)
    try:
        return np.memmap(stretch.path, dtype, "r", stretch.offset, (stretch.tokens,))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{stretch.path} cannot be read any more.",
            numbers=f"{type(error).__name__}: {error}.",
            write="--data.source <a whole copy of the tokens>",
        ) from None


def _no_id(stretch: Stretch, place: int, token: int, vocabulary: int) -> DataError:
    return DataError(
        f"{stretch.path} has an id that its tokenizer does not have.",
        numbers=f"Id {token:,} stands {place:,} tokens behind byte {stretch.offset:,}, and there "
        f"are {vocabulary:,} ids.",
        write="--data.tokenizer <the one that made the tokens>, or a whole copy of the file",
    )
