"""The run that a plan describes: a configuration of ``mics train``, and how it is started."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mics.commands.dashes import command_line
from mics.commands.options.plan import Config
from mics.errors import PlanError
from mics.planning.plan import Plan

_UNTOLD = ("optimizer", "reduce_dtype", "prefetch", "fragmentation")
_COMPILED = {"eager": False, "fused": True}
_FILL_IN = "fill in: files, a folder, a glob, hub:owner/name, or what mics tokenize made"
_PORT = 29500  # torchrun's own


def check_job(config: Config) -> None:
    """Check that ``mics train`` can be told all that a plan is asked for.

    Raises:
        PlanError: it cannot; names the options.
    """
    usual = Config()
    names = [name for name in _UNTOLD if getattr(config, name) != getattr(usual, name)]
    names += [] if config.stack in _COMPILED else ["stack"]
    if names:
        given = [f"--{n.replace('_', '-')} {getattr(config, n)}" for n in names]
        raise PlanError(
            "mics train cannot be told to run so.",
            numbers=f"{', '.join(given)}.",
            write="--toml without them",
        )


def settings_of(config: Config, best: Plan) -> dict[str, dict[str, Any]]:
    """Write down what a plan decides of a run, as the tables of its configuration.

    Args:
        config: what was asked.
        best: the plan.
    """
    way, cluster = best.way, best.cluster
    k = cluster.node.gpus_per_node
    tables: dict[str, dict[str, Any]] = {
        "run": {"folder": f"runs/{_short(config.model)}"},
        "model": {"name": config.model},
        "data": {"source": "", "sequence": way.sequence},
        "batch": {"micro_batch": way.micro_batch, "micro_steps": way.micro_steps},
        "parallel": {
            "ranks": cluster.gpus,
            "gpus_per_node": k,
            "partition": way.partition,
            "activation_checkpointing": way.checkpointing,
            "activation_offload": "on" if way.offload else "off",
            "compile": _COMPILED.get(config.stack, False),
        },
    }
    if config.tokens is not None:
        tables["run"]["steps"] = math.ceil(config.tokens / best.tokens)
    if way.partition > k > 1:
        tables["parallel"]["collectives"] = way.form
    if config.hop_two is not None:
        tables["parallel"]["hop_two"] = config.hop_two
    if not config.error_feedback:
        tables["parallel"]["error_feedback"] = False
    if config.dealt_states:
        tables["parallel"]["dealt_states"] = True
        tables["checkpoint"] = {"memory": False}  # which keeps what every replica has
    if config.where.memory is None and config.where.profile is None:
        tables["parallel"]["node"] = config.where.node or cluster.node.name
    return tables


def job_text(config: Config, best: Plan, file: Path) -> str:
    """Write the configuration that runs as planned, with how it is started in its first lines.

    Args:
        config: what was asked.
        best: the plan.
        file: in which it will be.
    """
    cluster = best.cluster
    lines = [
        f"# {config.model} on {cluster}, as planned by",
        f"#   {command_line('plan', config)}",
        f"# {best.figures}; a step of {best.sequences:,} "
        f"sequences would take {best.seconds:.3f} s.",
        "#",
        *(f"# {line}" for line in launch_lines(best, [str(file)])),
    ]
    for name, table in settings_of(config, best).items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in table.items())]
        if name == "data":
            lines[lines.index('source = ""')] += f"  # {_FILL_IN}"
            lines += ['# tokenizer = "..."  # by default bytes; tokens bring their own']
    return "\n".join(lines) + "\n"


def launch_lines(best: Plan, words: list[str]) -> list[str]:
    """Write how a run is started on the nodes of a plan.

    Args:
        best: the plan.
        words: what follows ``mics train``.
    """
    nodes, k = best.cluster.nodes, best.cluster.node.gpus_per_node
    where = "On the node:" if nodes == 1 else "On every node, HEAD being the name of the first:"
    lines = [where, f"  {torchrun(best, words)}"]
    if nodes > 1:
        srun = f"srun --nodes {nodes} --ntasks-per-node {k} mics train {shlex.join(words)}"
        lines += ["Or, under Slurm, once:", f"  {srun}"]
    return lines


def torchrun(best: Plan, words: list[str]) -> str:
    """Write the command of torchrun that starts a run on a node of a plan.

    Args:
        best: the plan.
        words: what follows ``mics train``.
    """
    nodes, k = best.cluster.nodes, best.cluster.node.gpus_per_node
    meet = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HEAD:{_PORT}"
    how = "--standalone" if nodes == 1 else meet
    return f"torchrun {how} --nproc-per-node {k} -m mics train {shlex.join(words)}"


def options_of_job(config: Config, best: Plan) -> list[str]:
    """Write what a plan decides as options of ``mics train``."""
    return list(_options(settings_of(config, best)))


def _options(tables: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, table in tables.items():
        for key, value in table.items():
            option = f"--{name}.{key.replace('_', '-')}"
            if isinstance(value, bool):
                yield from [option] if value else []
            else:
                yield from (option, str(value))


def _short(model: str) -> str:
    """Make a folder's name of a model's."""
    path = Path(model)
    name = path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    return re.sub(r"[^\w.-]+", "-", name) or "model"
