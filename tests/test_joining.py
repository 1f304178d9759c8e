"""Ranks of a launcher meet: who is waited for is said, what is wrong is said by every rank."""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from doors import listeners, outer_addresses

import mics
from mics.errors import MicsError
from mics.ranks import arrival
from mics.ranks.arrival import Waiting
from mics.ranks.joining import RanksMissing, join, make_world
from mics.ranks.launcher import read_launch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork with threads (3.12)
HOST = socket.gethostname()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def processes(
    environments: list[dict[str, str]], folder: Path, seconds: float, *, delay: float = 0.0
) -> Iterator[list[dict[str, Any]]]:
    """Processes of a job that have met, or not; they stay as long as this is entered.

    Each says what it raised, what it wrote to standard error and on which addresses it listens.
    """
    context = mp.get_context("fork")
    pipes = []
    started = []
    for index, environment in enumerate(environments):
        ours, theirs = context.Pipe()
        arguments = (environment, folder / f"{index}.err", seconds, theirs)
        process = context.Process(target=_process, args=arguments)
        process.start()
        pipes.append(ours)
        started.append(process)
        time.sleep(delay)
    try:
        yield [json.loads(pipe.recv_bytes()) for pipe in pipes]
    finally:
        for pipe in pipes:
            pipe.send_bytes(b"leave")
        for process in started:
            process.join()


def _process(environment: dict[str, str], errors: Path, seconds: float, pipe: Connection) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ |= environment
    arrival.PATIENCE_SECONDS = 0.3
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = os.fdopen(2, "w")
    told: dict[str, Any] = {"error": "", "missing": None, "sum": None}
    try:
        launch = read_launch()
        assert launch is not None
        make_world(join(launch, "cpu", seconds), launch, "gloo", 20.0)
        total = torch.ones(())
        dist.all_reduce(total, group=dist.new_group())
        told["sum"] = float(total)
    except MicsError as error:
        told["error"] = str(error)
        told["missing"] = error.ranks if isinstance(error, RanksMissing) else None
    told["said"] = errors.read_text()
    told["listens"] = sorted({one.address for one in listeners(os.getpid())})
    pipe.send_bytes(json.dumps(told).encode())
    pipe.poll(100)
    os._exit(0)


def ranks(*numbers: int, world: int, **more: str) -> list[dict[str, str]]:
    """Variables of processes of one job; the same number twice is the same rank twice."""
    port = str(free_port())
    of_all = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | more
    return [of_all | {"RANK": str(number)} for number in numbers]


def test_a_rank_that_never_comes_is_named_by_all_and_said_while_it_is_waited_for(
    tmp_path: Path,
) -> None:
    with processes(ranks(0, 1, world=3), tmp_path, 2.0) as told:
        for one in told:
            assert one["error"].startswith("Rank(s) 2 of 3 did not come within 2 s.\n")
            assert "Write: the same command on every node (Slurm: srun mics ...)" in one["error"]
            assert one["missing"] == [2]
        words = f"mics: rank 0 on {HOST} waits for rank(s) 2 of the 3 that torchrun announced ("
        assert told[0]["said"].startswith(words)
        assert told[0]["said"].split("\n")[0].endswith("of 2 s)")


def test_two_processes_with_one_rank_end_all(tmp_path: Path) -> None:
    with processes(ranks(0, 1, 1, world=3), tmp_path, 20.0) as told:
        for one in told:
            assert one["error"].startswith("Two processes say that they are rank 1.\n")
            assert one["error"].count(f" on {HOST}") == 2
            assert "Write: a RANK of its own for every process" in one["error"]


def test_a_second_rank_0_is_told_that_its_port_is_in_use(tmp_path: Path) -> None:
    with processes(ranks(0, 0, world=2), tmp_path, 2.0, delay=0.5) as told:
        assert told[0]["missing"] == [1]
        assert "Rank 0 cannot listen on 127.0.0.1:" in told[1]["error"]
        assert "address already in use" in told[1]["error"]
        assert "another process that says it is rank 0" in told[1]["error"]
        assert "Write: MASTER_PORT=<a free port>, the same on every rank" in told[1]["error"]


