"""Which ranks hold copies of a parameter, and how far the copies are apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mics.lab.checking.report import Param, Print, Step
from mics.topology import Ranks

Moment = Literal["before", "gradient", "after"]

ROUNDING = 1e-6
"""How far copies may be apart, in the size of their largest value, that only rounding parts."""


@dataclass(frozen=True)
class Copies:
    """One shard of one parameter, and the ranks that hold it.

    Args:
        name: of the parameter.
        shard: which part; "" for all of it.
        ranks: that hold it, in order.
        numel: its elements.
        spread: whether it is a shard of a DTensor.
    """

    name: str
    shard: str
    ranks: Ranks
    numel: int
    spread: bool


def copies_of(steps: Sequence[Step]) -> list[Copies]:
    """All parameters of a step, each shard once; with one rank what has no copy.

    Ranks hold copies of each other if they hold the same shard of a DTensor. What is no DTensor is
    a copy where it begins with equal values, or is given equal gradients: experts of a rank's own
    have neither.

    Args:
        steps: the first step of every rank.
    """
    held: dict[tuple[str, str], dict[int, Param]] = {}
    for rank, step in enumerate(steps):
        for name, param in step.params.items():
            held.setdefault((name, param.shard), {})[rank] = param
    found = []
    for (name, shard), by_rank in held.items():
        for ranks in _alike(by_rank):
            one = by_rank[ranks[0]]
            found.append(Copies(name, shard, ranks, one.numel, one.spread))
    return found


def _alike(by_rank: dict[int, Param]) -> list[Ranks]:
    params = list(by_rank.values())
    gradients = {one.gradient.digest for one in params if one.gradient is not None}
    if params[0].spread or len(gradients) == 1:
        return [tuple(by_rank)]
    begun: dict[str, list[int]] = {}
    for rank, param in by_rank.items():
        begun.setdefault(param.before.digest, []).append(rank)
    return [tuple(ranks) for ranks in begun.values()]


def apart(copies: Copies, steps: Sequence[Step], moment: Moment) -> float:
    """How far the copies are apart; 0 if they are equal to the bit, or there are none.

    Args:
        copies: of one shard.
        steps: one step of every rank.
        moment: of that step.
    """
    prints = [_print(copies, steps[rank], moment) for rank in copies.ranks]
    there = [one for one in prints if one is not None]
    if not there:
        return 0.0
    if len(there) < len(prints):  # a gradient on some ranks only
        return 1.0
    return max(there[0].apart_from(one) for one in there)


def _print(copies: Copies, step: Step, moment: Moment) -> Print | None:
    param = step.params.get(copies.name)
    found: Print | None = None if param is None else getattr(param, moment)
    return found


def has_gradient(copies: Copies, steps: Iterable[Step]) -> bool:
    """Whether any rank has a gradient for it."""
    return any(
        step.params[copies.name].gradient is not None
        for step in steps
        if copies.name in step.params
    )


def unreduced(copies: Copies, steps: Sequence[Step]) -> float:
    """How far gradients are apart that an optimizer has used as they were; 0 if they are alike.

    An optimizer that sums gradients itself leaves copies that have moved, and are equal.

    Args:
        copies: of one shard.
        steps: one step of every rank.
    """
    far = apart(copies, steps, "gradient")
    if far <= ROUNDING:
        return 0.0
    param = steps[copies.ranks[0]].params.get(copies.name)
    after = None if param is None else param.after
    moved = param is not None and after is not None and after.digest != param.before.digest
    return 0.0 if moved and apart(copies, steps, "after") == 0.0 else far
