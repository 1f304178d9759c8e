"""How a verb gets its ranks: those of a launcher, or local ones that it starts itself."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
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
    """The device ranks of this machine communicate on: ``wanted``, unless that is "auto".

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


def _make_group(store: Store, launch: Launch, device_type: str, seconds: float) -> None:
    backend = "gloo"
    if on_accelerator(device_type):
        backend = f"cpu:gloo,{device_type}:{dist.get_default_backend_for_device(device_type)}"
        use_local_device(launch.local_rank, device_type)
    dist.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world,
        timeout=timedelta(seconds=seconds),
    )


# -- ranks of our own ----------------------------------------------------------------------------

Work = Callable[..., int]
"""What a rank does: called with its ``Launch`` and more, returns the rank's exit code."""


def run_local_ranks(
    work: Work, ranks: int, device_type: str, seconds: float, *arguments: Any
) -> int:
    """Run ``work(launch, *arguments)`` on ``ranks`` processes of this machine.

    They meet in a temporary file and talk over the loopback interface. A rank that raises, dies or
    returns another code than 0 ends the others; what it raised is printed on standard error.

    Returns:
        0 when every rank returned 0, else 1.
    """
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="mics-") as folder:
        context = start_processes(  # type: ignore[no-untyped-call]
            _local_rank,
            args=(ranks, folder, device_type, seconds, work, arguments),
            nprocs=ranks,
            join=False,
            daemon=True,  # an interrupt here ends them
            start_method="fork" if ranks_can_fork(device_type) else "spawn",
        )
        try:
            while not context.join(grace_period=2):
                pass
        except ProcessRaisedException as error:
            print(f"mics: rank {error.error_index} raised{error}", file=sys.stderr)
            return 1
        except ProcessExitedException as error:
            if error.exit_code != 1:  # with 1, rank 0 has said why
                print(f"mics: rank {error.error_index}: {error}", file=sys.stderr)
            return 1
    return 0


def _local_rank(
    rank: int,
    ranks: int,
    folder: str,
    device_type: str,
    seconds: float,
    work: Work,
    arguments: tuple[Any, ...],
) -> None:
    # Ends quietly on ctrl-C, and when the parent dies (torch asks the kernel for this signal).
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not on_accelerator(device_type):
        torch.set_num_threads(1)
    listen_on_loopback()
    launch = Launch(LOCAL, rank, ranks, rank, ranks)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)  # type: ignore[attr-defined]
    _make_group(store, launch, device_type, seconds)
    code = work(launch, *arguments)
    dist.destroy_process_group()
    sys.exit(code)
