"""Which of several plans comes first, when the model that times them may be wrong.

A plan that is faster by less than the model's own error is not known to be faster. Such plans are
equal, and the smallest of them comes first: a smaller partition keeps communication nearer and its
hop 1 on fewer links, fewer nodes break more rarely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from mics.hardware.cluster import Node

STEP_ERROR = 0.03
"""How far a predicted step of GPUs may be off, as a share of it: the largest error of a published
step time that set no factor is 2.6 % (``benchmarks/results/validation.md``), rounded up."""

STEP_ERROR_ON_GLOO = 0.075
"""The same for CPU ranks that talk through Gloo: the largest error of ten measured configurations
(``benchmarks/results/predicted_steps.json``)."""

TOP = 10
"""How many of the first are shown."""

Item = TypeVar("Item")


def error_on(node: Node) -> float:
    """Say how far a step that is predicted for such nodes may be off."""
    return STEP_ERROR_ON_GLOO if node.gloo else STEP_ERROR


def count_equal(costs: Iterable[float], error: float) -> int:
    """Count the costs that exceed the least by no more than the error."""
    known = list(costs)
    limit = min(known) * (1 + error)
    return sum(cost <= limit for cost in known)


def in_order(
    items: Iterable[Item],
    cost: Callable[[Item], float],
    size: Callable[[Item], int],
    error: float,
) -> list[Item]:
    """Sort by cost, but by size first among the items that are as good as the best.

    Args:
        items: to be sorted.
        cost: what is to be small, seconds or dollars.
        size: what is to be small among equals.
        error: the share of the least cost by which an equal item may exceed it.
    """
    by_cost = sorted(items, key=lambda item: (cost(item), size(item)))
    equal = count_equal(map(cost, by_cost), error) if by_cost else 0
    first = sorted(by_cost[:equal], key=lambda item: (size(item), cost(item)))
    return first + by_cost[equal:]
