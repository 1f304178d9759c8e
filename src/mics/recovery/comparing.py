"""Replicas that hold other bits: who is wrong, and is it worth going back?

With three or more replicas the majority is right. With two nobody knows: both go back and repeat
the step, and the one whose result is another one now was wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mics.checkpoint.peers import Peers
from mics.errors import RecoveryError
from mics.ranks.console import alarm
from mics.ranks.drawing import ranks_text
from mics.recovery.holders import majority

_MOST_TIMES = 3  # that one step may differ before it is no accident


class Comparing:
    """What is known of the digests of this rank's shard.

    Args:
        peers: all ranks.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._trusted = False
        self._times: Counter[int] = Counter()
        self._before: dict[int, int] | None = None  # what ranks had before they went back

    def trust(self) -> None:
        """Take note that the replicas have been alike once: what differs later is an accident."""
        self._trusted = True

    def differ(self, step: int, digests: Mapping[int, int]) -> None:
        """Say who differs, as far as it is known. Collective.

        Args:
            step: in which some replicas differ, not always those of this rank's shard.
            digests: of this rank's shard, by rank.

        Raises:
            RecoveryError: on every rank: they were never alike, or differ in this step for the
                third time.
        """
        known = {str(rank): digest for rank, digest in digests.items()}
        tables = [{int(r): d for r, d in row.items()} for row in self._peers.gather(known)]
        unlike = {tuple(sorted(table)): table for table in tables if len(set(table.values())) > 1}
        groups = "; ".join(f"ranks {ranks_text(list(ranks))}" for ranks in sorted(unlike))
        if not self._trusted:
            raise RecoveryError(
                "Replicas of one shard hold other values from the beginning.",
                numbers=f"After step {step}: {groups}, which should be alike.",
                write="the same seed for every replica before mics.shard, experts as one parameter "
                "spread over their axis, or mics.Snapshots(..., compare=False)",
            )
        self._times[step] += 1
        if self._times[step] == _MOST_TIMES:
            raise RecoveryError(
                f"Replicas of one shard differ in step {step} however often it is repeated.",
                numbers=f"{_MOST_TIMES} times: {groups}.",
                write="torch.use_deterministic_algorithms(True), or mics.Snapshots(..., "
                "compare=False) where the arithmetic differs from GPU to GPU",
            )
        wrong = sorted(rank for table in unlike.values() for rank in minority(table))
        who = (
            f"rank {ranks_text(wrong)} has other bits than its replicas"
            if wrong
            else (f"{groups} differ, and two cannot tell who is wrong: the step is repeated")
        )
        alarm(f"SILENT CORRUPTION in step {step}: {who}. All ranks go back.")
        self._before = None if wrong else dict(digests)

    def agree(self, step: int, digests: Mapping[int, int]) -> None:
        """Take note that all replicas are alike; say who was wrong before. Collective then."""
        self._trusted = True
        if not self._times[step]:
            return
        before, self._before = self._before, None
        mine = [r for r, d in (before or {}).items() if r in digests and digests[r] != d]
        wrong = sorted({rank for of_rank in self._peers.gather(mine) for rank in of_rank})
        if wrong:
            alarm(f"It was rank {ranks_text(wrong)}: step {step} has other bits there now.")


def minority(digests: Mapping[int, int]) -> list[int]:
    """The ranks that differ from most; none where there is no majority."""
    right = majority(list(digests.values()))
    return [] if right is None else [rank for rank, one in digests.items() if one != right]
