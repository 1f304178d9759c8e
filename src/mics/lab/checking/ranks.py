"""Ranks of a script that is checked: processes of this machine that stand for nodes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mics.lab.checking import stand_ins
from mics.lab.checking.leaving import Enough, Leaving, all_written, report_of
from mics.lab.checking.observer import Observer
from mics.lab.checking.outcome import Job, Outcome, check
from mics.lab.checking.report import RankReport
from mics.lab.checking.script import run_script
from mics.lab.checking.standing import Trail, standings, steps_of
from mics.ranks.console import progress
from mics.ranks.device import HOST, ranks_can_fork
from mics.ranks.interfaces import LOOPBACK, loopback

_LAST_WORDS_SECONDS = 3.0  # for a rank that fails first, and is not the first to be seen
_LEAVING_SECONDS = 10.0  # for a script's own clean-up


class _WantsGpus(Exception):
    """The script names GPUs, and has failed because there are none."""


def observe(job: Job) -> list[RankReport]:
    """Run a script on ranks of this machine, until it ends or has taken enough steps.

    Rank 0's output goes to standard error, that of others nowhere. A script that fails for want of
    GPUs is read again ([Note: read otherwise] in ``script.py``).

    Returns:
        What each rank has seen, in the order of ranks.

    Raises:
        CheckError: the script failed, or took too long.
    """
    try:
        return _run_ranks(job, without_gpus=False)
    except _WantsGpus:
        progress(f"{job.words[0]} wants GPUs; it is run once more with the host in their place")
        return _run_ranks(job, without_gpus=True)


def _run_ranks(job: Job, *, without_gpus: bool) -> list[RankReport]:
    with tempfile.TemporaryDirectory(prefix="mics-check-") as name:
        folder = Path(name)
        context: Any = get_context("fork" if ranks_can_fork(HOST) else "spawn")
        port = _free_port()
        ranks: list[BaseProcess] = [
            context.Process(target=_rank, args=(job, rank, port, folder, without_gpus))
            for rank in range(job.world)
        ]
        sys.stdout.flush()
        sys.stderr.flush()
        with _ended(ranks):
            for rank in ranks:
                rank.start()
            in_time = _wait(ranks, folder, time.monotonic() + job.seconds)
            outcome = _outcome(ranks, folder, in_time=in_time)
    failed = [report for report in outcome.reports if report.failed]
    if failed and not without_gpus and any("cuda" in one.failed.lower() for one in failed):
        raise _WantsGpus
    check(job, outcome)
    return outcome.reports


def _outcome(ranks: Sequence[BaseProcess], folder: Path, *, in_time: bool) -> Outcome:
    """What has become of the ranks, before those that are left are killed."""
    codes = [rank.exitcode for rank in ranks]
    files = [report_of(folder, number) for number in range(len(ranks))]
    said = [number for number, file in enumerate(files) if file.exists()]
    living = {n: rank.pid for n, rank in enumerate(ranks) if n not in said and rank.pid}
    living = {number: pid for number, pid in living.items() if codes[number] is None}
    reports = [RankReport.from_text(files[number].read_text()) for number in said]
    return Outcome(
        reports,
        codes,
        [steps_of(folder, number) for number in range(len(ranks))],
        [] if in_time else standings(folder, living, said),
        in_time,
    )


def _wait(ranks: Sequence[BaseProcess], folder: Path, deadline: float) -> bool:
    """Wait until all ranks have ended, one has failed, or time is over; tell whether it was not."""
    written: float | None = None
    while time.monotonic() < deadline:
        if all(rank.exitcode is not None for rank in ranks):
            return True
        now = time.monotonic()
        failed = any(rank.exitcode not in (None, 0) for rank in ranks)
        if written is None and (failed or all_written(folder, len(ranks))):
            written = now + (_LAST_WORDS_SECONDS if failed else _LEAVING_SECONDS)
        if written is not None and now > written:
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def _ended(ranks: Sequence[BaseProcess]) -> Iterator[None]:
    """No rank outlives this."""
    try:
        yield
    finally:
        for rank in ranks:
            if rank.pid is not None and rank.exitcode is None:
                _kill(rank.pid)
        for rank in ranks:
            if rank.pid is not None:
                rank.join()


def _kill(pid: int) -> None:
    """Kill a rank, and what it has started; it is not reaped yet, so its number is its own."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to make its group
        os.kill(pid, signal.SIGKILL)


# -- one rank ------------------------------------------------------------------------------------


def _rank(job: Job, rank: int, port: int, folder: Path, without_gpus: bool) -> None:
    """Run the script as this rank, and write down what was seen; never returns."""
    _become(job, rank, port)
    report = RankReport(rank)
    code = 0

    def text() -> str:
        report.read_as = stand_ins.read_as
        return report.to_text()

    leaving = Leaving(folder, rank, job.world, text)
    try:
        observer = Observer(report, job.steps, leaving.enough, Trail(folder, rank))
        with observer:
            run_script(job.words, without_gpus=without_gpus)
            observer.end()
        leaving.say()
        leaving.wait_for_others()
    except Enough:
        pass
    except SystemExit as error:
        code = 0 if error.code in (None, 0) else 1
        if code:
            report.failed, report.time = _words(error), time.time()
        elif not leaving.said:
            observer.end()
            leaving.say()
            leaving.wait_for_others()
    except BaseException as error:
        code = 1
        report.failed, report.time = _words(error), time.time()
    finally:
        leaving.say()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of Gloo may be waiting for ranks that have gone


def _become(job: Job, rank: int, port: int) -> None:
    os.setsid()  # what it starts ends with it
    node, local_rank = divmod(rank, job.ranks_per_node)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(job.world),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(job.ranks_per_node),
        GROUP_RANK=str(node),
        GROUP_WORLD_SIZE=str(job.nodes),
        MASTER_ADDR=LOOPBACK,
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME=loopback(),
        CUDA_VISIBLE_DEVICES="",
        TORCH_COMPILE_DISABLE="1",  # what is sent does not depend on it, and compiling takes long
    )
    _speak_on(2 if rank == 0 else os.open(os.devnull, os.O_WRONLY))
    from torch import set_num_threads

    set_num_threads(1)
    random.seed()  # a fork has its parent's state; ranks that are started have none in common
    # About the hooks by which we look, which see a compiled module twice.
    warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are")


def _speak_on(target: int) -> None:
    """Let what a rank prints go to a descriptor; a report alone is on standard output."""
    os.dup2(target, 1)
    sys.stdout = os.fdopen(os.dup(target), "w", buffering=1)
    if target != 2:
        os.dup2(target, 2)
        sys.stderr = sys.stdout


def _words(error: BaseException) -> str:
    """A traceback without what stands around the script."""
    own = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    while frames and frames[0].filename.startswith(own):
        del frames[0]
    lines = ["Traceback (most recent call last):\n", *frames.format()]
    return "".join([*lines, *traceback.format_exception_only(error)])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port: int = free.getsockname()[1]
        return port
