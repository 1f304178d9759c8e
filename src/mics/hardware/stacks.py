"""Software stacks: one factor each, what of the modelled rate it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from mics.errors import PlanError
from mics.hardware.lookup import read_catalogue, spelt


@dataclass(frozen=True)
class Stack:
    """One factor, and the figure it was calibrated at.

    Args:
        name: its name in the catalogue.
        factor: the share of the modelled rate of computation that it reaches.
        calibrated: the figure that the factor was calibrated at.
    """

    name: str
    factor: float
    calibrated: str


@cache
def stacks() -> dict[str, Stack]:
    """All stacks of the catalogue by name."""
    tables = {k: v for k, v in read_catalogue("stacks").items() if isinstance(v, dict)}
    return {name: Stack(name, t["factor"], t["calibrated"]) for name, t in tables.items()}


def find_stack(name: str) -> Stack:
    """A stack of the catalogue.

    Raises:
        PlanError: there is none.
    """
    known = stacks()
    own = spelt(name, known)
    if own is None:
        raise PlanError(
            f"There is no software stack {name!r}.",
            numbers=f"Stacks: {', '.join(known)}.",
            write="one of them",
        )
    return known[own]
