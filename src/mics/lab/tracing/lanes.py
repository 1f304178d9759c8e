"""Rows of a picture: what nests stands in one, what overlaps otherwise gets another."""

from __future__ import annotations

from collections.abc import Sequence

_ROUNDING = 1_000  # ns by which an inner range may seem to outlast its outer one


def lanes_of(ranges: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Put ranges into as few lanes as come at hand, so that in each of them ranges only nest.

    Args:
        ranges: beginning and end of each, in nanoseconds.

    Returns:
        The lane of each, from 0, and its end, cut to that of the range it stands in where times
        were rounded.
    """
    order = sorted(range(len(ranges)), key=lambda i: (ranges[i][0], -ranges[i][1]))
    open_ends: list[list[int]] = []  # of every lane, outermost first
    lanes, ends = [0] * len(ranges), [end for _, end in ranges]
    for i in order:
        begun, ended = ranges[i]
        lanes[i] = _first_free(open_ends, begun, ended)
        lane = open_ends[lanes[i]]
        ends[i] = min(ended, lane[-1]) if lane else ended
        lane.append(ends[i])
    return lanes, ends


def _first_free(open_ends: list[list[int]], begun: int, ended: int) -> int:
    """The first lane that a range nests in; one more if there is none."""
    for number, lane in enumerate(open_ends):
        while lane and lane[-1] <= begun:
            lane.pop()
        if not lane or ended <= lane[-1] + _ROUNDING:
            return number
    open_ends.append([])
    return len(open_ends) - 1
