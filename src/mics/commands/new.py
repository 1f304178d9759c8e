"""``mics new``: job files for Slurm, Kubernetes, SkyPilot, Ray, ParallelCluster and torchrun."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mics.commands.checks import write_text
from mics.commands.numbers import check_numbers
from mics.errors import ConfigError
from mics.quantities import Within

if TYPE_CHECKING:
    from mics.hardware.cluster import Instance
    from mics.training.jobs.job import Job, Network

_KINDS = Literal["slurm", "kubernetes", "skypilot", "ray", "parallelcluster", "torchrun"]
_MINUTES = 24 * 60


@dataclass(frozen=True)
class Config:
    """Write the files that start `mics train` on the nodes of a cluster.

    They examine all nodes first (`mics doctor`), train, go on from the newest checkpoint when they
    are started again, and are yours to change. Nothing in them needs a launcher of mics.
    """

    kind: tyro.conf.Positional[_KINDS]
    """What runs the job; torchrun is for nodes without a scheduler."""

    nodes: Annotated[int, Within(1, 10_000)] = 1
    """How many."""

    node: str | None = None
    """What they are (`mics plan --list`), or a .toml file of that form: GPUs and network."""

    gpus_per_node: Annotated[int | None, Within(1, 128)] = None
    """GPUs of each, and so ranks; those of --node, or 8."""

    network: Literal["auto", "efa", "infiniband", "ethernet"] = "auto"
    """What joins them: what --node has, or ethernet, for which nothing is set."""

    config: Path = Path("job.toml")
    """The run: a TOML file of `mics train`, read and checked now."""

    folder: PurePosixPath | None = None
    """Folder of the run as the job sees it, on storage that all nodes share; as in --config."""

    time: str | None = None
    """Time limit as Slurm writes it (minutes, HH:MM:SS, D-HH, D-HH:MM:SS); a day by default."""

    queue: Annotated[str, tyro.conf.arg(aliases=["--partition"])] = ""
    """Slurm's partition, or the local queue of Kueue."""

    account: str = ""
    """Whom Slurm charges."""

    container: str = ""
    """Image that everything runs in: pyxis' under Slurm, a pod's, SkyPilot's."""

    mount: tuple[str, ...] = ()
    """SOURCE:/path, several if need be. SOURCE is a folder of the host (Slurm with --container), a
    claim (Kubernetes), a bucket or a file system of the network (SkyPilot)."""

    name: str = "mics"
    """Of the job."""

    restarts: Annotated[int, Within(0, 1000)] = 3
    """How often ranks that fail begin again before the job does."""

    launcher: Literal["auto", "srun", "torchrun", "mics-run"] = "auto"
    """Who starts the ranks: srun under Slurm, else torchrun; `mics run`, which survives lost ranks
    and nodes without a step lost, for slurm, parallelcluster and torchrun."""

    out: Path | None = None
    """Folder for the files, which it must not have yet; without it they are printed."""


def run(config: Config) -> int:
    """Check, render, and print or write.

    Returns:
        0.

    Raises:
        MicsError: an option makes no sense, or a file is there already.
    """
    check_numbers(config)
    from mics.ranks.console import show
    from mics.training.jobs.templates import render

    files = render(config.kind, _job(config))
    if config.out is None:
        marked = len(files) > 1
        texts = [(f"# ---- {one.name}\n" if marked else "") + one.text for one in files]
        show("\n".join(texts).rstrip("\n"))
        return 0
    _check_out(config.out, [one.name for one in files])
    for one in files:
        write_text(config.out / one.name, one.text)
        show(str(config.out / one.name))
    return 0


def _job(config: Config) -> Job:
    from mics.hardware.lookup import find_node
    from mics.training.jobs.job import Job, minutes_of, mounts_of
    from mics.training.jobs.templates import TEMPLATES
    from mics.training.settings import check_settings, check_source, read_settings

    _check_options(config)
    node = None if config.node is None else find_node(config.node)
    if not config.config.exists():
        raise ConfigError(
            f"There is no {config.config}, the run to write a job for.",
            write="mics plan ... --toml job.toml, which writes one, or --config examples/job.toml",
        )
    settings = read_settings(config.config)
    check_settings(settings)
    check_source(settings, must_be_named=True)
    template = TEMPLATES[config.kind]
    usual = template.launchers[0]
    queue = config.queue or ("gpus" if config.kind == "parallelcluster" else "")
    return Job(
        name=config.name,
        command=_command(config),
        nodes=config.nodes,
        gpus_per_node=_gpus(config, None if node is None else node.gpus_per_node),
        instance=None if node is None else node.instance,
        network=_network(config, None if node is None else node.instance),
        minutes=_MINUTES if config.time is None else minutes_of(config.time),
        queue=queue,
        account=config.account,
        container=config.container,
        mounts=mounts_of(config.mount),
        config=config.config,
        text=config.config.read_text(),
        settings=settings,
        folder=config.folder or PurePosixPath(settings.run.folder),
        restarts=config.restarts,
        launcher=usual if config.launcher == "auto" else config.launcher,
    )


def _check_options(config: Config) -> None:
    """Refuse what the job has no place for.

    Raises:
        ConfigError: an option would have no effect, or its ranks cannot be started so.
    """
    from mics.training.jobs.templates import OPTIONS, TEMPLATES

    template = TEMPLATES[config.kind]
    given = [name for name in OPTIONS if getattr(config, name) and name not in template.options]
    if config.mount and config.kind in ("slurm", "parallelcluster") and not config.container:
        given.append("mount")
    if given:
        without = " without --container" if given == ["mount"] and template.options else ""
        raise ConfigError(
            f"{' and '.join(f'--{name}' for name in given)} would have no effect on a job of "
            f"{config.kind}{without}.",
            write="the other options alone",
        )
    if config.launcher != "auto" and config.launcher not in template.launchers:
        raise ConfigError(
            f"Ranks of {config.kind} are not started by {config.launcher}.",
            write=" or ".join(f"--launcher {name}" for name in template.launchers),
        )


def _gpus(config: Config, of_node: int | None) -> int:
    if config.gpus_per_node is None:
        return of_node or 8
    if of_node is not None and config.gpus_per_node > of_node:
        raise ConfigError(
            f"A {config.node} has fewer GPUs.",
            numbers=f"--gpus-per-node {config.gpus_per_node}, it has {of_node}.",
            write=f"--gpus-per-node {of_node}, or leave it out",
        )
    return config.gpus_per_node


def _network(config: Config, instance: Instance | None) -> Network:
    has_efa = instance is not None and instance.efa > 0
    if config.network == "auto":
        return "efa" if has_efa else "ethernet"
    if instance is not None and config.network == "infiniband":
        raise ConfigError(
            f"AWS joins its {instance.name} by EFA.", write="--network efa, or leave it out"
        )
    return config.network


def _command(config: Config) -> str:
    """The command that has these options, for the head of the files."""
    words = ["mics", "new", config.kind]
    for field in fields(config)[1:]:
        value = getattr(config, field.name)
        if value != field.default and field.name != "out":
            texts = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, texts)]
    return shlex.join(words)


def _check_out(folder: Path, names: list[str]) -> None:
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}.", write=f"mkdir -p {folder}")
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise ConfigError(
            f"{folder} has {' and '.join(there)} already.", write="another --out, or remove it"
        )
