"""The best plan on each of several numbers of nodes, and the best of them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mics.errors import PlanError
from mics.planning.cost import as_dollars
from mics.planning.plan import Plan, search
from mics.planning.ranking import error_on, in_order
from mics.planning.reasons import explained
from mics.planning.table import plan_table
from mics.ranks.console import Told


def sweep(plan: Plan, counts: Sequence[int], told: Told) -> list[Plan]:
    """Find the best plan on every number of nodes, each for the same global batch.

    Args:
        plan: its question is asked again, with its global batch.
        counts: numbers of nodes.
        told: is told what is simulated, and which numbers are left out and why.
    """
    best = []
    question = replace(plan.question, global_batch=plan.sequences)
    for nodes in counts:
        told(f"simulating on {nodes} node{'s' if nodes > 1 else ''}")
        try:
            other = replace(plan.cluster, nodes=nodes)
            plans = explained(search(plan.anatomy, other, question))
        except PlanError as error:  # a partition or a global batch that does not go with so many
            told(f"{nodes} nodes are left out: {error.what}")
            continue
        if plans:
            best.append(plans[0])
        else:
            told(f"{nodes} nodes are left out: nothing fits")
    return best


def sweep_table(plans: Sequence[Plan], by: Literal["time", "cost"]) -> str:
    """Write the best plan of every number of nodes, and which of them is best.

    Of numbers of nodes that are equally good, within the model's error, the fewest are best.
    """
    lines = [
        f"the best plan on each number of nodes, for a step of {plans[0].sequences:,} sequences",
        *plan_table(plans, with_nodes=True),
    ]
    costs = {"time": _seconds, "cost": _dollars}[by]
    known = [plan for plan in plans if not math.isinf(costs(plan))]
    if not known:
        return "\n".join([*lines, "Best by cost: n/a, failures leave no time for any step."])
    error = error_on(plans[0].cluster.node)
    best = in_order(known, costs, lambda plan: plan.cluster.nodes, error)[0]
    figure = f"{best.tokens_per_second:,.0f} tokens/s"
    if by == "cost":
        figure = f"{as_dollars(best.dollars_per_billion_tokens)} a billion tokens"
    chosen = f"Best by {by}: {best.cluster.nodes} nodes, {best.way}, {figure}"
    if costs(best) > min(map(costs, known)):
        chosen += f"; more nodes are better by less than the error of a predicted step, {error:.1%}"
    return "\n".join([*lines, f"{chosen}."])


def _seconds(plan: Plan) -> float:
    return plan.seconds / plan.tokens


def _dollars(plan: Plan) -> float:
    """Dollars per billion tokens, infinite where nobody knows."""
    price = plan.dollars_per_billion_tokens
    return math.inf if price is None else price
