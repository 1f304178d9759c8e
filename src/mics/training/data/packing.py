"""Conversations in rows of one length, with little left over."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def packed(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put things of some lengths into rows of a width, the longest first, each where it fits best.

    Best-fit decreasing, which needs at most 11/9 of the fewest rows, and 4 more (Johnson et al.,
    1974). The same lengths give the same rows.

    Args:
        lengths: each from 1 to ``width``.
        width: of a row.

    Returns:
        Of every row the numbers of what is in it, in the order in which they stand in it.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # rows by the room that is left in them
    rooms: list[int] = []  # the keys of these, in order
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length = lengths[number]
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        else:
            room, row = width, len(rows)
            rows.append([])
        rows[row].append(number)
        left = room - length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                insort(rooms, left)
            open_rows[left].append(row)
    return rows
