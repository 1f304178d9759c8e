"""What a node's own memory has to hold where activations leave its GPUs: not them alone.

Beside them there are a copy of the model states, which a checkpoint that is written while training
goes on takes of them, and the ranks' processes; and the system needs memory for itself, for data
sets and checkpoints that it reads and writes. The last two are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.memory import Memory
from mics.anatomy.offloaded import pinned_bytes
from mics.anatomy.recipe import Recipe
from mics.hardware.cluster import Cluster
from mics.quantities import GIB

PROCESS_GIB = 4.0
"""A rank's process: Python, torch and its libraries, the buffers of its communicators."""

FOR_SYSTEM = 0.1
"""Of a node's memory, what is left to the system and its page cache."""


@dataclass(frozen=True)
class HostNeed:
    """Bytes of a node's own memory, for all of its GPUs at most; nothing where nothing leaves.

    Args:
        activations: pinned, each buffer rounded up.
        snapshot: of the model states, if one replica's ranks on this node write all they have.
        processes: of the ranks.
    """

    activations: float = 0.0
    snapshot: float = 0.0
    processes: float = 0.0

    @property
    def total(self) -> float:
        """All of it together."""
        return self.activations + self.snapshot + self.processes

    def text(self, memory: float | None) -> str:
        """What a node holds, for people.

        Args:
            memory: of the node; ``None`` where nobody knows.
        """
        parts = (
            f"activations up to {self.activations / GIB:,.1f} GiB, pinned; a checkpoint's snapshot "
            f"up to {self.snapshot / GIB:,.1f}; processes {self.processes / GIB:,.0f}"
        )
        of = "n/a" if memory is None else f"{usable(memory) / GIB:,.1f}"
        left = "" if memory is None else f" ({FOR_SYSTEM:.0%} is the system's)"
        return f"a node holds {self.total / GIB:,.1f} of {of} GiB{left}: {parts}"


def usable(memory: float) -> float:
    """Work out the bytes of a node's memory that a run may take."""
    return memory * (1 - FOR_SYSTEM)


def host_need(anatomy: Anatomy, cluster: Cluster, recipe: Recipe, on_gpu: Memory) -> HostNeed:
    """Work out what a node's own memory holds where activations leave.

    Args:
        anatomy: of the model.
        cluster: the node's.
        recipe: how a step is run.
        on_gpu: what a GPU needs, of which the model states are copied.
    """
    if not recipe.offload:
        return HostNeed()
    gpus = cluster.node.gpus_per_node
    trace = anatomy.trace(recipe.micro_batch, recipe.sequence)
    states = on_gpu.phases["optimizer step"]
    return HostNeed(
        activations=gpus * pinned_bytes(trace, recipe.checkpointing),
        snapshot=gpus * (states.parameters + states.optimizer),
        processes=gpus * PROCESS_GIB * GIB,
    )


def fits_host(cluster: Cluster, need: HostNeed) -> bool:
    """Tell whether a node's own memory is enough; what nobody knows is taken to be."""
    host = cluster.node.host
    return host is None or host.memory is None or need.total <= usable(host.memory)
