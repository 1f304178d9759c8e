"""A step whose micro-batches are dealt to a model that mics has not sharded: of FSDP2 or DDP.

Gradients of a step that is left early are a part of the sum: in ``.grad``, or in the buffer beside
it in which FSDP2 adds up what replicas have not reduced yet, which no ``zero_grad`` clears. They
are refused, as those of an ``OpenStep`` are.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mics import compat
from mics.communication.guard import guard
from mics.errors import MicroStepError, MicsWarning

_ATTRIBUTE = "_mics_open_deal"


class OpenDeal:
    """A step between the beginning of its first micro-step and the end of its last.

    Args:
        model: of FSDP2 or DDP, or any module of a single rank.

    Raises:
        MicroStepError: another one of the model runs.
    """

    def __init__(self, model: nn.Module) -> None:
        before: OpenDeal | None = model.__dict__.get(_ATTRIBUTE)
        if before is not None:
            before._make_room()
        self._params = list(model.parameters())
        self._groups = [g for module in model.modules() for g in compat.param_groups(module)]
        self._index = 0  # micro-steps that have ended
        self._ended = False
        self._left: list[weakref.ref[torch.Tensor] | None] | None = None
        self._lost = False  # whether what replicas had not reduced was dropped
        model.__dict__[_ATTRIBUTE] = self
        guard(self)

    @contextlib.contextmanager
    def micro_step(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Run the forward and backward of one micro-batch inside; end the step after the last.

        Replicas are averaged in the last one only.
        """
        try:
            with contextlib.nullcontext() if last else _without_reducing(model):
                yield
        except BaseException:
            self._leave()
            raise
        self._index += 1
        if last:
            self._ended = True
            del model.__dict__[_ATTRIBUTE]

    def check_optimizer(self, stepped: set[int]) -> bool:
        """Refuse an optimizer of gradients that are not finished, see ``guard.Owner``."""
        if self._ended:
            return False
        mine = [(i, p.grad) for i, p in enumerate(self._params) if id(p) in stepped]
        if not mine or not self._owes(mine):
            return True
        raise MicroStepError(
            "optimizer.step() was called before the loop over mics.deal(...) had ended: its "
            "gradients are a part of the step's.",
            numbers=f"{self._index} micro-step(s) have ended; the next one "
            f"{'is running' if self._left is None else 'was left'}.",
            write="optimizer.step() after the loop, without break; after a step that was left "
            "optimizer.zero_grad() alone, on every rank",
        )

    def _owes(self, mine: list[tuple[int, torch.Tensor | None]]) -> bool:
        has_gradients = any(gradient is not None for _, gradient in mine)
        if self._left is None:
            return has_gradients or any(map(compat.has_partial_reduction, self._groups))
        refs = [(self._left[i], gradient) for i, gradient in mine if gradient is not None]
        if any(ref is not None and ref() is gradient for ref, gradient in refs):
            return True
        return self._lost and not has_gradients

    def _leave(self) -> None:
        self._left = [None if p.grad is None else weakref.ref(p.grad) for p in self._params]
        for group in self._groups:  # it would be added to the next step's
            self._lost |= compat.has_partial_reduction(group)
            compat.drop_partial_reduction(group)

    def _make_room(self) -> None:
        """Drop what was left, for the next step."""
        if self._left is None:
            raise MicroStepError(
                "A loop over mics.deal(...) began before another one of the same model had ended.",
                numbers=f"{self._index} micro-step(s) of the other one have ended.",
                write="one loop over mics.deal(...) at a time",
            )
        self._ended = True
        found = False
        for param, ref in zip(self._params, self._left, strict=True):
            if param.grad is not None and ref is not None and ref() is param.grad:
                param.grad, found = None, True
        if found:
            warnings.warn(
                f"A step was left in its micro-step {self._index + 1}, before its end; its "
                "gradients have been dropped.",
                MicsWarning,
                stacklevel=4,
            )


@contextlib.contextmanager
def _without_reducing(model: nn.Module) -> Iterator[None]:
    """Let replicas be averaged later."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_requires_all_reduce(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_requires_all_reduce(True, recurse=False)
