"""Options that say what the nodes are, for `mics plan` and `mics simulate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mics.errors import PlanError
from mics.hardware.cluster import Node
from mics.hardware.lookup import described, find_gpu, find_node
from mics.quantities import Within

DEFAULT = "p4d"
_OTHERS = ("memory", "intra", "inter", "gpus_per_node")


@dataclass(frozen=True)
class ClusterOptions:
    """Options that describe a node: by name, by three numbers, or by a measurement."""

    node: str | None = None
    """A node of the catalogue (`mics plan --list`), or a .toml file of that form; default: p4d."""

    memory: Annotated[float | None, Within(0.01, 2048)] = None
    """Instead of --node: GiB a GPU is sold with, of which 98.7 % are counted on; with --intra and
    --inter."""

    intra: Annotated[float | None, Within(1e-3, 1e6)] = None
    """With --memory: GB/s that a ring inside the node carries."""

    inter: Annotated[float | None, Within(1e-3, 1e6)] = None
    """With --memory: GB/s that a node sends to others, an eighth of its Gbit/s."""

    gpus_per_node: Annotated[int | None, Within(1, 1024)] = None
    """With --memory: GPUs of a node; 8 by default."""

    profile: Path | None = None
    """Instead of --node: the JSON of `mics bench collectives --out`; with --gpu."""

    gpu: str | None = None
    """With --profile or --memory: a GPU of the catalogue that computes like those."""


def node_of(options: ClusterOptions) -> Node:
    """Find the node that the options describe.

    Raises:
        PlanError: an unknown node, two descriptions, half of one, or an option without effect.
    """
    if options.node is not None:
        _refuse(
            options, "beside --node", "memory", "intra", "inter", "gpus_per_node", "profile", "gpu"
        )
        return find_node(options.node)
    if options.profile is not None:
        _refuse(options, "beside --profile", *_OTHERS)
        if options.gpu is None:
            raise PlanError(
                "A profile says how fast links are, not what computes.", write="--gpu H100"
            )
        from mics.hardware.measured import measured_node

        return measured_node(options.profile, find_gpu(options.gpu))
    numbers = {"memory": options.memory, "intra": options.intra, "inter": options.inter}
    if all(number is None for number in numbers.values()):
        _refuse(options, "without --memory or --profile", "gpus_per_node", "gpu")
        return find_node(DEFAULT)
    memory, intra, inter = numbers.values()
    if memory is None or intra is None or inter is None:
        missing = [f"--{name}" for name, number in numbers.items() if number is None]
        raise PlanError(
            f"A node is described by three numbers; {' and '.join(missing)} is missing.",
            write="--memory <GiB> --intra <GB/s> --inter <GB/s>",
        )
    return described(
        memory_gib=memory,
        intra_gb_s=intra,
        inter_gb_s=inter,
        gpus_per_node=8 if options.gpus_per_node is None else options.gpus_per_node,
        gpu=None if options.gpu is None else find_gpu(options.gpu),
    )


def _refuse(options: ClusterOptions, where: str, *names: str) -> None:
    """Refuse an option that would have no effect."""
    given = [f"--{n.replace('_', '-')}" for n in names if getattr(options, n) is not None]
    if given:
        raise PlanError(
            f"{' and '.join(given)} would have no effect {where}.",
            write="one description of a node: --node, or --memory --intra --inter, or --profile",
        )
