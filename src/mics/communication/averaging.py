"""How the replicas come to the same gradients: what is sent of a unit's shard, how it is summed.

``hop_two.py`` says when; a class says how. ``AllReduce`` here is torch's collective, in the dtype
that the unit reduces in or another one; ``across_nodes.py`` has it in two stages, ``fewer_bits.py``
the way that sends fewer bits.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.backend import Issue, Program
from mics.communication.error_feedback import ErrorFeedback
from mics.communication.ledger import Ledger
from mics.ranks.issuing import all_reduce
from mics.ranks.mesh import ranks_of
from mics.traffic import Form, StageMessage


class Sent(NamedTuple):
    """Bytes of the messages of one run: all-reduced, and exchanged and gathered in blocks."""

    exact: int
    coded: int = 0


class Averaging(Protocol):
    """What hop 2 asks of it.

    Attributes:
        errors: what rounding holds back; ``None`` if it is forgotten.
    """

    errors: ErrorFeedback | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the message that it takes, as the unit's parameters are now."""

    def kind(self) -> Hashable:
        """What units must have in common to be sent as one message; ``None`` if none are."""

    def form(self, num_bytes: int) -> Form:
        """What form an all-reduce of so many bytes has."""

    def padded(self, num_bytes: int) -> int:
        """Bytes of an all-reduce of so many, with what its form adds to them."""

    def in_stages(self, num_bytes: int) -> bool:
        """Whether a message of so many bytes has more to be issued once the first call is over.

        Somebody has to go on with it then before the end of the backward pass.
        """

    def program(self, message: torch.Tensor, issue: Issue) -> Program:
        """Replace a message by its mean over the replicas, or its sum where a divide factor is set.

        Args:
            message: [numel of the padded shards of all trainable parameters], of one unit or of
                several of one kind, in place.
            issue: how a call is waited for.
        """

    def sent(self) -> Sent:
        """What one run will send."""


class AllReduce:
    """Exact, to the rounding of a dtype.

    Args:
        group: the FSDP2 parameter group.
        replicas: the ranks that hold the same shard.
        ledger: counts the all-reduces.
        dtype: to sum in; by default the one that the unit reduces in.
    """

    errors: ErrorFeedback | None = None

    def __init__(
        self,
        group: Any,
        replicas: dist.ProcessGroup,
        ledger: Ledger,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._dtype = dtype
        self._group = group
        self._replicas = replicas
        self._ledger = ledger

    @property
    def dtype(self) -> torch.dtype:
        """See ``Averaging.dtype``; a model may be cast after it was sharded."""
        return self._dtype or compat.reduce_dtype(self._group)

    def kind(self) -> Hashable:
        """Give the dtype, and what decides the division; see ``Averaging.kind``."""
        summed = compat.divide_factor(self._group) is not None
        return "all-reduce", self.dtype, summed, compat.sums_only(self._group)

    def form(self, num_bytes: int) -> Form:
        """See ``Averaging.form``."""
        return "flat"

    def padded(self, num_bytes: int) -> int:
        """See ``Averaging.padded``."""
        return num_bytes

    def in_stages(self, num_bytes: int) -> bool:
        """See ``Averaging.in_stages``: it is one call."""
        return False

    def program(self, message: torch.Tensor, issue: Issue) -> Program:
        """Run one all-reduce, of the whole message or a part of it."""
        op, divides = op_of(self._group, message.dtype)
        if divides:
            message.div_(self._replicas.size())
        sent = StageMessage("flat", ranks_of(self._replicas), message.nbytes, 1)
        span = self._ledger.issue(2, "all_reduce", sent, message.device)
        yield from issue(
            span,
            lambda async_op: all_reduce(message, op, self._replicas, async_op=async_op),
        )

    def sent(self) -> Sent:
        """See ``Averaging.sent``."""
        return Sent(compat.trainable_shard_numel(self._group) * self.dtype.itemsize)


def op_of(group: Any, dtype: torch.dtype) -> tuple[compat.ReduceOp, bool]:
    """FSDP2's divide rules for the second hop: mean, or sum when a divide factor is set.

    Returns:
        What a collective does, and whether its message has to be divided by the replicas first.
    """
    if compat.divide_factor(group) is not None:
        return dist.ReduceOp.SUM, False
    if compat.sums_only(group) or dtype == torch.float16:
        return dist.ReduceOp.SUM, True  # before the sum, so that fp16 cannot overflow
    return dist.ReduceOp.AVG, False
