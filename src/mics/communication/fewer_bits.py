"""Hop 2 in fewer bits: gradients exchanged in blocks of fp8 or int8, summed in fp32, gathered.

::

    every rank    rounds its message to blocks, and sends piece r to rank r         (exchange)
    rank r        adds up what it gets and its own piece, which was not rounded,
                  in fp32, and rounds the sum to blocks
    every rank    gets the rounded sums of all pieces, decodes them, and divides    (all-gather)

Everybody, the owner too, decodes the same bytes, so replicas stay equal to the bit. The two
collectives send as many values as an all-reduce, 2 (R - 1) / R of the message, in 1.016 bytes each.
What rounding holds back comes with the next message (``error_feedback.py``).

[Note: what stays exact]
Parameters of one dim, as norms and biases, are all-reduced in the dtype that the unit reduces in:
they are few, and one scale of very different values would lose the small ones. So is a message that
is so short that its blocks, of which each piece has whole ones, would be no fewer bytes.

Sum of decoded blocks, not of codes, between an exchange and a gather: Dettmers 2015; errors fed
back: Seide et al. 2014, Karimireddy et al. 2019.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.across_nodes import all_reduce_of
from mics.communication.averaging import AllReduce, Averaging, Sent
from mics.communication.backend import Issue, Program
from mics.communication.blocks_of_values import (
    Code,
    coded_bytes,
    coded_where_fewer,
    decode,
    encode,
    piece_numel,
)
from mics.communication.error_feedback import ErrorFeedback, cut, hold_back
from mics.communication.forms import Collectives
from mics.communication.gradients import matrices_of
from mics.communication.ledger import Ledger, Span
from mics.errors import ShardError
from mics.ranks.issuing import Handle, all_gather, exchange
from mics.ranks.mesh import Groups, ranks_of
from mics.traffic import Collective, Form, StageMessage

HopTwoBits = Literal["fp32", "bf16", "fp8", "int8", "auto"]
"""How a user asks for it; the dtype that is reduced in where nothing is asked for."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Asked(NamedTuple):
    """What a user asks of hop 2, the same for every unit of a model.

    Args:
        bits: ``None`` is the dtype that a unit reduces in.
        error_feedback: send what rounding to blocks holds back with the next gradients.
        collectives: how the form of all-reduces is chosen.
    """

    bits: HopTwoBits | None
    error_feedback: bool
    collectives: Collectives


