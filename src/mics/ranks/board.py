"""A notice board of the job: what every rank says of itself when others have to wait for it.

It lies in the store that the process group was made with, under a prefix of its own: one key for
each rank, and one that says who was the first to end. Nothing is written while all goes well: a
rank writes when it has waited long, when it goes on after that, and when it ends. Text crosses
between ranks as JSON.

[Note: a store that does not answer]
A store may be kept by a rank, and that rank may be stopped or gone. torch asks a store without a
limit of time and prints pages when it is gone. So it is asked in a thread, for a limited time, and
only where its file is or its port accepts; reading never waits for a key that nobody has set.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from mics import compat

Answer = TypeVar("Answer")

Does = Literal["works", "waits", "has left", "has ended", "has failed", "has given up"]
"""What a rank does, as far as it has said.

works         computes, or is where mics does not see it
waits         in a collective, until it says something else
has left      its step, by an exception or a break
has ended     its program
has failed    by an exception that nobody caught
has given up  waiting, with an error that says for whom
"""

WAIT_SECONDS = "MICS_WAIT_SECONDS"
"""The environment's name for ``Patience.speak``."""


@dataclass(frozen=True)
class Patience:
    """Seconds of a rank that waits for others.

    ``speak`` is when it says for whom; ``MICS_WAIT_SECONDS`` sets it (10), and the rest follows.
    """

    speak: float = 10.0

    @property
    def look(self) -> float:
        """The time between two looks at the board."""
        return self.speak / 10

    @property
    def again(self) -> float:
        """The time between two words about one wait."""
        return self.speak * 6

    @property
    def grace(self) -> float:
        """How long a rank that lost a connection waits for the others to say who has gone."""
        return self.speak * 0.3


@functools.cache
def patience() -> Patience:
    """What this process' environment asks for."""
    return Patience(float(os.environ.get(WAIT_SECONDS, "10")))


@dataclass(frozen=True)
class Notice:
    """What one rank says of itself.

    Args:
        rank: who.
        does: what it does.
        during: the call of mics or the micro-step that it is in.
        step: the number of the step it is in, or has left; 0 outside of steps.
        issued: the number of collectives it has issued in each group, by the group's key.
        host: its machine, and the space in which process ids count there.
        process: its process id.
        group: the key of the group it waits in.
        members: the ranks of that group.
        number: of the collective in the group.
        what: the collective it waits for; or why it has failed.
        error: of a rank that gave up: what, numbers and write of its error.
    """

    rank: int
    does: Does
    during: str = ""
    step: int = 0
    issued: dict[str, int] = field(default_factory=dict)
    host: str = ""
    process: int = 0
    group: str = ""
    members: list[int] = field(default_factory=list)
    number: int = 0
    what: str = ""
    error: list[str] = field(default_factory=list)


_LONGEST_ANSWER = 2.0  # seconds that the store may take

_BURST = 0.05  # seconds after an answer in which the store is taken to be still there


class NoAnswer(Exception):
    """The store did not answer, or is gone."""


