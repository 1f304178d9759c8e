"""Ranks for a run: those of a launcher, or ranks of this machine through torchrun's own API."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mics.errors import ConfigError, MicsError
from mics.ranks.device import default_device_type, on_accelerator, ranks_can_fork
from mics.ranks.launcher import Launch, listen_on_loopback, read_launch
from mics.training.config import TrainConfig

Work = Callable[[TrainConfig], int]
"""What every rank does; returns the rank's exit code."""

_STOPPING = (signal.SIGTERM, signal.SIGINT)


def run_on_ranks(work: Work, config: TrainConfig) -> int:
    """Run ``work(config)`` on every rank of the job, or on ranks started here.

    Returns:
        The exit code: the largest that a rank returned; 1 when one failed, which is then the last
        thing said: a MicsError's message, or the traceback of the rank that failed first.

    Raises:
        ConfigError: the number of ranks contradicts the launcher, or there are no such devices.
    """
    launch = read_launch()
    if launch is None:
        return _start_ranks(work, config, num_ranks(config, None))
    num_ranks(config, launch)
    return _as_rank_of_launcher(work, config, launch)


def num_ranks(config: TrainConfig, launch: Launch | None) -> int:
    """How many ranks there are, or are to be started.

    Raises:
        ConfigError: more than there are accelerators, or other than the launcher's.
    """
    wanted = config.parallel.ranks
    if wanted is not None and wanted < 1:
        raise ConfigError(
            "parallel.ranks must be at least 1.",
            numbers=f"parallel.ranks = {wanted}.",
            write="--parallel.ranks 1, or leave it out",
        )
    if launch is not None:
        if wanted not in (None, launch.world):
            raise ConfigError(
                f"parallel.ranks is for ranks started here, but {launch.source} has started some.",
                numbers=f"parallel.ranks = {wanted}, {launch.source} started {launch.world}.",
                write="leave --parallel.ranks out",
            )
        return launch.world
    if not on_accelerator(default_device_type()):
        return wanted or 1
    devices = torch.accelerator.device_count()
    if wanted is not None and wanted > devices:
        raise ConfigError(
            "There are fewer accelerators than ranks.",
            numbers=f"parallel.ranks = {wanted}, {devices} accelerator(s).",
            write=f"--parallel.ranks {devices}",
        )
    return wanted or devices


# -- ranks of a launcher ---------------------------------------------------------------------------


def _as_rank_of_launcher(work: Work, config: TrainConfig, launch: Launch) -> int:
    try:
        code = work(config)
        _leave_groups()
        return code
    except MicsError as error:
        # Most errors are every rank's, and are said once: the launcher ends the others when the
        # first rank leaves. What is still here after a while has something of its own to say.
        if launch.rank != 0:
            time.sleep(3)
        print(f"mics: rank {launch.rank}: {error}", file=sys.stderr, flush=True)
        return 1


# -- ranks of our own ------------------------------------------------------------------------------


def _start_ranks(work: Work, config: TrainConfig, ranks: int) -> int:
    # torchrun's agent reports failures at length; what a rank had to say comes last, from here.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    listen_on_loopback()
    launcher = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="mics",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="fork" if ranks_can_fork(default_device_type()) else "spawn",
        # SIGTERM and ctrl-C are for the ranks: they save and end by themselves.
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="mics-") as folder, _passing_signals_on() as passed:
        try:
            codes: dict[int, int] = elastic_launch(launcher, _rank)(work, config, ranks, folder)
        except ChildFailedError as error:
            words = _first_words(Path(folder), error, interrupted=bool(passed))
            print(words, file=sys.stderr, flush=True)
            return 1
    return max(codes.values())


def _rank(work: Work, config: TrainConfig, ranks: int, folder: str) -> int:
    for number in _STOPPING:
        signal.signal(number, signal.SIG_DFL)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    parent = os.getppid()
    try:
        code = work(config)
        _leave_groups()
    except BaseException as error:
        rank = int(os.environ["RANK"])
        meant = isinstance(error, MicsError)
        words = str(error) if meant else traceback.format_exc()
        report = {"time": time.time(), "rank": rank, "words": words, "meant": meant}
        (Path(folder) / f"{rank}.json").write_text(json.dumps(report))
        os._exit(1)  # threads of a backend may be waiting for ranks that have gone
    # From here on torchrun's wrapper waits for a word of the parent, for ever if that was killed.
    threading.Thread(target=_leave_with, args=(parent, code), daemon=True).start()
    return code


def _leave_groups() -> None:
    """Close connections while the interpreter is whole: a backend has threads of its own."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # modules and their hooks refer to each other, and to groups


def _leave_with(parent: int, code: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(code)


def _first_words(folder: Path, error: ChildFailedError, *, interrupted: bool) -> str:
    reports = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    if interrupted:  # ranks that lose a peer to the signal have tracebacks, of no interest
        reports = [report for report in reports if report["meant"]]
        if not reports:
            return "mics: interrupted"
    if not reports:
        rank, failure = error.get_first_failure()
        return f"mics: rank {rank} ended with exit code {failure.exitcode} and said nothing"
    first = min(reports, key=lambda report: report["time"])
    return f"mics: rank {first['rank']}: {first['words']}"


@contextmanager
def _passing_signals_on() -> Iterator[list[int]]:
    """SIGTERM and ctrl-C of this process go to the ranks, which decide what to do.

    Yields:
        The signals that have been passed on.
    """
    passed: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    before = {number: signal.signal(number, pass_on) for number in _STOPPING}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
