"""AdamW, its learning rate, the global gradient norm."""

from __future__ import annotations

import math

import torch
from torch import nn

from mics.sharding.clipping import clip_grad_norm_, get_total_norm
from mics.training.config import OptimizerConfig

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


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of one step, a function of the step alone: resuming needs no state.

    It rises linearly over ``warmup`` steps, then falls along half a cosine or a line to ``final``
    times the peak, which it reaches at the last step.

    Args:
        config: the peak and the shape.
        step: 1 to ``steps``.
        steps: steps of the whole run.
    """
    if step <= config.warmup:
        return config.learning_rate * step / config.warmup
    if config.decay == "none" or steps <= config.warmup + 1:
        return config.learning_rate
    done = (step - config.warmup - 1) / (steps - config.warmup - 1)
    left = (1 + math.cos(math.pi * done)) / 2 if config.decay == "cosine" else 1 - done
    return config.learning_rate * (config.final + (1 - config.final) * left)


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