def test_where_nobody_listens_it_is_said_that_rank_0_is_waited_for(tmp_path: Path) -> None:
    with processes(ranks(1, world=2), tmp_path, 1.5) as (told,):
        assert f"Rank 1 on {HOST} cannot reach rank 0 at 127.0.0.1:" in told["error"]
        assert "within 1.5 s.\n  The last try: connection refused." in told["error"]
        assert f"mics: rank 1 on {HOST} waits for rank 0 at 127.0.0.1:" in told["said"]
        assert "connection refused (" in told["said"]


@pytest.mark.parametrize("greets", [True, False], ids=["greets", "is silent"])
def test_another_server_on_the_port_is_known_for_one(greets: bool, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    held.append(connection)
                    if greets:
                        connection.sendall(b"SSH-2.0-OpenSSH_9\r\n")

        threading.Thread(target=serve, daemon=True).start()
        environments = ranks(1, world=2, MASTER_PORT=str(server.getsockname()[1]))
        with processes(environments, tmp_path, 2.5) as (told,):
            assert "is not rank 0 of this job, but another server.\n" in told["error"]
            assert "Write: MASTER_PORT=<a free port>, the same on every rank" in told["error"]
            if not greets:
                assert "It said nothing in " in told["error"]
                assert "waits for an answer of what listens at 127.0.0.1:" in told["said"]
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    ("of_rank_1", "words"),
    [
        (
            {"WORLD_SIZE": "3"},
            "Ranks were told different numbers of ranks.\n  Rank 0 was told 2, rank 1 (process ",
        ),
        (
            {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            f"Ranks 0 and 1 have the same place on their node.\n  LOCAL_RANK = 0 on {HOST} for",
        ),
    ],
    ids=["world", "local rank"],
)
def test_ranks_that_were_told_what_cannot_be_are_ended_all(
    of_rank_1: dict[str, str], words: str, tmp_path: Path
) -> None:
    first, second = ranks(0, 1, world=2)
    with processes([first, second | of_rank_1], tmp_path, 20.0) as told:
        for one in told:
            assert words in one["error"]


def test_ranks_of_one_machine_listen_on_loopback_though_rank_0_has_a_name(tmp_path: Path) -> None:
    environments = ranks(0, 1, world=2, MASTER_ADDR=HOST, LOCAL_WORLD_SIZE="2")
    with processes(environments, tmp_path, 20.0) as told:
        assert [one["sum"] for one in told] == [2.0, 2.0], told
        assert [one["listens"] for one in told] == [["127.0.0.1"]] * 2


def test_ranks_of_several_nodes_listen_on_the_interface_towards_rank_0(tmp_path: Path) -> None:
    outer = [address for address in outer_addresses() if ":" not in address]
    if not outer:
        pytest.skip("this machine has no address but its own")
    environments = ranks(0, 1, world=2, MASTER_ADDR=outer[0], LOCAL_WORLD_SIZE="1")
    with processes(environments, tmp_path, 20.0) as told:
        assert [one["sum"] for one in told] == [2.0, 2.0], told
        assert [one["listens"] for one in told] == [[outer[0]]] * 2
        assert " only, rank 0 at " in told[0]["said"]
        assert "; GLOO_SOCKET_IFNAME names another interface\n" in told[0]["said"]


def test_a_second_attempt_with_the_store_of_the_first_begins(tmp_path: Path) -> None:
    """As torchrun --max-restarts leaves it: its store is full of the first attempt's keys."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
    for attempt in (ranks(0, 1, world=2, **agent), ranks(1, 0, world=2, **agent)):
        # In the second attempt rank 1 is there before rank 0, and finds the first one's roll.
        with processes(attempt, tmp_path, 20.0, delay=0.5) as told:
            assert [one["sum"] for one in told] == [2.0, 2.0], told


def test_who_waits_says_so_from_the_tenth_second_on_and_then_less_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(arrival.time, "monotonic", lambda: now)
    wait = Waiting(60.0)
    for second in range(61):
        now = float(second)
        wait.tell(lambda: "rank 1 waits for rank 0")
    assert wait.left == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [f"mics: rank 1 waits for rank 0 ({at} s of 60 s)" for at in (10, 20, 40)]


def test_a_process_of_half_a_launcher_does_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(MicsError, match="WORLD_SIZE is set but RANK is not"):
        mics.init_mesh(partition=1)
