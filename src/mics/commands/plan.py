"""``mics plan``: which partition, does it fit, how fast, what does it cost."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.memory import NOT_MODELLED
from mics.commands.cluster_options import ClusterOptions, node_of
from mics.commands.written import check_folders, refuse_others
from mics.errors import PlanError
from mics.hardware.catalogue_text import catalogue
from mics.hardware.cluster import Cluster, extrapolated
from mics.hardware.stacks import find_stack
from mics.planning.cost import Reliability, dollars, goodput, wall_seconds
from mics.planning.inverse import (
    fewest_nodes,
    largest_micro_batch,
    longest_sequence,
    smallest_partition,
)
from mics.planning.nearest import check_any
from mics.planning.page import page
from mics.planning.parsing import parse_range
from mics.planning.plan import Plan, search
from mics.planning.question import MICRO_BATCHES, Question
from mics.planning.reasons import explained
from mics.planning.scaling import ENGINES, weak_scaling
from mics.planning.subject import subject
from mics.planning.table import as_document, as_table


@dataclass(frozen=True)
class Config(ClusterOptions):
    """Simulate every legal way to train a model on a cluster; print those that fit, fastest first.

    Needs no GPU and makes no weight. A cluster is a node of the catalogue (`mics plan --list`), a
    file of your own, three numbers, or what `mics bench collectives --out` measured.
    """

    model: str = "bert-10b"
    """A preset (`mics train --models`), config.json, a folder with one, or a hub name."""

    nodes: int = 8
    """How many."""

    sequence: int | None = None
    """Tokens of one sequence; the model's positions by default, at most 4096."""

    global_batch: int | None = None
    """Sequences per step, from which the micro-steps follow."""

    micro_steps: int | None = None
    """Per step, instead of --global-batch; 4 by default."""

    micro_batch: tuple[int, ...] = MICRO_BATCHES
    """Which to try."""

    partition: tuple[int, ...] = ()
    """Which to try; every legal one by default."""

    checkpointing: Literal["both", "none", "full"] = "both"
    """Recompute every block in backward."""

    optimizer: Literal["adamw", "adamw-fused", "sgd-momentum", "sgd"] = "adamw"
    """Which states are kept."""

    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of gradients in hop 1."""

    prefetch: int = 1
    """Blocks gathered ahead."""

    stack: str = "eager"
    """How much of a GPU's rate the software reaches: eager, fused, mics-paper."""

    fragmentation: float = 1.05
    """What the allocator takes over what is alive."""

    tokens: float | None = None
    """Of the whole run (300e9): how long it takes and what it costs, failures included."""

    sweep: str | None = None
    """Also plan for other numbers of nodes: nodes=2..64 (doubling)."""

    by: Literal["time", "cost"] = "time"
    """Which number of nodes of a sweep is best: tokens per second, or dollars per token. On one
    number of nodes both rank alike."""

    top: int = 10
    """Lines of the table."""

    json: Path | None = None
    """File for all plans."""

    png: Path | None = None
    """File for a picture."""

    html: Path | None = None
    """File for a page with memory, timeline, scaling and prices."""

    list: bool = False
    """List GPUs, nodes and software stacks with their sources, and stop."""


def run(config: Config) -> int:
    """Plan.

    Returns:
        0; 1 when nothing fits or something does not exist.
    """
    try:
        if config.list:
            refuse_others(config, "list")
            print(catalogue())
            return 0
        return _plan(config)
    except OSError as error:  # of a file that an option names
        raise PlanError(str(error)) from None


def question_of(config: Config, sequence: int) -> Question:
    """What is asked for."""
    checkpointing = {"both": (False, True), "none": (False,), "full": (True,)}
    return Question(
        sequence=sequence,
        global_batch=config.global_batch,
        micro_steps=config.micro_steps,
        micro_batches=config.micro_batch,
        partitions=config.partition or None,
        checkpointing=checkpointing[config.checkpointing],
        optimizer=config.optimizer,
        reduce_bytes=4 if config.reduce_dtype == "fp32" else 2,
        prefetch=config.prefetch,
        stack=config.stack,
        fragmentation=config.fragmentation,
    )


def _plan(config: Config) -> int:
    _check(config)
    cluster = Cluster(node_of(config), config.nodes)
    if config.by == "cost" and cluster.node.price is None:
        raise PlanError(
            f"The price of {cluster.node.name} is not known.",
            write="--by time, or a price in a .toml file of your own",
        )
    stack = find_stack(config.stack)
    _told(f"tracing {config.model}")
    anatomy = subject(config.model)
    question = question_of(config, anatomy.sequence_or(config.sequence))
    _told(f"simulating on {cluster}")
    found = search(anatomy, cluster, question)
    check_any(anatomy, cluster, question, found)
    plans = explained(found)
    swept = _swept(parse_range(config.sweep), plans[0]) if config.sweep else []
    print(
        f"{config.model}: {anatomy.num_parameters:,} parameters, sequence {question.sequence}\n"
        f"{cluster}\nsoftware stack {stack.name}: {stack.calibrated}\n"
    )
    print(as_table(plans[: config.top]))
    print(
        f"\n{len(plans)} of {len(plans) + len(found.rejected)} ways fit. Best: {plans[0].reason}."
    )
    print(_price(config, plans[0]))
    print("\n".join(_limits(anatomy, cluster, question, plans[0])))
    if swept:
        print("\n" + _sweep_table(swept, config.by))
    print("\n" + "\n".join(_caveats(question, [plan.cluster for plan in [plans[0], *swept]])))
    _files(config, plans, swept)
    return 0


