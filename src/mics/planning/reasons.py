"""Why a plan won and its neighbours did not, in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mics.anatomy.recipe import Recipe
from mics.planning.plan import Plan, Rejected, Search, with_reason
from mics.planning.ranking import error_on
from mics.quantities import GIB


def explained(search: Search) -> tuple[Plan, ...]:
    """Give every plan its reason."""
    return tuple(with_reason(plan, explain(plan, search)) for plan in search.plans)


def explain(plan: Plan, search: Search) -> str:
    """Set a plan against the next smaller and the next larger partition.

    Of the first plan it is said that it is not the fastest one, where it is not. A neighbour is run
    as the plan is; where it does not fit so, the sentence says what it lacks, and how it would do
    as it fits.
    """
    p = plan.way.partition
    sizes = {recipe.partition for recipe in _recipes(search)}
    smaller = max((q for q in sizes if q < p), default=None)
    larger = min((q for q in sizes if q > p), default=None)
    whole = " (plain full sharding, one replica)" if plan.is_full_sharding else ""
    parts = [f"p = {p}{whole}: {_fits(plan, search)}, {_bound(plan)}"]
    parts += _chosen(plan, search)
    parts += [_against(plan, q, search) for q in (smaller, larger) if q is not None]
    return "; ".join(parts)


def _chosen(plan: Plan, search: Search) -> Iterator[str]:
    """Say that the first plan is one of several equal ones, the smallest partition of them."""
    fastest = _fastest(search.plans)
    if plan is search.plans[0] and fastest is not None and fastest is not plan:
        slower = plan.seconds / fastest.seconds - 1
        error = error_on(plan.cluster.node)
        yield (
            f"{fastest.way} is {slower:.1%} faster, less than the error of a predicted step, "
            f"{error:.1%}: equal, so the smallest partition"
        )


def _recipes(search: Search) -> Iterator[Recipe]:
    yield from (plan.way for plan in search.plans)
    yield from (one.way for one in search.rejected)


def _fits(plan: Plan, search: Search) -> str:
    recipe, p = plan.way, plan.way.partition
    memory = f"{plan.needed / GIB:.1f} of {plan.cluster.node.gpu.memory / GIB:.4g} GiB"
    smaller = [other for other in search.plans if other.way.partition < p]
    if not any(other.partition < p for other in _recipes(search)):
        return memory
    if not smaller:
        return f"smallest that fits ({memory})"
    if not any(_same(other.way, recipe) for other in smaller):
        return f"smallest that fits with {recipe.setting} ({memory})"
    return memory


def _bound(plan: Plan) -> str:
    exposed = plan.simulated.step.exposed
    waits = {
        "the partition group": exposed[1],
        "the replicas": exposed[2],
        "the host": exposed[3],
    }
    whom = max(waits, key=lambda who: waits[who])
    share = waits[whom] / plan.seconds
    if share < 0.005:
        return "communication hidden"
    return f"{share:.0%} of the step waits for {whom}"


def _against(plan: Plan, q: int, search: Search) -> str:
    fitting = [other for other in search.plans if other.way.partition == q]
    alike = _fastest(other for other in fitting if _same(other.way, plan.way))
    if alike is not None:
        return f"{q} would {_compared(plan, alike)}"
    refused = [one for one in search.rejected if one.way.partition == q]
    lacking = min((one for one in refused if _same(one.way, plan.way)), key=_needed, default=None)
    text = "" if lacking is None else f"{q} lacks {lacking.lacking}"
    best = _fastest(fitting)
    if best is not None:
        other = f"with {best.way.setting} it would" if text else f"{best.way} would"
        return ", ".join(filter(None, (text, f"{other} {_compared(plan, best)}")))
    frugal = min(refused, key=_needed)
    if lacking is None or _same(frugal.way, plan.way):
        return f"{q} lacks {frugal.lacking} with {frugal.way.setting}"
    more = frugal.lacking if frugal.on_host else f"{frugal.missing / GIB:.1f}"
    return f"{text}, and {more} even with {frugal.way.setting}"


def _compared(plan: Plan, other: Plan) -> str:
    slower = other.seconds / other.tokens * plan.tokens / plan.seconds
    speed = f"take {slower:.2f}x as long per token"
    ours, theirs = plan.inter_bytes / plan.tokens, other.inter_bytes / other.tokens
    # With a part of a node the ledger counts a flat hop 2 as a ring of all ranks, which is not what
    # the time of a tree follows from: such bytes explain nothing.
    k = plan.cluster.node.gpus_per_node
    if not ours or not theirs or min(plan.way.partition, other.way.partition) < k:
        return speed
    moves = theirs / ours
    moved = (
        f"move {moves:.1f}x the bytes between nodes"
        if abs(moves - 1) > 0.05
        else "move as many bytes between nodes"
    )
    return f"{moved} and {speed}"


def _same(one: Recipe, other: Recipe) -> bool:
    return (one.micro_batch, one.micro_steps, one.checkpointing, one.offload) == (
        other.micro_batch,
        other.micro_steps,
        other.checkpointing,
        other.offload,
    )


def _fastest(plans: Iterable[Plan]) -> Plan | None:
    return max(plans, key=lambda plan: plan.tokens_per_second, default=None)


def _needed(one: Rejected) -> tuple[bool, float]:
    """What lacks memory of the host has it on its GPUs, and bytes of one are none of the other."""
    return one.on_host, one.needed
