"""Where the ranks of a script stand that does not come to its end, and which one holds up the rest.

[Note: read from outside]
A rank that sleeps or waits in Gloo runs no Python, so nothing of ours could ask it. It writes down
what it has issued as it goes, and Python's own ``faulthandler`` prints its stack on a signal, from
C, whatever it is in. Whoever waits has issued a collective to which not all have come; a rank for
which others wait, and which itself waits for nobody, holds them up.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mics.lab.checking.calls import Meeting
from mics.lab.checking.report import When
from mics.lab.checking.script import run_script
from mics.ranks.drawing import ranks_text

# One that no program uses for itself, where there are such; its number is that of all processes.
_ASK = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
_ANSWER_SECONDS = 2.0
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)$')
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x(?P<ident>[0-9a-f]+)")


@dataclass
class Standing:
    """How far a rank is.

    Args:
        rank: of all.
        thread: its main one, by the number that its stack has.
        steps: optimizer steps that it has come to.
        micro_step: whose backward pass has begun.
        when: what it is at there.
        issued: collectives per group, by its name.
        last: the latest of each group.
        ranks: of each group.
        ended: whether it has ended without an error.
        frames: of its stack, innermost first: file, line, function.
    """

    rank: int
    thread: int = 0
    steps: int = 0
    micro_step: int = 0
    when: When = "forward"
    issued: dict[str, int] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    ended: bool = False
    frames: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def waits_for_processes(self) -> bool:
        """Whether it is in what starts other processes, or waits for them."""
        return any(re.search(r"multiprocessing|subprocess", file) for file, _, _ in self.frames)


class Trail:
    """What a rank leaves behind as it goes, for whoever asks where it stands.

    Args:
        folder: of all ranks.
        rank: this one.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._now = Standing(rank, threading.main_thread().ident or 0)
        self._file = os.open(_file_of(folder, rank), os.O_WRONLY | os.O_CREAT, 0o600)
        self._stack: IO[str] = _stack_of(folder, rank).open("w")
        faulthandler.register(_ASK, file=self._stack, all_threads=True)
        self._write()

    def issue(self, meeting: Meeting) -> None:
        """Note a collective that is about to be issued."""
        now, group = self._now, meeting.group
        now.issued[group] = now.issued.get(group, 0) + 1
        now.last[group], now.ranks[group] = meeting.collective, list(meeting.ranks)
        self._write()

    def pass_back(self, micro_step: int) -> None:
        """Note that a micro-step's backward pass begins."""
        self._now.micro_step, self._now.when = micro_step, "backward"
        self._write()

    def pass_on(self) -> None:
        """Note that a forward begins."""
        self._now.when = "forward"
        self._write()

    def step(self, steps: int) -> None:
        """Note an optimizer that steps, and the how manieth step that is."""
        self._now.steps, self._now.micro_step, self._now.when = steps, 0, "after"
        self._write()

    def _write(self) -> None:
        os.pwrite(self._file, json.dumps(vars(self._now)).encode() + b"\n", 0)


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.trail"


def _stack_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.stack"


# -- from outside ----------------------------------------------------------------------------------


def standings(folder: Path, processes: Mapping[int, int], ended: Sequence[int]) -> list[Standing]:
    """Ask all ranks where they stand; those that have left no trail are missing.

    Args:
        folder: of all ranks.
        processes: the numbers of those that live, by rank.
        ended: ranks that have ended without an error.
    """
    asked = {rank: pid for rank, pid in processes.items() if _stack_of(folder, rank).exists()}
    for pid in asked.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, _ASK)
    deadline = time.monotonic() + _ANSWER_SECONDS
    found = {rank: _read(folder, rank) for rank in {*asked, *ended}}
    while time.monotonic() < deadline and any(
        not one.frames for rank, one in found.items() if rank in asked
    ):
        time.sleep(0.05)
        found |= {rank: _read(folder, rank) for rank in asked if not found[rank].frames}
    for rank in ended:
        found[rank].ended = True
    return [found[rank] for rank in sorted(found)]


def steps_of(folder: Path, rank: int) -> int:
    """How many optimizer steps a rank has come to, whatever became of it."""
    return _read(folder, rank).steps


def _read(folder: Path, rank: int) -> Standing:
    standing = Standing(rank)
    with contextlib.suppress(OSError, ValueError):  # a line that is just being written
        text = _file_of(folder, rank).read_text().partition("\n")[0]
        standing = Standing(**json.loads(text))
    with contextlib.suppress(OSError):
        standing.frames = frames_of(_stack_of(folder, rank).read_text(), standing.thread)
    return standing


