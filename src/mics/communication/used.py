"""Which parameters of a unit the data of this rank has used in a step.

[Note: used and unused]
Ranks of one step may use different parameters: layer drop, experts, heads per task. What a rank
sends must not depend on it, so a parameter that a backward pass left without a gradient is given
zeros before FSDP2 reduces the unit. Zeros are not the gradient of one process, though, when no rank
has used a parameter: an optimizer would decay it. So every rank remembers what it has used, all
tell each other at the end of the step (``settling.py``), and a gradient that nobody has made is
dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mics import compat
from mics.communication.error_feedback import ErrorFeedback
from mics.communication.finite import Finite
from mics.communication.shares import Share


class Used:
    """What one unit has used since its gradients were dropped.

    Args:
        group: the FSDP2 parameter group.
        finite: is shown its gradients.
    """

    def __init__(self, group: Any, finite: Finite) -> None:
        self._group = group
        self._finite = finite
        self._used: dict[int, bool] = {}  # by position among the trainable parameters
        self._noted = False  # in the backward of this use
        self._said = False  # that the first of two buffers is asked for
        self.share: Share | None = None  # what this rank owns, if the unit is dealt to the replicas
        self.errors: ErrorFeedback | None = None  # of its hop 2

    def note(self) -> None:
        """Look at the whole gradients, before FSDP2 reduces them, and fill in what is missing.

        Only the first call before a reduction does: after it zeros can not be told from gradients.
        """
        if not self._noted and compat.wants_reduce(self._group):
            self._note()

    @torch.no_grad()
    def _note(self) -> None:
        self.make_room()
        gradients = compat.whole_gradients(self._group)
        made = [one for one in gradients if one is not None]
        self._finite.look(made)
        # A frozen unit is not reduced, and may train later.
        self._noted, self._said = bool(gradients), False
        if made and len(made) == len(gradients):  # as in nearly every pass
            self._used.update(dict.fromkeys(range(len(made)), True))
            return
        trainable = compat.trainable_params(self._group)
        now = compat.fill_unused_gradients(self._group)
        for i, (param, used) in enumerate(zip(trainable, now, strict=True)):
            before = param.grad is not None and self._used.get(i, True)
            self._used[i] = before or used

    def make_room(self) -> None:
        """What stands in the place of gradients is none of a step's."""
        if self.share is not None:
            self.share.take_back()

    def before_reduce(self) -> None:
        """FSDP2 reduces what was noted; the next use is noted anew.

        It says so twice, as it asks for two buffers.
        """
        again, self._said = self._said, False
        if not again:
            self.reduced()
            self._said = True

    def reduced(self) -> None:
        """What was noted is reduced."""
        if not self._noted:  # FSDP2 reduces what has a gradient, and nothing was filled in
            self._used.clear()
        self._noted = self._said = False

    def forget(self) -> None:
        """A step was left: its gradients are dropped."""
        self._used.clear()
        self._noted = self._said = False

    @property
    def params(self) -> list[nn.Parameter]:
        """The sharded parameters."""
        return compat.sharded_params(self._group)

    @property
    def names(self) -> list[str]:
        """Their names."""
        return compat.param_names(self._group)

    def received(self, index: int) -> None:
        """A gradient is what hop 2 brought, this rank's data had no part in it."""
        self._used[index] = False

    def flags(self) -> list[bool]:
        """Whether data of this rank has made a gradient, for each trainable parameter."""
        trainable = compat.trainable_params(self._group)
        # A gradient that was never noted was set by somebody else, and counts as made.
        return [p.grad is not None and self._used.get(i, True) for i, p in enumerate(trainable)]

    def settle(self, by_anybody: Sequence[bool]) -> None:
        """Drop the gradients of parameters that no rank has used.

        One that a rank with another part of it has used gets zeros, where there are none.

        Args:
            by_anybody: for each trainable parameter, whether any rank has.
        """
        self._used = dict(enumerate(by_anybody))
        if self.share is not None:
            self.share.settle(by_anybody)
            return
        if self.errors is not None:
            self.errors.take_back([i for i, used in enumerate(by_anybody) if not used])
        trainable = compat.trainable_params(self._group)
        for param, used in zip(trainable, by_anybody, strict=True):
            if not used:
                param.grad = None
            elif param.grad is None:
                param.grad = torch.zeros_like(param)
