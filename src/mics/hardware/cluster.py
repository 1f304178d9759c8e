"""GPUs, links, nodes and clusters.

Memory is in bytes, bandwidths in bytes per second, times in seconds. What nobody knows is ``None``
and is shown as "n/a".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mics.anatomy.recipe import ON_GPUS, Machine
from mics.errors import PlanError
from mics.quantities import GIB

MOST_NODES = 1 << 17

UNMEASURED = 0.8
"""The share of its peak a GPU is taken to reach where nobody measured its largest product."""

GIVEN = 0.987
"""The share of the memory a GPU is sold with that its driver gives, where nobody has seen it: the
least of the catalogue's."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: its name in the catalogue.
        memory: how much of it the driver gives, in bytes: what torch calls its total capacity.
        peak: FLOPs per second of dense products in 16 bits.
        bandwidth: what its memory reads or writes, in bytes per second.
        achieved: FLOPs per second of the largest product that anybody measured.
        source: where the figures are from.
        bf16: whether it multiplies in bf16; else it does in fp16 only.
        peak_fp32: FLOPs per second of products in fp32, not rounded to TF32.
        torch_names: what torch calls it, without the vendor's name.
        sold: the memory it is sold with, in bytes; ``None`` where ``memory`` is all that is known.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float | None
    achieved: float | None = None
    source: str = ""
    bf16: bool = True
    peak_fp32: float | None = None
    torch_names: tuple[str, ...] = ()
    sold: float | None = None

    def computing(self, num_bytes: int) -> Gpu:
        """The same GPU with the rates of products in a dtype of so many bytes.

        Raises:
            PlanError: nobody knows them.
        """
        if num_bytes == 2:
            return self
        if num_bytes != 4 or self.peak_fp32 is None:
            own = ", or peak_fp32 of a GPU of your own" if num_bytes == 4 else ""
            raise PlanError(
                f"How fast {self.name} computes with {num_bytes} bytes a number is not known.",
                write=f"a dtype of 2 bytes{own}",
            )
        return replace(self, peak=self.peak_fp32, achieved=None)


@dataclass(frozen=True)
class Link:
    """What joins GPUs of one node, or nodes.

    Args:
        bandwidth: what a ring carries, in bytes per second; between nodes, what all GPUs of a node
            carry together over two nodes. 0 where nobody has measured it.
        latency: what one hop takes, in seconds.
        falls: with N nodes the bandwidth is ``bandwidth * (N / 2) ** -falls``.
        fixed: seconds of any collective before its first byte moves.
        line: the rate of all interfaces of a node together, in bytes per second.
    """

    bandwidth: float
    latency: float
    falls: float = 0.0
    fixed: float = 0.0
    line: float | None = None

    def over(self, nodes: int) -> float:
        """The bandwidth between that many nodes."""
        return float(self.bandwidth * (max(nodes, 2) / 2) ** -self.falls)


@dataclass(frozen=True)
class Host:
    """The host of a node's GPUs.

    Args:
        memory: of the whole node, in bytes; ``None`` where nobody knows.
        bandwidth: what one GPU copies to or from it, in bytes per second, both at a time.
    """

    memory: float | None
    bandwidth: float


@dataclass(frozen=True)
class Instance:
    """What a cloud rents a node as.

    Args:
        name: AWS' name of it.
        efa: its interfaces of the Elastic Fabric Adapter.
    """

    name: str
    efa: int


@dataclass(frozen=True)
class Node:
    """A machine with some GPUs.

    Args:
        intra: what joins its GPUs.
        inter: what joins it with other nodes.
        all_reduce: ``inter`` for all-reduces, where they were measured apart.
        price: US dollars per hour.
        measured_nodes: the most nodes of a measurement behind ``inter``; ``None`` where none is.
        gloo: ranks are on its CPUs and talk through Gloo: an all-reduce is a ring of all ranks,
            else a tree of nodes (``network.py``), and a step runs in Gloo's order.
        inside: how many times as long a stage inside the node takes in a step as alone, where ranks
            compute, copy and sum on the same cores; 1 where nobody has measured it.
        machine: what else is assumed of it.
        host: its own memory and its link to the GPUs; ``None`` where nobody knows.
        instance: what a cloud rents it as; ``None`` for a machine of one's own.
    """

    name: str
    gpu: Gpu
    gpus_per_node: int
    intra: Link
    inter: Link
    all_reduce: Link | None = None
    price: float | None = None
    source: str = ""
    measured_nodes: int | None = None
    gloo: bool = False
    inside: float = 1.0
    machine: Machine = ON_GPUS
    host: Host | None = None
    instance: Instance | None = None

    @property
    def most_nodes(self) -> int:
        """The most nodes of a cluster: 1 where nobody knows what they carry to each other."""
        return MOST_NODES if self.inter.bandwidth else 1


@dataclass(frozen=True)
class Cluster:
    """Equal nodes, joined by their link.

    Raises:
        PlanError: there are none, too many, or several whose link was never measured.
    """

    node: Node
    nodes: int

    def __post_init__(self) -> None:
        if not isinstance(self.nodes, int) or not 1 <= self.nodes <= MOST_NODES:
            raise PlanError(f"A cluster has 1 to {MOST_NODES:,} nodes, got {self.nodes}.")
        if self.nodes > self.node.most_nodes:
            line = self.node.inter.line
            raise PlanError(
                f"What {self.node.name} carries between nodes was never measured.",
                numbers="" if line is None else f"The line rate is {line / 1e9:.0f} GB/s.",
                write="--profile of mics bench collectives on two of them, or --node <a .toml "
                "file> with inter.bandwidth",
            )

    @property
    def gpus(self) -> int:
        """The GPUs of all nodes."""
        return self.nodes * self.node.gpus_per_node

    def __str__(self) -> str:
        return (
            f"{self.nodes} x {self.node.name} ({self.gpus} x {self.node.gpu.name}, "
            f"{self.node.gpu.memory / GIB:.4g} GiB each)"
        )


def host_of(cluster: Cluster) -> Host:
    """The host of a cluster's nodes.

    Raises:
        PlanError: nobody knows its link.
    """
    host = cluster.node.host
    if host is None:
        raise PlanError(
            f"How fast GPUs of {cluster.node.name} copy to their host is not known, so that "
            "nothing is planned to leave them.",
            write="host = { memory = 1152, bandwidth = 25 } in a .toml file of your own, or no "
            "offload",
        )
    return host


def extrapolated(node: Node, count: int) -> str:
    """A sentence where times are worked out for more nodes than were measured, else nothing."""
    if count == 1 or node.measured_nodes is None or count <= node.measured_nodes:
        return ""
    return (
        f"Links of {node.name} were measured on up to {node.measured_nodes} nodes; "
        "times on more are extrapolated."
    )
