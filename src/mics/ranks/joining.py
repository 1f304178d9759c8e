"""How the ranks of a launcher meet: rank 0 keeps a store, calls the roll, and begins.

[Note: rounds]
A launcher may start the same ranks again after a failure, with the store of its own still there and
full of the first attempt's keys. So rank 0 gives every attempt a name that nobody had before, and
begins it by a list of the processes that are part of it. A process that does not find itself there
has come too late for that attempt and waits for the next one.

What crosses the store is JSON and what torch's backends write: addresses, and no pickle.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from mics.errors import MicsError
from mics.ranks.address import export_torch_variables
from mics.ranks.arrival import Waiting
from mics.ranks.console import alarm, say
from mics.ranks.device import on_accelerator, use_local_device
from mics.ranks.drawing import ranks_text
from mics.ranks.interfaces import Door, door_of, is_loopback, listen_on
from mics.ranks.issuing import all_reduce
from mics.ranks.launcher import Launch, check_place
from mics.ranks.nodes_given import apart, without_srun

JOIN_SECONDS = 600.0
"""How long the ranks of a launcher wait for each other; nodes may have images to fetch first."""

_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 60.0  # a store answers at once, whatever its process is doing
_FAREWELL_SECONDS = 5.0  # for the others to read why, before the store ends with rank 0
_ROUND = "mics/round"


class RanksMissing(MicsError):
    """Announced ranks that did not come. Every rank that did raises it."""

    ranks: list[int]


def join(launch: Launch, device_type: str, seconds: float) -> Store:
    """Let the ranks of a launched job meet; nothing waits longer than ``seconds``.

    Args:
        launch: where this rank stands.
        device_type: what the ranks communicate on.
        seconds: how long to wait for the others. Who is waited for is said after 10 s.

    Returns:
        The store of this attempt, for ``make_world``.

    Raises:
        RanksMissing: some ranks did not come: it names them, on every rank that did.
        MicsError: rank 0 cannot be reached or listen, or two processes say that they are one rank.
        TopologyError: the launcher does not say where rank 0 listens, or what it says of this
            rank's place makes no sense.
    """
    check_place(launch)
    export_torch_variables(launch)
    if launch.source == "Slurm" and launch.world > 1 and (words := without_srun()):
        say(f"{words}: it waits for the others. Write: srun mics ...")
    if words := apart(launch):
        alarm(words)
    waiting = Waiting(seconds)
    store, door = _store(launch, waiting)
    listen_on(door)
    use_local_device(launch.local_rank, device_type)
    return _lead(store, launch, waiting) if launch.rank == 0 else _follow(store, launch, waiting)


def backend_on(device_type: str) -> str:
    """Name the backend of a device; the CPU side is always Gloo.

    Ranks can so compare notes before the accelerator's backend is used for the first time.
    """
    if not on_accelerator(device_type):
        return "gloo"
    return f"cpu:gloo,{device_type}:{dist.get_default_backend_for_device(device_type)}"


def make_world(store: Store, launch: Launch, backend: str | None, seconds: float | None) -> None:
    """Make the process group of ranks that have met; ``None`` is torch's own choice."""
    dist.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world,
        timeout=None if seconds is None else timedelta(seconds=seconds),
    )
    if backend is not None and "gloo" in backend:
        # One that ends at once would take its connections from those who still make theirs.
        all_reduce(torch.zeros(1), name="meeting of the ranks")


# -- the store -----------------------------------------------------------------------------------


def _store(launch: Launch, waiting: Waiting) -> tuple[Store, Door]:
    """Open the store of rank 0, or reach it; returns where this rank listens too."""
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent keeps a store of its own, see docs/training.md for what it listens on.
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.rank == 0 and not of_agent:
        return _open_store(launch, master, port, waiting)
    if launch.one_node and not of_agent:
        master = door_of(launch, master).address
    _reach(launch, master, port, waiting)
    return _ask_for_store(launch, master, port, waiting), door_of(launch, master)