def _caveats(question: Question, clusters: Sequence[Cluster]) -> list[str]:
    """What a reader must know of the numbers above."""
    largest = max(clusters, key=lambda cluster: cluster.nodes)
    gpu = largest.node.gpu
    lines = [
        f"GPU: {gpu.source}." if gpu.source else "",
        "" if gpu.bf16 else f"{gpu.name} multiplies 16 bits in fp16 only; mics train has bf16.",
        f"Assumed: {question.runtime_gib} GiB a GPU for its runtime, {question.communicator_gib} "
        f"GiB for each group it is in, {question.fragmentation - 1:.0%} for fragmentation; "
        f"{Reliability()}.",
        f"Not modelled: {NOT_MODELLED}.",
        extrapolated(largest.node, largest.nodes),
    ]
    return [line for line in lines if line]


def _price(config: Config, best: Plan) -> str:
    """What a step costs, and the whole run."""
    step = dollars(best.cluster, best.seconds)
    text = f"A step costs {_dollars(step)}, a billion tokens "
    text += _dollars(best.dollars_per_billion_tokens)
    if config.tokens is not None:
        spent = best.seconds_of(config.tokens)
        wall = wall_seconds(best.cluster, spent)
        days = "n/a" if wall is None else f"{wall / 86400:,.1f} days"
        text += f", {config.tokens:.3g} tokens {_dollars(dollars(best.cluster, spent))} in {days}"
    share = goodput(best.cluster)
    return f"{text}; {1 - share:.1%} of the time goes to checkpoints and failures."


def _dollars(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"${value:,.2f}" if value < 100 else f"${value:,.0f}"


def _limits(anatomy: Anatomy, cluster: Cluster, question: Question, best: Plan) -> list[str]:
    """The questions the other way round, around the best plan."""
    way = best.way
    smallest = smallest_partition(anatomy, cluster, question, way)
    batch = largest_micro_batch(anatomy, cluster, question, way)
    longest = longest_sequence(anatomy, cluster, question, way, limit=anatomy.positions)
    of_model = " (the model's positions)" if longest == anatomy.positions else ""
    fewest = fewest_nodes(anatomy, cluster, question)
    return [
        f"Around it: partition down to {smallest}, micro-batch up to {batch}, sequence up to "
        f"{longest}{of_model}; fewest nodes on which anything fits {fewest}."
    ]


def _swept(counts: Sequence[int], plan: Plan) -> list[Plan]:
    """The fastest plan on every number of nodes."""
    best = []
    for nodes in counts:
        _told(f"simulating on {nodes} nodes")
        try:
            other = dataclasses.replace(plan.cluster, nodes=nodes)
            plans = explained(search(plan.anatomy, other, plan.question))
        except PlanError as error:  # a partition or a global batch that does not go with so many
            _told(f"{nodes} nodes are left out: {error.what}")
            continue
        if plans:
            best.append(plans[0])
        else:
            _told(f"{nodes} nodes are left out: nothing fits")
    return best


def _sweep_table(plans: Sequence[Plan], by: str) -> str:
    """The best plan of every number of nodes, and the best of them all."""
    table = as_table(plans).split("\n")
    lines = ["the fastest plan on each number of nodes", f"{'nodes':>6}  {table[0]}"]
    lines += [
        f"{plan.cluster.nodes:>6}  {line}" for plan, line in zip(plans, table[1:], strict=True)
    ]
    priced = [plan for plan in plans if plan.dollars_per_billion_tokens is not None]
    if by == "time":
        best = max(plans, key=lambda plan: plan.tokens_per_second)
        told = f"{best.tokens_per_second:,.0f} tokens/s"
    elif priced:
        best = min(priced, key=lambda plan: plan.dollars_per_billion_tokens or 0)
        told = f"{_dollars(best.dollars_per_billion_tokens)} a billion tokens"
    else:
        return "\n".join([*lines, "Best by cost: n/a, failures leave no time for any step."])
    return "\n".join([*lines, f"Best by {by}: {best.cluster.nodes} nodes, {best.way}, {told}."])


def _files(config: Config, plans: Sequence[Plan], swept: Sequence[Plan]) -> None:
    best = plans[0]
    title = f"{config.model} on {best.cluster}"
    if config.json is not None:
        document = {
            "model": config.model,
            "parameters": best.anatomy.num_parameters,
            "sequence": best.question.sequence,
            "cluster": str(best.cluster),
            "stack": config.stack,
            "not_modelled": NOT_MODELLED,
            "plans": [as_document(plan) for plan in plans],
            "sweep": [as_document(plan) for plan in swept],
        }
        config.json.write_text(json.dumps(document, indent=1) + "\n")
    scaling = {}
    if config.html is not None or config.png is not None:
        _told("simulating other engines")
        scaling = weak_scaling(best, ENGINES)
    if config.html is not None:
        around = swept or _swept(_around(best.cluster.nodes), best)
        config.html.write_text(page(title, plans, around, scaling))
    if config.png is not None:
        from mics.planning.picture import draw

        draw(config.png, title, plans, scaling)


def _around(nodes: int) -> list[int]:
    """Half and twice as many, for a page without a sweep: price against speed needs several."""
    return [n for n in (nodes // 4, nodes // 2, 2 * nodes, 4 * nodes) if n]


def _check(config: Config) -> None:
    """What is asked of the command itself; ``Question`` checks the rest."""
    if config.top < 1:
        raise PlanError(f"--top must be at least 1, got {config.top}.")
    if config.tokens is not None and not 0 < config.tokens < math.inf:
        raise PlanError(f"--tokens must be positive, got {config.tokens}.", write="--tokens 300e9")
    if config.sweep is not None:
        parse_range(config.sweep)
    elif config.by == "cost":
        raise PlanError(
            "On one number of nodes time and cost rank alike.",
            write="--by cost --sweep nodes=2..64",
        )
    check_folders(config.json, config.png, config.html)


def _told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
