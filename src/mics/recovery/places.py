"""The slots of a rank in the memory of its node: which is written next, and which are left."""

from __future__ import annotations

from collections.abc import Sequence

from mics.checkpoint.peers import Peers
from mics.recovery.holders import Seat, is_first_on_host
from mics.recovery.job import SLOTS, Job, remove
from mics.recovery.slot import Slot


class Places:
    """The slots of this rank.

    Args:
        job: of the rank.
        rank: of this process.
        seats: of all ranks.
        peers: all ranks.
    """

    def __init__(self, job: Job, rank: int, seats: Sequence[Seat], peers: Peers) -> None:
        self._job, self._peers = job, peers
        self._is_first_here = is_first_on_host(rank, seats)
        self._paths = job.slots(seats[rank].key, rank)
        self._slots = [Slot(path) for path in self._paths]
        self._at = 0

    @property
    def free(self) -> Slot:
        """The one to be written next."""
        return self._slots[self._at]

    def turn(self) -> None:
        """Let the other one be written next: what is in this one is needed."""
        self._at = (self._at + 1) % SLOTS

    def go_on_from(self, slot: Slot) -> None:
        """Forget everything in memory but one slot of each rank, this one here. Collective."""
        self.clear(slot)
        at = self._paths.index(slot.path)
        self._slots = [Slot(path) for path in self._paths]
        self._slots[at] = slot
        self._at = (at + 1) % SLOTS

    def clear(self, but: Slot | None) -> None:
        """Remove every slot of this node that nobody goes on from. Collective."""
        names = [] if but is None else [but.path.name]
        used = {name for of_rank in self._peers.gather(names) for name in of_rank}
        if self._is_first_here:
            self._job.remove_all_but(used)
        self._peers.gather(None)  # nobody writes before that

    def remove(self) -> None:
        """Remove the folder of a job that has ended well."""
        if self._is_first_here:
            remove(self._job)
