"""When a generation begins, and with whom: all nodes, or those that are left after a while.

[Note: votes]
A generation of all nodes just begins. For one of some nodes the first of them asks all agents that
it sees for their votes, and begins when all those nodes and enough other agents have voted, see
[Note: two sides] in ``going_on.py``. An agent that may not vote says nothing and is asked again.

[Note: nodes that come and go]
A loss that leaves enough nodes is no failure of the job and does not count as one. So that it makes
steps beside a node that is lost again and again, this has ranks again after a while only, which
grows with each loss. Whatever else ends a generation lets it in sooner.

[Note: growing back]
When nodes are there again, ranks are asked to pause before their next step. Each does so having
kept the one before, and no step can end that one rank has not begun. When all stand, or wait in a
collective for those that do, the generation ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mics.agent.budget import LOST, Failure
from mics.agent.going_on import (
    Choice,
    History,
    Record,
    Shape,
    history_from,
    who_goes_on,
)
from mics.agent.links import Message
from mics.agent.membership import Membership
from mics.agent.pulse import Pulse
from mics.agent.settings import Settings
from mics.agent.voice import Voice, name_nodes

RUNS = ("running", "done", "clearing")
"""States of an agent that has ranks."""

_SAY_ABSENT_SECONDS = 10.0
_SAY_IDLE_SECONDS = 3.0
_ASK_AGAIN_SECONDS = 1.0
_PLAN_SECONDS = 5.0  # then another number: votes may have gone to two plans of one
_YIELD_SECONDS = 10.0  # to a node that others see and this one does not
_PAUSE_SECONDS = 5.0  # for the other ranks, when one of them stands; or two slow steps
_NO_STEP_SECONDS = 10.0  # where ranks tell no steps, and never pause
_STANDS_SECONDS = 1.0  # in a collective
_RETURN_SECONDS = 60.0  # for a node that was lost twice; twice as long each time after that
_MOST_RETURN_SECONDS = 1920.0


class Gathering:
    """Who begins the next generation.

    Args:
        settings: of this agent.
        members: what it knows of all of them.
        voice: of this agent.
        say: tells all other agents something.
    """

    def __init__(
        self,
        settings: Settings,
        members: Membership,
        voice: Voice,
        say: Callable[[Message], None],
    ) -> None:
        self._settings = settings
        self._shape = Shape(settings.num_nodes, settings.ranks_per_node, settings.least_nodes)
        self._members = members
        self._voice = voice
        self._say = say
        self._since = self._said = time.monotonic()
        self._plan: Record | None = None
        self._votes: dict[int, History] = {}
        self._asked = self._planned = self._idle = 0.0
        self._pause = Pause()
        self._losses: dict[int, list[float]] = {}  # when each node was lost, or dropped out

    def count(self, index: int) -> None:
        """A node that had ranks was lost, or has dropped out."""
        self._losses.setdefault(index, []).append(time.monotonic())

    def spares(self, failure: Failure) -> bool:
        """Whether a node was lost, and enough are left, see [Note: nodes that come and go]."""
        if failure.cause != LOST or failure.node is None:
            return False
        return bool(self.without([failure.node]).nodes)

    def _may_return(self, index: int) -> bool:
        now, window = time.monotonic(), self._settings.window
        times = [at for at in self._losses.get(index, []) if now - at < window]
        self._losses[index] = times
        if len(times) < 2:
            return True
        seconds = min(_RETURN_SECONDS * 2 ** (len(times) - 2), _MOST_RETURN_SECONDS)
        if now - times[-1] >= seconds:
            return True
        self._voice.say_once(
            f"node {index} was lost {len(times)} times within {window:g} s: it has ranks again "
            f"{seconds:g} s after the last time"
        )
        return False

    def lost(self) -> None:
        """A node was lost or has dropped out: count anew how long it is waited for."""
        self._since = self._said = time.monotonic()

    # -- who begins ------------------------------------------------------------------------------

    def next(self, state: str) -> Record | None:
        """The generation that this agent is to begin now, as the first of its nodes.

        Args:
            state: of this agent.
        """
        members = self._members
        nodes = self._due(state)
        if not nodes or nodes[0] != members.me:
            self._plan = None
            return None
        agents = {index: members.present[index] for index in nodes}
        if len(nodes) == self._shape.num_nodes:
            return Record(self._newest + 1, agents)
        return self._ask(agents)

    def leads(self, state: str) -> bool:
        """Whether this agent may have to begin the next generation: it is the first that can."""
        able = [i for i, other in self._members.others.items() if other.state != "out"]
        return state == "ready" and self._members.me < min(able, default=self._shape.num_nodes)

    def voted(self, index: int, message: Message) -> None:
        """Another agent has voted."""
        if self._plan is not None and message["mark"] == self._plan.mark:
            self._votes[index] = history_from(message["history"])

    def without(self, nodes: Sequence[int]) -> Choice:
        """Who would go on without some of the nodes."""
        gone = {*nodes, *self._out}
        there = [index for index in self._members.living if index not in gone]
        choice = self._choose(there)
        if choice.nodes and not self._members.has_majority:
            return Choice(why=self._side())
        return choice

    @property
    def prospect(self) -> str:
        """What comes of it that nodes are lost, for people; nothing where all are there."""
        members, settings = self._members, self._settings
        if not members.absent or not members.generation:
            return ""
        if not members.has_majority:
            return f"{self._side()}: it waits for them"
        choice = self.without([])
        if choice.nodes and len(choice.nodes) < len(members.latest.agents):
            return (
                f"{len(choice.nodes)} of {settings.num_nodes} nodes go on if no other node has come"
                f" within {settings.degrade_after:g} s, which --degrade-after says"
            )
        if not choice.nodes and settings.least_nodes < settings.num_nodes:
            return f"the job waits: {choice.why}"
        return ""

    @property
    def _newest(self) -> int:
        others = self._members.others.values()
        return max([self._members.generation, *(other.generation for other in others)])

    @property
    def _out(self) -> list[int]:
        return [i for i, other in self._members.others.items() if other.state == "out"]

    def _side(self) -> str:
        """Why this side may not go on with fewer nodes: agents that began anew do not count."""
        present = self._members.present
        few = [one for one in self._members.history.records if not one.has_most(present)]
        record = few[-1] if few else self._members.latest
        return (
            f"this side has {len(record.kept(present))} of the {len(record.agents)} agents of "
            f"generation {record.generation}, not the most, and goes on with all nodes only"
        )

    def _choose(self, there: Sequence[int]) -> Choice:
        members = self._members
        held = []
        for record in members.holding:
            kept = set(record.kept(members.present))
            held.append({node: at for at, node in enumerate(sorted(record.agents)) if node in kept})
        return who_goes_on(there, held, self._shape, members.partition)

    def _due(self, state: str) -> tuple[int, ...]:
        """The nodes that are to begin now, if it is time; none if not."""
        members = self._members
        states = [state, *(other.state for other in members.others.values())]
        if any(one not in ("ready", "out") for one in states):
            return ()
        ready = members.joined(state, "ready")
        if len(ready) == self._shape.num_nodes:
            return tuple(ready)
        linked = {index for other in members.others.values() for index in other.linked}
        hears_of_a_lower_one = min(linked, default=members.me) < min(members.living)
        if not members.has_majority or not members.history.records:
            return ()
        nodes = self._choose(ready).nodes
        waited = time.monotonic() - self._since - self._settings.degrade_after
        if hears_of_a_lower_one:
            return nodes if waited >= _YIELD_SECONDS else ()
        as_many = not members.absent or len(nodes) >= len(members.latest.agents)
        return nodes if waited >= 0 or as_many else ()

    def _ask(self, agents: dict[int, str]) -> Record | None:
        """Ask for votes; returns what may begin, once there are enough."""
        members, now = self._members, time.monotonic()
        plan = self._plan
        stale = now - self._planned > _PLAN_SECONDS * (1 + members.me)
        if plan is None or plan.agents != agents or plan.generation < self._newest or stale:
            plan = self._plan = Record(self._newest + 1, agents)
            self._votes = {}
            self._planned, self._asked = now, 0.0
            if not members.agree(plan):
                return None
        if now - self._asked >= _ASK_AGAIN_SECONDS:
            self._asked = now
            self._say({"kind": "plan", "record": plan.as_json()})
        voters = {i: a for i, a in members.present.items() if i in self._votes or i == members.me}
        histories = [members.history, *(self._votes[i] for i in voters if i != members.me)]
        enough = all(i in voters for i in agents) and all(h.allows(voters) for h in histories)
        return plan if enough else None

    # -- the wait --------------------------------------------------------------------------------

    def look(self, state: str) -> str | None:
        """Say who is waited for, if it is time to; returns why the wait is over, if it is."""
        members, now = self._members, time.monotonic()
        out = [*self._out, *([members.me] if state == "out" else [])]
        states = [state, *(other.state for other in members.others.values())]
        if not members.absent and not out:
            self.lost()
        if (not members.absent and not out) or any(one in RUNS for one in states):
            self._said = now
            self._say_idle(state, idle=any(one in RUNS for one in states))
            return None
        seconds, limit = now - self._since, self._settings.spare_wait
        nodes = ", ".join(f"{index} ({members.nodes[index]})" for index in members.absent)
        who = [f"node(s) {nodes}"] if nodes else []
        who += [f"new agents on {name_nodes(out)}, dropped out"] if out else []
        if seconds > limit and not (members.generation and self.without(out).nodes):
            return self._verdict(nodes, out)
        if now - self._said >= _SAY_ABSENT_SECONDS and who:
            self._said = now
            self._voice.say(f"waits for {' and '.join(who)} ({seconds:.0f} s of {limit:g} s)")
        return None

    def _say_idle(self, state: str, *, idle: bool) -> None:
        """Say that ranks of others run, and none here, once that has been so for a while."""
        members, now = self._members, time.monotonic()
        idle = idle and state == "ready" and bool(members.latest.agents) and not members.takes_part
        self._idle = (self._idle or now) if idle else 0.0
        if idle and now - self._idle >= _SAY_IDLE_SECONDS:
            self._voice.say_once(
                f"generation {members.latest.generation} runs on other nodes: this one waits "
                "without ranks for a pause between two steps, or until another is lost"
            )

    def _verdict(self, nodes: str, out: Sequence[int]) -> str:
        settings = self._settings
        words = []
        if nodes:
            words.append(f"node(s) {nodes} did not come")
        if out:
            words.append(f"{name_nodes(out)} dropped out and did not come back")
        said = f"{' and '.join(words)} within {settings.spare_wait:g} s, which --spare-wait says"
        if settings.least_nodes == settings.num_nodes:
            return said
        if not self._members.generation:
            return f"{said}; a job begins with all its nodes"
        return f"{said}; {self.without(out).why}"

    # -- words -----------------------------------------------------------------------------------

    def describe(self, state: str, record: Record) -> str:
        """Say who has ranks in a generation that begins; nothing where it is all, as before."""
        before = self._members.latest
        nodes, each = sorted(record.agents), self._shape.ranks_per_node
        whole = self._shape.num_nodes
        if len(nodes) == whole:
            if not before.agents or len(before.agents) == whole:
                return ""
            return f"generation {record.generation}: all {whole} nodes again, {whole * each} ranks"
        living = self._members.living
        out = [*self._out, *([self._members.me] if state == "out" else [])]
        idle = [i for i in range(whole) if i not in nodes]
        lost = [i for i in idle if i not in living]
        some = [f"{name_nodes(lost)} {_is(lost)} lost"] if lost else []
        some += [f"{name_nodes(out)} {_is(out, 'has', 'have')} dropped out"] if out else []
        ranks = f"{len(nodes) * each} of {whole * each} ranks"
        partition = self._members.partition
        if partition:
            groups = f"{len(nodes) * each // partition} of {whole * each // partition}"
            ranks += f", {groups} partition groups"
        some += [f"{len(nodes)} of {whole} nodes go on: {ranks}"]
        spare = [i for i in idle if i not in lost and i not in out]
        if spare:
            some += [f"{name_nodes(spare)} {_is(spare, 'waits', 'wait')} without ranks"]
        return f"generation {record.generation}: {'; '.join(some)}"

    # -- growing back ----------------------------------------------------------------------------

    def grow(self, state: str, pulses: Sequence[Pulse]) -> str:
        """Look whether more nodes could have ranks; to be called by the agent that watches.

        Args:
            state: of this agent.
            pulses: of all ranks.

        Returns:
            Why the generation is to end now, for people; nothing while it is not.
        """
        members = self._members
        nodes = sorted(members.latest.agents)
        more: list[int] = []
        if len(nodes) < self._shape.num_nodes and not members.behind and state == "running":
            there = members.joined(state, "running", "ready")
            there = [node for node in there if node in nodes or self._may_return(node)]
            chosen = self._choose(there).nodes
            if len(chosen) > len(nodes):
                more = [index for index in chosen if index not in nodes]
        if any(pulse.ended for pulse in pulses):
            more = []
        wanted = self._pause.wanted
        words = self._pause.look(more, pulses, time.monotonic())
        if self._pause.wanted != wanted:
            self._say({"kind": "pause", "mark": members.latest.mark, "on": self._pause.wanted})
        return words

    @property
    def pauses(self) -> bool:
        """Whether the ranks are asked to pause."""
        return self._pause.wanted

    def began(self) -> None:
        """Ranks of this node begin: they are asked nothing yet."""
        self._plan, self._pause = None, Pause()


class Pause:
    """The pause before a step in which a generation ends, see [Note: growing back]."""

    def __init__(self) -> None:
        self.wanted = False
        """Whether ranks are asked to pause."""
        self._since = 0.0
        self._stood: float | None = None

    def look(self, more: Sequence[int], pulses: Sequence[Pulse], now: float) -> str:
        """See how far it is.

        Args:
            more: nodes that could have ranks and have none.
            pulses: of all ranks.
            now: on the monotonic clock.

        Returns:
            Why the generation is to end now; nothing while it is not.
        """
        if not more:
            self.wanted, self._stood = False, None
            return ""
        if not self.wanted:
            self.wanted, self._since = True, now
        stand = [pulse for pulse in pulses if pulse.pauses]
        if stand and self._stood is None:
            self._stood = now
        wait = [p for p in pulses if not p.pauses and p.waits and (p.still or 0) > _STANDS_SECONDS]
        slow = max((pulse.slow_step for pulse in pulses), default=0.0)
        tells = stand or any(pulse.step for pulse in pulses)
        busy = any(p.is_long and p.tells for p in pulses if p not in stand and p not in wait)
        if not stand or busy:
            self._stood = None
        late = self._stood is not None and now - self._stood > max(_PAUSE_SECONDS, 2 * slow)
        untold = not tells and not busy and now - self._since > _NO_STEP_SECONDS
        if (stand and len(stand) + len(wait) == len(pulses)) or late or untold:
            step = min((pulse.step for pulse in stand), default=0)
            after = f" after step {step}" if step else ""
            return f"{name_nodes(more)} {_is(more)} back: growing back{after}"
        return ""


def _is(nodes: Sequence[int], one: str = "is", several: str = "are") -> str:
    return one if len(nodes) == 1 else several
