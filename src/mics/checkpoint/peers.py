"""How the ranks that save or load together compare notes: JSON text over a Gloo group of their own.

Training's communicators stay free for training while a save runs in the background.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mics.errors import CheckpointError
from mics.ranks.agreement import gather_text

Result = TypeVar("Result")

_LONGEST = timedelta(hours=3)  # a rank may write or verify for long while the others wait
_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = (
    weakref.WeakKeyDictionary()
)


class Peers:
    """All ranks of the job, or this process alone. Collective when first made."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self._group = _group_of_our_own()

    def gather(self, facts: Any) -> list[Any]:
        """The facts of every rank, in rank order."""
        if self._group is None:
            return [facts]
        texts = gather_text(json.dumps(facts), self._group, torch.device("cpu"))
        return [json.loads(text) for text in texts]

    def together(
        self, work: Callable[[], Result], *, only: int | None = None
    ) -> list[Result | Any]:
        """Do ``work`` on every rank (or on ``only`` one) and gather what it returns, as JSON.

        Raises:
            CheckpointError: on every rank, the error of the first rank that could not, whatever it
                was: the others must not wait for a rank that has left.
        """
        result: Any = None
        trouble: dict[str, str] | None = None
        cause: Exception | None = None
        try:
            if only is None or only == self.rank:
                result = work()
        except CheckpointError as error:
            trouble = {"what": error.what, "numbers": error.numbers, "write": error.write}
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            trouble = {
                "what": f"Rank {self.rank} cannot write{where}: {error.strerror or error}.",
                "numbers": "",
                "write": "a folder that every rank can write to, with room for a checkpoint",
            }
        except Exception as error:
            cause = error
            trouble = {
                "what": f"Rank {self.rank} failed at a checkpoint.",
                "numbers": f"{type(error).__name__}: {error}",
                "write": "",
            }
        gathered = self.gather({"result": result, "trouble": trouble})
        for one in gathered:
            if one["trouble"] is not None:
                raise CheckpointError(
                    one["trouble"]["what"],
                    numbers=one["trouble"]["numbers"],
                    write=one["trouble"]["write"],
                ) from cause
        return [one["result"] for one in gathered]


def _group_of_our_own() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    if world not in _groups:
        made = dist.new_group(backend="gloo", timeout=_LONGEST, group_desc="mics_checkpoint")
        assert made is not None
        _groups[world] = made
    return _groups[world]
