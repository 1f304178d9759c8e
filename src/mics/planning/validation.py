"""Published figures beside simulated ones, and the network model beside public measurements.

A figure that set a factor is marked calibrated and does not count as reproduced. One that set none
but was looked at while the model was made is marked so: it is less than a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.flops import hardware_flops
from mics.anatomy.recipe import ON_GPUS, Recipe
from mics.hardware.cluster import Cluster, Link
from mics.hardware.fit import Point, fit_links
from mics.hardware.lookup import find_node, read_catalogue
from mics.hardware.network import all_reduce_terms, gather_terms
from mics.hardware.stacks import find_stack
from mics.planning.subject import subject
from mics.ranks.console import Told
from mics.simulation.compute import times
from mics.simulation.engine_step import simulate_engine
from mics.simulation.profiles import EngineName

Holds = Literal["yes", "NO", "in the bracket", ""]

SEEN = "held out, seen while modelling"
STACK = "mics-paper"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: what was published or measured.
        published: as text with its unit.
        simulated: as text.
        error: of the simulated, relative; ``None`` where a range is compared.
        used: calibrated, held out, or held out but seen while modelling.
        holds: within what was set beforehand; nothing for what set a factor. "in the bracket" where
            only some of the assumptions give it.
        source: of the published.
        assumed: what it does not say.
    """

    name: str
    published: str
    simulated: str
    error: float | None
    used: str
    holds: Holds
    source: str
    assumed: str


def validate(told: Told = lambda _: None) -> list[Row]:
    """Simulate every figure of ``catalogue/published.toml`` and fit the public measurements.

    Args:
        told: is told which figure is being simulated; some take seconds.
    """
    rows = []
    for facts in read_catalogue("published")["figure"]:
        told(facts["name"])
        rows.append(_figure(facts))
    return [*rows, *_collectives()]


