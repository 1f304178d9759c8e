"""micro_steps: the two-hop schedule, and what makes it impossible to get wrong.

Hop 1 (reduce-scatter in the partition group) runs in every micro-step, hop 2 (all-reduce over the
replicas) in the last one only, overlapped with its backward (MiCS section 3.4).
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mics import compat
from mics.communication.hop_two import HopTwo
from mics.communication.landing import reductions_of
from mics.errors import MicroStepError, MicsWarning
from mics.sharding.same_steps import MicroStepsAgree
from mics.sharding.units import Unit, units_of

Batch = TypeVar("Batch")
Normalise = Literal["micro_steps"] | Callable[[Any], int | torch.Tensor] | None


def micro_steps(
    model: nn.Module, batches: Iterable[Batch], *, normalise: Normalise = None
) -> Iterator[Batch]:
    """Iterate over the micro-batches of one step; hop 2 runs on the last one only.

    ::

        for batch in mics.micro_steps(model, batches):
            loss(model(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    ``batches`` may be any iterable, its length need not be known: one batch is read ahead to know
    the last. Every rank passes the same number of batches.

    Args:
        model: a model sharded by mics, or a module that contains such models.
        batches: the micro-batches of one step; at least one.
        normalise: what the accumulated gradient is divided by.
            ``None``: nothing; gradients add up as PyTorch's do, averaged over ranks.
            ``"micro_steps"``: their number, for losses that are means over a micro-batch.
            A function ``batch -> tokens`` (int or scalar tensor): the tokens of all micro-steps of
            all ranks, for losses that are *sums* over tokens. This is the exact mean per token
            however unevenly tokens are spread.

    Raises:
        MicroStepError: no batch; ranks with different numbers of batches; gradient sync was
            switched off; a step of this model is open elsewhere; ``state_dict`` between
            micro-steps; ``optimizer.step`` before the loop is over, where its gradients are not
            complete or not normalised yet.
    """
    units = units_of(model)
    _refuse_unreduced(units)
    if normalise is not None and normalise != "micro_steps" and not callable(normalise):
        raise MicroStepError(
            f"normalise = {normalise!r} is not a choice.",
            write='normalise=None, "micro_steps", or a function from a batch to its tokens',
        )
    return _run(model, units, iter(batches), normalise)


class _OpenStep:
    """A step between its first micro-batch and the end of its loop."""

    def __init__(self, model: nn.Module, units: list[Unit], *, normalises: bool) -> None:
        self.index = 0
        self.last = False
        self._normalises = normalises
        self._params = [p for unit in units for p in compat.sharded_params(unit.group)]
        self._left: list[weakref.ref[torch.Tensor] | None] | None = None
        self._guard = model.register_state_dict_pre_hook(self._refuse_state_dict)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._guard.remove()
        self._left = [None if p.grad is None else weakref.ref(p.grad) for p in self._params]

    def owes(self, stepped: set[int]) -> bool:
        """Whether an optimizer of these parameters would use gradients that are not finished."""
        if self.last and not self._normalises:
            return False
        mine = [(i, p.grad) for i, p in enumerate(self._params) if id(p) in stepped]
        if self._left is None:
            return any(gradient is not None for _, gradient in mine)
        # After an exception or a break: as long as what the step left is still there.
        left = [(self._left[i], gradient) for i, gradient in mine]
        return any(ref is not None and ref() is gradient for ref, gradient in left)

    def refuse_optimizer(self) -> None:
        raise MicroStepError(
            "optimizer.step() was called before the loop over mics.micro_steps(...) had ended: its "
            + ("gradients are not normalised yet." if self.last else "gradients are incomplete."),
            numbers=f"{self.index} micro-step(s) have ended; the one under way is "
            f"{'the last' if self.last else 'not the last'}.",
            write="optimizer.step() after the loop, without break; or drop the gradients with "
            "optimizer.zero_grad()",
        )

    def _refuse_state_dict(self, *_: Any) -> None:
        raise MicroStepError(
            "state_dict() was called between micro-steps: the gradients accumulated so far are in "
            "no state dict, so a run resumed from it would lose them.",
            numbers=f"{self.index} micro-step(s) of this step have run.",
            write="save after the loop over mics.micro_steps(...)",
        )


_open_steps: weakref.WeakKeyDictionary[nn.Module, _OpenStep] = weakref.WeakKeyDictionary()


@functools.cache
def _guard_optimizers() -> None:
    """Once per process: no optimizer may step on the gradients of an open step."""
    register_optimizer_step_pre_hook(_refuse_unfinished)


def _refuse_unfinished(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if not _open_steps:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for step in _open_steps.values():
        if step.owes(stepped):
            step.refuse_optimizer()


def _run(
    model: nn.Module, units: list[Unit], batches: Iterator[Batch], normalise: Normalise
) -> Iterator[Batch]:
    nothing = object()
    batch: Any = next(batches, nothing)
    if batch is nothing:
        raise MicroStepError(
            "micro_steps was given no micro-batch.",
            numbers="0 batches.",
            write="at least one batch per step on every rank",
        )
    _abandon(model, units)
    _reshard(model)
    _guard_optimizers()
    step = _open_steps[model] = _OpenStep(model, units, normalises=normalise is not None)
    tokens: list[int | torch.Tensor] = []
    try:
        while batch is not nothing:
            following: Any = next(batches, nothing)
            step.last = following is nothing
            _set_all_reduce(model, step.last)
            agree = MicroStepsAgree(units[0].groups, step.index, more=not step.last)
            for hop in _hops(units):
                hop.confirm = agree.check
            if callable(normalise):
                tokens.append(normalise(batch))
            yield batch
            if _open_steps.get(model) is not step:
                raise MicroStepError(
                    "Another micro_steps began on this model before this one had ended.",
                    numbers=f"This one had run {step.index + 1} micro-step(s).",
                    write="one loop over mics.micro_steps(...) at a time",
                )
            agree.check()
            step.index += 1
            batch = following
        # Only after a last micro-step without a backward is anything left to do here.
        for hop in _hops(units):
            hop.synchronise()
        if normalise == "micro_steps":
            _scale(units, lambda unit: 1.0 / step.index)
        elif callable(normalise):
            total = _total(tokens, units[0])
            _scale(units, lambda unit: _ranks_averaged(unit) / total)
        del _open_steps[model]
    finally:
        for hop in _hops(units):
            hop.confirm = None
        _set_all_reduce(model, True)
        step.close()


def _abandon(model: nn.Module, units: list[Unit]) -> None:
    """Clear what a step that was left early (an exception, a break) has left behind."""
    left = _open_steps.pop(model, None)
    if left is None:
        return
    left.close()
    for module in model.modules():
        if isinstance(module, FSDPModule) and compat.is_root(module):
            compat.reset_iteration(module)
    # Units whose backward had ended are ahead of the others, by a micro-step or by hop 2: what is
    # there is no step's gradient.
    params = [param for unit in units for param in compat.sharded_params(unit.group)]
    dropped = any(param.grad is not None for param in params)
    reductions_of(units[0].groups).finish()
    for hop in _hops(units):
        hop.drop_gradients()
    for param in params:
        param.grad = None
    if dropped:
        warnings.warn(
            f"A step was left in its micro-step {left.index + 1}, before its end; its gradients "
            "have been dropped.",
            MicsWarning,
            stacklevel=3,
        )


def _reshard(model: nn.Module) -> None:
    """Free what an evaluation left gathered: the optimizer may have changed the shards since."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _refuse_unreduced(units: list[Unit]) -> None:
    unreduced = [unit for unit in units if not compat.wants_reduce(unit.group)]
    if not unreduced:
        return
    size = sum(
        compat.trainable_shard_numel(unit.group)
        * unit.groups.shard.size()
        * compat.reduce_dtype(unit.group).itemsize
        for unit in unreduced
    )
    raise MicroStepError(
        "set_requires_gradient_sync(False) is in force: it keeps whole gradients on every rank "
        "instead of shards, which is the memory MiCS saves.",
        numbers=f"{len(unreduced)} group(s), {size / 2**20:.2f} MiB of unsharded gradients.",
        write="model.set_requires_gradient_sync(True); micro_steps defers hop 2 by itself",
    )


def _set_all_reduce(model: nn.Module, wanted: bool) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(wanted, recurse=False)


def _hops(units: list[Unit]) -> list[HopTwo]:
    return [unit.hop_two for unit in units if unit.hop_two is not None]


# -- normalisation -------------------------------------------------------------------------------


def _ranks_averaged(unit: Unit) -> float:
    """What FSDP2 and hop 2 together divided the sum over ranks by."""
    factor = compat.divide_factor(unit.group)
    return factor if factor is not None else unit.groups.shard.size() * unit.groups.num_replicas


def _total(tokens: list[int | torch.Tensor], unit: Unit) -> torch.Tensor:
    """Tokens of all micro-steps of all ranks, at least 1; no host synchronisation."""
    device = unit.groups.device
    counts = [torch.as_tensor(n, device=device).to(torch.float64) for n in tokens]
    total = torch.stack(counts).sum()
    for group in unit.groups.axes:
        dist.all_reduce(total, group=group)
    return total.clamp(min=1.0)


@torch.no_grad()
def _scale(units: list[Unit], factor: Callable[[Unit], float | torch.Tensor]) -> None:
    for unit in units:
        for param in compat.sharded_params(unit.group):
            if param.grad is not None:
                local = param.grad.to_local()  # type: ignore[attr-defined]
                scale = factor(unit)
                # To the device of offloaded gradients, but not to their dtype: it rounds once.
                local.mul_(scale.to(local.device) if isinstance(scale, torch.Tensor) else scale)
