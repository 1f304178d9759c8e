"""How errors name what differs between a checkpoint and what it is loaded into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mics.checkpoint.manifest import MANIFEST
from mics.errors import CheckpointError

MOST_NAMED = 3


def differ(there: set[str], here: set[str]) -> str:
    """How many names are on one side only, and the first of them."""
    only_there, only_here = sorted(there - here), sorted(here - there)
    return (
        f"{len(only_there)} only there{_first(only_there)}; {len(only_here)} only "
        f"here{_first(only_here)}; {len(there & here)} in both."
    )


def not_to_be(folder: Path, name: str, why: str) -> CheckpointError:
    """The error for a value of a manifest that was never saved so."""
    return CheckpointError(
        f"{folder / MANIFEST} is damaged: {name} has a value that was never saved.",
        numbers=f"{why[:200]}.",
        write="an older checkpoint of the same run",
    )


def _first(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > MOST_NAMED else ""
    return f" ({', '.join(names[:MOST_NAMED])}{more})"
