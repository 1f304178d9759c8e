"""The fastest plan on each of several numbers of nodes, and the best of them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mics.errors import PlanError
from mics.planning.cost import as_dollars
from mics.planning.plan import Plan, search
from mics.planning.reasons import explained
from mics.planning.table import as_table
from mics.ranks.console import Told


def sweep(plan: Plan, counts: Sequence[int], told: Told) -> list[Plan]:
    """Find the fastest plan on every number of nodes.

    Args:
        plan: its question is asked again.
        counts: numbers of nodes.
        told: is told what is simulated, and which numbers are left out and why.
    """
    best = []
    for nodes in counts:
        told(f"simulating on {nodes} nodes")
        try:
            other = replace(plan.cluster, nodes=nodes)
            plans = explained(search(plan.anatomy, other, plan.question))
        except PlanError as error:  # a partition or a global batch that does not go with so many
            told(f"{nodes} nodes are left out: {error.what}")
            continue
        if plans:
            best.append(plans[0])
        else:
            told(f"{nodes} nodes are left out: nothing fits")
    return best


def sweep_table(plans: Sequence[Plan], by: Literal["time", "cost"]) -> str:
    """Write the best plan of every number of nodes, and which of them is best."""
    table = as_table(plans).split("\n")
    lines = ["the fastest plan on each number of nodes", f"{'nodes':>6}  {table[0]}"]
    lines += [
        f"{plan.cluster.nodes:>6}  {line}" for plan, line in zip(plans, table[1:], strict=True)
    ]
    priced = [plan for plan in plans if plan.dollars_per_billion_tokens is not None]
    if by == "time":
        best = max(plans, key=lambda plan: plan.tokens_per_second)
        figure = f"{best.tokens_per_second:,.0f} tokens/s"
    elif priced:
        best = min(priced, key=lambda plan: plan.dollars_per_billion_tokens or 0)
        figure = f"{as_dollars(best.dollars_per_billion_tokens)} a billion tokens"
    else:
        return "\n".join([*lines, "Best by cost: n/a, failures leave no time for any step."])
    return "\n".join([*lines, f"Best by {by}: {best.cluster.nodes} nodes, {best.way}, {figure}."])
