"""What one agent decides: when its ranks begin, when all of them have to begin again, and the end.

[Note: the life of a generation]
All agents are linked and have no ranks (``ready``). The first of the nodes that are to have ranks,
see ``gathering.py``, leads: it has a store started, chooses a number larger than any before, and
says ``begin``. Every agent of such a node starts its ranks (``running``), and the first of them
watches over all. When a rank dies, raises or stands still, or a node is lost, every agent hears of
it from the one who saw it, kills its ranks at once (``clearing``), and is ready again. One whose
ranks fail again and again is ``out`` instead, where others may go on without it. When all ranks of
a node have ended with 0 it is ``done``; when all nodes are, so is the job. Whoever finds that the
job has to end says ``end``, and that is the last word.
"""

from __future__ import annotations

import secrets
import signal
import time
from pathlib import Path
from typing import Any

from mics.agent.budget import GROWTH, Budget, Failure, describe_end_of_node, describe_exit
from mics.agent.going_on import Record
from mics.agent.links import BEAT_SECONDS
from mics.agent.loop import Loop
from mics.agent.nursery import Nursery, Process
from mics.agent.peers import Peers
from mics.agent.pulse import Pulse
from mics.agent.seeing import early_exit, failure_of, not_begun, say_if_silent
from mics.agent.settings import Settings
from mics.agent.voice import Voice
from mics.agent.world import Meeting, World

_LOOK_SECONDS = 0.1
_HELD_UP_SECONDS = 1.0  # this process was stopped or starved: what it knows of time is worthless
_HASTE_SECONDS = 5.0  # for ranks that were asked to end, when one of them has ended badly
_MOST_WARMINGS = 2  # that may leave the ranks' parent with several threads


