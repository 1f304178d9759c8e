"""Who has not come, and who can never come: read from what the ranks say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mics.ranks.board import Notice


def missing(wait: Notice, notices: Mapping[int, Notice]) -> list[int]:
    """Ranks of a collective that are not known to have come to it.

    Args:
        wait: of a rank that waits in the collective.
        notices: of every rank that has put one up.
    """
    return [
        rank
        for rank in wait.members
        if rank != wait.rank and not _has_come(notices.get(rank), wait)
    ]


def _has_come(other: Notice | None, wait: Notice) -> bool:
    # What a rank at work had issued when it said so is less than what it has issued by now.
    return other is not None and other.issued.get(wait.group, 0) >= wait.number


def circle(notices: Mapping[int, Notice]) -> list[Notice]:
    """Waits of which each needs another one of them to end first: none ever will.

    Whoever waits issues nothing, so a rank that waits and has not come to a collective comes to it
    only when its own wait is over. A collective to which all have come is under way, however long
    it takes, and is in no circle.
    """
    stuck = {rank: notice for rank, notice in notices.items() if notice.does == "waits"}
    while True:
        on = {
            rank
            for rank, wait in stuck.items()
            if any(other in stuck for other in missing(wait, notices))
        }
        if on == set(stuck):
            return [stuck[rank] for rank in sorted(stuck)]
        stuck = {rank: stuck[rank] for rank in on}


def crossed(notices: Mapping[int, Notice]) -> list[Notice]:
    """Waits for one and the same collective that its ranks take for different ones."""
    waits = [n for _, n in sorted(notices.items()) if n.does == "waits"]
    for wait in waits:
        same = [n for n in waits if (n.group, n.number) == (wait.group, wait.number)]
        if len({n.what for n in same}) > 1:
            return same
    return []


def state_of_process(notice: Notice, here: Notice) -> str:
    """What the system says of a rank's process: "is gone", "is stopped", or nothing.

    Args:
        notice: of the rank.
        here: of this rank; only processes of its machine can be seen.
    """
    if notice.host != here.host or not Path("/proc/self/stat").exists():
        return ""
    try:
        state = Path(f"/proc/{notice.process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "is gone"
    if state in "ZX":
        return "is gone"
    return "is stopped" if state in "Tt" else ""
