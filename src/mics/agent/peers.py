"""The agents of the other nodes: what they tell this one, and what it tells them.

A message has a ``kind``. What comes under a good seal is from an agent of this job and is believed.

beat    what the sender does, twice a second and whenever that changes
knowledge  what the sender knows of generations, once
plan    the sender asks for votes, see gathering.py
voted   the sender has voted
begin   the leader begins a generation
failed  the generation has ended, and why
hung    the sender, who watches, has found that a rank of the receiver's stands still
pause   ranks are to begin no other step, or to go on
stop    ranks are asked to end, by a signal
end     the job has ended
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mics.agent.budget import LOST, Failure
from mics.agent.gathering import Gathering
from mics.agent.going_on import Record, record_from
from mics.agent.hangs import find_hang
from mics.agent.links import Links, Message, Refusal
from mics.agent.loop import Loop
from mics.agent.membership import Membership, split_address
from mics.agent.pulse import Pulse, pulse_from
from mics.agent.settings import Settings
from mics.agent.voice import Voice
from mics.agent.world import Meeting
from mics.ranks.interfaces import LOOPBACK


class Boss(Protocol):
    """Who decides what this agent does."""

    @property
    def has_ranks(self) -> bool:
        """Whether there are ranks on this node, or were and may not all have gone."""

    def consider(self) -> None:
        """Something has changed: see whether it is time to begin, or to end."""

    def begin(self, meeting: Meeting, record: Record) -> None:
        """Begin a generation, if this node is ready."""

    def pause(self, *, wanted: bool) -> None:
        """Let the ranks of this node begin no other step, or go on."""

    def fail(self, failure: Failure, mark: str) -> None:
        """A generation has ended."""

    def declare_hung(self, pulse: Pulse, what: str, mark: str) -> None:
        """A rank of this node stands still."""

    def stop(self, number: int) -> None:
        """Let the ranks of this node end."""

    def end(self, code: int, why: str, words: str, *, tell: bool = True) -> None:
        """End the job."""

    def node_lost(self, failure: Failure, *, had_ranks: bool) -> None:
        """A node was lost."""

    def node_out(self) -> None:
        """Another node has dropped out."""


class Peers:
    """The other agents, if there are any.

    Args:
        loop: where this agent waits.
        settings: of this agent.
        voice: of this agent.
        boss: of this agent.
    """

    def __init__(self, loop: Loop, settings: Settings, voice: Voice, boss: Boss) -> None:
        self._loop = loop
        self._settings = settings
        self._voice = voice
        self._boss = boss
        nodes = list(settings.nodes) or [f"{LOOPBACK}:0"]
        self.members = Membership(settings.node_index, nodes, settings.terms, settings.job)
        self.gathering = Gathering(settings, self.members, voice, self.tell)
        """Who begins the next generation."""
        self.host = LOOPBACK
        """The address of this node."""
        self._links: Links | None = None

    def listen(self) -> None:
        """Listen, and call the others.

        Raises:
            MicsError: the address cannot be listened at.
        """
        settings = self._settings
        if not settings.nodes:
            return
        place = split_address(settings.listen or settings.nodes[settings.node_index])
        self._links = Links(
            self._loop, settings.token, settings.node_index, self.members.addresses, self
        )
        self.host, port = self._links.listen(place)
        self._voice.say(f"listens at {self.host}:{port}, for {settings.num_nodes} nodes")

    def look(self) -> None:
        """Call who is absent, part from who is silent; to be called often."""
        if self._links is not None:
            self._links.look()

    def forgive(self, seconds: float) -> None:
        """Add to the time in which others may be silent."""
        if self._links is not None:
            self._links.forgive(seconds)

    def close(self) -> None:
        """End all connections."""
        if self._links is not None:
            self._links.close()

    def tell(self, message: Message) -> None:
        """Tell all of them."""
        if self._links is not None:
            self._links.say(message)

    def tell_failure(self, failure: Failure) -> None:
        """Tell all of them that this generation has ended."""
        self.tell({"kind": "failed", "mark": self.members.mark, "failure": vars(failure)})

    def look_for_hang(self, pulses: Sequence[Pulse]) -> None:
        """Look for a rank that holds up the others, and tell its node, as the one that watches."""
        seconds, mark = self._settings.hang_seconds, self.members.mark
        hang = find_hang(pulses, seconds) if seconds else None
        if hang is None:
            return
        pulse, what = hang.culprit, str(hang)
        if pulse.node == self.members.me:
            self._boss.declare_hung(pulse, what, mark)
        elif self._links is not None:
            told = {"kind": "hung", "mark": mark, "what": what, "pulse": pulse.as_json()}
            self._links.send(pulse.node, told)

    def beat(self, state: str, pulses: Sequence[Pulse], why: str) -> None:
        """Tell all of them what this agent does, and why it has dropped out, if it has."""
        self.members.see(pulses, self.members.mark)
        self.tell(
            {
                "kind": "beat",
                "state": state,
                "why": why,
                "generation": self.members.generation,
                "mark": self.members.mark,
                "linked": self._links.linked if self._links is not None else [],
                "pulses": [pulse.as_json() for pulse in pulses],
            }
        )

    def invite(self, meeting: Meeting, record: Record) -> None:
        """Let all of them begin a generation, as the first of its nodes."""
        self.tell({"kind": "begin", "record": record.as_json(), "meeting": vars(meeting)})

    @property
    def all_done(self) -> bool:
        """Whether all ranks of the other nodes have ended with 0, and none is missing."""
        members = self.members
        others = [other for i, other in members.others.items() if i in members.latest.agents]
        return members.sees(members.latest) and all(other.state == "done" for other in others)

    @property
    def pulses(self) -> list[Pulse]:
        """What the ranks of the other nodes do."""
        others = self.members.others.values()
        return [pulse_from(pulse) for other in others for pulse in other.pulses]

    # -- see links.Owner -------------------------------------------------------------------------

    def hello(self) -> Message:
        """What this agent says first."""
        return self.members.hello()

    def admit(self, hello: Message) -> Refusal | None:
        """Why an agent may not be linked; ``None`` if it may."""
        refusal = self.members.admit(hello)
        if refusal is not None and refusal.final:
            self._voice.say_once(f"does not take node {hello.get('index')}: {refusal.why}")
        return refusal

    def linked(self, index: int, hello: Message) -> None:
        """An agent has been linked."""
        self.members.linked(index, hello)
        self._voice.say(f"node {index} is there")
        assert self._links is not None
        self._links.send(index, self.members.knowledge)
        self._boss.consider()

    def heard(self, index: int, message: Message) -> None:
        """A linked agent has said something."""
        match message["kind"]:
            case "beat":
                self._take_beat(index, message)
            case "knowledge":
                self.members.learn(message)
                self._boss.consider()
            case "plan":
                self._vote(index, record_from(message["record"]))
            case "voted":
                self.gathering.voted(index, message)
                self._boss.consider()
            case "begin":
                self._begin(record_from(message["record"]), message["meeting"])
            case "failed":
                self._boss.fail(Failure(**message["failure"]), message["mark"])
            case "hung":
                pulse = pulse_from(message["pulse"])
                self._boss.declare_hung(pulse, message["what"], message["mark"])
            case "pause":
                if message["mark"] == self.members.mark:
                    self._boss.pause(wanted=message["on"])
            case "stop":
                self._boss.stop(message["signal"])
            case "end":
                self._boss.end(message["code"], message["why"], message["words"], tell=False)

    def _take_beat(self, index: int, message: Message) -> None:
        was_out = self.members.others[index].state == "out"
        self.members.take_beat(index, message)
        if message["state"] == "out" and not was_out:
            self._voice.say(f"node {index} has dropped out: {message['why']}")
            self.gathering.count(index)
            self._boss.node_out()
        self._boss.consider()

    def _vote(self, index: int, record: Record) -> None:
        """Vote for a generation; who has ranks has no vote, as they may go on."""
        voted_before = record in self.members.history.records
        if not self._boss.has_ranks and (voted_before or self.members.agree(record)):
            told = {"kind": "voted", "mark": record.mark}
            assert self._links is not None
            self._links.send(index, told | {"history": self.members.history.as_json()})

    def _begin(self, record: Record, meeting: Message) -> None:
        # An agent that does not see all of them yet does not begin, and is waited for.
        takes_part = self.members.me in record.agents
        if self._boss.has_ranks or not self.members.may_begin(record):
            return
        if not takes_part or self.members.sees(record):
            nodes = tuple(sorted(record.agents))
            self._boss.begin(Meeting(**(meeting | {"nodes": nodes})), record)

    def lost(self, index: int, why: str) -> None:
        """A link has ended."""
        members = self.members
        had_ranks = index in members.latest.kept(members.present)
        members.lost(index)
        idle = "" if had_ranks or not members.latest.agents else "; it had no ranks"
        if had_ranks:
            self.gathering.count(index)
        failure = Failure(f"node {index} was lost: it {why}{idle}", cause=LOST, node=index)
        self._boss.node_lost(failure, had_ranks=had_ranks)

    def refused(self, index: int, refusal: Refusal) -> None:
        """Another agent has refused this one."""
        if refusal.final:
            self._boss.end(1, f"node {index} refuses this node: {refusal.why}", "", tell=False)
        else:
            self._voice.say_once(f"node {index} does not take this node yet: {refusal.why}")
