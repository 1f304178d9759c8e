"""Why a plan won and its neighbours did not, in a sentence."""

from __future__ import annotations

from collections.abc import Iterable

from mics.planning.plan import GIB, Plan, Rejected, Search, with_reason


def explained(search: Search) -> tuple[Plan, ...]:
    """All plans with their reasons."""
    return tuple(with_reason(plan, explain(plan, search)) for plan in search.plans)


def explain(plan: Plan, search: Search) -> str:
    """One plan against the next smaller and the next larger partition.

    Neighbours are taken at their best micro-batch and checkpointing.
    """
    p = plan.way.partition
    parts = [f"p = {p}: {_memory(plan)}, {_bound(plan)}"]
    smaller = _nearest(search, p, larger=False)
    if isinstance(smaller, Rejected):
        parts[0] = f"p = {p}: smallest that fits ({_memory(plan)}), {_bound(plan)}"
        parts.append(
            f"{smaller.way.partition} lacks {smaller.missing / GIB:.1f} GiB even with {smaller.way}"
        )
    neighbours = (smaller, _nearest(search, p, larger=True))
    parts += [_against(plan, other) for other in neighbours if isinstance(other, Plan)]
    return "; ".join(parts)


def _memory(plan: Plan) -> str:
    gpu = plan.cluster.node.gpu.memory
    return f"{plan.needed / GIB:.1f} of {gpu / GIB:.0f} GiB"


def _bound(plan: Plan) -> str:
    exposed = plan.simulated.step.exposed
    share = max(exposed[1], exposed[2]) / plan.simulated.step.seconds
    if share < 0.005:
        return "communication hidden"
    whom = "the partition group" if exposed[1] > exposed[2] else "the replicas"
    return f"{share:.0%} of the step waits for {whom}"


def _against(plan: Plan, other: Plan) -> str:
    q = other.way.partition
    slower = other.seconds / other.tokens * plan.tokens / plan.seconds
    speed = f"{slower:.2f}x as long per token"
    ours, theirs = plan.inter_bytes / plan.tokens, other.inter_bytes / other.tokens
    if not ours or not theirs:
        return f"{q} would take {speed}"
    moves = theirs / ours
    bytes_ = (
        f"move {moves:.1f}x the bytes between nodes"
        if abs(moves - 1) > 0.05
        else "move as many bytes between nodes"
    )
    return f"{q} would {bytes_} and take {speed}"


def _nearest(search: Search, p: int, *, larger: bool) -> Plan | Rejected | None:
    def on_side(q: int) -> bool:
        return q > p if larger else q < p

    sizes = {plan.way.partition for plan in search.plans}
    sizes |= {one.way.partition for one in search.rejected}
    candidates = sorted(filter(on_side, sizes), reverse=not larger)
    if not candidates:
        return None
    q = candidates[0]
    fitting = [plan for plan in search.plans if plan.way.partition == q]
    if fitting:
        return max(fitting, key=lambda plan: plan.tokens_per_second)
    return _frugal(one for one in search.rejected if one.way.partition == q)


def _frugal(rejected: Iterable[Rejected]) -> Rejected | None:
    return min(rejected, key=lambda one: one.needed, default=None)
