"""Pieces that the scripts of several schedulers have in common."""

from __future__ import annotations

import shlex

from mics.training.jobs.job import Job
from mics.training.jobs.network import environment

PORT = 29500
"""Where rank 0 listens, and agents of the launcher; torchrun's own choice."""

DOCTOR_PORT = PORT - 1
"""The same for the doctor, whose store may not be gone when the training begins."""

DOCTOR = "mics doctor --timeout 600"
"""What is run first: versions, groups and links of all ranks, or the name of who is not right."""

ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it torchrun lets no node join in place of a lost one (docs/survive.md)."""


def head(job: Job, *how: str) -> list[str]:
    """The lines that say what a file is and how it is used."""
    return [f"# {line}" for line in (f"Made by: {job.command}", *how)]


def exports(variables: dict[str, str]) -> list[str]:
    """Lines of a shell that set variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def variables(job: Job, **more: str) -> dict[str, str]:
    """What ranks find in their environment; the job has a name by which states in memory go."""
    return environment(job) | more


def torchrun(job: Job, port: int, restarts: int, identity: str) -> str:
    """One torchrun of each node, which meet at the node that the shell has as ``head``.

    Args:
        job: the nodes and their GPUs.
        port: where they meet.
        restarts: how often ranks that fail begin again.
        identity: of their meeting, as the shell is to read it.
    """
    return (
        f"torchrun --nnodes={job.nodes} --nproc-per-node={job.gpus_per_node} "
        f'--max-restarts={restarts} --rdzv-backend=c10d --rdzv-endpoint="$head:{port}" '
        f"--rdzv-id={identity}"
    )


def function(name: str, body: list[str]) -> list[str]:
    """A function of a shell."""
    return [f"{name}() {{", *(f"    {line}" for line in body), "}"]


def is_finished(job: Job) -> list[str]:
    """A function of a shell: whether the run has done its last step.

    A run that was told to save and end has ended well, and is not finished.
    """
    metrics = shlex.quote(str(job.folder / "metrics.jsonl"))
    line = f"tail -n 1 {metrics} 2>/dev/null | grep -q '\"finished\": true'"
    return function("is_finished", [line])


def block(lines: list[str], indent: int) -> str:
    """Lines as they stand in a block of YAML."""
    return "\n".join(" " * indent + line if line else "" for line in lines)