class FewerBits:
    """Sends the gradients of one unit in blocks; see above.

    Args:
        group: the FSDP2 parameter group.
        replicas: the ranks that hold the same shard.
        ledger: counts what is sent.
        code: of the blocks.
        errors: what rounding holds back; ``None`` forgets it.

    Attributes:
        dtype: as ``Averaging.dtype``.
        errors: as ``Averaging.errors``.
    """

    dtype = torch.float32

    def __init__(
        self,
        group: Any,
        replicas: dist.ProcessGroup,
        ledger: Ledger,
        code: Code,
        errors: ErrorFeedback | None,
    ) -> None:
        self._group = group
        self._replicas = replicas
        self._ledger = ledger
        self._code = code
        self.errors = errors
        self._exact = AllReduce(group, replicas, ledger)

    def sent(self) -> Sent:
        """See ``Averaging.sent``."""
        numel = sum(_sizes(self._coded()))
        exact = compat.trainable_shard_numel(self._group) - numel
        coded = coded_bytes(numel, self._replicas.size())
        return Sent(exact * self._exact.dtype.itemsize, coded)

    def kind(self) -> Hashable:
        """Send every unit by itself, as what is held back is a unit's."""
        return None

    def form(self, num_bytes: int) -> Form:
        """See ``Averaging.form``: what stays exact is little."""
        return "flat"

    def padded(self, num_bytes: int) -> int:
        """See ``Averaging.padded``."""
        return num_bytes

    def in_stages(self, num_bytes: int) -> bool:
        """See ``Averaging.in_stages``."""
        return bool(self._coded())

    def program(self, message: torch.Tensor, issue: Issue) -> Program:
        """See ``Averaging.program``."""
        coded = self._coded()
        exact = _between(coded, message.numel())
        rest = torch.cat([message[part] for part in exact] or [message[:0]]).to(self._exact.dtype)
        beside = self._exact.program(rest, issue) if exact else iter(())
        if coded:
            next(beside, None)
            yield from self._in_blocks(message, coded, issue)
        yield from beside
        _spread(rest, message, exact)

    def _coded(self) -> list[slice]:
        """The parts of a message that are sent in blocks; see [Note: what stays exact]."""
        parts = [part for _, part in matrices_of(self._group)]
        numel = sum(_sizes(parts))
        itemsize = self._exact.dtype.itemsize
        return parts if coded_where_fewer(numel, self._replicas.size(), itemsize) else []

    def _in_blocks(self, message: torch.Tensor, coded: list[slice], issue: Issue) -> Program:
        ranks, me = self._replicas.size(), self._replicas.rank()
        others = slice(0, me), slice(me + 1, ranks)
        values = message.new_zeros(ranks, piece_numel(sum(_sizes(coded)), ranks))
        compat.copy_all(cut(values, _sizes(coded)), [message[part] for part in coded])
        errors = None
        if self.errors is not None:
            errors = self.errors.to_send().view_as(values)
            values += errors
        rows = encode(values, self._code)
        arrived = torch.empty_like(rows)

        def send(async_op: bool) -> Handle | None:
            work = exchange(arrived, rows, self._replicas)
            if errors is not None:  # computed while it is on its way
                for some in others:
                    hold_back(errors[some], values[some], decode(rows[some], self._code))
            if async_op:
                return work
            work.wait()
            return None

        yield from issue(self._span("all_to_all", rows), send)
        total = values[me]
        for some in others:
            total += decode(arrived[some], self._code).sum(dim=0)
        piece, gathered = encode(total, self._code), arrived.view(-1)
        if errors is not None:
            hold_back(errors[me], total, decode(piece, self._code))
        yield from issue(
            self._span("all_gather", rows),
            lambda async_op: all_gather(gathered, piece, self._replicas, async_op=async_op),
        )
        result = decode(gathered, self._code)
        if compat.divide_factor(self._group) is None:
            result /= ranks
        compat.copy_all([message[part] for part in coded], cut(result, _sizes(coded)))

    def _span(self, collective: Collective, rows: torch.Tensor) -> Span:
        sent = StageMessage("flat", ranks_of(self._replicas), rows.nbytes, 1)
        return self._ledger.issue(2, collective, sent, rows.device)


def averaging_in(asked: Asked, group: Any, groups: Groups, ledger: Ledger) -> Averaging:
    """How the replicas of a unit come to the same gradients, in the bits that were asked for.

    Collective over the mesh the first time that it is called, or a size of message is met.

    Args:
        asked: the bits, and whether errors are fed back.
        group: the FSDP2 parameter group.
        groups: of the unit, with more than one replica.
        ledger: counts what is sent.
    """
    assert groups.replicas is not None
    if asked.bits in ("fp8", "int8"):
        errors = ErrorFeedback(group, groups) if asked.error_feedback else None
        return FewerBits(group, groups.replicas, ledger, asked.bits, errors)
    dtype = _DTYPES[asked.bits] if asked.bits else None
    return all_reduce_of(group, groups, ledger, asked.collectives, dtype)


def check_bits(asked: str | None) -> None:
    """Refuse what is no choice.

    Raises:
        ShardError: it is none.
    """
    if asked is not None and asked not in get_args(HopTwoBits):
        raise ShardError(
            f"hop_two = {asked!r} is not a choice.",
            write='hop_two="fp32", "bf16", "fp8", "int8" or "auto", or None for the dtype that is '
            "reduced in",
        )


def _sizes(parts: Sequence[slice]) -> list[int]:
    return [part.stop - part.start for part in parts]


def _between(parts: Sequence[slice], numel: int) -> list[slice]:
    """What parts in ascending order leave of so many elements, without what is empty."""
    starts = [0, *(part.stop for part in parts)]
    ends = [*(part.start for part in parts), numel]
    return [slice(a, b) for a, b in zip(starts, ends, strict=True) if a < b]


def _spread(rest: torch.Tensor, message: torch.Tensor, parts: Sequence[slice]) -> None:
    for target, source in zip(
        [message[part] for part in parts], cut(rest, _sizes(parts)), strict=True
    ):
        target.copy_(source)
