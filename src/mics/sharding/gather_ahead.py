"""Gather the next block's parameters while this one computes, where the backend blocks (Gloo).

On a GPU FSDP2 issues gathers from a thread that runs ahead of the device. On the CPU nothing runs
ahead, so every block starts its successor's gather before it waits for its own: the successor's
inter stage is then on the wire while its own intra stage runs. Backward needs nothing of this,
FSDP2 gathers ahead there by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from mics import compat
from mics.sharding.units import Unit, units_on


def gather_ahead(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Let every block of a sharded model start the gather of the next one.

    A block that is then not run costs its gather, nothing else: FSDP2 drops it at the end of
    backward. Without gradients nothing is gathered ahead, since nothing would drop it.

    Args:
        model: the root.
        blocks: in the order they run.
    """
    units = [
        [unit for m in block.modules() for unit in units_on(m) if unit.groups.shard.size() > 1]
        for block in blocks
    ]
    if not any(units):
        return  # replicas of one rank gather nothing
    model.register_forward_pre_hook(_start(model, units[0]))  # after FSDP2's own
    for block, (own, following) in zip(blocks, pairwise([*units, []]), strict=True):
        block.register_forward_pre_hook(_start(model, [*own, *following]), prepend=True)
        for unit in reversed(units_on(block)):
            unit.stand_first()  # what this rank has skipped is gathered before


def _start(model: nn.Module, units: Sequence[Unit]) -> Callable[..., None]:
    root = compat.state_of(model)

    def start(*_: Any) -> None:
        if compat.knows_root(root) and torch.is_grad_enabled() and not compat.in_backward():
            for unit in units:
                if unit.hop_two is not None:
                    unit.hop_two.before_gather()
                compat.start_unshard(unit.group)

    return compat.outside_graphs(start)
