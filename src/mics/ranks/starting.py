"""How a verb gets its ranks: those of a launcher, or local ones that it starts itself."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
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
    on_accelerator,
    ranks_can_fork,
    use_local_device,
)
from mics.ranks.drawing import ranks_text
from mics.ranks.files import write_whole
from mics.ranks.launcher import Launch, export_torch_variables, listen_on_loopback
from mics.ranks.whereabouts import say_failure

LOCAL = "mics"
"""The ``source`` of a ``Launch`` whose ranks were started here."""

_POLL_SECONDS = 0.2


class RanksMissing(MicsError):
    """Announced ranks that did not come. Every rank that did raises it."""

    ranks: list[int]


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


# -- ranks of a launcher -------------------------------------------------------------------------


def join(launch: Launch, device_type: str, seconds: float) -> None:
    """Make the process group of a launched job; nothing waits longer than ``seconds``.

    The CPU side is always Gloo, so that ranks can compare notes before the accelerator's backend
    is used for the first time.

    Raises:
        MicsError: rank 0 cannot be reached, or some ranks did not come: it names them.
        TopologyError: the launcher does not say where rank 0 listens.
    """
    export_torch_variables(launch)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent keeps a store; elsewhere rank 0 does. Not waiting for the others here is
    # what lets the roll call name the missing.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            launch.world,
            is_master=launch.rank == 0 and not agent,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        raise MicsError(
            f"Rank {launch.rank} on {socket.gethostname()} cannot reach rank 0 at "
            f"{address}:{port} within {seconds:g} s.",
            numbers=str(error).split("\n")[0],
            write="MASTER_ADDR=<host of rank 0> and a MASTER_PORT that is open between the nodes",
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    rendezvous = PrefixStore(f"mics/{attempt}", store)
    _call_the_roll(rendezvous, launch, seconds)
    _make_group(rendezvous, launch, device_type, seconds)


def _call_the_roll(store: Store, launch: Launch, seconds: float) -> None:
    store.set(f"here/{launch.rank}", socket.gethostname())
    store.add("come", 1)
    deadline = time.monotonic() + seconds
    # Asking again and again instead of store.wait, which logs pages when its time is up.
    while store.add("come", 0) < launch.world:
        if time.monotonic() > deadline:
            raise _missing(store, launch, seconds)
        time.sleep(_POLL_SECONDS)


def _missing(store: Store, launch: Launch, seconds: float) -> RanksMissing:
    ranks = [rank for rank in range(launch.world) if not store.check([f"here/{rank}"])]
    error = RanksMissing(
        f"Rank(s) {ranks_text(ranks)} of {launch.world} did not come within {seconds:g} s.",
        numbers=f"{launch.source} announced {launch.world} ranks; rank {launch.rank} is on "
        f"{socket.gethostname()}.",
        write="the same command on every node (Slurm: srun mics ...)",
    )
    error.ranks = ranks
    if launch.rank == 0:
        time.sleep(5 * _POLL_SECONDS)  # the store ends with rank 0: let the others ask it too
    return error


def _make_group(store: Store, launch: Launch, device_type: str, seconds: float | None) -> None:
    backend = "gloo"
    if on_accelerator(device_type):
        backend = f"cpu:gloo,{device_type}:{dist.get_default_backend_for_device(device_type)}"
        use_local_device(launch.local_rank, device_type)
    dist.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world,
        timeout=None if seconds is None else timedelta(seconds=seconds),
    )


# -- ranks of our own ----------------------------------------------------------------------------

Work = Callable[..., int]
"""What a rank does: called with its ``Launch`` and more, returns the rank's exit code."""

# SIGTERM from a scheduler, ctrl-C from a person, and a terminal that was closed.
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
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
        _make_group(store, launch, device_type, seconds)
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
    for number in _PASSED_ON:  # SIGINT comes from the kernel too, when the parent dies
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    listen_on_loopback()
    os.environ["MASTER_ADDR"] = "127.0.0.1"
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
    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, signals.come)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
