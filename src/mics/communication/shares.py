"""One rank's share of a unit, where the replicas deal its optimizer state among them.

[Note: shares of a message]
The R replicas hold the same shard of a unit. Its message (the padded shards of all trainable
parameters, end to end) is cut into R equal shares, and rank r of the replicas owns the r-th: whole
parameters, parts of some, nothing of others. Hop 2 is then a reduce-scatter to the owners, and what
an optimizer has stepped is gathered again: each moves (R - 1) / R of the message, together what the
all-reduce moves.

[Note: where a gradient is]
Until the end of a step ``.grad`` of the sharded parameters is the accumulator, as without shares
(``hop_two.py``). At the end the owned parameters have what hop 2 brought. Those without a gradient
have a signpost (``signposts.py``).

[Note: when the new shards come]
Gathering begins behind ``optimizer.step()`` and is waited for by the unit's next forward, and by
whatever else reads parameters. An optimizer that has stepped only some of a unit leaves the gather
to the last one, or to whoever reads first: one gather for each step. That one begins those of all
units, since ranks whose data skips a block come to another one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mics import compat
from mics.communication.apart import Message
from mics.communication.averaging import op_of
from mics.communication.backend import Issue, Program, backend_of
from mics.communication.gradients import message_of, offsets_of
from mics.communication.ledger import Ledger
from mics.communication.share_sizes import sizes_of_shares
from mics.communication.signposts import Signs
from mics.errors import MicroStepError, ShardError
from mics.quantities import first_of
from mics.ranks.issuing import all_gather, reduce_scatter
from mics.ranks.mesh import Groups, ranks_of
from mics.traffic import StageMessage

_OWNER, _OWNED = "_mics_owner", "_mics_owned"


@dataclass(frozen=True)
class _Piece:
    """What a rank owns of one parameter, in elements.

    Args:
        offset: of the parameter's shard in the message.
        numel: of the shard, without padding.
        first: of what is owned, in the shard; ``last`` is behind it.
    """

    offset: int
    numel: int
    first: int
    last: int


class Share:
    """What this rank owns of one unit.

    Args:
        group: the FSDP2 parameter group, with trainable parameters of one dtype.
        groups: of the unit, with more than one replica.
        ledger: counts what is sent.
    """

    def __init__(self, group: Any, groups: Groups, ledger: Ledger) -> None:
        assert groups.replicas is not None
        self.partition = groups.shard
        self._group, self.replicas, self._ledger = group, groups.replicas, ledger
        self.device = groups.device
        self._backend = backend_of(groups.replicas, groups.device)
        self._trained = _trained(group)
        self.sizes = sizes_of_shares(group, groups)
        first = self.replicas.rank() * self.sizes.numel
        self._first = first
        self._pieces = []
        for param, offset in zip(compat.trainable_params(group), offsets_of(group), strict=True):
            numel = compat.local_of(param).numel()
            inside = [min(max(at - offset, 0), numel) for at in (first, first + self.sizes.numel)]
            self._pieces.append(_Piece(offset, numel, *inside))
        self.params = [
            nn.Parameter(memory[piece.first : piece.last])
            for memory, piece in zip(self._memories(), self._pieces, strict=True)
        ]
        """One for each trainable parameter of the unit, flat; some are empty."""
        for at, (param, owned) in enumerate(
            zip(compat.trainable_params(group), self.params, strict=True)
        ):
            owned.__dict__[_OWNER] = self, at
            param.__dict__[_OWNED] = owned
        self.beside: Sequence[Share] = [self]
        """All that were dealt with it, in the order of the model."""
        self.given: set[int] = set()
        """Positions of what was given to the user, who steps it and drops its gradients."""
        self.may_be_stepped = False
        """Whether a step has ended, and ranks have not compared yet who has stepped."""
        self.signs = Signs(self.params, lambda: compat.trainable_params(group))
        """What stands where it has no gradients."""
        self._brought = False  # hop 2 has brought gradients, and the step has not ended
        self._over = False  # it has, and nobody has dropped them
        self._stepped: set[int] = set()  # positions, since the shards were gathered
        self._written: int | None = None  # writes of the shards when their gather began
        self._left_at = self._writes_of_owned()  # by the last step
        self._flight: dist.Work | None = None

    def messages(self) -> list[Message]:
        """What a step sends: gradients to their owners, and the new shards to everybody."""
        ranks, reduced = ranks_of(self.replicas), compat.reduce_dtype(self._group)
        new = StageMessage("flat", ranks, self.sizes.whole * self.params[0].element_size(), 1)
        return [
            Message(
                "reduce_scatter", self.sizes.message(self.sizes.whole * reduced.itemsize, ranks)
            ),
            Message("all_gather", new),
        ]

    @property
    def names(self) -> list[str]:
        """Names of the trainable parameters."""
        pairs = zip(compat.param_names(self._group), self._trained, strict=True)
        return [name for name, trained in pairs if trained]

    def sharded(self, at: int) -> nn.Parameter:
        """The parameter of the model of which one is a part."""
        return compat.trainable_params(self._group)[at]

    @torch.inference_mode(False)
    @torch.no_grad()
    def check(self) -> None:
        """Refuse a unit that trains others, or has them elsewhere, than when it was dealt.

        Raises:
            ShardError: it does.
        """
        if _trained(self._group) != self._trained:
            raise ShardError(
                "requires_grad of parameters was changed after mics.owned had dealt them.",
                numbers=f"In the unit of {first_of(compat.param_names(self._group))}.",
                write="requires_grad_(...) first, and mics.owned(model) behind it",
            )
        for param, memory, piece in zip(self.params, self._memories(), self._pieces, strict=True):
            there = memory[piece.first : piece.last]
            if there.numel() and there.data_ptr() != param.data_ptr():
                raise ShardError(
                    "The parameters of the model are elsewhere than when mics.owned dealt them; "
                    "what it returned is no part of them any more.",
                    numbers=f"In the unit of {first_of(self.names)}.",
                    write="mics.owned(model) and the optimizer behind whatever replaces parameters "
                    "(model.to, load_state_dict(assign=True))",
                )
        if not self._stepped:
            self._refuse_writes()

    # -- gradients -------------------------------------------------------------------------------

    def before_reduce(self) -> None:
        """FSDP2 is about to add to the accumulated gradients.

        Raises:
            MicroStepError: those of the last step are still there.
        """
        self.take_back()
        if self._over and any(self.params[at].grad is not None for at in self.given):
            raise MicroStepError(
                "Owned gradients of the last step are still there when those of another one come.",
                numbers=f"In the unit of {first_of(self.names)}.",
                write="optimizer.zero_grad() of the optimizer of mics.owned(model) in every step "
                "(set_to_none=False leaves zeros); "
                "mics.micro_steps to add up several backward passes",
            )
        if self._over:
            for param in self.params:  # of what nobody steps
                param.grad = None
        self._over = False

    def take_back(self) -> None:
        """Another step's gradients come to the model: no unit has signposts any more."""
        self.signs.follow_zero_grad()
        if self.signs.shown:
            for share in self.beside:
                share.signs.take_back()

    def drop_gradients(self) -> None:
        """Forget those of a step that will not be finished."""
        self.take_back()
        for param in self.params:
            param.grad = None
        self.signs.forget()
        self._brought = self._over = False

    @torch.no_grad()
    def reduce(self, issue: Issue) -> Program:
        """Bring what this rank owns of the gradients, averaged over the replicas; see ``Issue``."""
        self.take_back()  # of a step before, where a rank has left out the backward
        dtype = compat.reduce_dtype(self._group)
        message = _padded(message_of(self._group, dtype, self.device), self.sizes.whole)
        mine = message.new_empty(self.sizes.numel)
        op, divides = op_of(self._group, dtype)
        if divides:  # not in place: more may be added to what was accumulated
            message = message / self.replicas.size()
        sent = self.sizes.message(message.nbytes, ranks_of(self.replicas))
        span = self._ledger.issue(2, "reduce_scatter", sent, message.device)
        if sent.by_all_reduce:
            yield from issue(
                span,
                lambda wait: reduce_scatter(mine, message, op, self.replicas, async_op=wait),
            )
        else:
            yield from self._backend.reduce([(mine, message)], op, self.replicas, span, issue)
        for param, piece in zip(self.params, self._pieces, strict=True):
            begin = piece.offset + piece.first - self._first if param.numel() else 0
            param.grad = mine[begin : begin + param.numel()].to(param.dtype)
        self.signs.bring()
        self._brought = True

    def settle(self, by_anybody: Sequence[bool]) -> None:
        """The step has ended: only the owned parameters have gradients now.

        Args:
            by_anybody: for each trainable parameter, whether any rank has used it.
        """
        if not self._brought:
            return
        self.signs.show(by_anybody)
        self._brought, self._over = False, True
        self.may_be_stepped = True

    # -- new shards ------------------------------------------------------------------------------

    def stepped(self, ids: set[int]) -> None:
        """An optimizer has stepped the owned parameters with these ids.

        The gather begins where no other optimizer has gradients left to step.
        """
        gradients = {at for at in self.given if self.params[at].grad is not None}
        self._stepped |= {at for at in gradients if id(self.params[at]) in ids}
        if self._stepped and self._stepped == gradients:
            self._gather()

    @torch.inference_mode(False)  # what it leaves is for training too
    @torch.no_grad()
    def wait(self) -> None:
        """See that the shards are whole: what other ranks have stepped is there.

        Collective over the replicas where an optimizer has stepped only some of the unit.

        Raises:
            MicroStepError: something else has written the shards meanwhile.
        """
        for share in self.beside if self._stepped else ():
            if share._stepped:
                share._gather()
        self.land()

    @torch.inference_mode(False)
    @torch.no_grad()
    def land(self) -> None:
        """Wait for a gather that is under way, as ``wait`` does, and begin none."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        self._refuse_writes()
        if self._written != self._writes():
            raise MicroStepError(
                "Parameters were written between optimizer.step() and the arrival of what other "
                "ranks have stepped; it would be overwritten.",
                numbers=f"In the unit of {first_of(self.names)}.",
                write="model.state_dict() first, which waits for it",
            )
        flight.wait()

    @property
    def pending(self) -> bool:
        """Whether what other ranks have stepped is still to come."""
        return bool(self._stepped) or self._flight is not None

    def _gather(self) -> None:
        self._stepped.clear()
        self._flight = self._backend.beside(self._bring, self.device, "hop 2")
        self._written, self._left_at = self._writes(), self._writes_of_owned()

    def _refuse_writes(self) -> None:
        if self._left_at != self._writes_of_owned():
            raise MicroStepError(
                "What mics.owned returned was written outside of an optimizer's step, or by one "
                "that had no gradient of it; the other replicas do not get it.",
                numbers=f"In the unit of {first_of(self.names)}.",
                write="optimizers that write in step() alone; edits of model.parameters() behind "
                "model.state_dict(), the same on every replica",
            )

    def _writes_of_owned(self) -> int:
        return sum(map(compat.times_written, self.params))

    @torch.no_grad()
    def _bring(self, issue: Issue) -> Program:
        mine = self.params[0].new_zeros(self.sizes.numel)
        begins = [piece.offset + piece.first - self._first for piece in self._pieces]
        some = [(at, param) for at, param in enumerate(self.params) if param.numel()]
        places = [mine[begins[at] : begins[at] + param.numel()] for at, param in some]
        compat.copy_all(places, [param.detach() for _, param in some])
        whole = mine.new_empty(self.sizes.whole)
        sent = StageMessage("flat", ranks_of(self.replicas), whole.nbytes, 1)
        span = self._ledger.issue(2, "all_gather", sent, whole.device)
        yield from issue(span, lambda wait: all_gather(whole, mine, self.replicas, async_op=wait))
        rows = [whole[one.offset : one.offset + one.numel] for one in self._pieces]
        compat.copy_all(self._memories(), rows)

    def _memories(self) -> list[torch.Tensor]:
        """This rank's shard of each trainable parameter, flat and without padding."""
        params = compat.trainable_params(self._group)
        return [compat.local_of(param.detach()).view(-1) for param in params]

    def _writes(self) -> int:
        params = compat.trainable_params(self._group)
        return sum(
            compat.times_written(p) + compat.times_written(m)
            for p, m in zip(params, self._memories(), strict=True)
        )

    # -- state -----------------------------------------------------------------------------------

    @torch.no_grad()
    def whole(self, at: int, mine: torch.Tensor) -> torch.Tensor:
        """This rank's shard of something of which every replica has what it owns. Collective.

        Args:
            at: of which parameter, by its position.
            mine: [what is owned of it].

        Returns:
            In the shape of the shard.
        """
        piece = self._pieces[at]
        ranks = self.replicas.size()
        message = mine.new_zeros(piece.numel)
        message[piece.first : piece.last] = mine
        rows = message.new_empty(ranks * piece.numel)
        all_gather(rows, message, self.replicas, name="optimizer state of the replicas")
        shard = compat.local_of(self.sharded(at))
        bounds = [
            min(max(r * self.sizes.numel - piece.offset, 0), piece.numel) for r in range(ranks + 1)
        ]
        parts = [
            row[a:b] for row, a, b in zip(rows.view(ranks, -1), bounds, bounds[1:], strict=False)
        ]
        return torch.cat(parts).view(shard.shape)

    def part(self, at: int, shard: torch.Tensor) -> torch.Tensor:
        """What this rank owns of something in the shape of a parameter's shard; a copy, flat."""
        piece = self._pieces[at]
        return shard.reshape(-1)[piece.first : piece.last].clone()


def stands_for(param: torch.Tensor) -> torch.Tensor:
    """The parameter of the model of which an owned one is a part; any other is itself."""
    owner: tuple[Share, int] | None = param.__dict__.get(_OWNER)
    return param if owner is None else owner[0].sharded(owner[1])


def owner_of(param: torch.Tensor) -> tuple[Share, int] | None:
    """The share that an owned parameter is of, and its position there."""
    found: tuple[Share, int] | None = param.__dict__.get(_OWNER)
    return found


def owned_of(param: torch.Tensor) -> nn.Parameter | None:
    """What this rank owns of a sharded parameter; ``None`` where it was not dealt."""
    found: nn.Parameter | None = param.__dict__.get(_OWNED)
    return found


def gradient_of(param: torch.Tensor) -> torch.Tensor | None:
    """Where the gradient of a finished step is: with what is owned, if the parameter was dealt."""
    owned = owned_of(param)
    return param.grad if owned is None else owned.grad


def _padded(message: torch.Tensor, numel: int) -> torch.Tensor:
    if len(message) == numel:
        return message
    return torch.cat([message, message.new_zeros(numel - len(message))])


def _trained(group: Any) -> list[bool]:
    return [param.requires_grad for param in compat.sharded_params(group)]
