"""Plans as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mics.planning.plan import Plan
from mics.quantities import GIB
from mics.ranks.columns import Column, as_table

COLUMNS = (
    Column("p"),
    Column("replicas", 8),
    Column("micro-batch"),
    Column("micro-steps"),
    Column("checkpoint"),
    Column("gather", 4),
    Column("memory"),
    Column("step"),
    Column("tokens/s", 1),
    Column("MFU", 3),
    Column("HFU", 9),
    Column("hop 1 waits", 6),
    Column("hop 2 waits", 5),
    Column("between nodes", 7),
    Column("$/B tokens", 2),
)


def plan_table(plans: Sequence[Plan], *, with_nodes: bool = False) -> list[str]:
    """Write one line per plan, as wide as the terminal allows; the lines.

    Args:
        plans: of the rows.
        with_nodes: whether a column says on how many nodes a plan is.
    """
    if with_nodes:
        rows = [(f"{plan.cluster.nodes}", *cells(plan)) for plan in plans]
        return as_table((Column("nodes"), *COLUMNS), rows)
    return as_table(COLUMNS, [cells(plan) for plan in plans])


def cells(plan: Plan) -> tuple[str, ...]:
    """Write a plan's line, one text per column."""
    recipe, exposed = plan.way, plan.simulated.step.exposed
    price = plan.dollars_per_billion_tokens
    return (
        str(recipe.partition),
        str(plan.cluster.gpus // recipe.partition),
        str(recipe.micro_batch),
        str(recipe.micro_steps),
        ("full" if recipe.checkpointing else "none") + (", host" if recipe.offload else ""),
        recipe.form,
        f"{plan.needed / GIB:.1f} GiB",
        f"{plan.seconds:.3f} s",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.mfu:.1%}",
        f"{plan.hfu:.1%}",
        f"{exposed[1] / plan.seconds:.1%}",
        f"{exposed[2] / plan.seconds:.1%}",
        f"{plan.inter_bytes / 1e9:,.1f} GB",
        "n/a" if price is None else f"{price:,.0f}" if price >= 1 else f"{price:.2g}",
    )


def as_document(plan: Plan) -> dict[str, Any]:
    """Write a plan for JSON; bytes and seconds."""
    recipe, step = plan.way, plan.simulated.step
    return {
        "nodes": plan.cluster.nodes,
        "node": plan.cluster.node.name,
        "partition": recipe.partition,
        "micro_batch": recipe.micro_batch,
        "micro_steps": recipe.micro_steps,
        "global_batch": plan.sequences,
        "plain_full_sharding": plan.is_full_sharding,
        "checkpointing": recipe.checkpointing,
        "offload": recipe.offload,
        "host_bytes_of_a_node": plan.host.total,
        "all_gather": plan.simulated.form,
        "memory_bytes": plan.needed,
        "usable_bytes": plan.cluster.node.gpu.memory,
        "memory_by_phase": {phase: vars(need) for phase, need in plan.memory.phases.items()},
        "step_seconds": plan.seconds,
        "straggler_seconds": step.late,
        "compute_seconds": step.compute,
        "exposed_seconds": {str(hop): value for hop, value in step.exposed.items()},
        "communication_seconds": {str(hop): value for hop, value in step.total.items()},
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "hfu": plan.hfu,
        "node_bytes_between_nodes": plan.inter_bytes,
        "dollars_per_billion_tokens": plan.dollars_per_billion_tokens,
        "reason": plan.reason,
    }
