"""EMA: a moving average of a model's weights, sharded as they are.

Each rank averages its own shards, so nothing is sent, and replicas, whose shards are equal, have
equal averages. The average of a weight has at least 32 bits: 1 - decay times a difference is often
less than bfloat16 can add to a weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mics import compat
from mics.communication.guard import guard
from mics.errors import ConfigError, MicroStepError
from mics.sharding.owned import await_shards

_AT_ONCE = 32  # tensors; of those with fewer bits a copy in 32 bits is made


class EMA:
    """An exponential moving average of what a model trains.

    Call ``update`` after every optimizer step, and evaluate inside ``with ema.swapped():``.
    ``mics.save`` and ``mics.load`` take it as ``ema=``. The first update copies the weights, as
    ``torch.optim.swa_utils.AveragedModel`` does; weights that are frozen when it is made, and
    buffers, stay the model's own.

    Args:
        model: sharded by mics or FSDP2, or a plain module.
        decay: how much of the average an update keeps, from 0 to below 1.
        warmup: update number n keeps at most ``(1 + n) / (warmup + n)``, so that early weights,
            which are poor, are forgotten sooner; 10 is usual. 0 keeps ``decay`` from the beginning.
        average_buffers: average buffers of floating point too; others are the model's own.

    Raises:
        ConfigError: ``decay`` or ``warmup`` is none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.999,
        warmup: float = 0,
        average_buffers: bool = False,
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(
                f"decay = {decay} is no part of an average that is kept.",
                write="decay=0.999, or another number from 0 to below 1",
            )
        if not 0 <= warmup < float("inf"):
            raise ConfigError(
                f"warmup = {warmup} is no number of updates.", write="warmup=10, or 0 for none"
            )
        self.model, self.decay, self.warmup = model, decay, warmup
        self.updates = 0
        self._swapped = False
        await_shards(model.parameters())
        averaged: dict[str, torch.Tensor] = {
            name: param for name, param in model.named_parameters() if param.requires_grad
        }
        if average_buffers:
            buffers = model.named_buffers()
            averaged |= {name: buffer for name, buffer in buffers if buffer.is_floating_point()}
        self.averages = {name: _in_32_bits(tensor) for name, tensor in averaged.items()}
        """Averages by the names of the model; sharded as the weights are."""

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's weights into the average; sends nothing.

        Raises:
            MicroStepError: the average is swapped in.
            ConfigError: the model was sharded since the average was made.
        """
        if self._swapped:
            raise MicroStepError(
                "EMA.update was called while the average is in the model.",
                write="ema.update() behind optimizer.step(), outside of ema.swapped()",
            )
        mine = self._tensors()
        for name, average in self.averages.items():
            _refuse_other(name, average, mine[name])
        averages = [compat.local_of(average) for average in self.averages.values()]
        weights = [compat.local_of(mine[name]) for name in self.averages]
        keep = self._decay_now()
        average_all = get_ema_multi_avg_fn(keep)  # type: ignore[no-untyped-call]
        for first in range(0, len(averages), _AT_ONCE):
            some = averages[first : first + _AT_ONCE]
            pairs = zip(some, weights[first : first + _AT_ONCE], strict=True)
            average_all(some, [weight.to(average.dtype) for average, weight in pairs], None)
        self.updates += 1

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model have its average inside, and its own weights, bit for bit, afterwards.

        Holds a second copy of this rank's shards meanwhile. Forward passes inside are those of an
        evaluation, without gradients; what saves the model saves the average.

        Raises:
            MicroStepError: inside, by a forward that prepares a backward and by an optimizer of
                the model; at the end, if something else has written weights.
        """
        if self._swapped:
            raise MicroStepError(
                "The average is in the model already.", write="one with ema.swapped() at a time"
            )
        with torch.no_grad():
            found = self._tensors()
            mine = {name: compat.local_of(found[name]) for name in self.averages}
            own = {name: shard.clone() for name, shard in mine.items()}
            self._fill(mine, {n: compat.local_of(a) for n, a in self.averages.items()})
        written = {name: compat.times_written(shard) for name, shard in mine.items()}
        self._swapped = True
        guard(self)
        hook = self.model.register_forward_pre_hook(_refuse_training, prepend=True)
        try:
            yield
        finally:
            hook.remove()
            self._swapped = False
            changed = [n for n, t in mine.items() if compat.times_written(t) != written[n]]
            with torch.no_grad():
                self._fill(mine, own)
        if changed:
            raise MicroStepError(
                "Weights were written while the average was in their place; what was written is "
                "gone, and the weights are those from before.",
                numbers=f"{len(changed)} of {len(mine)} tensors, {changed[0]} first.",
                write="mics.load and edits of weights outside of ema.swapped()",
            )

    def check_optimizer(self, stepped: set[int]) -> bool:
        """Refuse an optimizer while the average is in the model, see ``guard.Owner``."""
        if self._swapped and any(id(param) in stepped for param in self.model.parameters()):
            raise MicroStepError(
                "optimizer.step() was called while the average is in the model.",
                write="optimizer.step() outside of ema.swapped()",
            )
        return self._swapped

    def _decay_now(self) -> float:
        """What the next update keeps; nothing the first time."""
        if self.updates == 0:
            return 0.0
        return min(self.decay, (1 + self.updates) / (self.warmup + self.updates))

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The model's tensors of today by name: ``load_state_dict(assign=True)`` replaces them."""
        await_shards(self.model.parameters())
        found: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        found |= dict(self.model.named_buffers())
        return found

    def _fill(self, mine: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
        for name, shard in mine.items():
            shard.copy_(values[name])
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what is gathered is of other weights


def _refuse_other(name: str, average: torch.Tensor, weight: torch.Tensor) -> None:
    """Refuse to average parts of another size.

    Raises:
        ConfigError: they are.
    """
    here, there = compat.local_of(weight).shape, compat.local_of(average).shape
    if here != there:
        raise ConfigError(
            f"{name} was sharded, or sharded otherwise, since its average was made.",
            numbers=f"This rank has {list(here)} of it; its part of the average is {list(there)}.",
            write="mics.EMA(model) behind mics.shard(model)",
        )


def _in_32_bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with at least 32 bits per number."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(dtype, copy=True)


def _refuse_training(model: nn.Module, _: Any) -> None:
    if torch.is_grad_enabled():
        raise MicroStepError(
            "A forward that prepares a backward ran while the average is in the model: its "
            "gradients would be those of other weights.",
            write="with torch.no_grad() around the evaluation, and training outside of "
            "ema.swapped()",
        )
