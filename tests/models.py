"""Small models for tests. Each has ``blocks``, the modules a user of FSDP2 would shard one by one.

``example(seed)`` gives an input and a target; sizes are odd on purpose, so that every shard is
padded on two and on four ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

Example = tuple[torch.Tensor, torch.Tensor]


class UnevenMLP(nn.Module):
    """Linear layers of 13, 17 and 5 features; 17 and 5 rows do not divide by 2 or 4."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 13)) for _ in range(2)
        )
        self.out = nn.Linear(13, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)

    def example(self, seed: int) -> Example:
        return _floats(seed, 13, 5)


class TiedTransformer(nn.Module):
    """Token embedding, two attention blocks, an output layer that shares the embedding's weight.

    ``scale`` is a persistent buffer, ``positions`` one that is not saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(_AttentionBlock(6) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("positions", torch.linspace(-1, 1, 7)[:, None], persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def example(self, seed: int) -> Example:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(11, (3, 8), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]


class FrozenBlock(nn.Module):
    """The first block is frozen, in the second only the biases train."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(13, 13), nn.Tanh(), nn.Linear(13, 13)) for _ in range(3)
        )
        self.out = nn.Linear(13, 5)
        self.blocks[0].requires_grad_(False)
        for name, param in self.blocks[1].named_parameters():
            param.requires_grad_("bias" in name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)

    def example(self, seed: int) -> Example:
        return _floats(seed, 13, 5)


class ThriceUsed(nn.Module):
    """One layer runs three times in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(13, 13)])
        self.out = nn.Linear(13, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.blocks[0](x))
        return self.out(x)

    def example(self, seed: int) -> Example:
        return _floats(seed, 13, 5)


class _AttentionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 13), nn.GELU(), nn.Linear(13, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.mlp(x)


def _floats(seed: int, features: int, outputs: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(4, features, generator=generator),
        torch.randn(4, outputs, generator=generator),
    )


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> Any:
    """``make()`` with the same weights every time."""
    torch.manual_seed(seed)
    return make()


def loss_of(model: Any, example: Example) -> torch.Tensor:
    """Mean loss over an example: cross entropy for tokens, squared error for floats."""
    x, target = example
    output = model(x)
    if target.dtype == torch.int64:
        return F.cross_entropy(output.float().flatten(0, 1), target.flatten())
    return F.mse_loss(output.float(), target)


def shard_blocks(fully_shard: Callable[..., Any], model: Any, **keywords: Any) -> Any:
    """What every FSDP2 script does: each block, then the rest."""
    for block in model.blocks:
        fully_shard(block, **keywords)
    return fully_shard(model, **keywords)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole of a DTensor or of a plain tensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole parameters by name."""
    return {name: full(param) for name, param in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients by name, of the parameters that have one."""
    params = model.named_parameters()
    return {name: full(param.grad) for name, param in params if param.grad is not None}
