"""Who goes on when nodes are lost: which nodes have ranks, and which side of a cut may have any.

Numbers and names only: nothing here sends, waits or starts.

[Note: two sides]
All of a generation's ranks have to run for a step to be made, and an agent takes part in one
generation at a time. So of two sets of nodes that have a node in common at most one goes on.

- A generation of all nodes may begin wherever they are. One at the listed address of a node that is
  gone is taken by either side: there is one listed address, so only one side can have it.
- A generation of some of them needs the votes of most agents of the latest generation, or of half
  with the first of them; so does a replacement at another address, which could be on both sides.
  Agents are known by what they drew when they began: one that was started again has no vote.
- An agent that votes writes the new generation down before it begins, and votes from then on for
  such only as have most of that one too. Whoever has most of the latest generation's agents has one
  among them that knows of every other generation which had that; and it does not vote while its own
  ranks run. What has begun everywhere makes older ones void.

Whom a replacement has taken the place of is told so when it is heard of again, and ends.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mics.ranks.drawing import ranks_text

Agents = Mapping[int, str]
"""Agents by the index of their node: what they drew when they began."""


@dataclass(frozen=True)
class Shape:
    """What a job has, and what it may go on with.

    Args:
        num_nodes: of the full job.
        ranks_per_node: on each.
        min_nodes: with ranks, at least.
    """

    num_nodes: int
    ranks_per_node: int
    min_nodes: int


@dataclass(frozen=True)
class Choice:
    """Who is to have ranks.

    Args:
        nodes: in order; none if the job cannot go on.
        why: it cannot, for people.
    """

    nodes: tuple[int, ...] = ()
    why: str = ""


def who_goes_on(
    there: Sequence[int], held: Sequence[Mapping[int, int]], shape: Shape, partition: int
) -> Choice:
    """Choose the nodes that have ranks next: as many whole partition groups as there are.

    Where nodes are left over, those stay that hold a whole copy of the model together. Where no
    such nodes are there, nobody goes on: ranks would begin at step 0, beside states that others
    hold.

    Args:
        there: the nodes that could have some, in order.
        held: by generation of which nodes may hold states, the latest last, the places of nodes in
            it, by the index of those that are still there.
        shape: of the job.
        partition: ranks that hold one copy of the model together; 0 if that is not known.
    """
    if len(there) == shape.num_nodes:
        return Choice(tuple(there))
    have = f"{len(there)} of {shape.num_nodes} nodes are there"
    if shape.min_nodes == shape.num_nodes:
        return Choice(why=f"{have}, and without --min-nodes a job needs all")
    if not partition and shape.min_nodes > 1:  # one node that may go on alone holds a copy
        return Choice(
            why=f"{have}, and no rank has said how many of them hold one copy of the model together"
        )
    each = group_nodes(partition or 1, shape.ranks_per_node)
    count = len(there) // each * each
    if count < max(1, shape.min_nodes):
        if each > 1:
            have += f", of which whole partition groups, of {each} nodes each, use {count}"
        return Choice(why=f"{have}; --min-nodes is {shape.min_nodes}")
    if not partition:
        return Choice(tuple(sorted(there)))
    for places in reversed(held):
        nodes = sorted(_by_use(there, places, each)[:count])
        if not any(_lost_shards(nodes, one, shape, partition) for one in held):
            return Choice(tuple(nodes))
    gone = held and _lost_shards(there, held[-1], shape, partition)
    shards = f"shard(s) {ranks_text(gone)}" if gone else "every shard"
    return Choice(why=f"{have}, and none of them is known to hold {shards} of the model's state")


def _lost_shards(
    nodes: Sequence[int], places: Mapping[int, int], shape: Shape, partition: int
) -> list[int]:
    """The shards of the model that none of the nodes has had in a generation."""
    each = shape.ranks_per_node
    firsts = [places[node] * each for node in nodes if node in places]
    found = {rank % partition for first in firsts for rank in range(first, first + each)}
    return [shard for shard in range(partition) if shard not in found]


def group_nodes(partition: int, ranks_per_node: int) -> int:
    """The fewest nodes whose ranks are whole partition groups."""
    return partition // math.gcd(partition, ranks_per_node)


def _by_use(there: Sequence[int], places: Mapping[int, int], each: int) -> list[int]:
    """Order nodes by their use for a copy: of whole groups, then with parts that none before has.

    Ranks get states from the memory of nodes with ranks only, so one copy has to be among them.
    """
    groups: dict[int, list[int]] = {}
    for node in there:
        if node in places:
            groups.setdefault(places[node] // each, []).append(node)
    first = [node for nodes in groups.values() if len(nodes) == each for node in nodes]
    parts = {places[node] % each for node in first}
    rest = [node for node in there if node not in first]
    for node in rest:
        if node in places and places[node] % each not in parts:
            parts.add(places[node] % each)
            first.append(node)
    known = [node for node in rest if node not in first and node in places]
    return [*first, *known, *(node for node in rest if node not in places)]


def joined(links: Mapping[int, Collection[int]]) -> list[int]:
    """Those nodes, from the first on, each of which is linked to all before it.

    Args:
        links: of every node, the nodes that it is linked to.
    """
    taken: list[int] = []
    for node in sorted(links):
        if all(node in links[other] and other in links[node] for other in taken):
            taken.append(node)
    return taken


# -- sides of a cut ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A generation that has begun, or may have.

    Args:
        generation: its number.
        agents: that have ranks in it.
    """

    generation: int
    agents: dict[int, str]

    @property
    def mark(self) -> str:
        """Alike for two agents if they mean the same generation."""
        agents = json.dumps(sorted(self.agents.items())).encode()
        return f"{self.generation}:{zlib.crc32(agents):08x}"

    def kept(self, agents: Agents) -> list[int]:
        """The nodes of it whose agents are among these."""
        return [index for index, agent in self.agents.items() if agents.get(index) == agent]

    def has_most(self, voters: Agents) -> bool:
        """Whether most of its agents are among these, or half of them with the first."""
        kept, whole = self.kept(voters), len(self.agents)
        return 2 * len(kept) > whole or (2 * len(kept) == whole and min(self.agents) in kept)

    def as_json(self) -> dict[str, Any]:
        """The same for other agents."""
        return {
            "generation": self.generation,
            "agents": {str(index): agent for index, agent in self.agents.items()},
        }