def as_markdown(rows: Sequence[Row]) -> str:
    """Write the table that is committed."""
    lines = [
        "| figure | published | simulated | error | used | holds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = "" if row.error is None else f"{row.error:+.1%}"
        cells = (row.name, row.published, row.simulated, error, row.used, row.holds)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Sources and assumptions:", ""]
    lines += [
        f"- {row.name}: {'. '.join(filter(None, (row.source, row.assumed)))}." for row in rows
    ]
    stack = find_stack(STACK)
    lines += ["", f"Stack {stack.name}: factor {stack.factor}, {stack.calibrated}."]
    spread = f"{ON_GPUS.sigma:.0%}"
    lines += [f"Spread of a micro-step over GPUs: {spread}, at which FSDP trainers scale."]
    return "\n".join(lines) + "\n"


def _figure(facts: Mapping[str, Any]) -> Row:
    kind = facts["kind"]
    more = ""
    if kind == "tflops":
        value = _tflops(facts, facts["nodes"][0])
        more = _other_micro_batches(facts)
        published, simulated = f"{facts['published']} TFLOPS", f"{value:.1f} TFLOPS"
    elif kind == "weak scaling":
        first, last = (_tflops(facts, nodes) for nodes in facts["nodes"])
        value = last / first
        published, simulated = f"{facts['published']:.1%}", f"{value:.1%}"
    else:
        return _bracket(facts)
    error = value / facts["published"] - 1
    off = value - facts["published"] if kind == "weak scaling" else error
    holds = _held(abs(off) <= facts["within"]) if "within" in facts else ""
    return _row(facts, published, simulated, error, holds, more)


def _other_micro_batches(facts: Mapping[str, Any]) -> str:
    """Say what an assumed micro-batch decides."""
    others = facts["other_micro_batches"]
    values = [_tflops({**facts, "micro_batch": b}, facts["nodes"][0]) for b in others]
    rates = ", ".join(f"{value:.1f}" for value in values)
    return f"With micro-batch {', '.join(map(str, others))}: {rates} TFLOPS"


def _bracket(facts: Mapping[str, Any]) -> Row:
    """Simulate every number of nodes, from the mildest to the harshest assumption."""
    ends = list(zip(facts["host"], facts["hop"], strict=True))
    ratios = {n: [_ratio(facts, n, host, hop * 1e-6) for host, hop in ends] for n in facts["nodes"]}
    k = find_node(facts["node"]).gpus_per_node
    simulated = "; ".join(
        f"{n * k} GPUs {low:.2f} to {high:.2f}" for n, (low, high) in ratios.items()
    )
    inside = any(low <= facts["published"] <= high for low, high in ratios.values())
    beyond = all(low <= facts["published"] for low, _ in ratios.values())
    holds: Holds = ("yes" if beyond else "in the bracket") if inside else "NO"
    within = [str(n * k) for n, (low, high) in ratios.items() if low <= facts["published"] <= high]
    where = f"The bracket holds it on {', '.join(within) or 'none of these numbers of'} GPUs"
    return _row(facts, f"up to {facts['published']} x", simulated, None, holds, where)


def _ratio(facts: Mapping[str, Any], nodes: int, host: float, hop: float) -> float:
    node = find_node(facts["node"])
    node = replace(node, inter=replace(node.inter, latency=hop))
    theirs = _seconds(facts, facts["engine"], Cluster(node, nodes), host)
    return theirs / _seconds(facts, "mics", Cluster(node, nodes))


def _held(within: bool) -> Holds:
    return "yes" if within else "NO"


def _row(
    facts: Mapping[str, Any],
    published: str,
    simulated: str,
    error: float | None,
    holds: Holds,
    more: str = "",
) -> Row:
    return Row(
        facts["name"],
        published,
        simulated,
        error,
        facts["used"],
        holds,
        facts["source"],
        ". ".join(filter(None, (facts["assumed"], more))),
    )


def _tflops(facts: Mapping[str, Any], nodes: int) -> float:
    recipe = _recipe(facts)
    trace = _model(facts).trace(recipe.micro_batch, recipe.sequence)
    flops = hardware_flops(trace, checkpointing=recipe.checkpointing)
    cluster = Cluster(find_node(facts["node"]), nodes)
    return recipe.micro_steps * flops / _seconds(facts, facts["engine"], cluster) / 1e12


def _seconds(
    facts: Mapping[str, Any], engine: EngineName, cluster: Cluster, host: float | None = None
) -> float:
    anatomy = _model(facts)
    recipe = _recipe(facts)
    computed = times(
        anatomy.trace(recipe.micro_batch, recipe.sequence),
        cluster.node.gpu,
        stack=find_stack(recipe.stack).factor,
        checkpointing=recipe.checkpointing,
    )
    return simulate_engine(engine, anatomy, computed, cluster, recipe, host=host).seconds


def _recipe(facts: Mapping[str, Any]) -> Recipe:
    """Write down how the published step was run, as far as it says."""
    return Recipe(
        facts["partition"],
        facts["micro_batch"],
        checkpointing=True,
        sequence=int(facts.get("sequence", 2048)),
        reduce_bytes=2,
        optimizer="adamw-fused",
        stack=STACK,
    )


def _model(facts: Mapping[str, Any]) -> Anatomy:
    shape = facts.get("shape")
    return _of_preset(facts["preset"]) if shape is None else _of_shape(*shape.values())


@cache
def _of_preset(name: str) -> Anatomy:
    return subject(name, dtype=torch.float16)


@cache
def _of_shape(hidden: int, layers: int, heads: int) -> Anatomy:
    import transformers

    config = transformers.GPT2Config(
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_positions=2048,
        vocab_size=50257,
        activation_function="gelu",
    )
    return subject(config, dtype=torch.float16)


def _collectives() -> list[Row]:
    rows = []
    for name, facts in read_catalogue("measurements").items():
        if isinstance(facts, dict):
            rows += _collective(name, facts, _measured(facts))
    return rows


def _collective(
    name: str, facts: Mapping[str, Any], points: Mapping[int, list[Point]]
) -> list[Row]:
    """Compare all points with a node or a fit, and the last ones with a fit to the others."""
    node, whole = find_node(facts["node"]), facts["collective"] == "all_reduce"
    every = [point for group in points.values() for point in group]
    if facts["shipped"]:
        link, how = (node.all_reduce if whole else None) or node.inter, f"{node.name} as shipped"
    else:
        link, how = fit_links(every, node.intra)["inter"], "fitted to all"
    first, second, third = sorted(points)[:3]
    known = fit_links([*points[first], *points[second]], node.intra)["inter"]
    at_all = _mean_error(every, link, node.intra)
    ahead = _mean_error(points[third], known, node.intra)

    def row(what: str, among: Sequence[Point], error: float, used: str, within: float) -> Row:
        text = f"mean error {error:.1%}"
        count, holds = f"{len(among)} points", _held(error <= within)
        return Row(f"{name}, {what}", count, text, None, used, holds, facts["source"], "")

    fitted = f"fitted to {first} and {second} nodes, at {third}"
    return [
        row(how, every, at_all, "calibrated: the link's figures", 0.10),
        row(fitted, points[third], ahead, SEEN if facts["seen"] else "held out", 0.12),
    ]


def _measured(facts: Mapping[str, Any]) -> dict[int, list[Point]]:
    """Read the measured points, by number of nodes."""
    k = find_node(facts["node"]).gpus_per_node
    whole = facts["collective"] == "all_reduce"
    points: dict[int, list[Point]] = {}
    for gpus, measured in facts["gigabytes_per_second"].items():
        n, nodes = int(gpus), int(gpus) // k
        for megabytes, busbw in zip(facts["megabytes"], measured, strict=True):
            size = megabytes * 1e6
            seconds = (2 if whole else 1) * size * (n - 1) / n / (busbw * 1e9)
            terms = (all_reduce_terms(n, nodes, size),) if whole else gather_terms(k, n, size)
            points.setdefault(nodes, []).append(Point(terms, seconds))
    return points


def _mean_error(points: Sequence[Point], link: Link, intra: Link) -> float:
    errors = [abs(p.stages[0].seconds(link, intra) / p.seconds - 1) for p in points]
    return sum(errors) / len(errors)