class Board:
    """The board of one process group of the whole job.

    Args:
        world: the group; the board ends with it.
        generation: how many boards this process had before, so that old notices stay behind.
    """

    def __init__(self, world: dist.ProcessGroup, generation: int) -> None:
        self.rank, self.world = world.rank(), world.size()
        self.patience = patience()
        self.seen: dict[int, Notice] = {}  # the latest of every rank
        # An agent counts its own restarts: those of several nodes need not be alike, and then tell
        # no attempts apart. Ranks that met by ``joining.py`` have a store of their attempt's own.
        alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "several nodes"
        kept: Store = compat.job_store().clone()  # type: ignore[attr-defined]
        self._store: Store = PrefixStore(f"mics_board/{attempt}/{generation}", kept)
        self._kept = kept
        self._one_at_a_time = threading.Lock()
        self._asked = threading.Thread()  # the latest to ask
        self._answered = float("-inf")  # when it last did, on the monotonic clock
        space = Path("/proc/self/ns/pid")  # ids of processes count inside of one
        inside = space.readlink() if space.is_symlink() else "-"
        host = f"{socket.gethostname()} {inside}"
        self.mine = Notice(self.rank, "works", host=host, process=os.getpid())
        with contextlib.suppress(NoAnswer):
            self.tell(self.mine)

    @property
    def kept_by_first_rank(self) -> bool:
        """Whether the store goes when rank 0 does."""
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return hasattr(_whole(self._kept), "port") and not by_agent

    @property
    def is_gone(self) -> bool:
        """Whether the store has gone with rank 0, which kept it."""
        return self.kept_by_first_rank and not _is_there(_whole(self._kept))

    def tell(self, notice: Notice) -> None:
        """Put up this rank's notice in place of its last one; an end is the first, or not."""
        text = json.dumps(asdict(notice))

        def put(store: Store) -> None:
            if notice.does in ("has ended", "has failed", "has given up"):
                store.compare_set("ended", "", str(self.rank))
            store.set(_key(self.rank), text)  # last: once all have, the store may go

        self._ask(put)

    def somebody_ended(self) -> bool:
        """Whether a rank has ended, failed or given up."""
        return self._ask(lambda store: bool(store.check(["ended"])))

    def read(self) -> dict[int, Notice]:
        """The notice of every rank that has put one up."""

        def get(store: Store) -> list[bytes]:
            there = [r for r in range(self.world) if r in self.seen or store.check([_key(r)])]
            values: list[bytes] = store.multi_get([_key(rank) for rank in there])
            return values

        for value in self._ask(get):
            notice = Notice(**json.loads(value))
            self.seen[notice.rank] = notice
        return self.seen

    def meet(self, key: str, ranks: int) -> Callable[[], bool]:
        """Come to a meeting.

        Args:
            key: of the meeting, the same on all its ranks and used once.
            ranks: how many it is of.

        Returns:
            What says, as often as it is asked, that this rank has come, and tells whether all have.
        """
        come: list[int] = []  # how many had come with this rank, once that is known

        def come_and_look(store: Store) -> bool:
            if not come:
                come.append(store.add(f"meet/{key}", 1))
            if come[0] == ranks:
                store.set(f"met/{key}", "1")
            return bool(store.check([f"met/{key}"]))

        return lambda: self._ask(come_and_look, often=True)

    def _ask(self, call: Callable[[Store], Answer], *, often: bool = False) -> Answer:
        """Call with the store, see [Note: a store that does not answer].

        Args:
            call: returns the answer.
            often: trust for a moment that a store that has answered is still there.

        Raises:
            NoAnswer: it does not answer.
        """
        answers: list[Answer] = []

        def ask() -> None:
            with contextlib.suppress(Exception):  # whatever a store raises: there is no answer
                answers.append(call(self._store))

        with self._one_at_a_time:
            now = time.monotonic()
            if self._asked.is_alive():
                raise NoAnswer
            trusted = often and now < self._answered + _BURST
            if not trusted and not _is_there(_whole(self._kept)):
                raise NoAnswer
            self._asked = threading.Thread(target=ask, name="mics_board", daemon=True)
            self._asked.start()
            self._asked.join(_LONGEST_ANSWER)
            if not answers:
                raise NoAnswer
            self._answered = now
        return answers[0]


@dataclass
class _Latest:
    """The board of the latest process group of the job."""

    world: weakref.ref[dist.ProcessGroup] | None = None
    board: Board | None = None
    boards: int = 0  # made so far


_latest = _Latest()


def board_of_job() -> Board | None:
    """The board of the default process group; ``None`` without other ranks, or without a store."""
    world = dist.group.WORLD
    if world is None:
        return None
    if _latest.world is None or _latest.world() is not world:
        _latest.world, _latest.board = weakref.ref(world), None
        if world.size() > 1 and dist.get_backend(world) != "fake":
            _latest.boards += 1
            with contextlib.suppress(RuntimeError):  # a store that can not be cloned
                _latest.board = Board(world, _latest.boards)
    return _latest.board


def last_board() -> Board | None:
    """The board of the latest process group, also after its end."""
    return _latest.board


def _key(rank: int) -> str:
    return f"rank/{rank}"


def _whole(store: Store) -> Store:
    """The store behind its prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def _is_there(store: Store) -> bool:
    """Whether a store can be asked without pages of complaints: its port accepts, its file is."""
    if hasattr(store, "port") and hasattr(store, "host"):
        try:
            socket.create_connection((store.host, store.port), timeout=1).close()
        except OSError:
            return False
    if hasattr(store, "path"):
        return Path(store.path).exists()
    return True
