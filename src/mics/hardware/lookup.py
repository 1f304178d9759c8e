"""Nodes and GPUs by name: from the catalogue, from a user's file, or from three numbers."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mics.errors import PlanError
from mics.hardware.cluster import GIVEN, Gpu, Node
from mics.hardware.tables import check_rates, gpu_of, node_of
from mics.quantities import GIB

_MOST_BYTES = 2**20  # of a file that describes a node


def nodes() -> dict[str, Node]:
    """All nodes of the catalogue by name."""
    return {name: node_of(name, facts, gpus()) for name, facts in _tables("nodes").items()}


def gpus() -> dict[str, Gpu]:
    """All GPUs of the catalogue by name."""
    return {name: gpu_of(name, facts) for name, facts in _tables("gpus").items()}


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
    short = instances.get(name.lower(), name)
    own = spelt(short, known)
    if own is not None:
        return known[own]
    write = "one of them, or a .toml file of your own (mics plan --list shows one)"
    raise _unknown("node", name, short, known, write)


def find_gpu(name: str) -> Gpu:
    """A GPU of the catalogue.

    Raises:
        PlanError: there is none; names the nearest.
    """
    known = gpus()
    own = spelt(name, known)
    if own is not None:
        return known[own]
    raise _unknown("GPU", name, name, known, "one of them")


def gpu_that_torch_calls(name: str) -> Gpu | None:
    """The GPU of the catalogue with this name of torch's, or ``None`` where there is none.

    The whole name counts: an H200 NVL or a slice of an H100 has another peak than the H200 or the
    H100 that the catalogue lists.
    """
    bare = name.removeprefix("NVIDIA ").removeprefix("Tesla ")
    return next((gpu for gpu in gpus().values() if bare in gpu.torch_names), None)


def spelt(name: str, known: Collection[str]) -> str | None:
    """Find a name among those that are known, whatever the case of its letters."""
    return next((one for one in known if one.lower() == name.lower()), None)


def _unknown(kind: str, name: str, short: str, known: Collection[str], write: str) -> PlanError:
    lower = {one.lower(): one for one in known}
    near = [lower[one] for one in difflib.get_close_matches(short.lower(), lower, 1)]
    return PlanError(
        f"There is no {kind} {name!r} in the catalogue"
        + (f"; did you mean {near[0]!r}?" if near else "."),
        numbers=f"{kind[0].upper()}{kind[1:]}s: {', '.join(known)}.",
        write=write,
    )


def described(
    *,
    memory_gib: float,
    intra_gb_s: float,
    inter_gb_s: float,
    gpus_per_node: int = 8,
    gpu: Gpu | None = None,
) -> Node:
    """A node of three numbers; latencies are those of p4d.

    Args:
        memory_gib: memory a GPU is sold with, in GiB; 98.7 % of it are taken to be given.
        intra_gb_s: what a ring inside the node carries, in GB/s.
        inter_gb_s: what a node carries to others, in GB/s.
        gpus_per_node: how many GPUs it has.
        gpu: the GPU that its own are as fast as; an A100 of 40 GB by default.

    Raises:
        PlanError: a number is not positive, not finite, or a rate that no link has.
    """
    given = {"memory": memory_gib, "intra": intra_gb_s, "inter": inter_gb_s}
    for name, value in (given | {"gpus_per_node": gpus_per_node}).items():
        if not 0 < value < math.inf:
            raise PlanError(f"{name} must be positive, got {value}.")
    check_rates("a described node", intra_gb_s, inter_gb_s, gpus_per_node)
    like = find_node("p4d")
    rates = gpu or like.gpu
    assumed = "" if gpu else ", as none was named"
    own = replace(
        rates,
        name=f"GPU of {memory_gib:g} GiB",
        memory=memory_gib * GIVEN * GIB,
        sold=memory_gib * GIB,
        source=f"as described; computes like {rates.name}{assumed}",
    )
    return Node(
        "described",
        own,
        gpus_per_node,
        replace(like.intra, bandwidth=intra_gb_s * 1e9),
        replace(like.inter, bandwidth=inter_gb_s * 1e9, line=inter_gb_s * 1e9),
        source="as described; latencies of p4d",
    )


def _from_file(path: Path) -> Node:
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        raise PlanError(
            f"There is no {path}." if not path.is_file() else f"{path} is too large for a node.",
            write="a .toml file with one node",
        )
    try:
        facts = tomllib.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is no TOML.", numbers=str(error)) from None
    described = facts.pop("gpus", {})
    if not isinstance(described, dict):
        raise PlanError(f"gpus of {path} must be a table.", write="[gpus.<name>]")
    own = {name: gpu_of(name, table) for name, table in described.items()}
    for name in own:
        listed = spelt(name, gpus())
        if listed is not None or sum(one.lower() == name.lower() for one in own) > 1:
            raise PlanError(
                f"gpus.{name} of {path} has the name of another GPU, {listed or name}.",
                write="a name of its own",
            )
    tables = {name: table for name, table in facts.items() if isinstance(table, dict)}
    if len(tables) != 1:
        raise PlanError(
            f"{path} must describe one node.",
            numbers=f"Its tables are {', '.join(tables) or 'none'}.",
            write="one table as in mics plan --list, and [gpus.<name>] for GPUs of your own",
        )
    ((name, table),) = tables.items()
    return node_of(name, table, gpus() | own)


def _tables(file: str) -> dict[str, Mapping[str, Any]]:
    return {name: table for name, table in read_catalogue(file).items() if isinstance(table, dict)}


@cache
def read_catalogue(file: str) -> dict[str, Any]:
    """Read a file of the catalogue."""
    return tomllib.loads((files("mics.hardware") / "catalogue" / f"{file}.toml").read_text())
