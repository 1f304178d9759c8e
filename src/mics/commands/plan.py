"""``mics plan``: which partition, does it fit, how fast, what does it cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mics.anatomy.memory import NOT_MODELLED
from mics.commands.checks import check_folders, refuse_others, write_text
from mics.commands.cluster_options import node_of
from mics.commands.dashes import command_line
from mics.commands.job import check_job, job_text, launch_lines, options_of_job, torchrun
from mics.commands.numbers import check_numbers
from mics.commands.options.plan import Config
from mics.errors import PlanError
from mics.hardware.catalogue_text import catalogue
from mics.hardware.cluster import Cluster
from mics.hardware.stacks import find_stack
from mics.models.presets import rule_of
from mics.planning.answer import Plans
from mics.planning.api import plan
from mics.planning.parsing import parse_range
from mics.planning.plan import Plan, equal_plans
from mics.planning.ranking import error_on
from mics.planning.scaling import ENGINES, weak_scaling
from mics.planning.subject import subject
from mics.planning.sweep import sweep, sweep_table
from mics.planning.table import as_document
from mics.ranks.columns import fitted
from mics.ranks.console import progress, show


def run(config: Config) -> int:
    """Plan, print and write what was asked for.

    Returns:
        0; 1 when nothing fits or something does not exist.
    """
    check_numbers(config)
    try:
        if config.list:
            refuse_others(config, "list")
            show(catalogue())
            return 0
        return _plan(config)
    except OSError as error:  # of a file that an option names
        raise PlanError(str(error)) from None


def options_of(config: Config) -> dict[str, Any]:
    """Translate the command's options into those of ``mics.plan``."""
    checkpointing = {"both": (False, True), "none": (False,), "full": (True,)}
    offload = {"auto": (False, True), "none": (False,), "full": (True,)}
    return {
        "offload": offload[config.offload],
        "sequence": config.sequence,
        "global_batch": config.global_batch,
        "micro_steps": config.micro_steps,
        "micro_batches": config.micro_batch,
        "partitions": config.partition or None,
        "checkpointing": checkpointing[config.checkpointing],
        "optimizer": config.optimizer,
        "reduce_bytes": 4 if config.reduce_dtype == "fp32" else 2,
        "hop_two": config.hop_two,
        "error_feedback": config.error_feedback,
        "dealt_states": config.dealt_states,
        "prefetch": config.prefetch,
        "stack": config.stack,
        "fragmentation": config.fragmentation,
    }


def _plan(config: Config) -> int:
    _check(config)
    cluster = Cluster(node_of(config.where), config.nodes)
    if config.by == "cost" and cluster.node.price is None:
        raise PlanError(
            f"The price of {cluster.node.name} is not known.",
            write="--by time, or a price in a .toml file of your own",
        )
    find_stack(config.stack)
    progress(f"tracing {config.model}")
    anatomy = subject(config.model)
    progress(f"simulating on {cluster}")
    plans = plan(anatomy, cluster, **options_of(config))
    swept = sweep(plans.best, parse_range(config.sweep), progress) if config.sweep else []
    lines = [*rule_of(config.model), plans.report(top=config.top, tokens=config.tokens)]
    if swept:
        lines.append(sweep_table(swept, config.by) + "\n")
    lines.append("\n".join(plans.caveats(swept)))
    _files(config, plans, swept)
    show(fitted("\n".join(lines)))  # last: what can fail has been done
    if config.toml is not None:  # commands stay whole, to be copied
        runs = f"{config.toml} runs so: {plans.best.figures}. Fill in what it is to train on, "
        runs = fitted(f"{runs}source in its [data], and look first, on any machine:")
        look = f"  mics train {config.toml} --dry-run"
        show("\n".join(["", runs, look, *launch_lines(plans.best, [str(config.toml)])]))
    return 0


def _document(config: Config, plans: Plans, swept: Sequence[Plan]) -> dict[str, Any]:
    """Write down for machines what is printed for people."""
    best = plans.best
    return {
        "model": config.model,
        "parameters": best.anatomy.num_parameters,
        "sequence": best.way.sequence,
        "cluster": str(best.cluster),
        "stack": config.stack,
        "global_batch": best.sequences,
        "micro_batches_left_out": list(plans.left_out),
        "step_error": error_on(best.cluster.node),
        "equally_fast": len(equal_plans(plans)),
        "ways_that_fit": len(plans),
        "ways_tried": len(plans) + len(plans.rejected),
        "price": vars(plans.price(config.tokens)),
        "limits": vars(plans.limits),
        "caveats": plans.caveats(swept),
        "not_modelled": NOT_MODELLED,
        "plans": [as_document(one) for one in plans],
        "sweep": [as_document(one) for one in swept],
    }


def _files(config: Config, plans: Plans, swept: Sequence[Plan]) -> None:
    """Make what the files hold, all of it before the first is written."""
    best = plans.best
    title = f"{config.model} on {best.cluster}"
    texts: list[tuple[Path, str]] = []
    if config.toml is not None:
        texts.append((config.toml, job_text(config, best, config.toml)))
    if config.json is not None:
        document = json.dumps(_document(config, plans, swept), indent=1, allow_nan=False)
        texts.append((config.json, document + "\n"))
    scaling = {}
    if config.html is not None or config.png is not None:
        progress("simulating other engines")
        scaling = weak_scaling(best, ENGINES)
    if config.html is not None:
        from mics.planning.page import Asked, page

        around = swept or sweep(best, _around(best.cluster.nodes), progress)
        asked = Asked(
            title,
            command_line("plan", config),
            torchrun(best, options_of_job(config, best)),
            plans.price(config.tokens),
            plans.caveats(around),
        )
        texts.append((config.html, page(asked, plans, around, scaling)))
    if config.png is not None:
        from mics.planning.picture import draw

        draw(config.png, title, plans, scaling)
    for file, text in texts:
        write_text(file, text)


def _around(nodes: int) -> list[int]:
    """List half and twice as many: price against speed needs several, on a page without a sweep."""
    return [n for n in (nodes // 4, nodes // 2, 2 * nodes, 4 * nodes) if n]


def _check(config: Config) -> None:
    """Check what is asked of the command itself; ``plan`` checks the rest."""
    if config.sweep is not None:
        parse_range(config.sweep)
    elif config.by == "cost":
        raise PlanError(
            "On one number of nodes time and cost rank alike.",
            write="--by cost --sweep nodes=2..64",
        )
    if config.toml is not None:
        check_job(config)
    check_folders(config.json, config.png, config.html, config.toml)
