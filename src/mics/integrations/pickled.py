"""What a tool pickles on one rank, where shards would be those of that rank alone.

A tool that does not know of shards lets one rank write what it is given. The file then has one
rank's part of each tensor, nothing says so, and what the other ranks held is lost when they end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.tensor import DTensor

from mics.errors import CheckpointError


def refuse_shards(value: Any, *, what: str, write: str) -> None:
    """Refuse what has shards in it. Every rank sees the same, so nobody is asked.

    Args:
        value: tables, lists and tuples of anything.
        what: that would be written, as the subject of a sentence.
        write: what to write instead.

    Raises:
        CheckpointError: there are shards in it, with the names under which they were found.
    """
    found = [*_shards_in(value, "")]
    if found:
        raise CheckpointError(
            f"{what} has shards, and a file of one rank would have that rank's alone.",
            numbers=f"{len(found)} of its tensors are sharded, as {found[0]!r}.",
            write=write,
        )


def _shards_in(value: Any, name: str) -> list[str]:
    if isinstance(value, DTensor):
        return [name]
    if isinstance(value, Mapping):
        parts = [(str(key), one) for key, one in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(str(key), one) for key, one in enumerate(value)]
    else:
        return []
    return [found for key, one in parts for found in _shards_in(one, f"{name}.{key}".strip("."))]
