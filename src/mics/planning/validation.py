"""Published figures beside simulated ones, and the network model beside public measurements.

A figure that set a factor is marked calibrated and does not count as reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mics.planning.subject import subject
from mics.simulation.anatomy import Anatomy
from mics.simulation.compute import times
from mics.simulation.engines import Engine, Run, simulate_engine
from mics.simulation.fit import Point, fit_all_gather, fit_all_reduce, predicted
from mics.simulation.hardware import Cluster, find_node, read_catalogue
from mics.simulation.stacks import find_stack

STACK = "mics-paper"
SIGMA = 0.02
MICRO_STEPS = 4


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: what was published or measured.
        published: as text with its unit.
        simulated: as text.
        error: of the simulated, relative; ``None`` where a range is compared.
        used: calibrated or held out.
        holds: within what was set beforehand; ``None`` for a calibrated one.
        source: of the published.
        assumed: what it does not say.
    """

    name: str
    published: str
    simulated: str
    error: float | None
    used: str
    holds: bool | None
    source: str
    assumed: str


def validate() -> list[Row]:
    """Simulate every figure of ``catalogue/published.toml`` and fit the public measurements."""
    return [*map(_figure, read_catalogue("published")["figure"]), *_collectives()]


def as_markdown(rows: Sequence[Row]) -> str:
    """The committed table."""
    lines = [
        "| figure | published | simulated | error | used | holds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = "" if row.error is None else f"{row.error:+.1%}"
        holds = {None: "", True: "yes", False: "NO"}[row.holds]
        lines.append(
            f"| {row.name} | {row.published} | {row.simulated} | {error} | {row.used} | {holds} |"
        )
    lines += ["", "Sources and assumptions:", ""]
    lines += [f"- {row.name}: {row.source}. {row.assumed}".rstrip() + "." for row in rows]
    stack = find_stack(STACK)
    lines += ["", f"Stack {stack.name}: factor {stack.factor}, {stack.calibrated}."]
    lines += [f"Spread of a micro-step over GPUs: {SIGMA:.0%}, at which FSDP trainers scale."]
    return "\n".join(lines) + "\n"


def _figure(facts: Mapping[str, Any]) -> Row:
    kind = facts["kind"]
    if kind == "tflops":
        value = _tflops(facts, facts["nodes"][0])
        published, simulated = f"{facts['published']} TFLOPS", f"{value:.1f} TFLOPS"
    elif kind == "weak scaling":
        first, last = (_tflops(facts, nodes) for nodes in facts["nodes"])
        value = last / first
        published, simulated = f"{facts['published']:.1%}", f"{value:.1%}"
    else:
        return _bracket(facts)
    error = value / facts["published"] - 1
    off = value - facts["published"] if kind == "weak scaling" else error
    holds = abs(off) <= facts["within"] if "within" in facts else None
    return _row(facts, published, simulated, error, holds)


def _bracket(facts: Mapping[str, Any]) -> Row:
    found = []
    for nodes in facts["nodes"]:
        engine = _seconds(facts, facts["engine"], nodes)
        found.append(engine / _seconds(facts, "mics", nodes))
    simulated = " ".join(
        f"{nodes * 8} GPUs {ratio:.2f}" for nodes, ratio in zip(facts["nodes"], found, strict=True)
    )
    holds = min(found) <= facts["published"] <= max(found)
    return _row(facts, f"up to {facts['published']} x", simulated, None, holds)


def _row(
    facts: Mapping[str, Any],
    published: str,
    simulated: str,
    error: float | None,
    holds: bool | None,
) -> Row:
    return Row(
        facts["name"],
        published,
        simulated,
        error,
        facts["used"],
        holds,
        facts["source"],
        facts["assumed"],
    )


def _tflops(facts: Mapping[str, Any], nodes: int) -> float:
    trace = _model(facts).trace(facts["micro_batch"], _sequence(facts))
    flops = 2 * trace.flops("forward") + trace.flops("backward")  # forward is recomputed
    return MICRO_STEPS * flops / _seconds(facts, facts["engine"], nodes) / 1e12


def _seconds(facts: Mapping[str, Any], engine: Engine, nodes: int) -> float:
    node, anatomy = find_node(facts["node"]), _model(facts)
    made = times(
        anatomy.trace(facts["micro_batch"], _sequence(facts)),
        node.gpu,
        stack=find_stack(STACK).factor,
        checkpointing=True,
    )
    run = Run(MICRO_STEPS, facts["partition"], reduce_bytes=2, sync_bytes=2, sigma=SIGMA)
    return simulate_engine(engine, anatomy, made, Cluster(node, nodes), run).seconds


def _sequence(facts: Mapping[str, Any]) -> int:
    return int(facts.get("sequence", 2048))


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
        n_embd=hidden, n_layer=layers, n_head=heads, n_positions=2048, vocab_size=50257
    )
    return subject(config, dtype=torch.float16)


def _collectives() -> list[Row]:
    rows = []
    for name, facts in read_catalogue("measurements").items():
        if not isinstance(facts, dict):
            continue
        points = _points(facts)
        fit = fit_all_gather if facts["collective"] == "all_gather" else fit_all_reduce
        everything = _mean_error(fit(points), points)
        fewest = sorted({p.nodes for p in points})
        known = [p for p in points if p.nodes in fewest[:2]]
        unseen = [p for p in points if p.nodes == fewest[2]]
        ahead = _mean_error(fit(known), unseen)
        count = f"{len(points)} points"
        rows += [
            Row(
                f"{name}, fitted to all",
                count,
                f"mean error {everything:.1%}",
                None,
                "calibrated: the node's figures",
                everything <= 0.10,
                facts["source"],
                "",
            ),
            Row(
                f"{name}, fitted to {fewest[0]} and {fewest[1]} nodes, at {fewest[2]}",
                f"{len(unseen)} points",
                f"mean error {ahead:.1%}",
                None,
                "held out",
                ahead <= 0.12,
                facts["source"],
                "",
            ),
        ]
    return rows


def _points(facts: Mapping[str, Any]) -> list[Point]:
    return [
        Point(int(ranks), int(ranks) // facts["gpus_per_node"], megabytes * 1e6, busbw * 1e9)
        for ranks, measured in facts["gigabytes_per_second"].items()
        for megabytes, busbw in zip(facts["megabytes"], measured, strict=True)
    ]


def _mean_error(fitted: Any, points: Sequence[Point]) -> float:
    return sum(abs(predicted(fitted, p) / p.seconds(fitted) - 1) for p in points) / len(points)
