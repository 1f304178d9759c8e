"""Start ranks as processes of this machine and collect what they return or raise.

Gloo ranks are forked. NCCL ranks are spawned, because CUDA does not survive a fork; they may share
one GPU, each being told that it is a host of its own (NCCL refuses a GPU twice on one host).
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo  # FSDP2 imports it on its first call; once here instead of once per rank
import torch.distributed as dist
import torch.distributed.fsdp
from torch.distributed.device_mesh import DeviceMesh

import mics

SECONDS = 150.0


class RankFailed(AssertionError):
    """A rank raised; the message is its own traceback."""


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    ranks_per_node: int | None = None,
    backend: Literal["gloo", "nccl"] = "gloo",
) -> list[Any]:
    """Run ``function(*args)`` on ``world`` ranks; return what each returned, in rank order.

    The first rank that raises ends all of them and its traceback is raised here.
    """
    results = collect_ranks(function, world, *args, ranks_per_node=ranks_per_node, backend=backend)
    failed = [text for kind, text in results if kind == "raised"]
    if failed:
        raise RankFailed(failed[0])
    return [value for _, value in results]


def errors_of_ranks(
    function: Callable[..., Any], world: int, *args: Any, ranks_per_node: int | None = None
) -> list[str]:
    """Run on all ranks, every one of which must raise; return the tracebacks."""
    results = collect_ranks(
        function, world, *args, ranks_per_node=ranks_per_node, stop_at_first=False
    )
    returned = [rank for rank, (kind, _) in enumerate(results) if kind == "returned"]
    assert not returned, f"ranks {returned} did not raise"
    return [text for _, text in results]


def collect_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    ranks_per_node: int | None = None,
    stop_at_first: bool = True,
    backend: Literal["gloo", "nccl"] = "gloo",
) -> list[tuple[str, Any]]:
    """Run on all ranks; ("returned", value) or ("raised", traceback) for each.

    A rank that is done stays until all are: its sockets must not close under a rank that is still
    connecting, and a rank that waits for it must not be saved by its end.
    """
    context = mp.get_context("fork" if backend == "gloo" else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        processes = []
        # What is here already is no garbage of the ranks: to look through it all would copy every
        # page of it into each of them.
        gc.freeze()
        for rank in range(world):
            ours, theirs = context.Pipe()
            place = Place(rank, world, ranks_per_node or world, folder, backend)
            process = context.Process(target=_rank_main, args=(place, theirs, function, args))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads (3.12)
                process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        gc.unfreeze()
        results: dict[int, tuple[str, Any]] = {}
        try:
            while len(results) < world:
                ready = wait([p for r, p in enumerate(pipes) if r not in results], SECONDS)
                if not ready:
                    missing = [r for r in range(world) if r not in results]
                    raise TimeoutError(f"ranks {missing} said nothing for {SECONDS} s")
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        results[rank] = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        results[rank] = ("raised", _last_words(processes[rank], rank, folder))
                if stop_at_first and any(kind == "raised" for kind, _ in results.values()):
                    break
        finally:
            for pipe in pipes:
                with contextlib.suppress(BrokenPipeError):
                    pipe.send_bytes(b"leave")
            for process in processes:
                process.join(0.2 if len(results) < world else 10)
                if process.is_alive():
                    process.kill()
                    process.join()
            _pass_on_words(folder, world)
    return [results.get(rank, ("stopped", "")) for rank in range(world)]


@functools.cache
def mesh_of_rank(partition: int, gpus_per_node: int | None = None) -> DeviceMesh:
    """Return this rank's mesh of a layout, made once; collective the first time.

    Every process group of Gloo has a thread that wakes 100 times a second. Ranks that make new
    groups for each of many models spend a third of their time on those of the models before.
    """
    return mics.init_mesh(partition=partition, gpus_per_node=gpus_per_node)


@dataclass(frozen=True)
class Place:
    """Where one rank stands."""

    rank: int
    world: int
    ranks_per_node: int
    folder: str
    backend: str


def _last_words(process: mp.process.BaseProcess, rank: int, folder: str) -> str:
    """Return how a rank ended that could not answer, and where its threads were then."""
    process.join(10)
    words = Path(folder, f"words{rank}").read_text(errors="replace")
    return f"rank {rank} died, exit code {process.exitcode}; its last words: {words or 'none'}"


def _pass_on_words(folder: str, world: int) -> None:
    """Write to this process's stderr what the ranks wrote to theirs."""
    for rank in range(world):
        with contextlib.suppress(FileNotFoundError):  # it died before it could write
            os.write(2, Path(folder, f"words{rank}").read_bytes())


def _rank_main(
    place: Place, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    _set_environment(place)
    torch.set_num_threads(1)
    # What ends a rank between two lines of Python leaves its words and its stacks.
    words = os.open(f"{place.folder}/words{place.rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(words, 2)
    faulthandler.enable(words)
    try:
        if place.backend == "nccl":
            torch.accelerator.set_device_index(place.rank % torch.accelerator.device_count())
        store = dist.FileStore(f"{place.folder}/store", place.world)
        backend = "gloo" if place.backend == "gloo" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world)
        answer = ("returned", function(*args))
    except BaseException:
        answer = ("raised", f"rank {place.rank}: {traceback.format_exc()}")
    # Plain pickle copies tensors; the pipe's own would share memory that dies with this process.
    pipe.send_bytes(pickle.dumps(answer))
    pipe.poll(SECONDS)  # until the others are done too
    # Gloo sometimes aborts in static destructors; everything of interest has been sent.
    os._exit(0)


def _set_environment(place: Place) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        os.environ.pop(name, None)
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_RANK": str(place.rank % place.ranks_per_node),
        "LOCAL_WORLD_SIZE": str(place.ranks_per_node),
        "MICS_PROFILE": os.environ.get("MICS_PROFILE", f"{place.folder}/profile.json"),
    }
    if place.backend == "nccl":
        os.environ |= {"NCCL_HOSTID": str(place.rank), "NCCL_SOCKET_IFNAME": "lo"}
