"""What rounding has held back of a unit's gradients, to be sent with the next ones.

[Note: one error a value]
A message in few bits is rounded twice: by every rank on its way to the owner of a piece, and by the
owner when all are added up. An owner rounds nothing of its own piece before the sum, so each rank
has one error a value: the first of other pieces, the second of its own. Both are in the units of
the sum; added to what the rank sends next, they are part of the next sum. What has been applied and
what is held back, over all replicas, is then what was computed, whatever was rounded.

[Note: what is held back of a step that is dropped]
What a rank held back goes into its next message. Where the gradients behind that message are then
dropped (by a loss scaler, for their norm, or because a step was cut short), it is gone with them:
at most one rounding of a value. So is what was held back of them: it is in proportion to them, and
of a step that was dropped for its size it would be most of the next one. They were dropped if they
are gone, or zeros, when more are to come, and no optimizer of the unit has stepped since; where
none ever has, a program uses gradients in a way of its own, and nothing is taken for dropped.
Blocks that are no numbers are not taken: there the error from before stays.

[Note: what nobody has used]
A parameter that no rank has used sends what is held back of it, and has no gradient at the end of
the step (``used.py``). So all ranks take back in equal parts what was sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mics import compat
from mics.communication.blocks_of_values import piece_numel
from mics.communication.gradients import gradients_of, matrices_of, trainable_gradients
from mics.ranks.issuing import all_reduce
from mics.ranks.mesh import Groups


class ErrorFeedback:
    """The errors of one unit on this rank, of its parameters of two or more dims.

    Args:
        group: the FSDP2 parameter group.
        groups: of the unit.
    """

    def __init__(self, group: Any, groups: Groups) -> None:
        self._group = group
        self._device = groups.device
        self.replicas = groups.replicas
        # By number in the group, of padded shards, behind each other in one buffer.
        self._errors: dict[int, torch.Tensor] = {}
        self._buffer = torch.empty(0, device=self._device)
        self._steps = 0  # of optimizers of the unit
        self._sent_at: int | None = None  # so many of them had been when it was last sent

    def stepped(self) -> None:
        """An optimizer is about to use what hop 2 has brought."""
        self._steps += 1

    def clear(self) -> None:
        """Hold back nothing."""
        self._buffer.zero_()
        self._sent_at = None

    @torch.no_grad()
    def forget_dropped(self) -> None:
        """Hold back nothing of gradients that were dropped; before others are added to them.

        See [Note: what is held back of a step that is dropped].
        """
        is_unused = self._steps and self._sent_at == self._steps
        if is_unused and not any(bool(one.any()) for one in gradients_of(self._group)):
            self.clear()

    @torch.no_grad()
    def take_back(self, unused: Sequence[int]) -> None:
        """Hold back what hop 2 has brought, see [Note: what nobody has used].

        Args:
            unused: places among the trainable parameters, before their gradients are dropped.
        """
        if not unused:
            return
        assert self.replicas is not None
        gradients = trainable_gradients(self._group)
        params = compat.trainable_params(self._group)
        errors = {id(param): error for param, error in self._views(self._buffer)}
        for place in unused:
            error, gradient = errors.get(id(params[place])), gradients[place]
            if error is not None and gradient is not None:
                brought = gradient.to(error)
                if compat.divide_factor(self._group) is not None:
                    brought = brought / self.replicas.size()
                error.add_(torch.where(brought.isfinite(), brought, 0.0))
        if len(unused) == len(params):
            self._sent_at = None

    def to_send(self) -> torch.Tensor:
        """``buffer()``, when it is added to a message."""
        buffer = self.buffer()
        self._sent_at = self._steps
        return buffer

    def buffer(self) -> torch.Tensor:
        """All errors behind each other, in place, and zeros up to whole pieces of all replicas.

        They are zeros to begin with. Where other parameters train than before, the errors of those
        that still do stay.

        Returns:
            [numel] fp32.
        """
        self.forget_dropped()
        wanted = {number: part.stop - part.start for number, part in matrices_of(self._group)}
        known = {number: error.numel() for number, error in self._errors.items()}
        if list(wanted.items()) == list(known.items()):
            return self._buffer
        assert self.replicas is not None
        ranks = self.replicas.size()
        numel = ranks * piece_numel(sum(wanted.values()), ranks)
        buffer = torch.zeros(numel, device=self._device)
        fresh = dict(zip(wanted, cut(buffer, list(wanted.values())), strict=True))
        for number, error in fresh.items():
            if known.get(number) == error.numel():
                error.copy_(self._errors[number])
        self._errors, self._buffer = fresh, buffer
        return buffer

    @torch.no_grad()
    def of_params(
        self, buffer: torch.Tensor | None = None
    ) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Each parameter with its errors on this rank, in place.

        Args:
            buffer: another one like ``buffer()`` to look into.

        Returns:
            Errors of the shape of the parameter's shard here, fp32.
        """
        return self._views(self.buffer() if buffer is None else buffer)

    def _views(self, whole: torch.Tensor) -> list[tuple[nn.Parameter, torch.Tensor]]:
        params = compat.sharded_params(self._group)
        parts = cut(whole, [error.numel() for error in self._errors.values()])
        found = []
        for number, error in zip(self._errors, parts, strict=True):
            shard = compat.local_of(params[number].detach())
            found.append((params[number], error[: shard.numel()].view(shard.shape)))
        return found

    @torch.no_grad()
    def mean(self) -> torch.Tensor:
        """The mean over the replicas of ``buffer()``, a new one like it. Collective over them."""
        assert self.replicas is not None
        mean = self.buffer().clone()
        all_reduce(mean, group=self.replicas)
        return mean.div_(self.replicas.size())


def cut(values: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The first of some values, in parts of these sizes behind each other."""
    return list(torch.split(values.view(-1)[: sum(sizes)], list(sizes)))


def hold_back(errors: torch.Tensor, values: torch.Tensor, decoded: torch.Tensor) -> None:
    """Keep what rounding has taken from values, where that is a number.

    Args:
        errors: [...] fp32, in place.
        values: [...] fp32, before rounding.
        decoded: [...] fp32, behind it; overwritten.
    """
    taken = torch.sub(values, decoded, out=decoded)
    torch.where(taken.isfinite(), taken, errors, out=errors)