class Supervisor:
    """One agent.

    Args:
        settings: what it was asked to do.
        folder: for the heartbeats of its ranks.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.code: int | None = None
        """The exit code, once the job has ended."""
        self.loop = Loop()
        self._settings = settings
        self._folder = folder
        self._voice = Voice(settings.node_index if settings.num_nodes > 1 else None)
        self._peers = Peers(self.loop, settings, self._voice, self)
        self._members = self._peers.members
        self._budget = Budget(settings.restarts, settings.window)
        self._nursery = Nursery(self.loop, settings.command, self)
        self._gathering = self._peers.gathering
        self._state = "warming"
        self._warmings = 0
        self._world: World | None = None
        self._store: Process | None = None
        self._failed = self._cleared = 0.0  # when the generation of before had
        self._said_began = True
        self._why_out = ""  # this node has dropped out
        self._asked: int | None = None  # the signal that ends the job
        self._deadline = 0.0

    def open(self) -> None:
        """Listen, if there are other nodes, and have the ranks' parent warmed.

        Raises:
            MicsError: the address cannot be listened at.
        """
        self._peers.listen()
        self._open_nursery()
        self.loop.every(_LOOK_SECONDS, self._look)
        self.loop.every(BEAT_SECONDS, self._beat)

    def close(self) -> None:
        """End everything that this agent has started."""
        self._nursery.close()
        self._peers.close()
        if self._world is not None:
            self._world.close()
        self.loop.close()

    def ask_to_end(self, number: int) -> None:
        """Pass a signal on to all ranks of the job, which may save and end in their own way."""
        self._peers.tell({"kind": "stop", "signal": number})
        self.stop(number)

    # -- what other agents say, see peers.Boss ---------------------------------------------------

    @property
    def has_ranks(self) -> bool:
        """Whether there are ranks on this node, or were and may not all have gone."""
        return self._world is not None

    def consider(self) -> None:
        """Begin or end, if it is time to."""
        if self._asked is not None or self.code is not None:
            return
        if self._state == "done" and self._peers.all_done:
            self.end(0, "", "")
        if self._state != "ready" or not self._nursery.is_ready:
            return
        record = self._gathering.next(self._state)
        if record is None and not self._gathering.leads(self._state):
            return
        if self._store is None:
            self._store = self._nursery.start_store(self._peers.host)
        port = self._store.report.get("port")
        if port is None or record is None:
            return
        job = self._members.job or f"job-{secrets.token_hex(4)}"
        nodes = tuple(sorted(record.agents))
        meeting = Meeting(job, record.generation, self._peers.host, port, nodes)
        self._peers.invite(meeting, record)
        self.begin(meeting, record)

    def begin(self, meeting: Meeting, record: Record) -> None:
        """Begin a generation, if this node is ready or has no ranks in it."""
        takes_part = self._members.me in meeting.nodes
        if takes_part and self._state != "ready":
            return
        words = self._gathering.describe(self._state, record)
        self._members.begin(record, meeting.job)
        if words:
            self._voice.say(words)
        if not takes_part:
            return
        self._gathering.began()
        host = self._peers.host
        self._world = World(self._settings, meeting, self._nursery, self._folder, host)
        self._said_began = False
        self._become("running")

    def pause(self, *, wanted: bool) -> None:
        """Let the ranks of this node begin no other step, or go on."""
        if self._world is not None:
            self._world.ask_for_pause(wanted=wanted)

    def fail(self, failure: Failure, mark: str) -> None:
        """A generation has ended, as another agent has seen."""
        if mark == self._members.mark:
            self._take(failure)

    def declare_hung(self, pulse: Pulse, what: str, mark: str) -> None:
        """A rank of this node stands still."""
        if mark == self._members.mark:
            self._fail(
                Failure(what, rank=pulse.rank, node=pulse.node, cause="hung", step=pulse.step)
            )

    def stop(self, number: int) -> None:
        """Let the ranks of this node end."""
        self._asked = self._asked or number
        if self._world is None or not self._world.running:
            self.end(0 if self._state == "done" else 128 + number, "", "")
            return
        self._deadline = self._deadline or time.monotonic() + self._settings.grace
        self._world.pass_on(number)

    def end(self, code: int, why: str, words: str, *, tell: bool = True) -> None:
        """End the job, and this agent; the first reason counts."""
        if self.code is not None:
            return
        self.code = code
        if tell and self._asked is None:
            self._peers.tell({"kind": "end", "code": code, "why": why, "words": words})
        if words:
            self._voice.quote(words)
        if why:
            self._voice.say(why)

    def node_lost(self, failure: Failure, *, had_ranks: bool) -> None:
        """A node was lost."""
        if self._asked is not None or self.code is not None:
            return
        if had_ranks or not self._members.sees(self._members.latest):
            self._gathering.lost()
        if had_ranks and self._state in ("running", "done"):
            self._fail(failure)  # told to all: others may still be linked to it
        else:
            self._voice.say(failure.what)
        if self.code is None and had_ranks and self._gathering.prospect:
            self._voice.say(self._gathering.prospect)

    def node_out(self) -> None:
        """Another node has dropped out."""
        self._gathering.lost()

    # -- what processes do, see nursery.Parent ---------------------------------------------------

    def warmed(self, told: dict[str, Any]) -> None:
        """The ranks' parent is ready, or cannot be used."""
        if not self._nursery.is_ready:
            self._warmings += 1
            how = "warmed" if self._warmings < _MOST_WARMINGS else "not warmed"
            self._voice.say(
                f"the ranks' parent has {told['threads']} threads, with which it cannot fork; "
                f"another one is started, {how}"
            )
            self._nursery.drop()
            self._open_nursery()
            return
        if told["trouble"]:
            self._voice.say(
                f"the ranks' parent could not be warmed ({told['trouble']}): every rank starts as "
                "a Python of its own, which takes longer"
            )
        self._rest()

    def reported(self, process: Process) -> None:
        """A process has reported: a store its port, a rank that it ends by an exception."""
        if process.local_rank is None:
            self.consider()
        elif self._is_mine(process):
            self._rank_failed(process)

    def ended(self, process: Process) -> None:
        """A process has ended, and is reaped."""
        if process is self._store:
            self._store_ended(process)
        if self._world is None or not self._is_mine(process):
            return
        if self._asked is not None:
            self._look_at_the_end(process)
        elif self._state == "clearing":
            self._look_at_clearing()
        elif process.status != 0:
            self._rank_failed(process)
        else:
            self._world.first_end = self._world.first_end or time.monotonic()
            if self._world.done:
                self._become("done")

    def orphaned(self, processes: list[Process], why: str) -> None:
        """The ranks' parent is gone, and they with it."""
        for process in processes:
            process.status = -signal.SIGKILL
        self._store = None
        if self._asked is not None:
            self.end(128 + self._asked, "", "")
            return
        self._fail(Failure(f"the parent of the ranks of node {self._members.me} {why}"))
        if self.code is None:
            self._drop_world()
            self._become("warming")
            self._open_nursery()

    def _store_ended(self, process: Process) -> None:
        self._store = None
        what = f"the store on node {self._members.me} {describe_exit(process.status or 0)[0]}"
        status = process.status or 0
        if "port" not in process.report and status >= 0:  # nor would another one: it has said why
            self.end(1, f"{what} before it could be reached", "")
        self._fail(Failure(what))

    # -- the end of a generation -----------------------------------------------------------------

    def _rank_failed(self, process: Process) -> None:
        assert self._world is not None and process.local_rank is not None
        if self._state == "running":
            self._fail(failure_of(process, self._world.pulse(process.local_rank)))

    def _fail(self, failure: Failure) -> None:
        """End this generation on all nodes, as this one has seen that it has to."""
        if self._state in ("running", "done") and self._asked is None:
            self._peers.tell_failure(failure)
            self._take(failure)

    def _take(self, failure: Failure) -> None:
        """Kill the ranks of this node, and begin again or not."""
        if self._state not in ("running", "done") or self._asked is not None:
            return
        assert self._world is not None
        self._failed, self._state = time.monotonic(), "clearing"
        self._world.kill()
        self._members.see(self._world.pulses(), self._members.mark)  # since the latest beat
        spared = self._gathering.spares(failure)
        verdict = self._budget.spend(failure, self._failed, spared=spared)
        what = f"{failure.what} ({failure.where})" if failure.where else failure.what
        node = self._budget.blamed
        if node is not None and self._gathering.without([node]).nodes:
            verdict = None
            self._budget.let_go()
            if node == self._members.me:
                self._why_out = describe_end_of_node(what)
        if verdict is not None:
            self.end(failure.code, f"{what}; {verdict}", failure.words)
            return
        if failure.words:
            self._voice.quote(failure.words)
        self._voice.say(f"{what}; all ranks begin again{self._budget.spent}")
        if self._why_out:
            self._voice.say(f"drops out: {self._why_out}")
        self._look_at_clearing()

    def _look_at_clearing(self) -> None:
        if self._world is not None and not self._world.running:
            self._cleared = time.monotonic()
            self._drop_world()
            self._rest()

    def _drop_world(self) -> None:
        if self._world is not None:
            self._world.close()
            self._world = None
        if self._store is not None:
            store, self._store = self._store, None
            self._nursery.kill(store)

    def _look_at_the_end(self, process: Process) -> None:
        """See whether all ranks that were asked to end have done so."""
        assert self._world is not None and self._asked is not None
        if process.status != 0:
            self._deadline = min(self._deadline, time.monotonic() + _HASTE_SECONDS)
        if not self._world.running:
            code = 128 + self._asked if self._world.code else 0
            self.end(code, "", process.report.get("words", ""))

    # -- from time to time -----------------------------------------------------------------------

    def _look(self) -> None:
        if self.loop.late > _HELD_UP_SECONDS:
            self._voice.say(f"was held up for {self.loop.late:.1f} s")
            self._peers.forgive(self.loop.late)
            if self._world is not None:
                self._world.forgive()
        self._peers.look()
        if self._world is not None:
            self._look_at_world(self._world)
        why = self._gathering.look(self._state)
        if why is not None and self._asked is None:
            self.end(1, why, "")
        self.consider()

    def _look_at_world(self, world: World) -> None:
        world.look()
        if self._asked is not None:
            if time.monotonic() > self._deadline:
                world.pass_on(signal.SIGKILL)
            return
        if self._state == "clearing":
            return
        if not self._said_began and world.have_started:
            self._say_began(world)

    def _look_at_pulses(self, world: World, pulses: list[Pulse]) -> None:
        """See whether ranks are wanting that have not died."""
        if self._asked is not None or self._state not in ("running", "done"):
            return
        say_if_silent(world, pulses, self._voice)
        everybody = [*pulses, *self._peers.pulses]
        failure = not_begun(self._members, world)
        if failure is None and not (self._state == "done" and self._peers.all_done):
            failure = early_exit(world, everybody, self._settings)
        if failure is not None:
            self._fail(failure)
        elif self._members.watches:
            self._peers.look_for_hang(everybody)
            self._look_for_growth(everybody)

    def _look_for_growth(self, pulses: list[Pulse]) -> None:
        why = self._gathering.grow(self._state, pulses)
        self.pause(wanted=self._gathering.pauses)
        if why:
            self._fail(Failure(why, cause=GROWTH))

    def _beat(self) -> None:
        world = self._world
        pulses = world.pulses() if world is not None else []
        self._peers.beat(self._state, pulses, self._why_out)
        if world is not None:
            self._look_at_pulses(world, pulses)

    # -- small parts -----------------------------------------------------------------------------

    def _become(self, state: str) -> None:
        """Go on to another state, tell the others, and see what that makes possible."""
        self._state = state
        self._beat()
        self.consider()

    def _rest(self) -> None:
        """Wait for the next generation, or for good."""
        self._become("out" if self._why_out else "ready")

    def _open_nursery(self) -> None:
        self._nursery.open(warm=self._warmings < _MOST_WARMINGS)

    def _is_mine(self, process: Process) -> bool:
        return self._world is not None and process in self._world.ranks.values()

    def _say_began(self, world: World) -> None:
        self._said_began = True
        self._voice.say(world.describe_start(self._failed, self._cleared))