def record_from(fields: Any) -> Record:
    """Read what another agent has told.

    Raises:
        KeyError, TypeError, ValueError: it is no record.
    """
    agents = {int(index): str(agent) for index, agent in fields["agents"].items()}
    return Record(int(fields["generation"]), agents)


class History:
    """The generations that still matter: the latest that began everywhere, and those after it."""

    def __init__(self, records: Sequence[Record] = (), begun: int = 0) -> None:
        self._records = list(records)
        self._begun = begun  # the number of the latest that began everywhere

    @property
    def records(self) -> tuple[Record, ...]:
        """All of them, the latest last."""
        return tuple(self._records)

    @property
    def begun(self) -> int:
        """The latest that is known to have begun everywhere; 0 if none is."""
        return self._begun

    def note(self, record: Record) -> None:
        """A generation begins, or may begin."""
        alike = [r for r in self._records if r.agents == record.agents]
        if record.generation <= max([self._begun, *(r.generation for r in alike)]):
            return
        kept = [r for r in self._records if r not in alike or r.generation == self._begun]
        self._records = sorted([*kept, record], key=lambda r: r.generation)

    def has_begun(self, record: Record) -> None:
        """It has begun everywhere: what came before it is void."""
        if record.generation > self._begun:
            self._begun = record.generation
            later = [r for r in self._records if r.generation > record.generation]
            self._records = [record, *later]

    def merge(self, other: History) -> None:
        """Take what another agent knows."""
        for record in other.records:
            if record.generation == other.begun and record.generation > self._begun:
                self.has_begun(record)
            else:
                self.note(record)

    def allows(self, voters: Agents) -> bool:
        """Whether these may begin a generation without all nodes, see [Note: two sides]."""
        return bool(self._records) and all(record.has_most(voters) for record in self._records)

    def as_json(self) -> dict[str, Any]:
        """The same for other agents."""
        return {"records": [record.as_json() for record in self._records], "begun": self._begun}


def history_from(fields: Any) -> History:
    """Read what another agent has told.

    Raises:
        KeyError, TypeError, ValueError: it is no history.
    """
    return History([record_from(one) for one in fields["records"]], int(fields["begun"]))
