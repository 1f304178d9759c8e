"""What a rank does, written where the agent of its node can read it, also when the rank is stuck.

``mics run`` gives every rank a small file and reads what stands there: the step, the call of mics
that the rank is in, how many collectives it has issued and which one it waits in. A write is a
store of some words; names are put into a table in the file when they are used first. Without such
an agent nothing is written.

[Note: steps by number]
A step has the number that the program gives it by ``at_step``, so that one that kills its rank is
known again after a restart. Without it steps count from 1 in every process.

[Note: where ranks pause]
A rank that is asked to pause does so as its next micro-step begins, when all that belongs to the
step before is done, a checkpoint too; where steps are kept, only behind one that was, and when what
is written beside the program is written. Loops of FSDP2 and DDP tell no micro-steps: they are in
the step after the one that was kept last, and pause as the keeping of it ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "MICS_HEARTBEAT"
"""The environment's name for a rank's file."""

FILE_BYTES = 16384

PAUSE = "a pause for nodes that are back"
"""Where a rank is while its agent lets it begin no other step."""

_FINISHES = "the end of what is written beside the program"

LONG = frozenset(
    {
        PAUSE,
        _FINISHES,
        "compilation",
        "the evaluation",
        "mics.fully_shard",
        "mics.init_mesh",
        "mics.load",
        "mics.load_adapters",
        "mics.save",
        "mics.save_adapters",
        "mics.shard",
    }
)
"""Calls that may take as long as they like."""

_BEATS, _STEP, _STEPS, _MICRO_STEP, _ISSUED, _DURING, _WAITS = range(7)
_LONG, _STEP_BEGAN, _PARTITION = range(7, 10)
_NUMBERS = struct.Struct("@8QdQ")  # in this order
_NAMES_AT, _NAME_BYTES = 128, 160
_MOST_NAMES = (FILE_BYTES - _NAMES_AT) // _NAME_BYTES
_PAUSE = 15  # the one word that the agent writes
_PAUSE_LOOK_SECONDS = 0.01


@dataclass(frozen=True)
class Beat:
    """What stands in a rank's file.

    Args:
        beats: written so far, collectives aside; 0 if the rank has written nothing.
        step: the one it is in or has been in last, from 1; 0 before the first.
        steps: begun by this process.
        micro_step: from 1.
        issued: collectives, in all groups.
        during: the call of mics it is in, or nothing.
        waits: the collective it waits in, or nothing.
        takes_long: whether the program has said that what it does takes long.
        step_began: on the machine's monotonic clock.
        partition: ranks that hold one copy of the model together, on the largest of its meshes; 0
            if the rank has not said it.
    """

    beats: int
    step: int
    steps: int
    micro_step: int
    issued: int
    during: str
    waits: str
    takes_long: bool
    step_began: float
    partition: int = 0

    @property
    def sign_of_life(self) -> tuple[int, int, str]:
        """What is another one whenever the rank has done anything that it tells."""
        return self.beats, self.issued, self.waits

    @property
    def is_long(self) -> bool:
        """Whether the rank is where it may stay for any time.

        Also before its second step, and where it tells no micro-steps.
        """
        calls = self.takes_long or self.during in LONG
        return calls or self.steps < 2 or not self.micro_step


class Heart:
    """Writes the file of one rank.

    Args:
        path: of a file of ``FILE_BYTES``.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._file = mmap.mmap(descriptor, FILE_BYTES)
        finally:
            os.close(descriptor)
        # Whole words: each is written at once, and costs less than packing all of them.
        self._words = memoryview(self._file).cast("Q")
        self._times = memoryview(self._file).cast("d")
        self._names: dict[object, int] = {"": 0}
        self._before = 0  # steps before this process
        self._beats = self._steps = self._issued = self._during = 0
        self._winds_up = False
        self._is_kept = True
        self._finish: Callable[[], None] | None = None

    def at_step(self, step: int) -> None:
        """Say the number of the step that begins next."""
        self._before = step - 1 - self._steps
        if self._winds_up:  # the program has begun something else
            self._winds_up = False
            self.take_long(-1)

    def in_step(self, steps: int, micro_step: int) -> None:
        """Say that this process is in a micro-step; both count from 1."""
        if steps != self._steps:
            if self._words[_PAUSE] and self._is_kept:
                self._pause()
            self._steps = steps
            self._words[_STEP] = max(0, self._before + steps)
            self._words[_STEPS] = steps
            self._times[_STEP_BEGAN] = time.monotonic()
        self._words[_MICRO_STEP] = micro_step
        self._beat()

    def keep_steps(self, finish: Callable[[], None] | None) -> None:
        """Say what ends the writing beside the program before a pause, see ``end_step``."""
        self._is_kept, self._finish = True, finish

    def end_step(self, done: int, *, kept: bool) -> None:
        """Say how many steps are done, and whether the last of them is being kept."""
        self._is_kept = kept
        self.at_step(done + 1)
        if not self._words[_MICRO_STEP]:  # nothing else is known of where it is
            self._words[_STEP] = done + 1
            self._words[_STEPS] += 1
            self._times[_STEP_BEGAN] = time.monotonic()
            self._beat()

    def rest(self) -> None:
        """Pause here, if that is asked for and no micro-step will begin."""
        if self._words[_PAUSE] and self._is_kept and not self._words[_MICRO_STEP]:
            self._words[_STEP] -= 1
            self._pause()
            self._words[_STEP] += 1

    def enter(self, call: str) -> int:
        """Say that a call of mics has begun; returns the one around it, for ``leave``."""
        before = self._during
        self.leave(self._name(call, call))
        return before

    def leave(self, before: int) -> None:
        """Say that a call of mics has ended."""
        self._words[_DURING] = self._during = before
        self._beat()

    def hold_in(self, partition: int) -> None:
        """Say how many ranks hold one copy of the model together; the largest number counts."""
        if partition > self._words[_PARTITION]:
            self._words[_PARTITION] = partition
            self._beat()

    def take_long(self, change: int) -> None:
        """Say that something that takes long has begun (1) or ended (-1)."""
        self._words[_LONG] += change
        self._beat()

    def wind_up(self) -> None:
        """Say that all is done, unless another step begins."""
        if not self._winds_up:
            self._winds_up = True
            self.take_long(1)

    def issue(self) -> None:
        """Count a collective. This and the waiting are one store each: a step has hundreds."""
        self._words[_ISSUED] = self._issued = self._issued + 1

    def wait(self, key: object, place: object) -> None:
        """Say that this rank waits, in a place whose words are always the same for its key."""
        at = self._names.get(key)
        self._words[_WAITS] = self._name(key, place) if at is None else at

    def go_on(self) -> None:
        """Say that it waits no longer."""
        self._words[_WAITS] = 0

    def _pause(self) -> None:
        before = self.enter(_FINISHES)
        if self._finish is not None:
            self._finish()
        self.enter(PAUSE)
        while self._words[_PAUSE]:
            time.sleep(_PAUSE_LOOK_SECONDS)
        self.leave(before)

    def _beat(self) -> None:
        self._words[_BEATS] = self._beats = self._beats + 1

    def _name(self, key: object, words: object) -> int:
        at = self._names.get(key)
        if at is None:
            at = len(self._names)
            if at >= _MOST_NAMES:  # the table is full: the last place has the latest name
                at = _MOST_NAMES - 1
                self._names = {k: i for k, i in self._names.items() if i != at}
            self._names[key] = at
            text = str(words).encode()[: _NAME_BYTES - 1]
            start = _NAMES_AT + at * _NAME_BYTES
            self._file[start : start + _NAME_BYTES] = text.ljust(_NAME_BYTES, b"\0")
        return at


