"""The order in which the units of a model start hop 2: one, whatever a rank's data used.

A communicator matches its collectives by their order alone. A rank whose data skipped a block, or a
whole backward, learns of it at another moment than the others, so hop 2 does not start when a unit
happens to be complete, but when it is and all before it have started: the last unit of the model
first, as a backward pass completes them (``DistributedDataParallel`` orders its buckets for the
same reason). A unit that nobody used takes part with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

from mics.communication.hop_two import HopTwo


class HopOrder:
    """Starts the hop 2 of units in the reverse order of their modules.

    Args:
        hops: of the units under one root and on one mesh, in module order.
    """

    def __init__(self, hops: Sequence[HopTwo]) -> None:
        self._hops = tuple(reversed(hops))
        # The first that has not started. All are owed at once: the first forward, which makes this,
        # may be of a step that has begun, and a rank may leave out its backward.
        self._next = 0

    def begin(self) -> None:
        """All units owe a hop 2."""
        self._next = 0

    def advance(self) -> None:
        """Start those whose turn it is and that are ready."""
        while self._next < len(self._hops):
            hop = self._hops[self._next]
            if hop.wanted:
                if not hop.ready:
                    return
                hop.start()
            self._next += 1

    def finish(self) -> None:
        """Start all that have not started."""
        while self._next < len(self._hops):
            if self._hops[self._next].wanted:
                self._hops[self._next].start()
            self._next += 1
