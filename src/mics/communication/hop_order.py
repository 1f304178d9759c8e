"""The order in which the units of a model start hop 2: one, whatever a rank's data used.

A communicator matches its collectives by their order alone. A rank whose data skipped a block, or a
whole backward, learns of it at another moment than the others, so hop 2 does not start when a unit
happens to be complete, but when it is and all before it have started: the last unit of the model
first, as a backward pass completes them (``DistributedDataParallel`` orders its buckets for the
same reason). A unit that nobody used takes part with zeros. Small ones share a message
(``joined.py``), which starts when all of them may. Meshes beside each other have one order too:
torch may give them one communicator, and a rank that waits for one has others wait for it.

[Note: messages in stages]
A message in stages goes on to its second call when the next one starts. That may take long, and
nothing waits for it before the end: there all go on in the order in which they started, so that
each one's last call runs beside what is still under way of the later ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from mics.communication.hop_two import HopTwo
from mics.communication.joined import joined


class HopOrder:
    """Starts the hop 2 of units in the reverse order of their modules.

    Args:
        hops: of the units under one root, in module order.
    """

    def __init__(self, hops: Sequence[HopTwo]) -> None:
        self._hops = hops
        # The first that have not started. All are owed at once: the first forward, which makes
        # this, may be of a step that has begun, and a rank may leave out its backward.
        self._next = 0
        self._messages: list[list[HopTwo]] | None = None  # made anew, for what is trained may be
        self._under_way: list[HopTwo] = []  # the first of each message that has started

    def begin(self) -> None:
        """All units owe a hop 2."""
        self._next = 0
        self._messages = None
        self._under_way = []

    def advance(self) -> None:
        """Start those whose turn it is and that are ready."""
        self._start(only_ready=True)

    def finish(self) -> None:
        """Start all that have not started, and let all go on that are in stages."""
        self._start(only_ready=False)
        for first in [*self._under_way[-1:], *self._under_way]:  # see [Note: messages in stages]
            first.go_on()
        self._under_way = []

    def _start(self, *, only_ready: bool) -> None:
        if self._messages is None:
            wanted = any(hop.wanted for hop in self._hops)
            self._messages = messages_of(self._hops) if wanted else []
        for message in self._messages[self._next :]:
            hops = [hop for hop in message if hop.wanted]
            if only_ready and not all(hop.ready for hop in hops):
                return
            self._next += 1
            if hops:
                first, *others = hops
                first.start(*others)
                for before in self._under_way[-1:]:
                    before.go_on()
                self._under_way.append(first)


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
