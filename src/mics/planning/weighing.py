"""What a recipe needs of a GPU's memory on a cluster, and how long its step takes there."""

from __future__ import annotations

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.memory import Memory, memory, with_fragmentation
from mics.anatomy.recipe import Recipe
from mics.hardware.cluster import Cluster
from mics.hardware.stacks import find_stack
from mics.planning.host import fits_host, host_need
from mics.simulation.compute import times
from mics.simulation.engine_step import Simulated, simulate_engine
from mics.simulation.profiles import EngineName


def memory_on(anatomy: Anatomy, cluster: Cluster, recipe: Recipe) -> Memory:
    """Work out the largest moment of every phase."""
    node = cluster.node
    return memory(
        anatomy, recipe, node.machine, gpus=cluster.gpus, gpus_per_node=node.gpus_per_node
    )


def needed_by(anatomy: Anatomy, cluster: Cluster, recipe: Recipe) -> float:
    """Work out the bytes a recipe needs of a GPU, with fragmentation."""
    return with_fragmentation(memory_on(anatomy, cluster, recipe), cluster.node.machine)


def fits(anatomy: Anatomy, cluster: Cluster, recipe: Recipe) -> bool:
    """Tell whether a GPU, and its host, have the memory that a recipe needs."""
    need = memory_on(anatomy, cluster, recipe)
    if with_fragmentation(need, cluster.node.machine) > cluster.node.gpu.memory:
        return False
    return fits_host(cluster, host_need(anatomy, cluster, recipe, need))


def simulate_recipe(
    engine: EngineName,
    anatomy: Anatomy,
    cluster: Cluster,
    recipe: Recipe,
    *,
    timeline: bool = False,
) -> Simulated:
    """Simulate a step of an engine, run as a recipe says."""
    computed = times(
        anatomy.trace(recipe.micro_batch, recipe.sequence),
        cluster.node.gpu.computing(recipe.compute_bytes),
        stack=find_stack(recipe.stack).factor,
        checkpointing=recipe.checkpointing,
    )
    return simulate_engine(engine, anatomy, computed, cluster, recipe, timeline=timeline)
