"""GPUs, nodes and clusters: from the catalogue, from a user's file, or from three numbers.

Inside, memory is in bytes, bandwidths in bytes per second, times in seconds. Files give GiB, GB/s
(10^9), TFLOPS and microseconds. What nobody knows is ``None`` and is shown as "n/a".
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mics.errors import PlanError


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: in the catalogue.
        memory: bytes.
        peak: FLOPs per second of dense products in 16 bits.
        achieved: those of the largest product anybody measured.
        bandwidth: of its memory, bytes per second.
        source: where the figures are from.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float | None
    achieved: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Link:
    """What joins GPUs of one node, or nodes.

    Args:
        bandwidth: what a ring carries, bytes per second; between nodes, all of a node's together
            and over two nodes. 0 where nobody has measured it.
        latency: of one hop, seconds.
        falls: with N nodes the bandwidth is ``bandwidth * (N / 2) ** -falls``.
        fixed: seconds of any collective before its first byte moves.
        line: the sum of the interfaces, bytes per second.
    """

    bandwidth: float
    latency: float
    falls: float = 0.0
    fixed: float = 0.0
    line: float | None = None

    def over(self, nodes: int) -> float:
        """Bandwidth over that many nodes."""
        return float(self.bandwidth * (max(nodes, 2) / 2) ** -self.falls)


@dataclass(frozen=True)
class Node:
    """A machine with some GPUs.

    Args:
        all_reduce: between nodes, where it was measured apart: trees, so latency is per level.
        price: US dollars per hour.
        measured_nodes: the most nodes of a measurement behind ``inter``; ``None`` where none is.
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


@dataclass(frozen=True)
class Cluster:
    """Equal nodes."""

    node: Node
    nodes: int

    @property
    def gpus(self) -> int:
        """In all nodes."""
        return self.nodes * self.node.gpus_per_node

    def __str__(self) -> str:
        return (
            f"{self.nodes} x {self.node.name} ({self.gpus} x {self.node.gpu.name}, "
            f"{self.node.gpu.memory / 2**30:.1f} GiB each)"
        )


def extrapolated(node: Node, count: int) -> str:
    """A sentence where times are worked out for more nodes than were measured, else nothing."""
    if count == 1 or node.measured_nodes is None or count <= node.measured_nodes:
        return ""
    return (
        f"Links of {node.name} were measured on up to {node.measured_nodes} nodes; "
        "times on more are extrapolated."
    )


def nodes() -> dict[str, Node]:
    """All nodes of the catalogue by name."""
    return {name: _node(name, facts, gpus()) for name, facts in _tables("nodes").items()}


def gpus() -> dict[str, Gpu]:
    """All GPUs of the catalogue by name."""
    return {name: _gpu(name, facts) for name, facts in _tables("gpus").items()}


def dated(file: str) -> str:
    """When a file of the catalogue was last looked over."""
    return str(read_catalogue(file)["dated"])


def find_node(name: str) -> Node:
    """A node of the catalogue ("p4d", "p4d.24xlarge"), or of a user's file of the same form.

    Raises:
        PlanError: there is none; names the nearest.
    """
    if name.endswith(".toml"):
        return _from_file(Path(name))
    known = nodes()
    instances = {str(facts["instance"]): key for key, facts in _tables("nodes").items()}
    short = instances.get(name, name)
    if short in known:
        return _measured(known[short])
    near = difflib.get_close_matches(short, known, 1)
    raise PlanError(
        f"There is no node {name!r} in the catalogue"
        + (f"; did you mean {near[0]!r}?" if near else "."),
        numbers=f"Nodes: {', '.join(known)}.",
        write="one of them, a .toml file of your own (mics plan --list shows one), or "
        "--memory, --intra and --inter",
    )


def find_gpu(name: str) -> Gpu:
    """A GPU of the catalogue.

    Raises:
        PlanError: there is none; names the nearest.
    """
    known = gpus()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1)
    raise PlanError(
        f"There is no GPU {name!r} in the catalogue"
        + (f"; did you mean {near[0]!r}?" if near else "."),
        numbers=f"GPUs: {', '.join(known)}.",
        write="--gpu <one of them>",
    )


def described(
    *,
    memory_gib: float,
    intra_gb_s: float,
    inter_gb_s: float,
    gpus_per_node: int = 8,
    tflops: float | None = None,
) -> Node:
    """A node of three numbers; latencies are those of p4d, and an A100's rate unless given.

    Args:
        memory_gib: of a GPU.
        intra_gb_s: what a ring inside the node carries.
        inter_gb_s: what a node carries to others.
        gpus_per_node: k.
        tflops: peak of a GPU, 16 bits.

    Raises:
        PlanError: a number is not positive.
    """
    given = {"memory": memory_gib, "intra": intra_gb_s, "inter": inter_gb_s, "tflops": tflops or 1}
    for name, value in given.items():
        if not value > 0:
            raise PlanError(f"{name} must be positive, got {value}.")
    like = find_node("p4d")
    achieved = None if tflops else like.gpu.achieved
    gpu = Gpu(
        f"GPU of {memory_gib:g} GiB",
        memory_gib * 2**30,
        tflops * 1e12 if tflops else like.gpu.peak,
        like.gpu.bandwidth,
        achieved,
        "as described" if tflops else "as described; rates of an A100",
    )
    return Node(
        "described",
        gpu,
        gpus_per_node,
        replace(like.intra, bandwidth=intra_gb_s * 1e9),
        replace(like.inter, bandwidth=inter_gb_s * 1e9, line=inter_gb_s * 1e9),
        source="as described; latencies of p4d",
    )