def heart() -> Heart | None:
    """The one of this process; ``None`` without an agent that reads it, and beside the program.

    What waits in a thread of its own, as the keeping of states does, is not where the program is.
    """
    try:
        return _of_thread.heart  # asked for in every collective
    except AttributeError:
        is_program = threading.current_thread() is threading.main_thread()
        _of_thread.heart = _open_heart() if is_program else None
        return _of_thread.heart


class _OfThread(threading.local):
    heart: Heart | None


_of_thread = _OfThread()


def begin_as_another_rank() -> None:
    """Look for a heartbeat anew: this process was forked, and is told of another one."""
    if hasattr(_of_thread, "heart"):
        del _of_thread.heart


def _open_heart() -> Heart | None:
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    try:
        return Heart(path)
    except OSError as error:
        print(f"mics: no heartbeats: {path}: {error.strerror}", file=sys.stderr, flush=True)
        return None


def at_step(step: int) -> None:
    """Say the number of the step that begins next, see [Note: steps by number]."""
    mine = heart()
    if mine is not None:
        mine.at_step(step)


def keep_steps(finish: Callable[[], None] | None) -> None:
    """Say that steps are kept, and how to end what is written beside the program.

    Args:
        finish: waits for it, on this rank alone; ``None`` where steps are no longer kept.
    """
    mine = heart()
    if mine is not None:
        mine.keep_steps(finish)


def end_step(done: int, *, kept: bool) -> None:
    """Say how many steps are done, and whether the last of them is being kept."""
    mine = heart()
    if mine is not None:
        mine.end_step(done, kept=kept)


def rest() -> None:
    """Pause here, if that is asked for, see [Note: where ranks pause]."""
    mine = heart()
    if mine is not None:
        mine.rest()


def hold_in(partition: int) -> None:
    """Say how many ranks hold one copy of the model together.

    Whoever goes on without a lost node has to leave whole copies, so an agent asks for this number.
    """
    mine = heart()
    if mine is not None:
        mine.hold_in(partition)


def wind_up() -> None:
    """Say that the work is done and kept elsewhere: what is left may take as long as it likes.

    To begin again would repeat everything, because somebody is slow to leave.
    """
    mine = heart()
    if mine is not None:
        mine.wind_up()


@contextlib.contextmanager
def taking_long() -> Iterator[None]:
    """Let this rank take as long as it likes inside: nobody calls it hung.

    ``mics.save``, ``mics.load``, compilation and the like say so themselves.
    """
    mine = heart()
    if mine is not None:
        mine.take_long(1)
    try:
        yield
    finally:
        if mine is not None:
            mine.take_long(-1)


def make_file(path: Path) -> None:
    """Make the file of a rank that has said nothing yet."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, FILE_BYTES)
    finally:
        os.close(descriptor)


def ask_for_pause(file: mmap.mmap, *, wanted: bool) -> None:
    """Let a rank begin no other step, or go on; it has ended the step before, and kept it."""
    struct.pack_into("@Q", file, 8 * _PAUSE, wanted)


def read_beat(file: mmap.mmap | bytes) -> Beat:
    """Read a rank's file. A write that is under way may be seen in parts, see ``beats``."""
    numbers = _NUMBERS.unpack_from(file)
    beats, step, steps, micro_step, issued, during, waits, long, began, partition = numbers
    names = (_read_name(file, during), _read_name(file, waits))
    return Beat(beats, step, steps, micro_step, issued, *names, bool(long), began, partition)


def _read_name(file: mmap.mmap | bytes, at: int) -> str:
    if not 0 < at < _MOST_NAMES:
        return ""
    start = _NAMES_AT + at * _NAME_BYTES
    return file[start : start + _NAME_BYTES].rstrip(b"\0").decode(errors="replace")
