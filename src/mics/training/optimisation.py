"""AdamW, and the global gradient norm."""

from __future__ import annotations

import torch
from torch import nn

from mics.errors import ConfigError
from mics.sharding.clipping import clip_grad_norm_, get_total_norm
from mics.sharding.owned import owned
from mics.training.config import OptimizerConfig, TrainConfig
from mics.training.schedules import learning_rate

MEMORY = "adamw-fused"
"""What ``make_optimizer`` makes, as the memory model calls it."""


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, *, dealt_states: bool = False
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of a sharded model.

    Weights with two or more dims decay, biases and norms do not. Fused, because every accelerator
    and the CPU have the fused form; its ``step`` count lives on the device.

    Args:
        model: sharded.
        config: of the optimizer.
        dealt_states: step what this replica owns alone, see ``mics.owned``; collective then.
    """
    trainable = [param for param in model.parameters() if param.requires_grad]
    matrices = [param for param in trainable if param.ndim >= 2]
    others = [param for param in trainable if param.ndim < 2]
    if dealt_states:
        matrices, others = owned(model, matrices), owned(model, others)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate(config, 1, 1),
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def check_dealt(config: TrainConfig) -> None:
    """Refuse dealt states beside what cannot be with them.

    Raises:
        ConfigError: the memory of nodes keeps what every replica has, and fewer bits for hop 2 are
            for an all-reduce.
    """
    if not config.parallel.dealt_states:
        return
    if config.checkpoint.memory:
        raise ConfigError(
            "Optimizer states that are dealt to the replicas are not kept in the memory of nodes: "
            "a lost node's would be nowhere else.",
            write="--checkpoint.no-memory, and --checkpoint.every for what may be lost",
        )
    if config.parallel.hop_two is not None:
        raise ConfigError(
            "Dealt optimizer states have a hop 2 of their own, in the dtype that is reduced in.",
            numbers=f"parallel.hop_two is {config.parallel.hop_two}.",
            write="parallel.dealt_states or parallel.hop_two",
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
