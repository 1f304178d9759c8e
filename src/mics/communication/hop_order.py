"""The order in which the units of a model start hop 2: one, whatever a rank's data used.

A communicator matches its collectives by their order alone. A rank whose data skipped a block, or a
whole backward, learns of it at another moment than the others, so hop 2 does not start when a unit
happens to be complete, but when it is and all before it have started: the last unit of the model
first, as a backward pass completes them (``DistributedDataParallel`` orders its buckets for the
same reason). A unit that nobody used takes part with zeros. Small ones share a message
(``joined.py``), which starts when all of them may. Meshes beside each other have one order too:
torch may give them one communicator, and a rank that waits for one has others wait for it. So have
the models of one step, which a rank may leave out whole: one comes after the other. A step that
begins inside another's last micro-step comes before what that has not started.

[Note: messages in stages]
A message in stages goes on to its second call when the next one starts. That may take long, and
nothing waits for it before the end: there all go on in the order in which they started, so that
each one's last call runs beside what is still under way of the later ones. The end of a model's
passes is not at one place of the order on every rank, so of several models one's messages go on
before the next one's start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from mics.communication.hop_two import HopTwo
from mics.communication.joined import joined


class HopOrder:
    """Starts the hop 2 of units in the reverse order of their modules.

    Args:
        trees: the hops under each root, in module order. Those of the last root come first, as a
            backward comes to what ran last first, and no root's before all of the one before it.
    """

    def __init__(self, trees: Sequence[Sequence[HopTwo]]) -> None:
        self._own = list(trees)
        self._trees = list(trees)
        self._tree_of = _places(self._trees)
        # Trees that have not started all. They owe at once: the first forward, which makes this,
        # may be of a step that has begun, and a rank may leave out its backward.
        self._owed = self._all()
        self._ended: set[int] = set()  # trees whose pass is over: what is not ready starts too
        self._from = 0  # the first tree that need not wait for its step to end
        # Of the first that owes, made anew, for what is trained may be; and what of it has started.
        self._messages: list[list[HopTwo]] | None = None
        self._next = 0
        # The first of each message of one tree that has started.
        self._under_way: list[HopTwo] = []
        self._tree_under_way = -1

    def begin(self) -> None:
        """All units owe a hop 2, those of no other step."""
        self._trees = list(self._own)
        self._tree_of = _places(self._trees)
        self._owed = self._all()
        self._ended.clear()
        self._from = 0
        self._messages = None
        self._under_way = []

    def let_in(self, other: HopOrder) -> None:
        """All units of another step owe a hop 2, ahead of what has not started here.

        That waits for the end of its own step: ranks talk at the end of the other one.
        """
        first = self._from = len(self._trees)
        self._trees += other._own
        self._tree_of = _places(self._trees)
        self._owed = [first + tree for tree in other._all()] + self._owed
        self._messages = None

    def let_out(self, other: HopOrder) -> None:
        """Another step was left: nothing waits for its units."""
        gone = {self._tree_of.get(id(hop)) for hops in other._own for hop in hops}
        self._owed = [tree for tree in self._owed if tree not in gone]
        self._messages = None

    def begin_pass(self, hop: HopTwo) -> None:
        """The units under the root of one owe a hop 2; if they have had one, then another."""
        tree = self._tree_of[id(hop)]
        self._ended.discard(tree)
        if tree not in self._owed:
            self._owed.append(tree)
        if tree == self._owed[0]:
            self._messages = None

    def advance(self) -> None:
        """Start those whose turn it is and that are ready."""
        self._advance(set())

    def _advance(self, at_their_end: set[int]) -> None:
        while self._owed:
            tree = self._owed[0]
            if tree < self._from and tree not in at_their_end:
                return
            if not self._start(tree, only_ready=tree not in self._ended):
                return
            self._owed.pop(0)
            self._messages = None

    def end_pass(self, hop: HopTwo) -> bool:
        """Start all under the root of one, once it is their turn, and let those in stages go on.

        Returns:
            Whether it has been their turn.
        """
        tree = self._tree_of[id(hop)]
        self._ended.add(tree)
        self._go_on(set())
        return tree not in self._owed

    def finish(self, step: HopOrder) -> None:
        """Start all of a step that have not started, and what is ahead of them.

        Args:
            step: the order of its own, which may be this.
        """
        mine = {self._tree_of[id(hop)] for hops in step._own for hop in hops}
        last = max((place for place, tree in enumerate(self._owed) if tree in mine), default=-1)
        ending = mine | set(self._owed[: last + 1])
        self._ended |= ending
        self._go_on(ending)

    def _all(self) -> list[int]:
        return list(reversed(range(len(self._own))))

    def _go_on(self, at_their_end: set[int]) -> None:
        self._advance(at_their_end)
        if self._tree_under_way not in self._owed:
            self._let_go_on()

    def _let_go_on(self) -> None:
        """See [Note: messages in stages]."""
        for first in [*self._under_way[-1:], *self._under_way]:
            first.go_on()
        self._under_way = []

    def _start(self, tree: int, *, only_ready: bool) -> bool:
        """Start messages of a tree in their order; return whether all have started."""
        if self._messages is None:
            hops = self._trees[tree]
            self._messages = messages_of(hops) if any(hop.wanted for hop in hops) else []
            self._next = 0
        for message in self._messages[self._next :]:
            hops = [hop for hop in message if hop.wanted]
            if only_ready and not all(hop.ready for hop in hops):
                return False
            self._next += 1
            if not hops:
                continue
            if tree != self._tree_under_way:
                self._let_go_on()
            first, *others = hops
            first.start(*others)
            for before in self._under_way[-1:]:
                before.go_on()
            self._under_way.append(first)
            self._tree_under_way = tree
        return True


def _places(trees: Sequence[Sequence[HopTwo]]) -> dict[int, int]:
    """The number of each hop's tree, the latest if there are several."""
    return {id(hop): tree for tree, hops in enumerate(trees) for hop in hops}


def messages_of(hops: Sequence[HopTwo]) -> list[list[HopTwo]]:
    """The hops of each message, in the order in which they start.

    Args:
        hops: of units under one root, in module order.
    """
    order = [hop for hop in reversed(hops) if hop.message_bytes]
    meshes: dict[dist.ProcessGroup, list[int]] = {}
    for place, hop in enumerate(order):
        meshes.setdefault(hop.partition, []).append(place)
    messages = []
    for places in meshes.values():
        sizes = [order[i].message_bytes for i in places]
        together = joined(sizes, [order[i].kind for i in places])
        messages += [[places[i] for i in message] for message in together]
    messages.sort(key=lambda message: message[-1])  # may start when its last one may
    return [[order[i] for i in message] for message in messages]
