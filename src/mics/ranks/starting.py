"""How a verb gets its ranks: those of a launcher, or local ones that it starts itself."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
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
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

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
from mics.ranks.launcher import Launch, export_torch_variables, listen_on_loopback

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
    with tempfile.TemporaryDirectory(prefix="mics-") as name, _passing_signals_on() as passed:
        folder = Path(name)
        context = start_processes(  # type: ignore[no-untyped-call]
            _local_rank,
            args=(ranks, folder, device_type, seconds, work, arguments),
            nprocs=ranks,
            join=False,
            start_method="fork" if ranks_can_fork(device_type) else "spawn",
        )
        silent = _first_to_die(context, folder)
        reports = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    failed = [report for report in reports if "words" in report]
    if silent is None and not failed:
        return max((report["code"] for report in reports), default=0)
    _say_why(silent, failed, interrupted=bool(passed))
    return 1


def _first_to_die(context: Any, folder: Path) -> str | None:
    """Wait for the ranks; returns who of them was the first to die and left no report, and how."""
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        if not _report_of(folder, error.error_index).exists():
            return f"rank {error.error_index} ended with exit code {error.exit_code}"
    return None


def _say_why(silent: str | None, failed: list[dict[str, Any]], *, interrupted: bool) -> None:
    if interrupted:  # ranks that lose a peer to the signal have tracebacks, of no interest
        silent, failed = None, [report for report in failed if report["bug"] is None]
        if not failed:
            say("interrupted")
    if silent is not None:
        say(f"{silent} and said nothing")
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
    for number in _PASSED_ON:  # SIGINT comes from the kernel too, when the parent dies
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    listen_on_loopback()
    launch = Launch(LOCAL, rank, ranks, rank, ranks)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(ranks)
    try:
        store = dist.FileStore(str(folder / "store"), ranks)  # type: ignore[attr-defined]
        _make_group(store, launch, device_type, seconds)
        code = work(launch, *arguments)
        leave_groups()
    except BaseException as error:
        bug = None if isinstance(error, MicsError) else type(error).__name__
        words = str(error) if bug is None else traceback.format_exc()
        _report(folder, rank, time=time.time(), bug=bug, words=words)
        sys.stdout.flush()
        os._exit(1)  # threads of a backend may be waiting for ranks that have gone
    _report(folder, rank, code=code)


def _report(folder: Path, rank: int, **facts: Any) -> None:
    unnamed = folder / f"{rank}.part"  # a rank may be killed while it writes
    unnamed.write_text(json.dumps({"rank": rank, **facts}))
    unnamed.replace(_report_of(folder, rank))


def _report_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


@contextmanager
def _passing_signals_on() -> Iterator[list[int]]:
    """Hand the signals that would end this process to the ranks, which decide what to do.

    Yields:
        The signals that have been passed on.
    """
    passed: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, pass_on)
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
