"""One answer of all ranks for each step of a loop of one's own: is it taken?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mics.errors import ConfigError
from mics.ranks.device import communication_device, default_device_type
from mics.ranks.issuing import all_reduce
from mics.ranks.skips import SkipRule, Verdict

Number = float | torch.Tensor


class Verdicts:
    """Agrees on every rank whether a step is taken.

    ::

        verdicts = mics.Verdicts(spike_norm=10)
        ...
        norm = mics.clip_grad_norm_(model.parameters(), 1.0)
        verdict = verdicts.agree(loss, norm)          # on every rank
        if verdict.take:
            optimizer.step()
        optimizer.zero_grad()

    A rank that decides by its own loss leaves its shard behind the others, or ahead. Here all of
    them decide by the same numbers: the mean of what the ranks give, which is no number as soon as
    one of them gives none. Beside ``mics.deal``, where a rank has more of a step when others are
    away, and may have none of it, the mean is that over micro-batches::

        verdict = verdicts.agree(total, norm, summed_over=16)   # of mics.deal(model, 16)

    Args:
        spike_loss: a loss this many times the median of the latest 64 of taken steps is a spike,
            once there are 16; 0: none is.
        spike_norm: the same of the norm.

    Raises:
        ConfigError: a factor is neither 0 nor above 1.
    """

    def __init__(self, *, spike_loss: float = 0.0, spike_norm: float = 0.0) -> None:
        self._rule = SkipRule(spike_loss=spike_loss, spike_norm=spike_norm)

    def agree(self, loss: Number, norm: Number, *, summed_over: float | None = None) -> Verdict:
        """Say whether a step is taken. Collective; it waits for the device, as the answer must.

        Args:
            loss: of this rank, shape () or a float.
            norm: of the gradient, as ``mics.clip_grad_norm_`` returns it.
            summed_over: what the sum of all ranks' losses is divided by, the same on every rank:
                the micro-batches of a step that ``mics.deal`` deals, or its tokens, where ``loss``
                is the sum of what ``Dealt.backward`` returned; by default the number of ranks.

        Returns:
            The same on every rank: ``take``, ``why`` not, and how many were skipped ``in_a_row``.

        Raises:
            ConfigError: ``summed_over`` is not above 0.
        """
        if summed_over is not None and not 0 < summed_over < math.inf:
            raise ConfigError(
                "summed_over is what the sum of all ranks' losses is divided by.",
                numbers=f"summed_over = {summed_over}.",
                write="the number of micro-batches of a step, as mics.deal is given it",
            )
        device = communication_device(default_device_type())
        both = torch.stack([_as_scalar(number).to(device) for number in (loss, norm)])
        world = 1
        if dist.is_initialized():
            all_reduce(both, name="verdict on a step")
            world = dist.get_world_size()
        sum_of_losses, sum_of_norms = both.tolist()
        return self._rule.judge(sum_of_losses / (summed_over or world), sum_of_norms / world)

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed needs to give the same verdicts; it fits ``mics.save``."""
        return self._rule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one whose ``state_dict`` this is.

        Raises:
            ConfigError: it is none.
        """
        self._rule.load_state_dict(state)

    def begin_anew(self) -> None:
        """Forget how many steps were skipped in a row, as after an earlier state was loaded."""
        self._rule.begin_anew()


def _as_scalar(number: Number) -> torch.Tensor:
    if isinstance(number, DTensor):
        number = number.full_tensor()
    return torch.as_tensor(number).detach().to(torch.float64).reshape(())
