"""A job as its file has to know it: nodes, time, folders, and what runs on them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from mics.errors import ConfigError
from mics.hardware.cluster import Instance
from mics.topology import Topology
from mics.training.config import TrainConfig

Network = Literal["efa", "infiniband", "ethernet"]
"""What joins the nodes."""

Launcher = Literal["srun", "torchrun", "mics-run"]
"""Who starts the ranks of a job."""

SECONDS_TO_SAVE = 300
"""How long before the time limit ranks are told to save, and how long a pod may take to end."""


@dataclass(frozen=True)
class Mount:
    """Storage, and where the job sees it.

    Args:
        source: a folder of the host, a claim, a volume, or the address of a bucket.
        target: an absolute path.
    """

    source: str
    target: str


@dataclass(frozen=True)
class File:
    """One file of a job."""

    name: str
    text: str


@dataclass(frozen=True)
class Job:
    """What is to run, and where.

    Args:
        name: of the job.
        command: the ``mics new`` that made it, for the head of its file.
        nodes: how many.
        gpus_per_node: GPUs, and so ranks, of each.
        instance: what a cloud calls such a node; ``None`` for a node of one's own.
        network: what joins them.
        minutes: the time limit.
        queue: Slurm's partition, or the local queue of Kueue; "" for the cluster's own choice.
        account: whom Slurm charges; "" for nobody.
        container: an image; "" for what is installed on the nodes.
        mounts: storage that a container, a pod or a machine sees.
        config: the TOML of ``mics train``, as the job finds it.
        text: what stands in it.
        settings: the same, read.
        folder: of the run, as the job sees it.
        restarts: how often ranks begin again on their nodes before the job fails.
        launcher: who starts the ranks.
    """

    name: str
    command: str
    nodes: int
    gpus_per_node: int
    instance: Instance | None
    network: Network
    minutes: int
    queue: str
    account: str
    container: str
    mounts: tuple[Mount, ...]
    config: Path
    text: str
    settings: TrainConfig
    folder: PurePosixPath
    restarts: int
    launcher: Launcher

    @property
    def ranks(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.gpus_per_node

    def training(self, config: PurePosixPath | Path | None = None) -> str:
        """The program of every rank, as a shell reads it.

        Args:
            config: where the job finds its TOML, if that is not where it stands now.
        """
        words = ["mics", "train", str(config or self.config), "--run.folder", str(self.folder)]
        return shlex.join(words)


_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,+-]{0,127}")
_IMAGE = re.compile(r"[A-Za-z0-9/][A-Za-z0-9_.:/#@+-]{0,511}")
_PATH = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@+-]{0,511}")
_PATH_IS = "a path of letters, digits and ._/@+-, without .."
_TARGET = re.compile(r"/[A-Za-z0-9_./@+-]{1,511}")
_SOURCE = re.compile(r"[A-Za-z0-9/][A-Za-z0-9_.:/@+-]{0,511}")


def check_job(job: Job) -> None:
    """Refuse what no cluster could run: these words end up in scripts.

    Raises:
        ConfigError: a name or a path has signs of which a shell or a scheduler makes something
            else, or the settings are for other ranks.
        TopologyError: the partition size of the settings does not divide the ranks.
    """
    for option, text, allowed, write in (
        ("--name", job.name, _NAME, "small letters, digits and dashes, 40 at most"),
        ("--queue", job.queue, _WORD, "the name of a queue"),
        ("--account", job.account, _WORD, "the name of an account"),
        ("--container", job.container, _IMAGE, "an image: registry.io/team/mics:1.0"),
        ("--config", str(job.config), _PATH, f"{_PATH_IS}: big.toml"),
        ("--folder", str(job.folder), _PATH, f"{_PATH_IS}: /fsx/runs/big"),
        ("--node", job.instance.name if job.instance else "", _WORD, "a node of a plain name"),
        *(("--mount", one.source, _SOURCE, "SOURCE:/path") for one in job.mounts),
        *(("--mount", one.target, _TARGET, "SOURCE:/path") for one in job.mounts),
    ):
        if text and (allowed.fullmatch(text) is None or ".." in PurePosixPath(text).parts):
            raise ConfigError(
                f"{option} cannot be written into a job file.",
                numbers=f"It is {text[:200]!r}.",
                write=f"{option} with {write}",
            )
    _check_settings(job)


_TIME = re.compile(
    r"(?:(?P<days>\d{1,3})-)?(?P<first>\d{1,5})(?::(?P<second>\d\d))?(?::(?P<third>\d\d))?"
)
_LEAST_MINUTES, _MOST_MINUTES = 10, 366 * 24 * 60


def minutes_of(text: str) -> int:
    """Read a time limit as Slurm writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.

    Raises:
        ConfigError: it is none, or leaves no time to save.
    """
    found = _TIME.fullmatch(text)
    minutes = -1.0
    if found is not None:
        first, second, third = (int(found[name] or 0) for name in ("first", "second", "third"))
        if found["days"] is not None:
            minutes = (int(found["days"]) * 24 + first) * 60 + second + third / 60
        elif found["third"] is not None:
            minutes = first * 60 + second + third / 60
        else:
            minutes = first + second / 60
    if not _LEAST_MINUTES <= minutes <= _MOST_MINUTES:
        raise ConfigError(
            f"--time must be {_LEAST_MINUTES} minutes to a year, of which {SECONDS_TO_SAVE} s are "
            "there to save.",
            numbers=f"It is {text[:80]!r}.",
            write="--time 24:00:00",
        )
    return math.ceil(minutes)


def mounts_of(texts: Sequence[str]) -> tuple[Mount, ...]:
    """Read SOURCE:/path.

    Raises:
        ConfigError: one is nothing of the kind, or two have one path.
    """
    mounts = []
    for text in texts:
        source, colon, target = text.rpartition(":")
        if not (source and colon and target.startswith("/")):
            raise ConfigError(
                "--mount is SOURCE:/path.", numbers=f"It is {text[:200]!r}.", write="/data:/data"
            )
        mounts.append(Mount(source, target.rstrip("/") or "/"))
    targets = [one.target for one in mounts]
    if len(set(targets)) < len(targets):
        raise ConfigError("Two mounts have one path.", numbers=f"They are {', '.join(targets)}.")
    return tuple(mounts)


def mount_of(job: Job, path: PurePosixPath) -> Mount | None:
    """Find the storage that a path lies in; ``None`` where it is in none."""
    return next((one for one in job.mounts if path.is_relative_to(one.target)), None)


def _check_settings(job: Job) -> None:
    parallel = job.settings.parallel
    shape = f"{job.nodes} nodes x {job.gpus_per_node} GPUs are {job.ranks} ranks"
    for name, value, fits in (
        ("ranks", parallel.ranks, job.ranks),
        ("gpus_per_node", parallel.gpus_per_node, job.gpus_per_node),
    ):
        if value is not None and value != fits:
            raise ConfigError(
                f"{job.config} is for another cluster.",
                numbers=f"parallel.{name} = {value}, but {shape}.",
                write=f"{name} = {fits} in [parallel], or leave it out",
            )
    if parallel.partition != "auto":
        Topology.from_world(job.ranks, job.gpus_per_node, parallel.partition)
