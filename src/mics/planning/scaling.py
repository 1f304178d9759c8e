"""How speed grows with the cluster, engine against engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from mics.errors import PlanError
from mics.planning.plan import Plan, simulate_way
from mics.simulation.engines import Engine
from mics.topology import possible_partitions

ENGINES: tuple[Engine, ...] = ("mics", "hsdp every micro-step", "fsdp2")
_MOST = 2048


Curves = dict[str, list[tuple[float, float]]]


def weak_scaling(
    plan: Plan, engines: Sequence[Engine], nodes: Sequence[int] | None = None
) -> Curves:
    """Tokens per second over GPUs; every GPU keeps the plan's micro-batch and micro-steps.

    Args:
        plan: partition, micro-batch and so on.
        engines: which.
        nodes: how many; by default doubling from the fewest the partition allows to 64, at least.
    """
    steps = plan.way.micro_steps
    return _curves(plan, engines, ((count, steps) for count in nodes or _doubling(plan)))


def strong_scaling(plan: Plan, engines: Sequence[Engine], nodes: Sequence[int]) -> Curves:
    """The same global batch on more GPUs: fewer micro-steps each.

    Numbers of nodes that do not divide the batch are left out.
    """
    whole = plan.way.micro_steps * plan.cluster.nodes
    shared = ((count, *divmod(whole, count)) for count in nodes)
    return _curves(plan, engines, ((n, steps) for n, steps, rest in shared if steps and not rest))


def _curves(plan: Plan, engines: Sequence[Engine], points: Iterable[tuple[int, int]]) -> Curves:
    """Of numbers of nodes with micro-steps; those the partition does not go with are left out."""
    found: Curves = {engine: [] for engine in engines}
    for count, steps in points:
        cluster = replace(plan.cluster, nodes=count)
        if plan.way.partition not in possible_partitions(count, cluster.node.gpus_per_node):
            continue
        way = replace(plan.way, micro_steps=steps)
        tokens = way.micro_batch * steps * cluster.gpus * plan.question.sequence
        for engine in engines:
            simulated = simulate_way(engine, plan.anatomy, cluster, plan.question, way)
            found[engine].append((cluster.gpus, tokens / simulated.seconds))
    return found


def parse_range(text: str) -> list[int]:
    """ "nodes=2..64" or "2..64": 2, 4, 8, ..., 64.

    Raises:
        PlanError: another form.
    """
    low, dots, high = text.removeprefix("nodes=").partition("..")
    if not dots or not low.isdigit() or not high.isdigit() or not 0 < int(low) <= int(high):
        raise PlanError(f"{text!r} is no range.", write="nodes=2..64 (doubling)")
    counts, count = [], int(low)
    while count <= int(high):
        counts.append(count)
        count *= 2
    return counts


def _doubling(plan: Plan) -> Iterator[int]:
    count = max(1, plan.way.partition // plan.cluster.node.gpus_per_node)
    while count <= max(64, plan.cluster.nodes) and count <= _MOST:
        yield count
        count *= 2
