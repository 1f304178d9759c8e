"""How the ranks that save or load together compare notes: JSON text over a Gloo group of their own.

Training's communicators stay free for training while a save runs in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mics.errors import CheckpointError, DisagreementError, MicsError
from mics.ranks.agreement import check_agreement
from mics.ranks.issuing import host_group, receive, send
from mics.ranks.together import gather_json, together
from mics.ranks.whereabouts import world_group

Result = TypeVar("Result")

_LONGEST = timedelta(hours=3)  # a rank may write or verify for long while the others wait


class Peers:
    """All ranks of the job, or this process alone. Collective when first made.

    Args:
        of: names the group; who may speak while a save does beside training has one of its own.
    """

    def __init__(self, of: str = "mics_checkpoint") -> None:
        self.rank, self.world = 0, 1
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            ranks = dist.get_process_group_ranks(world_group())
            self._group = host_group(ranks, of, _LONGEST)

    def send(self, tensor: torch.Tensor, taker: int) -> None:
        """Send a tensor of the host to another rank, which takes it by ``receive``."""
        assert self._group is not None
        send(tensor, taker, self._group)

    def receive(self, tensor: torch.Tensor, giver: int) -> None:
        """Take what another rank sends by ``send``."""
        assert self._group is not None
        receive(tensor, giver, self._group)

    def gather(self, facts: Any) -> list[Any]:
        """The facts of every rank, in rank order."""
        return gather_json(facts, self._group)

    def together(
        self,
        work: Callable[[], Result],
        *,
        only: int | None = None,
        kind: type[MicsError] = CheckpointError,
    ) -> list[Result | Any]:
        """Do ``work`` on every rank (or on ``only`` one) and gather what it returns, as JSON.

        Args:
            work: what is done.
            only: the rank that does it; all by default.
            kind: what ``work`` raises on purpose.

        Raises:
            MicsError: of this kind, or a CheckpointError: on every rank, the error of the first
                rank that could not, whatever it was: the others must not wait for a rank that has
                left.
        """
        mine = work if only is None or only == self.rank else None
        return together(mine, self._group, kind=kind, explain=self._explain)

    def agree(self, facts: Mapping[str, Sequence[str]]) -> None:
        """Compare lines of text by their subjects. Collective.

        Raises:
            CheckpointError: on every rank; names the ranks that differ, and the first line that
                does.
        """
        if self._group is None:
            return
        try:
            check_agreement(facts, [self._group], torch.device("cpu"))
        except DisagreementError as error:
            raise CheckpointError(error.what, numbers=error.numbers, write=error.write) from None

    def _explain(self, error: Exception) -> CheckpointError:
        if isinstance(error, OSError):
            where = f" {error.filename}" if error.filename else ""
            return CheckpointError(
                f"Rank {self.rank} cannot write{where}: {error.strerror or error}.",
                write="a folder that every rank can write to, with room for a checkpoint",
            )
        return CheckpointError(
            f"Rank {self.rank} failed at a checkpoint.", numbers=f"{type(error).__name__}: {error}"
        )
