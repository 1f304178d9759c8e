"""What the gradients of a step are divided by when its last micro-step has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mics import compat
from mics.communication.shares import gradient_of
from mics.sharding.tokens import Counted, total_of
from mics.sharding.units import Unit


def divide_by_micro_steps(units: Sequence[Unit], micro_steps: int) -> None:
    """Make the mean over micro-steps of gradients that have been added up."""
    _scale(units, lambda unit: 1.0 / micro_steps)


def divide_by_tokens(units: Sequence[Unit], tokens: Sequence[Counted]) -> None:
    """Make the mean per token, over all ranks, of gradients of losses that are sums over tokens.

    Args:
        units: of one model; those of the largest mesh know all ranks with tokens.
        tokens: this rank's number of tokens in each of its micro-steps.

    Raises:
        MicroStepError: ranks that count the same tokens have other counts.
    """
    largest = max(units, key=lambda unit: unit.groups.whole.size())
    total = total_of(tokens, largest.groups)
    _scale(units, lambda unit: _ranks_averaged(unit) / total)


def _ranks_averaged(unit: Unit) -> float:
    """What FSDP2 and hop 2 together divided the sum over ranks by."""
    factor = compat.divide_factor(unit.group)
    return factor if factor is not None else unit.groups.shard.size() * unit.groups.num_replicas


@torch.no_grad()
def _scale(units: Sequence[Unit], factor: Callable[[Unit], float | torch.Tensor]) -> None:
    for unit in units:
        found = compat.locals_of(map(gradient_of, compat.sharded_params(unit.group)))
        shards = [shard for shard in found if shard is not None]
        if not shards:
            continue
        scale = factor(unit)
        if isinstance(scale, torch.Tensor):
            # To the device of offloaded gradients, but not to their dtype: it rounds once.
            scale = scale.to(shards[0].device)
        compat.multiply_all(shards, scale)