def _open_store(launch: Launch, master: str, port: int, waiting: Waiting) -> tuple[Store, Door]:
    """Listen on one address only, which torch's store would not do by itself."""
    door = door_of(launch, master)
    family = socket.AF_INET6 if ":" in door.address else socket.AF_INET
    try:
        listener = socket.create_server((door.address, port), family=family)
    except OSError as error:
        raise MicsError(
            f"Rank 0 cannot listen on {door.address}:{port}: {_words(error)}.",
            numbers="Another job listens there, or another process that says it is rank 0."
            if error.errno == errno.EADDRINUSE
            else f"MASTER_ADDR = {master}, MASTER_PORT = {port}.",
            write="MASTER_PORT=<a free port>, the same on every rank",
        ) from None
    if not is_loopback(door.address):
        say(
            f"ranks listen on {door.interface or door.address} only, rank 0 at "
            f"{door.address}:{port}; GLOO_SOCKET_IFNAME names another interface"
        )
    store = dist.TCPStore(  # type: ignore[attr-defined]
        door.address,
        port,
        launch.world,
        is_master=True,
        timeout=timedelta(seconds=waiting.seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, door


def _reach(launch: Launch, master: str, port: int, waiting: Waiting) -> None:
    """Wait until something listens where rank 0 should; torch's store would wait without a word."""
    me = f"rank {launch.rank} on {socket.gethostname()}"
    while True:
        try:
            socket.create_connection((master, port), timeout=max(1.0, min(5, waiting.left))).close()
            return
        except OSError as error:
            why = _words(error)
        if not waiting.left:
            raise MicsError(
                f"R{me[1:]} cannot reach rank 0 at {master}:{port} within {waiting.seconds:g} s.",
                numbers=f"The last try: {why}.",
                write="MASTER_ADDR=<host of rank 0> and a MASTER_PORT that is open between the "
                "nodes",
            )
        waiting.tell(lambda: f"{me} waits for rank 0 at {master}:{port}: {why}")  # noqa: B023
        waiting.pause()


def _ask_for_store(launch: Launch, master: str, port: int, waiting: Waiting) -> Store:
    """Reach the store. What listens may be something else, and may never say a word."""
    answer: list[Store | Exception] = []

    def ask() -> None:
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                master,
                port,
                launch.world,
                is_master=False,
                timeout=timedelta(seconds=waiting.seconds),
                wait_for_workers=False,
            )
            answer.append(store)
        except Exception as error:
            answer.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # torch waits for ever, whatever its timeout
    asking.start()
    me = f"rank {launch.rank} on {socket.gethostname()}"
    patience = Waiting(min(_ANSWER_SECONDS, waiting.left))
    while asking.is_alive() and patience.left:
        asking.join(_POLL_SECONDS)
        patience.tell(lambda: f"{me} waits for an answer of what listens at {master}:{port}")
    if answer and isinstance(answer[0], Store):
        return answer[0]
    said = str(answer[0]).split("\n")[0] if answer else f"It said nothing in {patience.seconds:g} s"
    raise MicsError(
        f"What listens at {master}:{port} is not rank 0 of this job, but another server.",
        numbers=f"{said.rstrip('.')}. This is {me}.",
        write="MASTER_PORT=<a free port>, the same on every rank",
    )


def _words(error: OSError) -> str:
    return str(error.strerror or error).lower()


# -- the roll ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hello:
    """What a process says of itself."""

    rank: int
    world: int
    local_rank: int
    ranks_per_node: int
    host: str
    process: int
    nonce: str

    @property
    def who(self) -> str:
        return f"process {self.process} on {self.host}"


def _hello(launch: Launch) -> _Hello:
    return _Hello(
        launch.rank,
        launch.world,
        launch.local_rank,
        launch.ranks_per_node,
        socket.gethostname(),
        os.getpid(),
        secrets.token_hex(8),
    )


def _lead(store: Store, launch: Launch, waiting: Waiting) -> Store:
    """Begin an attempt as rank 0: wait for all, compare, and say who is part of it."""
    name = secrets.token_hex(8)
    here = PrefixStore(f"mics/{name}", store)
    _come(here, _hello(launch))
    store.set(_ROUND, name)
    error: MicsError | None = None
    while here.add("come", 0) < launch.world and not here.check(["twice"]):
        if not waiting.left:
            error = _missing(_absent(here, launch), launch, waiting.seconds)
            break
        waiting.tell(lambda: _waits_for(_absent(here, launch), launch))
        waiting.pause()
    present = [rank for rank in range(launch.world) if here.check([f"here/{rank}"])]
    come = [_read(here, f"here/{rank}") for rank in present]
    if here.check(["twice"]):
        error = _same_rank(_read(here, "twice"), come)
    error = error or _contradiction(come)
    if error is None:
        here.set("verdict", json.dumps({"nonces": [hello.nonce for hello in come]}))
        return PrefixStore("group", here)
    trouble = [error.what, error.numbers, error.write, getattr(error, "ranks", None)]
    here.set("verdict", json.dumps({"trouble": trouble}))
    farewell = Waiting(_FAREWELL_SECONDS)
    while here.add("read", 0) < len(present) - 1 and farewell.left:
        farewell.pause()
    raise error


def _follow(store: Store, launch: Launch, waiting: Waiting) -> Store:
    """Take part in an attempt of rank 0's, see [Note: rounds]."""
    me, name = _hello(launch), ""
    here: Store = store
    while True:
        newest = store.get(_ROUND).decode() if store.check([_ROUND]) else ""
        if newest != name:
            name, here = newest, PrefixStore(f"mics/{newest}", store)
            if not here.check(["verdict"]):
                _come(here, me)
        if name and here.check(["verdict"]):
            verdict = json.loads(here.get("verdict"))
            if "trouble" in verdict:
                here.add("read", 1)
                raise _error_of(verdict["trouble"])
            if verdict["nonces"][me.rank] == me.nonce:
                return PrefixStore("group", here)
        if not waiting.left:
            raise _missing(_absent(here, launch) if name else [0], launch, waiting.seconds)
        waiting.tell(lambda: _waits_for([0], launch))
        waiting.pause()


def _come(here: Store, me: _Hello) -> None:
    if here.add(f"rank/{me.rank}", 1) == 1:
        here.set(f"here/{me.rank}", json.dumps(asdict(me)))
        here.add("come", 1)
    else:
        here.set("twice", json.dumps(asdict(me)))


def _read(here: Store, key: str) -> _Hello:
    return _Hello(**json.loads(here.get(key)))


def _absent(here: Store, launch: Launch) -> list[int]:
    return [rank for rank in range(launch.world) if not here.check([f"here/{rank}"])]


# -- what went wrong -----------------------------------------------------------------------------


def _waits_for(ranks: list[int], launch: Launch) -> str:
    return (
        f"rank {launch.rank} on {socket.gethostname()} waits for rank(s) {ranks_text(ranks)} of "
        f"the {launch.world} that {launch.source} announced"
    )


def _missing(ranks: list[int], launch: Launch, seconds: float) -> RanksMissing:
    error = RanksMissing(
        f"Rank(s) {ranks_text(ranks)} of {launch.world} did not come within {seconds:g} s.",
        numbers=f"{launch.source} announced {launch.world} ranks; rank {launch.rank} is on "
        f"{socket.gethostname()}.",
        write="the same command on every node (Slurm: srun mics ...)",
    )
    error.ranks = ranks
    return error


def _same_rank(second: _Hello, come: list[_Hello]) -> MicsError:
    first = [hello.who for hello in come if hello.rank == second.rank]
    return MicsError(
        f"Two processes say that they are rank {second.rank}.",
        numbers=f"They are {' and '.join([*first, second.who])}.",
        write="a RANK of its own for every process, or torchrun or srun, which give them",
    )


def _contradiction(come: list[_Hello]) -> MicsError | None:
    """Return what is wrong with ranks that have all come; ``None`` if nothing is."""
    worlds = {hello.world for hello in come}
    if len(worlds) > 1:
        odd = next(hello for hello in come if hello.world != come[0].world)
        return MicsError(
            "Ranks were told different numbers of ranks.",
            numbers=f"Rank 0 was told {come[0].world}, rank {odd.rank} ({odd.who}) {odd.world}.",
            write="the same WORLD_SIZE on every rank",
        )
    of_host: defaultdict[str, list[_Hello]] = defaultdict(list)
    for hello in come:
        of_host[hello.host].append(hello)
    for host, there in of_host.items():
        # More of them than a node has: they stand for several nodes.
        if len(there) > there[0].ranks_per_node:
            continue
        taken: dict[int, int] = {}
        for hello in there:
            other = taken.setdefault(hello.local_rank, hello.rank)
            if other != hello.rank:
                return MicsError(
                    f"Ranks {other} and {hello.rank} have the same place on their node.",
                    numbers=f"LOCAL_RANK = {hello.local_rank} on {host} for both.",
                    write="a LOCAL_RANK of its own for every rank of a node",
                )
    return None


def _error_of(trouble: list[Any]) -> MicsError:
    what, numbers, write, ranks = trouble
    if ranks is None:
        return MicsError(what, numbers=numbers, write=write)
    error = RanksMissing(what, numbers=numbers, write=write)
    error.ranks = ranks
    return error
