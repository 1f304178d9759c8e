"""``mics check``: what any training script sends, and whether its replicas stay alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mics.commands.cluster_options import ClusterOptions, node_of
from mics.commands.dashes import parse_before_file
from mics.commands.numbers import check_numbers
from mics.errors import CheckError
from mics.hardware.cluster import Cluster
from mics.lab.checking.costs import costs_of
from mics.lab.checking.evidence import Evidence
from mics.lab.checking.judging import judge
from mics.lab.checking.words import as_json, as_text
from mics.quantities import Within
from mics.ranks.console import progress, show


@dataclass(frozen=True)
class Config:
    """Run a few steps of a training script as it is, and judge what it sends.

    The script and its arguments follow the options. Its ranks are processes of this machine that
    stand for nodes; they are told who they are in torchrun's variables, and talk through Gloo.
    FSDP2, HSDP, DDP and mics are understood. Exit code 1: something is wrong.
    """

    where: Annotated[ClusterOptions, tyro.conf.arg(name="")] = field(default_factory=ClusterOptions)

    nodes: Annotated[int, Within(1, 64)] = 2
    """Nodes that the ranks stand for."""

    ranks_per_node: Annotated[int, Within(1, 64)] = 2
    """Ranks of each node; each is a process of this machine."""

    steps: Annotated[int, Within(1, 1000)] = 3
    """Optimizer steps after which the script is ended."""

    seconds: Annotated[float, Within(1, 1e6)] = 300.0
    """Seconds in which the steps must have been taken."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the report as JSON."""

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """The script and its arguments."""


def parse(words: Sequence[str], **keywords: object) -> Config:
    """Options before the script, the script's own behind it."""
    config: Config = parse_before_file(Config, words, (".py",), **keywords)
    return config


def run(config: Config) -> int:
    """Run the script, and say what it does.

    Returns:
        0 when nothing is wrong, 1 when something is, 2 when there is no script.

    Raises:
        MicsError: the script does not train here, or an option is not right.
    """
    check_numbers(config)
    if not config.command:
        progress("mics check: no script; write it behind the options: mics check train.py")
        return 2
    if not Path(config.command[0]).is_file():
        raise CheckError(
            f"There is no script {config.command[0]}.", write="mics check [options] <script.py>"
        )
    cluster = Cluster(node_of(config.where), config.nodes)
    from mics.lab.checking.outcome import Job
    from mics.lab.checking.ranks import observe

    job = Job(config.command, config.nodes, config.ranks_per_node, config.steps, config.seconds)
    evidence = Evidence(observe(job), job.ranks_per_node)
    verdict = judge(evidence)
    costs = costs_of(evidence, verdict, cluster)
    if config.json:
        show(json.dumps(as_json(evidence, verdict, costs)))
    else:
        show(f"{config.command[0]}: {as_text(evidence, verdict, costs)}")
    return 1 if verdict.findings else 0
