"""AdamW, and the global gradient norm."""

from __future__ import annotations

import torch
from torch import nn

from mics.sharding.clipping import clip_grad_norm_, get_total_norm
from mics.training.config import OptimizerConfig
from mics.training.schedules import learning_rate

MEMORY = "adamw-fused"
"""What ``make_optimizer`` makes, as the memory model calls it."""


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of a sharded model.

    Weights with two or more dims decay, biases and norms do not. Fused, because every accelerator
    and the CPU have the fused form; its ``step`` count lives on the device.
    """
    trainable = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate(config, 1, 1),
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set it for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(model: nn.Module, largest: float) -> torch.Tensor:
    """Scale the gradients so that their global norm is at most ``largest``; 0 leaves them.

    Collective over the partition group. The norm is of the whole gradient, summed over all shards;
    hop 2 has made it the same on every replica.

    Returns:
        The norm before clipping, shape ().
    """
    if largest > 0:
        return clip_grad_norm_(model.parameters(), largest)
    return get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
