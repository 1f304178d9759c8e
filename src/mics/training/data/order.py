"""An endless, seeded order of sequences whose whole state is one integer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def sequence_at(positions: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Which of ``count`` sequences stand at ``positions`` of the endless order.

    Every epoch (``count`` positions) is another permutation. None is ever held in memory: it is a
    Feistel network over the next power of four, walked until it falls inside (cycle walking, Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        positions: places in the order, from 0, of any shape.
        count: number of sequences, at least 1.
        seed: what the order is drawn from.
    """
    assert count > 0, "the walk below would never end"
    epochs, places = np.divmod(positions, count)
    half_bits = max(1, (int(count - 1).bit_length() + 1) // 2)
    found = _shuffled(places.astype(np.uint64), epochs.astype(np.uint64), seed, half_bits)
    while (outside := found >= count).any():
        again = _shuffled(found, epochs.astype(np.uint64), seed, half_bits)
        found = np.where(outside, again, found)
    return found.astype(np.int64)


def _shuffled(
    values: NDArray[np.uint64], epochs: NDArray[np.uint64], seed: int, half_bits: int
) -> NDArray[np.uint64]:
    half = np.uint64(half_bits)
    low = np.uint64((1 << half_bits) - 1)
    left, right = values >> half, values & low
    key = _mix(np.uint64(seed % 2**64) ^ _mix(epochs))
    for turn in range(_ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(key + np.uint64(turn))) & low)
    return (left << half) | right


def _mix(value: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """Spread every bit over all (the finalizer of SplitMix64, Steele, Lea and Flood, 2014)."""
    mixed = np.atleast_1d(value) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)
