"""A node or a GPU from a table of TOML, every figure checked.

Tables give GiB, GB/s (10^9), TFLOPS and microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mics.errors import PlanError
from mics.hardware.cluster import GIVEN, Gpu, Host, Instance, Link, Node
from mics.quantities import GIB

_MOST = 1 << 17
_MOST_INTRA = 1800.0  # GB/s of a GPU, one way: NVLink 6
_MOST_INTER = 100.0  # GB/s of a GPU: an interface of 800 Gbit/s for each
_NODE_KEYS = {
    "instance",
    "efa",
    "gpu",
    "gpus_per_node",
    "price",
    "measured_nodes",
    "fixed",
    "intra",
    "inter",
    "all_reduce",
    "source",
    "host",
}
_HOST_KEYS = {"memory", "bandwidth"}
_MOST_HOST = 450.0  # GB/s of a GPU, one way: NVLink-C2C
_LINK_KEYS = {"line", "bandwidth", "latency", "falls", "fixed"}
_GPU_KEYS = {
    "memory",
    "usable",
    "peak",
    "achieved",
    "bandwidth",
    "bf16",
    "peak_fp32",
    "torch_names",
    "source",
}


def node_of(name: str, facts: Mapping[str, Any], known: Mapping[str, Gpu]) -> Node:
    """Read a node from its table.

    Args:
        name: the table's name.
        facts: the table.
        known: GPUs it may have.

    Raises:
        PlanError: a figure is missing, unknown, of another type, or cannot be.
    """
    _check_keys(name, facts, _NODE_KEYS, {"gpu", "gpus_per_node", "intra", "inter"})
    gpu = facts["gpu"]
    if not isinstance(gpu, str) or gpu not in known:
        raise PlanError(
            f"{name} has a GPU that is not known, {gpu!r}.",
            numbers=f"GPUs: {', '.join(known)}.",
            write="one of them, or [gpus.<name>] beside the node",
        )
    fixed = _number(name, facts, "fixed") or 0.0
    all_reduce, measured = facts.get("all_reduce"), "measured_nodes" in facts
    k = _count(name, facts, "gpus_per_node")
    intra = _link(f"intra of {name}", facts["intra"], fixed)
    inter = _link(f"inter of {name}", facts["inter"], fixed)
    check_rates(name, intra.bandwidth / 1e9, max(inter.bandwidth, inter.line or 0.0) / 1e9, k)
    return Node(
        name=name,
        gpu=known[gpu],
        gpus_per_node=k,
        intra=intra,
        inter=inter,
        all_reduce=None
        if all_reduce is None
        else _link(f"all_reduce of {name}", all_reduce, fixed),
        price=_positive(name, facts, "price"),  # what is not known is left out, not 0
        source=_text(name, facts, "source"),
        measured_nodes=_count(name, facts, "measured_nodes") if measured else None,
        host=_host(f"host of {name}", facts["host"]) if "host" in facts else None,
        instance=_instance(name, facts),
    )


def _instance(name: str, facts: Mapping[str, Any]) -> Instance | None:
    rented, efa = _text(name, facts, "instance"), "efa" in facts
    if efa and not rented:
        raise PlanError(f"{name} has efa and no instance.", write='instance = "p5.48xlarge"')
    return Instance(rented, _count(name, facts, "efa") if efa else 0) if rented else None


def check_rates(of: str, intra: float, inter: float, gpus_per_node: int) -> None:
    """Refuse rates that no link has: most are bits where bytes are meant.

    Args:
        of: the node, for people.
        intra: GB/s of a ring inside the node.
        inter: GB/s of a node to others.
        gpus_per_node: GPUs that share the latter.

    Raises:
        PlanError: a rate is above what is sold.
    """
    for name, rate, most, what in (
        ("intra", intra, _MOST_INTRA, "a GPU sends inside a node"),
        ("inter", inter, _MOST_INTER * gpus_per_node, f"a node of {gpus_per_node} GPUs sends"),
    ):
        if rate > most:
            raise PlanError(
                f"{name} of {of} is more than {what}: {rate:g} GB/s.",
                numbers=f"The most that is sold is {most:g} GB/s, {8 * most:g} Gbit/s.",
                write=f"{rate / 8:g} GB/s, if {rate:g} are Gbit/s",
            )


def _link(of: str, facts: Any, fixed: float) -> Link:
    if not isinstance(facts, dict):
        raise PlanError(
            f"{of} must be a table, got {facts!r}.", write="{ bandwidth = 180, latency = 20 }"
        )
    # What is sold and was never measured has a line rate only; it is planned for with neither.
    between = of.startswith("inter")
    needed = {"latency"} if between and "line" in facts else {"bandwidth", "latency"}
    _check_keys(of, facts, _LINK_KEYS, needed)
    line = _positive(of, facts, "line")
    own = _number(of, facts, "fixed")
    bandwidth = _positive(of, facts, "bandwidth") or 0.0
    if line is not None and bandwidth > line:
        raise PlanError(
            f"bandwidth of {of} is above its line rate.", numbers=f"{bandwidth:g} of {line:g} GB/s."
        )
    return Link(
        bandwidth=bandwidth * 1e9,
        latency=(_number(of, facts, "latency") or 0.0) * 1e-6,
        falls=_number(of, facts, "falls") or 0.0,
        fixed=(fixed if own is None else own) * 1e-6,
        line=None if line is None else line * 1e9,
    )


def _host(of: str, facts: Any) -> Host:
    if not isinstance(facts, dict):
        raise PlanError(
            f"{of} must be a table, got {facts!r}.", write="{ memory = 1152, bandwidth = 25 }"
        )
    _check_keys(of, facts, _HOST_KEYS, {"bandwidth"})
    memory, rate = _positive(of, facts, "memory"), _positive(of, facts, "bandwidth") or 0.0
    if rate > _MOST_HOST:
        raise PlanError(
            f"bandwidth of {of} is more than a GPU copies: {rate:g} GB/s.",
            numbers=f"The most that is sold is {_MOST_HOST:g} GB/s.",
            write=f"{rate / 8:g} GB/s, if {rate:g} are Gbit/s",
        )
    return Host(None if memory is None else memory * GIB, rate * 1e9)


def gpu_of(name: str, facts: Any) -> Gpu:
    """Read a GPU from its table.

    Args:
        name: the table's name.
        facts: the table.

    Raises:
        PlanError: as ``node_of``.
    """
    if not isinstance(facts, dict):
        raise PlanError(f"gpus.{name} must be a table, got {facts!r}.", write=f"[gpus.{name}]")
    _check_keys(name, facts, _GPU_KEYS, {"memory", "peak"})
    achieved, bandwidth = _positive(name, facts, "achieved"), _positive(name, facts, "bandwidth")
    fp32, bf16 = _positive(name, facts, "peak_fp32"), facts.get("bf16", True)
    if not isinstance(bf16, bool):
        raise PlanError(f"bf16 of {name} must be true or false, got {bf16!r}.")
    sold = _positive(name, facts, "memory") or 0.0
    usable = _positive(name, facts, "usable")
    if usable is not None and usable > sold:
        raise PlanError(
            f"usable of {name} is more than its memory.", numbers=f"{usable:g} of {sold:g} GiB."
        )
    return Gpu(
        name=name,
        memory=(sold * GIVEN if usable is None else usable) * GIB,
        sold=sold * GIB,
        peak=(_positive(name, facts, "peak") or 0.0) * 1e12,
        bandwidth=None if bandwidth is None else bandwidth * 1e9,
        achieved=None if achieved is None else achieved * 1e12,
        source=_text(name, facts, "source"),
        bf16=bf16,
        peak_fp32=None if fp32 is None else fp32 * 1e12,
        torch_names=_texts(name, facts, "torch_names"),
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
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise PlanError(f"{key} of {of} must be a number, not negative, got {value!r}.")
    return float(value)


def _positive(of: str, facts: Mapping[str, Any], key: str) -> float | None:
    """A figure above zero, where there is one."""
    value = _number(of, facts, key)
    if value == 0:
        raise PlanError(f"{key} of {of} must be positive, got {value:g}.")
    return value


def _count(of: str, facts: Mapping[str, Any], key: str) -> int:
    value = facts[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST:
        raise PlanError(
            f"{key} of {of} must be a positive integer, at most {_MOST:,}, got {value!r}."
        )
    return value


def _texts(of: str, facts: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = facts.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise PlanError(f"{key} of {of} must be a list of texts, got {values!r}.")
    return tuple(values)


def _text(of: str, facts: Mapping[str, Any], key: str) -> str:
    value = facts.get(key, "")
    if not isinstance(value, str):
        raise PlanError(f"{key} of {of} must be text, got {value!r}.")
    return value
