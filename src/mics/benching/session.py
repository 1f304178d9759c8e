"""A session of measurements: where the ranks meet, what they run there, what is kept of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mics.benching.contestants import Contestant, Layout
from mics.benching.deepspeed_child import Order
from mics.benching.deepspeed_parent import RELEASES, DeepSpeed
from mics.benching.dilated import Stretched
from mics.benching.options import Dilation, Name
from mics.benching.side_by_side import Stepping
from mics.benching.workloads import Language
from mics.lab.network import bits_per_second
from mics.ranks.console import speaks
from mics.ranks.mesh import start
from mics.topology import Topology
from mics.version import __version__


@dataclass(frozen=True)
class Place:
    """The ranks that measure and the link between their nodes.

    Args:
        world: ranks of the job.
        gpus_per_node: ranks joined by the fast link.
        link: rate of a node's slow link, as ``tc`` writes it; ``None`` where it is not known.
    """

    world: int
    gpus_per_node: int
    link: str | None

    def check(self, partitions: Sequence[int]) -> None:
        """Check that the ranks can be divided so, all of it before anything is measured.

        Raises:
            TopologyError: they cannot.
        """
        for partition in partitions:
            Topology.from_world(self.world, self.gpus_per_node, partition)

    def group_sizes(self) -> tuple[int, ...]:
        """Return a node's ranks, then twice as many each time, then all; latency is fitted so."""
        k, nodes = self.gpus_per_node, self.world // self.gpus_per_node
        doubling = [k * 2**n for n in range(nodes.bit_length()) if nodes % 2**n == 0]
        return tuple(p for p in sorted({*doubling, self.world}) if p > 1) or (self.world,)

    def facts(self, partition: int) -> dict[str, Any]:
        """Return what must stand beside a figure that was measured here."""
        return {
            "command": " ".join(["mics", *_without_out(sys.argv[1:])]),
            "date": datetime.now(UTC).date().isoformat(),
            "torch": torch.__version__,
            "mics": __version__,
            "backend": dist.get_backend(),
            "link": self.link,
            "world": self.world,
            "gpus_per_node": self.gpus_per_node,
            "partition": partition,
        }


def meet(gpus_per_node: int | None, link: str | None) -> Place:
    """Let the ranks of this job meet.

    Args:
        gpus_per_node: ranks joined by the fast link; what the launcher says by default.
        link: rate of a node's slow link, if it is known.
    """
    world, launched_per_node = start()
    return Place(world, gpus_per_node or launched_per_node, link)


def link_of(asked: str | None) -> str | None:
    """Return the rate of a node's slow link: the one that was named, or the lab's."""
    return asked or os.environ.get("MICS_LAB_LINK")


def bits_of(link: str | None) -> float | None:
    """Return the bits per second of a rate; ``None`` where there is none.

    Raises:
        LabError: it is no rate.
    """
    return bits_per_second(link) if link else None


def engine_of(
    name: Name,
    work: Language | Stretched,
    layout: Layout,
    *,
    dilation: Dilation | None,
    link_bits: float | None,
) -> Stepping:
    """Make an engine, in this process or, if it is DeepSpeed's, in a child's.

    Args:
        name: which engine.
        work: what it trains.
        layout: how the ranks are used.
        dilation: what a stretched ``work`` stands for.
        link_bits: bits per second of a node's slow link.
    """
    if name not in RELEASES:
        return Contestant(name, work, layout)
    partition, k = layout.partition, layout.gpus_per_node
    if isinstance(work, Language):
        return DeepSpeed(Order(name, asdict(work.options), None, partition, k))
    assert dilation is not None
    scale = work.arithmetic.scale
    return DeepSpeed(Order(name, asdict(dilation), link_bits, partition, k, scale))


def write_results(path: Path | None, document: dict[str, Any]) -> None:
    """Write what was measured as JSON, once for the whole job; ``None`` writes nothing."""
    if path is not None and speaks():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def _without_out(words: Sequence[str]) -> list[str]:
    """Leave the file out of a command line: where a result lies is no part of it."""
    kept = [word for word in words if not word.startswith("--out=")]
    at = kept.index("--out") if "--out" in kept else len(kept)
    return [*kept[:at], *kept[at + 2 :]]
