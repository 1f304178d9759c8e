"""Start ranks as programs that end: by an exception, early, or killed. What each wrote is kept.

Unlike those of ``ranks.py``, a rank that is done closes its connections, and the others see it.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # FSDP2 imports it on its first call; once here instead of once per rank
import torch.distributed as dist
import torch.distributed.fsdp

DEADLINE = 40.0  # seconds after which ranks that have not ended are killed


@dataclass(frozen=True)
class End:
    """How one rank ended.

    Args:
        code: its exit code; ``None`` if it had to be killed.
        seconds: after the start of all.
        text: what it wrote.
    """

    code: int | None
    seconds: float
    text: str


def run_programs(
    function: Callable[[int], object],
    folder: Path,
    *,
    world: int = 4,
    kept_by_first_rank: bool = False,
    patience: float = 2.0,
    timeout: float = 60.0,
    until: str = "",
    of: tuple[int, ...] | None = None,
) -> list[End]:
    """Run ``function(rank)`` as the main part of a program on every rank.

    Args:
        function: what a rank does; it may be local to the test.
        folder: for what the ranks write.
        world: how many ranks.
        kept_by_first_rank: whether rank 0 keeps the store, which else is a file.
        patience: MICS_WAIT_SECONDS.
        timeout: of the process group, in seconds.
        until: they are killed once one of them has written this.
        of: they are killed once these have ended; by default all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] if kept_by_first_rank else 0
    context = mp.get_context("fork")
    began = time.monotonic()
    processes = []
    for rank in range(world):
        arguments = (function, rank, world, folder, port, patience, timeout)
        process = context.Process(target=_main, args=arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads (3.12)
            process.start()
        processes.append(process)
    ended: dict[int, float] = {}
    awaited = set(range(world) if of is None else of)
    while not awaited <= ended.keys() and time.monotonic() < began + DEADLINE:
        for rank, process in enumerate(processes):
            if rank not in ended and process.exitcode is not None:
                ended[rank] = time.monotonic() - began
        time.sleep(0.02)
        if until and any(until in file.read_text() for file in folder.glob("*.txt")):
            break
    for process in processes:
        process.kill()
        process.join()
    return [
        End(
            process.exitcode if rank in ended else None,
            ended.get(rank, DEADLINE),
            (folder / f"{rank}.txt").read_text(),
        )
        for rank, process in enumerate(processes)
    ]


def _main(
    function: Callable[[int], object],
    rank: int,
    world: int,
    folder: Path,
    port: int,
    patience: float,
    timeout: float,
) -> None:
    written = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stderr = os.fdopen(2, "w")  # not pytest's
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MICS_PROFILE": str(folder / "profile.json"),
        "MICS_WAIT_SECONDS": str(patience),
    }
    torch.set_num_threads(1)
    if port:
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0, wait_for_workers=False)
    else:
        store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    del store
    try:
        function(rank)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as the interpreter does
        sys.exit(1)
