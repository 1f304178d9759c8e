"""Do all ranks shard the same model in the same way? Asked before anything that could hang."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from mics.ranks.agreement import check_agreement
from mics.ranks.mesh import versions
from mics.sharding.tensor_parts import kind_of


def check_same_model(
    modules: list[nn.Module],
    axes: Sequence[dist.ProcessGroup],
    device: torch.device,
    ignored: set[nn.Parameter],
    more: Mapping[str, Sequence[str]],
) -> None:
    """Compare versions, parameters and buffers (name, order, shape, dtype), and ``more``.

    Raises:
        DisagreementError: on every rank, naming the ranks that differ from the first and where.
    """
    facts = {
        "version": versions(),
        "model": [f"module {i}: {type(m).__name__}" for i, m in enumerate(modules)]
        + [
            f"{name} {_spelled(param)}"
            f"{'' if param.requires_grad else ' frozen'}{' ignored' if param in ignored else ''}"
            for module in modules
            for name, param in module.named_parameters()
        ]
        + [
            f"{name} {_spelled(buffer)} buffer"
            for module in modules
            for name, buffer in module.named_buffers()
        ],
    }
    check_agreement({**facts, **more}, axes, device)


def _spelled(tensor: torch.Tensor) -> str:
    spelled = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    return f"{spelled} {kind_of(tensor)}".rstrip()


def on_meta(modules: list[nn.Module]) -> list[str]:
    """Names of the parameters and buffers that have no values yet."""
    return [
        name
        for module in modules
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if tensor.is_meta
    ]
