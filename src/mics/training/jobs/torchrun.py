"""A shell script for nodes without a scheduler: the same command on every node.

Rendezvous and restarts are torchrun's ("torchrun (Elastic Launch)" of PyTorch's documentation).
"""

from __future__ import annotations

import shlex

from mics.training.jobs.job import SECONDS_TO_SAVE, File, Job
from mics.training.jobs.network import probe
from mics.training.jobs.shell import (
    DOCTOR,
    DOCTOR_PORT,
    ELASTIC,
    PORT,
    exports,
    head,
    torchrun,
    variables,
)


def render_torchrun(job: Job) -> tuple[File, ...]:
    """Write ``launch.sh``."""
    ours = job.launcher == "mics-run"
    more = {"MICS_JOB": job.name} if ours else {"MICS_JOB": job.name} | ELASTIC
    sections = [
        ["#!/bin/bash", *head(job, *_usage(job))],
        ["set -euo pipefail", *exports(variables(job, **more))],
        _arguments(job),
        probe(job),
        _by_us(job) if ours else _by_torchrun(job),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return (File("launch.sh", text + "\n"),)


def _usage(job: Job) -> list[str]:
    if job.nodes == 1:
        return ["On the node: bash launch.sh"]
    if job.launcher == "mics-run":
        hosts = ",".join(f"HOST{index}:{PORT}" for index in range(2))
        return [
            f"On every node, with its own index: bash launch.sh 0 {hosts},...",
            "The agents' secret is in ./token, the same on every node:",
            "(umask 077; head -c 32 /dev/urandom | base64 > token)",
        ]
    return ["On every node, with the address of the first: bash launch.sh 10.0.0.1"]


def _arguments(job: Job) -> list[str]:
    if job.nodes == 1:
        return ["head=127.0.0.1"] if job.launcher == "torchrun" else []
    if job.launcher == "mics-run":
        return ["index=${1:?the index of this node}", "agents=${2:?host:port of every node}"]
    return ["head=${1:?the address of the first node}"]


def _by_torchrun(job: Job) -> list[str]:
    return [
        "# All ranks are compared, and the links between them timed.",
        f"{_torchrun(job, DOCTOR_PORT, 0)} -m {DOCTOR}",
        "",
        "# The launch. It goes on from the newest state, in memory or in a checkpoint.",
        f"exec {_torchrun(job, PORT, job.restarts)} \\",
        f"    -m {job.training()}",
    ]


def _torchrun(job: Job, port: int, restarts: int) -> str:
    return torchrun(job, port, restarts, f"{shlex.quote(job.name)}-{port}")


def _by_us(job: Job) -> list[str]:
    several = ' --nodes "$agents" --node-index "$index" --token-file token' if job.nodes > 1 else ""
    run = f"mics run --ranks-per-node {job.gpus_per_node}{several}"
    return [
        "# All ranks are compared, and the links between them timed.",
        f"{run} --restarts 0 -- {DOCTOR}",
        "",
        "# The launch. It goes on from the newest state, in memory or in a checkpoint.",
        f"exec {run} --job {shlex.quote(job.name)} --restarts {job.restarts} "
        f"--grace {SECONDS_TO_SAVE - 30} \\",
        f"    -- {job.training()}",
    ]