def _from_file(path: Path) -> Node:
    if not path.is_file():
        raise PlanError(f"There is no {path}.", write="a .toml file with one node")
    try:
        facts = tomllib.loads(path.read_text())
    except ValueError as error:
        raise PlanError(f"{path} is no TOML.", numbers=str(error)) from None
    own = {name: _gpu(name, table) for name, table in facts.pop("gpus", {}).items()}
    tables = {name: table for name, table in facts.items() if isinstance(table, dict)}
    if len(tables) != 1:
        raise PlanError(
            f"{path} must describe one node.",
            numbers=f"Its tables are {', '.join(tables) or 'none'}.",
            write="one table as in mics plan --list, and [gpus.<name>] for GPUs of your own",
        )
    ((name, table),) = tables.items()
    return _measured(_node(name, table, gpus() | own))


def _measured(node: Node) -> Node:
    """A node can be planned for when the bandwidth between nodes is known."""
    if node.inter.bandwidth > 0:
        return node
    line = node.inter.line
    raise PlanError(
        f"What {node.name} carries between nodes was never measured in public.",
        numbers="" if line is None else f"The line rate is {line / 1e9:.0f} GB/s.",
        write="--profile of mics bench collectives on two of them, or --node <a .toml file> with "
        "inter.bandwidth",
    )


_NODE_KEYS = {
    "instance",
    "gpu",
    "gpus_per_node",
    "price",
    "measured_nodes",
    "fixed",
    "intra",
    "inter",
    "all_reduce",
    "source",
}
_LINK_KEYS = {"line", "bandwidth", "latency", "falls", "fixed"}
_GPU_KEYS = {"memory", "peak", "achieved", "bandwidth", "source"}


def _node(name: str, facts: Mapping[str, Any], known: Mapping[str, Gpu]) -> Node:
    _check_keys(name, facts, _NODE_KEYS, {"gpu", "gpus_per_node", "intra", "inter"})
    if facts["gpu"] not in known:
        raise PlanError(
            f"{name} has a GPU that is not known, {facts['gpu']!r}.",
            numbers=f"GPUs: {', '.join(known)}.",
            write="one of them, or [gpus.<name>] beside the node",
        )
    k = facts["gpus_per_node"]
    if not isinstance(k, int) or k < 1:
        raise PlanError(f"gpus_per_node of {name} must be a positive integer, got {k!r}.")
    fixed = _number(name, facts, "fixed") or 0.0
    return Node(
        name,
        known[facts["gpu"]],
        k,
        _link(f"intra of {name}", facts["intra"], fixed),
        _link(f"inter of {name}", facts["inter"], fixed),
        _link(f"all_reduce of {name}", facts["all_reduce"], fixed)
        if "all_reduce" in facts
        else None,
        _number(name, facts, "price"),
        facts.get("source", ""),
        facts.get("measured_nodes"),
    )


def _link(of: str, facts: Any, fixed: float) -> Link:
    if not isinstance(facts, dict):
        raise PlanError(
            f"{of} must be a table, got {facts!r}.", write="{ bandwidth = 180, latency = 20 }"
        )
    _check_keys(of, facts, _LINK_KEYS, {"latency"} if "line" in facts else {"bandwidth", "latency"})
    line = _number(of, facts, "line")
    own = _number(of, facts, "fixed")
    return Link(
        (_number(of, facts, "bandwidth") or 0.0) * 1e9,
        (_number(of, facts, "latency") or 0.0) * 1e-6,
        _number(of, facts, "falls") or 0.0,
        (fixed if own is None else own) * 1e-6,
        None if line is None else line * 1e9,
    )


def _gpu(name: str, facts: Mapping[str, Any]) -> Gpu:
    _check_keys(name, facts, _GPU_KEYS, {"memory", "peak"})
    achieved, bandwidth = _number(name, facts, "achieved"), _number(name, facts, "bandwidth")
    return Gpu(
        name,
        (_number(name, facts, "memory") or 0.0) * 2**30,
        (_number(name, facts, "peak") or 0.0) * 1e12,
        None if bandwidth is None else bandwidth * 1e9,
        None if achieved is None else achieved * 1e12,
        facts.get("source", ""),
    )


def _check_keys(of: str, facts: Mapping[str, Any], known: set[str], needed: set[str]) -> None:
    missing, unknown = sorted(needed - set(facts)), sorted(set(facts) - known)
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] if missing else []
        wrong += [f"has unknown {', '.join(unknown)}"] if unknown else []
        raise PlanError(
            f"{of} {' and '.join(wrong)}.",
            numbers=f"Known: {', '.join(sorted(known))}.",
            write="the form that mics plan --list shows",
        )


def _number(of: str, facts: Mapping[str, Any], key: str) -> float | None:
    """A figure that is not negative, where there is one."""
    value = facts.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise PlanError(f"{key} of {of} must be a number, not negative, got {value!r}.")
    return float(value)


def _tables(file: str) -> dict[str, Mapping[str, Any]]:
    return {name: table for name, table in read_catalogue(file).items() if isinstance(table, dict)}


@cache
def read_catalogue(file: str) -> dict[str, Any]:
    """A file of the catalogue."""
    return tomllib.loads((files("mics.simulation") / "catalogue" / f"{file}.toml").read_text())
