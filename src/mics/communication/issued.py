"""Which collectives a mesh was given, in order: the same on every rank, or all is wrong.

A communicator matches collectives by their order. Ranks of a partition group that gather or reduce
other units, or the same ones in another order, would compute with each other's blocks without a
word where the sizes agree. So would replicas that start hop 2 of other units, or of the same ones
in another order: one unit's gradients would be averaged with another's. So each rank writes down
what it issues, and the ranks compare at the end of a step (``settling.py``).
"""

from __future__ import annotations

import zlib
from array import array
from typing import Literal

from mics.ranks.mesh import PerMesh

Kind = Literal["gathers", "reduces"]
KINDS: tuple[Kind, ...] = ("gathers", "reduces")
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
ENDED = -1
"""In place of a call: none comes any more."""


class Issued:
    """What this rank has issued on one mesh since it was last compared."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._calls = array("i")  # on the partition group
        self._started = array("i")  # the units whose hop 2 has

    def number(self, name: str) -> int:
        """A number for one more unit, the same on every rank, as all make units in one order.

        Args:
            name: of the unit, to tell a user.
        """
        self._names.append(name)
        return len(self._names) - 1

    def rename(self, unit: int, name: str) -> None:
        """Give a unit the name that it has under its root."""
        self._names[unit] = name

    def add(self, unit: int, kind: Kind) -> None:
        """A unit issues one more."""
        self._calls.append(len(KINDS) * unit + _NUMBERS[kind])

    def start_hop_two(self, unit: int) -> None:
        """A unit starts hop 2."""
        self._started.append(unit)

    def digest(self) -> int:
        """A number below 2**31 that differs when the order in the partition group does."""
        return _digest(self._calls)

    @property
    def started(self) -> int:
        """A number below 2**31 that differs when the order of hop 2 does."""
        return _digest(self._started)

    def calls(self) -> list[int]:
        """All of them, coded; see ``spell``."""
        return self._calls.tolist()

    def spell(self, call: int) -> str:
        """One of them in words."""
        if call == ENDED:
            return "has ended"
        unit, kind = divmod(call, len(KINDS))
        return f"{KINDS[kind]} {self._names[unit]}"

    def clear(self) -> None:
        """Forget what has been compared."""
        del self._calls[:]
        del self._started[:]


def _digest(numbers: array[int]) -> int:
    return zlib.crc32(numbers.tobytes()) & 0x7FFFFFFF


issued_of = PerMesh(lambda _: Issued())
"""What was issued on a mesh."""