def frames_of(text: str, thread: int) -> list[tuple[str, int, str]]:
    """A script's frames in one thread, of what faulthandler prints: file, line, function.

    The innermost comes first; what stands around the script is left out.
    """
    frames: list[tuple[str, int, str]] = []
    mine = False
    for line in text.splitlines():
        head, frame = _THREAD.match(line), _FRAME.match(line)
        if head:
            mine = int(head["ident"], 16) == thread
        elif frame and mine:
            frames.append((frame["file"], int(frame["line"]), frame["name"]))
    # What stands around the script ends with who runs it, and the observer is in between.
    own = next((n for n, one in enumerate(frames) if one[2] == run_script.__name__), len(frames))
    here = Path(__file__).parent
    return [one for one in frames[:own] if Path(one[0]).parent != here]


# -- who holds up whom -----------------------------------------------------------------------------


def waits_for(one: Standing, all_of_them: Sequence[Standing]) -> tuple[str, list[int]]:
    """The group in which a rank waits, and the ranks that have not come; "" if it waits nowhere."""
    if one.ended:
        return "", []
    issued = {other.rank: other.issued for other in all_of_them}
    for group, number in one.issued.items():
        late = [
            rank
            for rank in one.ranks[group]
            if rank in issued and issued[rank].get(group, 0) < number
        ]
        if late:
            return group, late
    return "", []


def culprits(all_of_them: Sequence[Standing]) -> list[int]:
    """Ranks for which others wait, and which wait for nobody."""
    waits = {one.rank: waits_for(one, all_of_them)[1] for one in all_of_them}
    awaited = {rank for late in waits.values() for rank in late}
    return [rank for rank, late in waits.items() if rank in awaited and not late]


def in_words(all_of_them: Sequence[Standing], script: Path) -> tuple[str, list[str]]:
    """Who holds up whom, a sentence, and a line for every rank.

    Args:
        all_of_them: the ranks, in order.
        script: whose folder's frames are shown.
    """
    guilty = culprits(all_of_them)
    waiting = [one for one in all_of_them if waits_for(one, all_of_them)[1]]
    if guilty:
        noun = "Rank" if len(guilty) == 1 else "Ranks"
        verb = "holds" if len(guilty) == 1 else "hold"
        what = f"{noun} {ranks_text(guilty)} {verb} up the others."
    elif waiting:
        what = (
            "Ranks wait for each other in different collectives, or in the same ones in "
            "another order: none of them can go on."
        )
    else:
        what = "No rank waits for another one: all are at work, or in a loop without an end."
    order = [one for one in all_of_them if one.rank in guilty]
    order += [one for one in all_of_them if one.rank not in guilty]
    return what, [_line(one, all_of_them, script) for one in order]


def _line(one: Standing, all_of_them: Sequence[Standing], script: Path) -> str:
    if one.ended:
        return f"rank {one.rank} has ended after {_steps(one.steps)}"
    at = f"{_place(one, script)}, {_moment(one)}"
    group, late = waits_for(one, all_of_them)
    if not group:
        return f"rank {one.rank}: {at}"
    name = one.last[group].replace("_", "-")
    whom = f"it waits for rank(s) {ranks_text(late)} in the {name} no. {one.issued[group]}"
    return f"rank {one.rank}: {at}; {whom} among ranks {ranks_text(one.ranks[group])}"


def _steps(number: int) -> str:
    return f"{number} step" if number == 1 else f"{number} steps"


def _moment(one: Standing) -> str:
    if one.when == "after":
        return f"behind the backward passes of step {one.steps}"
    number = one.micro_step + (one.when == "forward")
    return f"in the {one.when} of micro-step {number} of step {one.steps + 1}"


def _place(one: Standing, script: Path) -> str:
    """The innermost line of the script, and what it has called, if that is not its own."""
    if not one.frames:
        return "it does not say where"
    folder = script.resolve().parent
    own = [f for f in one.frames if _is_of(f[0], folder)]
    file, line, name = one.frames[0]
    inner = f"{name} of {Path(file).name}, line {line}"
    if not own:
        return inner
    file, line, function = own[0]
    where = f"line {line} of {Path(file).name}"
    where += "" if function == "<module>" else f" in {function}"
    return where if own[0] == one.frames[0] else f"{where}, inside {inner}"


def _is_of(file: str, folder: Path) -> bool:
    path: Any = Path(file).resolve()
    return folder in path.parents and "site-packages" not in path.parts
