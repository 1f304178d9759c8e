"""Who the nodes of a job are: who lives, who is let in, who has voted for what."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mics.agent.going_on import History, Record, history_from, joined, record_from
from mics.agent.links import Message, Refusal
from mics.agent.names import Address
from mics.agent.pulse import Pulse, pulse_from


@dataclass
class Other:
    """Another node that is linked.

    Args:
        incarnation: of its agent; a replacement has another one.
        state: what its agent does, as in ``supervising.py``.
        generation: the latest that it knows of.
        mark: of the generation that it has begun last, see ``going_on.Record``.
        linked: the nodes that it is linked to.
        pulses: what its ranks do, as ``pulse.py`` writes it.
    """

    incarnation: str
    state: str = "new"
    generation: int = 0
    mark: str = ""
    linked: list[int] = field(default_factory=list)
    pulses: list[Any] = field(default_factory=list)


class Membership:
    """What one agent knows of the nodes.

    Args:
        me: the index of this one.
        nodes: the addresses of all of them, by index, as ``host:port``.
        terms: what all agents of a job must have been told alike, by its name for people.
        job: the job's id; empty until it is known.
    """

    def __init__(self, me: int, nodes: list[str], terms: dict[str, str], job: str = "") -> None:
        self.me = me
        self.nodes = nodes
        self.addresses: list[Address] = [split_address(node) for node in nodes]
        self.terms = terms
        self.job = job
        self.incarnation = secrets.token_hex(8)
        self.generation = 0
        """The latest that this agent knows of, begun or not."""
        self.latest = Record(0, {})
        """The latest that has begun, as far as this agent has heard."""
        self.mark = ""
        """Of the latest in which this node has had ranks, see ``going_on.Record``."""
        self.history = History()
        self.holding: list[Record] = []
        """The generations of which nodes may hold states: the latest in which a step was seen, and
        those since. What has begun since may have ended before ranks had their states."""
        self.partition = 0
        """Ranks that hold one copy of the model together; 0 if no rank has said it."""
        self.others: dict[int, Other] = {}
        self._known: dict[int, str] = {}  # the agents that were seen last
        self._replaced: set[str] = set()

    @property
    def living(self) -> list[int]:
        """The nodes that are linked, and this one, in order."""
        return sorted([self.me, *self.others])

    @property
    def absent(self) -> list[int]:
        """The nodes that are not."""
        return [index for index in range(len(self.nodes)) if index not in self.living]

    @property
    def present(self) -> dict[int, str]:
        """The agents of all living nodes."""
        there = {index: other.incarnation for index, other in self.others.items()}
        return dict(sorted((there | {self.me: self.incarnation}).items()))

    @property
    def has_majority(self) -> bool:
        """Whether this side may go on with replacements from elsewhere, or with fewer nodes."""
        return not self.generation or self.history.allows(self.present)

    @property
    def takes_part(self) -> bool:
        """Whether this node has ranks in the latest generation."""
        return self.latest.agents.get(self.me) == self.incarnation

    @property
    def watches(self) -> bool:
        """Whether it is the first of those that have ranks, which looks after all of them."""
        return self.takes_part and self.me == min(self.latest.kept(self.present))

    def joined(self, state: str, *states: str) -> list[int]:
        """The nodes that are linked with each other and are in one of some states.

        Args:
            state: of this one.
            states: that count.
        """
        links = {
            index: other.linked for index, other in self.others.items() if other.state in states
        }
        return joined(links | ({self.me: [*self.others]} if state in states else {}))

    def sees(self, record: Record) -> bool:
        """Whether all agents of a generation are there."""
        return len(record.kept(self.present)) == len(record.agents)

    def agree(self, record: Record) -> bool:
        """Vote for a generation, if this agent, which has no ranks, has seen no later one."""
        if record.generation <= self.generation or (
            self.me in record.agents and not self.sees(record)
        ):
            return False
        self.generation = record.generation
        self.history.note(record)
        return True

    def may_begin(self, record: Record) -> bool:
        """Whether this agent may begin what another one has: it is new, or was voted for."""
        if record.generation == self.generation:
            return record in self.history.records and record.generation > self.latest.generation
        return record.generation > self.generation and len(record.agents) == len(self.nodes)

    def hello(self) -> Message:
        """What this agent says first."""
        return {
            "index": self.me,
            "incarnation": self.incarnation,
            "nodes": self.nodes,
            "terms": self.terms,
            "job": self.job,
            "generation": self.generation,
        }

    @property
    def knowledge(self) -> Message:
        """What this agent says next."""
        return {
            "kind": "knowledge",
            "latest": self.latest.as_json(),
            "history": self.history.as_json(),
            "holding": [record.as_json() for record in self.holding],
            "partition": self.partition,
        }

    def admit(self, hello: Message) -> Refusal | None:
        """Why an agent may not be linked; ``None`` if it may."""
        index, terms, nodes = hello["index"], hello.get("terms"), hello.get("nodes")
        if not isinstance(terms, dict) or not isinstance(nodes, list):
            return Refusal("it speaks another language", final=True)
        for name in [*self.terms, *terms]:
            if terms.get(name) != self.terms.get(name):
                told = f"{terms.get(name)}, not {self.terms.get(name)}"
                return Refusal(f"node {index} was started with other {name}: {told}", final=True)
        if len(nodes) != len(self.nodes):
            return Refusal(f"node {index} was told of {len(nodes)} nodes, not {len(self.nodes)}")
        if hello.get("job") and self.job and hello["job"] != self.job:
            return Refusal(f"node {index} is of job {hello['job']}, not {self.job}", final=True)
        if hello.get("incarnation") in self._replaced:
            return Refusal(f"another agent has taken the place of node {index}", final=True)
        begun = self.generation > 0 or hello.get("generation", 0) > 0
        if nodes != self.nodes and not begun:
            return Refusal("the --nodes of the two are not alike", final=True)
        if nodes[index] != self.nodes[index] and self.generation > 0 and not self.has_majority:
            return Refusal(
                f"node {index} is to be at {self.nodes[index]}: from {nodes[index]} only the side "
                "with most of the nodes takes it"
            )
        return None

    def linked(self, index: int, hello: Message) -> None:
        """Take what a new link has said; it was admitted."""
        agent = str(hello["incarnation"])
        before = self._known.get(index, self.latest.agents.get(index))
        if before is not None and before != agent:
            self._replaced.add(before)
        self._known[index] = agent
        if hello["generation"] > self.generation:  # this one is the newcomer
            self.generation, self.job = hello["generation"], hello["job"]
            self._adopt([i for i in range(len(self.nodes)) if i != self.me], hello["nodes"])
        else:
            self._adopt([index], hello["nodes"])
        self.job = self.job or hello["job"]
        self.others[index] = Other(agent, generation=hello["generation"])

    def learn(self, knowledge: Message) -> None:
        """Take what an agent knows that has been linked."""
        latest = record_from(knowledge["latest"])
        holding = [record_from(one) for one in knowledge["holding"]]
        known = latest.generation == self.latest.generation and len(holding) >= len(self.holding)
        if latest.generation >= self.latest.generation and not known:
            self.latest, self.holding = latest, holding
        self.history.merge(history_from(knowledge["history"]))
        self.partition = self.partition or knowledge["partition"]

    def _adopt(self, indices: list[int], nodes: list[str]) -> None:
        for index in indices:
            if self.nodes[index] != nodes[index]:
                self.nodes[index] = nodes[index]
                self.addresses[index] = split_address(nodes[index])

    def take_beat(self, index: int, message: Message) -> None:
        """Take what a linked agent says of itself."""
        other = self.others[index]
        other.state, other.generation = message["state"], message["generation"]
        other.mark = message["mark"]
        other.linked, other.pulses = message["linked"], message["pulses"]
        self.see(map(pulse_from, other.pulses), other.mark)
        if self.sees(self.latest) and not self.behind:
            self.history.has_begun(self.latest)

    def see(self, pulses: Iterable[Pulse], mark: str) -> None:
        """Take what ranks say: how many hold one copy of the model, and that all have states.

        Args:
            pulses: of ranks of a node.
            mark: of their generation.
        """
        pulses = [*pulses]
        self.partition = max([pulse.partition for pulse in pulses], default=0) or self.partition
        if mark == self.latest.mark and any(pulse.step for pulse in pulses):
            self.holding = [self.latest]

    @property
    def behind(self) -> list[int]:
        """The nodes that are to begin the latest generation, and have not."""
        marks = {index: other.mark for index, other in self.others.items()} | {self.me: self.mark}
        return [i for i in self.latest.agents if marks.get(i) != self.latest.mark]

    def lost(self, index: int) -> None:
        """A link has ended."""
        del self.others[index]

    def begin(self, record: Record, job: str) -> None:
        """A generation begins, here or on other nodes only."""
        self.generation, self.latest, self.job = record.generation, record, job
        self.history.note(record)
        alike = [one for one in self.holding[1:] if one.agents == record.agents]
        self.holding = [*(one for one in self.holding if one not in alike), record]
        if self.takes_part:
            self.mark = record.mark


def split_address(text: str) -> Address:
    """Split ``host:port``; an IPv6 host stands in brackets.

    Raises:
        ValueError: it is no such text, or the host stands for all addresses of a machine.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if host in ("", "*", "::", "0.0.0.0") or not port.isdecimal() or int(port) >= 1 << 16:
        raise ValueError(text)
    return host, int(port)
