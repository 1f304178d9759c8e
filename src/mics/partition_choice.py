"""The partition size when nobody names one: the smallest whose pooled memory holds the model.

MiCS section 3.2: smaller groups talk to fewer ranks over faster links, so p is as small as memory
allows. Adam's model states are 4 values per trainable parameter: itself, its gradient, two moments.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from mics.errors import ShardError
from mics.topology import possible_partitions

_FOR_STATES = 0.7
"""Share of a device for model states; the rest is for activations and buffers."""


@dataclass(frozen=True)
class PartitionChoice:
    """A partition size and why."""

    partition: int
    reason: str


def model_state_bytes(model: nn.Module) -> int:
    """Bytes of parameters, gradients and Adam's two moments of the whole model."""
    return sum(
        p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters()
    )


def choose_partition(
    state_bytes: int, device_bytes: int, *, nodes: int, gpus_per_node: int
) -> PartitionChoice:
    """The smallest legal p whose share of the model states fits.

    Args:
        state_bytes: model states of one replica.
        device_bytes: memory of one rank's device, the smallest of all ranks.
        nodes: number of nodes.
        gpus_per_node: ranks per node.

    Raises:
        ShardError: not even the whole cluster holds one replica.
    """
    budget = device_bytes * _FOR_STATES
    possible = possible_partitions(nodes, gpus_per_node)
    fitting = [p for p in possible if state_bytes / p <= budget]
    if not fitting:
        needed = -(-state_bytes // int(budget))
        raise ShardError(
            f"The model does not fit: one replica over all {possible[-1]} rank(s) still needs "
            f"{_size(state_bytes / possible[-1])} of model states per rank.",
            numbers=f"A rank has {_size(device_bytes)}, of which {_FOR_STATES:.0%} may be model "
            f"states; {_size(state_bytes)} in all (Adam: 4 values per trainable parameter).",
            write=f"at least {needed} ranks, a smaller model, or CPU offload",
        )
    p = fitting[0]
    reason = (
        f"partition {p}: the smallest that fits, {_size(state_bytes / p)} of model states in "
        f"{_size(device_bytes)} per rank ({1 - _FOR_STATES:.0%} kept for activations)"
    )
    smaller = [q for q in possible if q < p]
    if smaller:
        reason += f"; {smaller[-1]} would need {_size(state_bytes / smaller[-1])}"
    return PartitionChoice(p, reason)


def device_memory(device: torch.device, ranks_per_host: int) -> int:
    """Bytes one rank may use: its accelerator's memory, or its part of the host's."""
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        return int(properties.total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_per_host


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"
