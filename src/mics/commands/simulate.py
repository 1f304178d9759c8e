"""``mics simulate``: how a job scales, engine against engine, from 8 GPUs to tens of thousands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mics.anatomy.recipe import Recipe
from mics.commands.checks import check_folders, refuse_others, write_text
from mics.commands.cluster_options import node_of
from mics.commands.numbers import check_numbers
from mics.commands.options.simulate import Config
from mics.errors import PlanError
from mics.hardware.cluster import Cluster, Link, Node, extrapolated
from mics.hardware.stacks import find_stack
from mics.planning.parsing import parse_range
from mics.planning.plan import Plan, Search, search
from mics.planning.question import Question
from mics.planning.scaling import strong_scaling, too_large, weak_scaling
from mics.planning.subject import subject
from mics.planning.validation import as_markdown, validate
from mics.planning.weighing import simulate_recipe
from mics.quantities import GIB
from mics.ranks.columns import Column, as_table, fitted
from mics.ranks.console import progress, show
from mics.simulation.profiles import PROFILES
from mics.simulation.timeline import chrome_trace
from mics.topology import possible_partitions

_MOST_TRACED = 1024


def run(config: Config) -> int:
    """Simulate, print and write what was asked for.

    Returns:
        0; 1 when something does not exist or fit.
    """
    check_numbers(config)
    try:
        return _validate(config) if config.validate else _simulate(config)
    except OSError as error:  # of a file that an option names
        raise PlanError(str(error)) from None


def _validate(config: Config) -> int:
    """Print the table; return 1 where a figure that was held out is missed."""
    refuse_others(config, "validate", "out")
    check_folders(config.out)
    rows = validate(progress)
    table = as_markdown(rows)
    if config.out is not None:
        write_text(config.out, table)
    show(table.removesuffix("\n"))
    missed = [row.name for row in rows if row.holds == "NO"]
    if missed:
        progress(f"mics simulate: not held: {'; '.join(missed)}")
    return 1 if missed else 0


def _simulate(config: Config) -> int:
    counts = _checked(config)
    node = _what_if(node_of(config.where), config)
    cluster = _smallest(config, node, counts)
    progress(f"tracing {config.model}")
    anatomy = subject(config.model)
    recipe = Recipe(
        1,
        micro_steps=config.micro_steps,
        sequence=anatomy.sequence_or(config.sequence),
        stack=config.stack,
        pipelined=config.pipelined,
    )
    question = Question(
        recipe,
        micro_batches=(config.micro_batch,),
        partitions=None if config.partition is None else (config.partition,),
        checkpointing=(config.checkpointing,),
        offload=(False,),
    )
    plan = _first(config, search(anatomy, cluster, question))
    scale = weak_scaling if config.scaling == "weak" else strong_scaling
    curves = scale(plan, config.engines, counts, progress)
    stack = find_stack(config.stack)
    lines = [
        f"{config.model}: {anatomy.num_parameters:,} parameters; {plan.way}, sequence "
        f"{recipe.sequence}, {config.micro_steps} micro-steps; {node.name}; {config.scaling}",
        *_table(curves, config),
        f"Software stack {stack.name}: {stack.calibrated}.",
        f"GPU: {node.gpu.source}." if node.gpu.source else "",
        extrapolated(node, counts[-1]),
        _on_gloo(node, config),
        *too_large(plan, config.engines),
    ]
    _files(config, plan, curves)
    show(fitted("\n".join(filter(None, lines))))  # last: what can fail has been done
    return 0


def _checked(config: Config) -> list[int]:
    """Read the numbers of nodes, when all else makes sense."""
    if config.out is not None:
        raise PlanError(
            "--out is the file of --validate.", write="--json, --png or --trace for a simulation"
        )
    if len(set(config.engines)) < len(config.engines):
        raise PlanError(f"--engines names one twice: {', '.join(config.engines)}.")
    if not config.engines:
        raise PlanError("There is nothing to simulate: --engines names none.")
    if config.trace is not None and config.micro_steps > _MOST_TRACED:
        raise PlanError(
            f"A timeline holds at most {_MOST_TRACED:,} micro-steps, got {config.micro_steps:,}.",
            write="--trace without --micro-steps",
        )
    check_folders(config.json, config.png, config.trace)
    one = "" if ".." in config.nodes else f"..{config.nodes}"
    return parse_range(f"{config.nodes}{one}")


def _what_if(node: Node, config: Config) -> Node:
    """Change the link between nodes, and the spread over GPUs, as the options say."""

    def changed(link: Link) -> Link:
        return replace(
            link,
            bandwidth=link.bandwidth * config.bandwidth,
            latency=link.latency * config.latency,
        )

    return replace(
        node,
        inter=changed(node.inter),
        all_reduce=changed(node.all_reduce) if node.all_reduce else None,
        machine=replace(node.machine, sigma=config.sigma),
    )


def _smallest(config: Config, node: Node, counts: Sequence[int]) -> Cluster:
    """Find the fewest nodes of the range that the partition goes with."""
    k, p = node.gpus_per_node, config.partition
    for count in counts:
        if p is None or p in possible_partitions(count, k):
            return Cluster(node, count)
    raise PlanError(
        f"partition {p} goes with no number of nodes of the range.",
        numbers=f"{' '.join(map(str, counts))} x {node.name} of {k} GPUs; on {counts[-1]}: "
        f"{' '.join(map(str, possible_partitions(counts[-1], k)))}.",
        write="one of these, or other --nodes",
    )


def _first(config: Config, result: Search) -> Plan:
    """Pick the smallest partition that fits."""
    if result.plans:
        return min(result.plans, key=lambda plan: (plan.way.partition, plan.seconds))
    nearest = min(result.rejected, key=lambda one: one.needed)
    raise PlanError(
        f"{config.model} does not fit the smallest cluster of the range.",
        numbers=f"{nearest.way} lacks {nearest.missing / GIB:.1f} GiB.",
        write="more --nodes, a smaller --micro-batch, or mics plan, which says what would fit",
    )


def _on_gloo(node: Node, config: Config) -> str:
    """Say how engines are simulated on links that were measured through Gloo."""
    others = [engine for engine in config.engines if engine != "mics"]
    if not node.gloo:
        return ""
    text = "Links were measured on CPUs: mics is simulated as it runs on Gloo"
    return text + (f", {', '.join(others)} as on GPUs." if others else ".")


def _table(curves: Mapping[str, Sequence[tuple[float, float]]], config: Config) -> list[str]:
    first = config.engines[0]
    columns = (
        Column("GPUs"),
        Column("engine", left=True),
        Column("tokens/s", 2),
        Column("per GPU", 3),
        Column("efficiency", 1),
        Column(f"time over {first}"),
    )
    rows = []
    for index, (gpus, base) in enumerate(curves[first]):
        for engine in config.engines:
            speed = curves[engine][index][1]
            at_first = curves[engine][0]
            efficiency = speed / gpus / (at_first[1] / at_first[0])
            figures = (f"{speed:,.0f}", f"{speed / gpus:,.0f}", f"{efficiency:.1%}")
            rows.append((f"{gpus:.0f}", engine, *figures, f"{base / speed:.2f}"))
    about = [f"{engine}: {PROFILES[engine].about}" for engine in config.engines]
    return [*as_table(columns, rows), *about]


def _files(config: Config, plan: Plan, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    if config.json is not None:
        document = {
            "model": config.model,
            "node": plan.cluster.node.name,
            "scaling": config.scaling,
            "partition": plan.way.partition,
            "micro_batch": plan.way.micro_batch,
            "micro_steps": plan.way.micro_steps,
            "sequence": plan.way.sequence,
            "bandwidth": config.bandwidth,
            "latency": config.latency,
            "pipelined": config.pipelined,
            "stack": config.stack,
            "tokens_per_second_by_gpus": curves,
        }
        write_text(config.json, json.dumps(document, indent=1, allow_nan=False) + "\n")
    if config.png is not None:
        from mics.planning.picture import draw_scaling

        draw_scaling(config.png, f"{config.model} on {plan.cluster.node.name}", curves)
    if config.trace is not None:
        simulated = simulate_recipe(
            config.engines[0], plan.anatomy, plan.cluster, plan.way, timeline=True
        )
        write_text(config.trace, json.dumps(chrome_trace(simulated.step.timeline)))
