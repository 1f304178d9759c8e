"""A source that is ready to be read, whatever it was made of, and how all ranks come to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mics.errors import DataError
from mics.ranks.together import together
from mics.training.data.stream import Tokens
from mics.training.data.tokens import Tokenizer

Group = dist.ProcessGroup | None
"""A Gloo group of all ranks; ``None`` for a process alone."""


@dataclass(frozen=True)
class Opened:
    """The tokens of one source.

    Args:
        source: as the options name it.
        tokenizer: that made them.
        tokenizer_sha256: of its ``tokenizer.json``; "" where nobody kept it beside the tokens.
        train: ids to train on.
        held_out: ids to measure with.
        text_bytes: of the text of both; ``None`` where nobody knows.
        identity: what tells these ids from others, as JSON.
        notes: what a person should know.
    """

    source: str
    tokenizer: Tokenizer
    tokenizer_sha256: str
    train: Tokens
    held_out: Tokens
    text_bytes: tuple[int | None, int | None]
    identity: Any
    notes: tuple[str, ...] = ()


def on_all(work: Callable[[], Any] | None, group: Group) -> list[Any]:
    """Do something, where there is something to do, and raise one rank's error on all.

    Returns:
        What it returned on every rank, as JSON.

    Raises:
        DataError: of the first rank that failed.
    """

    def explain(error: Exception) -> DataError:
        return DataError(
            f"Rank {dist.get_rank() if group is not None else 0} failed at the data.",
            numbers=f"{type(error).__name__}: {error}",
        )

    return together(work, group, kind=DataError, explain=explain)
