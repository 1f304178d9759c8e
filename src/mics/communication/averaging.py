"""How the replicas come to the same gradients: what is sent of a unit's shard, how it is summed.

``hop_two.py`` says when; a class here says how. ``AllReduce`` is torch's collective, in the dtype
that the unit reduces in.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.backend import Issue, Program
from mics.communication.ledger import Ledger
from mics.ranks.issuing import all_reduce
from mics.ranks.mesh import ranks_of
from mics.traffic import StageMessage


class Averaging(Protocol):
    """What hop 2 asks of it.

    Attributes:
        dtype: of the message that it takes.
    """

    dtype: torch.dtype

    def kind(self) -> Hashable:
        """What units must have in common to be sent as one message; ``None`` if none are."""

    def program(self, message: torch.Tensor, issue: Issue) -> Program:
        """Replace a message by its mean over the replicas, or its sum where a divide factor is set.

        Args:
            message: [numel of the padded shards of all trainable parameters], of one unit or of
                several of one kind, in place.
            issue: how a call is waited for.
        """


class AllReduce:
    """Exact, to the rounding of the dtype that the unit reduces in.

    Args:
        group: the FSDP2 parameter group.
        replicas: the ranks that hold the same shard.
        ledger: counts the all-reduces.
    """

    def __init__(self, group: Any, replicas: dist.ProcessGroup, ledger: Ledger) -> None:
        self.dtype = compat.reduce_dtype(group)
        self._group = group
        self._replicas = replicas
        self._ledger = ledger

    def kind(self) -> Hashable:
        """Give the dtype, and what decides the division; see ``Averaging.kind``."""
        summed = compat.divide_factor(self._group) is not None
        return "all-reduce", self.dtype, summed, compat.sums_only(self._group)

    def program(self, message: torch.Tensor, issue: Issue) -> Program:
        """Run one all-reduce, of the whole message."""
        op = self._scale_and_op(message)
        sent = StageMessage("flat", ranks_of(self._replicas), message.nbytes, 1)
        span = self._ledger.issue(2, "all_reduce", sent, message.device)
        yield from issue(
            span,
            lambda async_op: all_reduce(message, op, self._replicas, async_op=async_op),
        )

    def _scale_and_op(self, message: torch.Tensor) -> compat.ReduceOp:
        """FSDP2's divide rules for the second hop: mean, or sum when a divide factor is set."""
        if compat.divide_factor(self._group) is not None:
            return dist.ReduceOp.SUM
        if compat.sums_only(self._group) or message.dtype == torch.float16:
            message.div_(self._replicas.size())  # before the sum, so that fp16 cannot overflow
            return dist.ReduceOp.SUM
        return dist.ReduceOp.AVG
