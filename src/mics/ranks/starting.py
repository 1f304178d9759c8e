"""Ranks of this machine that a verb starts itself, where no launcher has."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from mics.errors import MicsError
from mics.ranks.console import say
from mics.ranks.device import (
    HOST,
    default_device_type,
    num_devices,
    ranks_can_fork,
    use_local_device,
)
from mics.ranks.files import write_whole
from mics.ranks.interfaces import LOOPBACK, listen_on_loopback
from mics.ranks.joining import backend_on, make_world
from mics.ranks.launcher import Launch
from mics.ranks.whereabouts import say_failure

LOCAL = "mics"
"""The ``source`` of a ``Launch`` whose ranks were started here."""


def choose_device_type(wanted: str, ranks_here: int) -> str:
    """Choose what ranks of this machine communicate on: ``wanted``, unless that is "auto".

    "auto" is the accelerator when there is one for every rank of this machine, else the CPU.
    """
    if wanted != "auto":
        return wanted
    accelerator = default_device_type()
    if num_devices(accelerator) < ranks_here:
        return HOST
    return accelerator


# -- ranks of our own ----------------------------------------------------------------------------

Work = Callable[..., int]
"""What a rank does: called with its ``Launch`` and more, returns the rank's exit code."""

ASK_TO_END = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
"""A scheduler's signals, ctrl-C and ctrl-\\ from a person, and a terminal that was closed."""


def run_local_ranks(
    work: Work, ranks: int, device_type: str, seconds: float | None, *arguments: Any
) -> int:
    """Run ``work(launch, *arguments)`` on ``ranks`` processes of this machine.

    They are told who they are in torchrun's variables and have a process group when the work
    begins. They meet in a temporary file, talk over the loopback interface and report in text:
    nothing listens on the network, and nothing that others could have written is unpickled.

    A rank that raises or dies ends the others. Signals that end this process go to the ranks, which
    may save and end in their own way; they end as well if this process is killed.

    Args:
        work: what every rank does; a function of a module where ranks cannot be forked.
        ranks: how many to start.
        device_type: what they communicate on.
        seconds: how long a rank waits for the others; ``None`` is torch's own choice.
        arguments: what the work is called with, behind its ``Launch``.

    Returns:
        The largest code that a rank returned; 1 when one failed. Why is then the last thing said on
        standard error: a MicsError's message, or the traceback of the rank that failed first.
    """
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # of ranks it ends
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="mics-") as name, _passing_signals_on() as signals:
        folder = Path(name)
        with _starting_in(folder):
            context = start_processes(  # type: ignore[no-untyped-call]
                _local_rank,
                args=(ranks, folder, device_type, seconds, work, arguments),
                nprocs=ranks,
                join=False,
                start_method="fork" if ranks_can_fork(device_type) else "spawn",
            )
        signals.pass_to(context.pids())
        silent = _first_to_die(context, folder)
        reports = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    failed = [report for report in reports if "words" in report]
    if silent is None and not failed:
        return max((report["code"] for report in reports), default=0)
    _say_why(silent, failed, interrupted=bool(signals.passed))
    return 1


def _first_to_die(context: Any, folder: Path) -> str | None:
    """Wait for the ranks; returns who of them was the first to die and left no report, and how."""
    try:
        while not context.join():
            pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        if not _report_of(folder, error.error_index).exists():
            if isinstance(error, ProcessRaisedException):
                return f"rank {error.error_index}: {error.msg.strip()}"
            silence = "said nothing" if error.exit_code < 0 else "left no report"
            return f"rank {error.error_index} ended with exit code {error.exit_code} and {silence}"
    return None


@contextmanager
def _starting_in(folder: Path) -> Iterator[None]:
    """What is started meanwhile has its error files in ``folder``, and its signals wait.

    torch unpickles whatever stands under an error file's name, so others must not write there.
    A rank that has a signal before it has set its handlers would lose it.
    """
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ASK_TO_END)
    try:
        yield
    finally:
        tempfile.tempdir = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _say_why(silent: str | None, failed: list[dict[str, Any]], *, interrupted: bool) -> None:
    if interrupted:  # ranks that lose a peer to the signal have tracebacks, of no interest
        silent, failed = None, [report for report in failed if report["bug"] is None]
        if not failed:
            say("interrupted")
    if silent is not None:
        say(silent)
    if failed:
        first = min(failed, key=lambda report: report["time"])
        if first["bug"] is not None:
            say(f"rank {first['rank']} raised {first['bug']}")
        say(f"rank {first['rank']}: {first['words']}")


def leave_groups() -> None:
    """Close connections while the interpreter is whole: a backend has threads of its own."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # modules and their hooks refer to each other, and to groups


def _local_rank(
    rank: int,
    ranks: int,
    folder: Path,
    device_type: str,
    seconds: float | None,
    work: Work,
    arguments: tuple[Any, ...],
) -> None:
    try:
        _become(rank, ranks)
        launch = Launch(LOCAL, rank, ranks, rank, ranks)
        store = dist.FileStore(str(folder / "store"), ranks)  # type: ignore[attr-defined]
        use_local_device(rank, device_type)
        make_world(store, launch, backend_on(device_type), seconds)
        code = work(launch, *arguments)
        leave_groups()
        _report(folder, rank, code=code)
    except BaseException as error:
        say_failure(error)
        bug = None if isinstance(error, MicsError) else type(error).__name__
        words = str(error) if bug is None else traceback.format_exc()
        facts = {"time": time.time(), "bug": bug, "words": words}
        code = 1
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code
            facts = {"code": code}
        try:
            _report(folder, rank, **facts)
            sys.stdout.flush()
        except OSError:  # such as a full disk, which may be what the words are about
            print(f"mics: rank {rank}: {words}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)  # threads of a backend may be waiting for ranks that have gone


def _become(rank: int, ranks: int) -> None:
    """Take over from the process that started this one: signals, threads and environment."""
    tempfile.tempdir = None
    for number in ASK_TO_END:  # SIGINT comes from the kernel too, when the parent dies
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASK_TO_END)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    overruled = listen_on_loopback()
    if overruled and rank == 0:
        say(f"{' and '.join(overruled)} is for several nodes; ranks of this one use loopback")
    os.environ["MASTER_ADDR"] = LOOPBACK
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(ranks)


def _report(folder: Path, rank: int, **facts: Any) -> None:
    write_whole(_report_of(folder, rank), json.dumps({"rank": rank, **facts}))


def _report_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


class _Signals:
    """Signals on their way to the ranks; those of before the ranks' start wait for it."""

    def __init__(self) -> None:
        self.passed: list[int] = []
        self._pids: list[int] = []

    def come(self, number: int, frame: FrameType | None) -> None:
        self.passed.append(number)
        self._send(number)

    def pass_to(self, pids: list[int]) -> None:
        waiting = tuple(self.passed)
        self._pids = pids
        for number in waiting:
            self._send(number)

    def _send(self, number: int) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def _passing_signals_on() -> Iterator[_Signals]:
    """Hand the signals that would end this process to the ranks, which decide what to do."""
    signals = _Signals()
    before = {number: signal.getsignal(number) for number in ASK_TO_END}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, signals.come)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
