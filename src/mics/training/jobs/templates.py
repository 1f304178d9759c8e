"""What job files there are, which options each has a place for, and who may start its ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from mics.errors import ConfigError
from mics.training.jobs.job import File, Job, Launcher, check_job, mount_of
from mics.training.jobs.kubernetes import render_kubernetes
from mics.training.jobs.parallelcluster import render_parallelcluster
from mics.training.jobs.ray import render_ray
from mics.training.jobs.skypilot import render_skypilot
from mics.training.jobs.slurm import render_slurm
from mics.training.jobs.torchrun import render_torchrun


@dataclass(frozen=True)
class Template:
    """One kind of job.

    Args:
        render: writes its files.
        launchers: who may start its ranks, the usual one first.
        options: those that not every job has, and this one has.
    """

    render: Callable[[Job], tuple[File, ...]]
    launchers: tuple[Launcher, ...]
    options: frozenset[str]


_OF_SLURM = frozenset({"time", "queue", "account", "container", "mount"})

TEMPLATES = {
    "slurm": Template(render_slurm, ("srun", "torchrun", "mics-run"), _OF_SLURM),
    "kubernetes": Template(
        render_kubernetes, ("torchrun",), frozenset({"time", "queue", "container", "mount"})
    ),
    "skypilot": Template(render_skypilot, ("torchrun",), frozenset({"container", "mount"})),
    "ray": Template(render_ray, ("torchrun",), frozenset()),
    "parallelcluster": Template(
        render_parallelcluster, ("srun", "torchrun", "mics-run"), _OF_SLURM
    ),
    "torchrun": Template(render_torchrun, ("torchrun", "mics-run"), frozenset()),
}

OPTIONS = ("time", "queue", "account", "container", "mount")
"""Options that not every job has."""


def render(kind: str, job: Job) -> tuple[File, ...]:
    """Write the files of a job.

    Args:
        kind: of ``TEMPLATES``.
        job: what is to run.

    Raises:
        ConfigError: the job cannot be written down, or its folder would be lost with its machines.
        TopologyError: the partition size of the settings does not divide the ranks.
    """
    check_job(job)
    _check_folder(kind, job)
    return TEMPLATES[kind].render(job)


def _check_folder(kind: str, job: Job) -> None:
    """A run's folder is on storage that all nodes see, and that is there after them."""
    inside = mount_of(job, job.folder)
    if not job.folder.is_absolute():
        if kind in ("slurm", "torchrun"):
            return  # it lies where the job is submitted, or started
        wrong = f"{job.folder} is no absolute path"
    elif kind == "parallelcluster" and inside is None and len(job.folder.parts) < 3:
        wrong = f"{job.folder} is where the cluster's shared storage would be mounted"
    elif kind in ("kubernetes", "skypilot") and inside is None:
        wrong = f"{job.folder} is in none of the mounts, and so on the disk of one machine"
    elif kind == "slurm" and job.container and inside is None:
        wrong = f"{job.folder} is in none of the mounts, and so inside the container"
    elif inside is not None and "://" in inside.source:
        wrong = f"{inside.source} is a bucket, in which no folder can be renamed"
    else:
        return
    sources = {
        "kubernetes": "--mount CLAIM:/data",
        "skypilot": "--mount fs-1.efs.us-east-1.amazonaws.com:/:/data",
        "slurm": "--mount /data:/data",
    }
    also = f"{sources[kind]} and " if kind in sources else ""
    raise ConfigError(
        "The folder of the run must be on storage that all nodes share.",
        numbers=f"{wrong}.",
        write=f"{also}--folder {PurePosixPath('/data/runs/big')}",
    )
