"""How speed grows with the cluster, engine against engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from mics.planning.plan import Plan
from mics.planning.weighing import needed_by, simulate_recipe
from mics.quantities import GIB
from mics.ranks.console import Told
from mics.simulation.profiles import EngineName
from mics.topology import possible_partitions

ENGINES: tuple[EngineName, ...] = ("mics", "hsdp every micro-step", "fsdp2")


Curves = dict[str, list[tuple[float, float]]]


def weak_scaling(
    plan: Plan,
    engines: Sequence[EngineName],
    nodes: Sequence[int] | None = None,
    told: Told = lambda _: None,
) -> Curves:
    """Simulate more and more GPUs, each of which keeps the plan's micro-batch and micro-steps.

    Args:
        plan: partition, micro-batch and so on.
        engines: which.
        nodes: how many; by default doubling from the fewest the partition allows to 64, at least.
        told: is told which numbers of nodes are left out, and why.
    """
    steps = plan.way.micro_steps
    asked = _doubling(plan) if nodes is None else nodes
    return _curves(plan, engines, ((count, steps) for count in asked), told)


def strong_scaling(
    plan: Plan, engines: Sequence[EngineName], nodes: Sequence[int], told: Told = lambda _: None
) -> Curves:
    """Simulate the same global batch on more GPUs: fewer micro-steps each.

    Args:
        plan: partition, micro-batch and so on.
        engines: which.
        nodes: how many.
        told: is told which numbers of nodes are left out, and why.
    """
    whole = plan.way.micro_steps * plan.cluster.nodes

    def shared() -> Iterator[tuple[int, int]]:
        for count in nodes:
            steps, rest = divmod(whole, count)
            if steps and not rest:
                yield count, steps
            else:
                told(f"{count} nodes are left out: {whole} micro-batches of a node do not divide")

    return _curves(plan, engines, shared(), told)


def _curves(
    plan: Plan, engines: Sequence[EngineName], points: Iterable[tuple[int, int]], told: Told
) -> Curves:
    """Simulate numbers of nodes, each with its micro-steps."""
    curves: Curves = {engine: [] for engine in engines}
    for count, steps in points:
        if count > plan.cluster.node.most_nodes:
            told(f"{count} nodes are left out: the link between them was never measured")
            continue
        cluster = replace(plan.cluster, nodes=count)
        p = plan.way.partition
        if p not in possible_partitions(count, cluster.node.gpus_per_node):
            told(f"{count} nodes are left out: partition {p} does not divide them")
            continue
        recipe = replace(plan.way, micro_steps=steps)
        tokens = recipe.micro_batch * steps * cluster.gpus * recipe.sequence
        for engine in engines:
            simulated = simulate_recipe(engine, plan.anatomy, cluster, recipe)
            curves[engine].append((cluster.gpus, tokens / simulated.seconds))
    return curves


def too_large(plan: Plan, engines: Sequence[EngineName]) -> list[str]:
    """Say of engines that keep whole parameters what a GPU could not hold."""
    gpu, gpus = plan.cluster.node.gpu, plan.cluster.gpus
    needed: dict[EngineName, float] = {}
    if "ddp" in engines:
        whole = replace(plan.way, partition=1, form="flat")
        needed["ddp"] = needed_by(plan.anatomy, plan.cluster, whole)
    for engine in ("zero2", "zero2 0.5.6"):
        if engine in engines:  # whole parameters; gradients, masters and moments split
            of_each = plan.way.compute_bytes + 16 / gpus
            needed[engine] = of_each * plan.anatomy.num_parameters
    return [
        f"{engine} would need {size / GIB:.2f} of {gpu.memory / GIB:.4g} GiB for "
        f"{'a step' if engine == 'ddp' else 'model states alone'}: it is simulated as if it fitted."
        for engine, size in needed.items()
        if size > gpu.memory
    ]


def _doubling(plan: Plan) -> Iterator[int]:
    count = max(1, plan.way.partition // plan.cluster.node.gpus_per_node)
    most = min(max(64, plan.cluster.nodes), plan.cluster.node.most_nodes)
    while count <= most:
        yield count
        count *= 2
