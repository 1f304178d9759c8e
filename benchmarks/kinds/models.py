"""One small transformer, and what rows of the table change in it.

Widths are odd where nothing forbids it, so that shards are padded.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import all_to_all_single
from torch.distributed.tensor import DTensor, Replicate, Shard

Weights = Literal["fp32", "float8", "lora", "nf4"]

HEADS, CHOSEN, RANK = 2, 2, 3  # heads of attention, experts per token, rank of an adapter
LENGTH, ROWS = 8, 2  # of a micro-batch of one rank

# torch 2.13 renamed it, and the old name warns.
_gather: Any = (
    getattr(_functional_collectives, "all_gather_single_autograd", None)
    or _functional_collectives.all_gather_tensor_autograd
)


@dataclass(frozen=True)
class Shape:
    """What the model of a row is made of."""

    width: int = 12
    hidden: int = 20
    words: int = 30
    tied: bool = False
    frozen: bool = False
    experts: int = 0  # of a block; 0: one MLP
    weights: Weights = "fp32"


@dataclass(frozen=True)
class Across:
    """The axes that a model computes across; a model of one process has none."""

    cp: DeviceMesh | None = None
    tp: DeviceMesh | None = None
    ep: DeviceMesh | None = None


class Attention(nn.Module):
    """Causal, over a sequence that may be spread over ranks."""

    def __init__(self, shape: Shape, across: Across) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )
        self.cp = across.cp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, x.shape[-1] // HEADS)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.cp is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            own, first = q.shape[2], self.cp.get_local_rank() * q.shape[2]
            k, v = (_gather(one.contiguous(), 2, self.cp.get_group()) for one in (k, v))
            seen = torch.ones(own, k.shape[2], dtype=torch.bool).tril(first)
            y = F.scaled_dot_product_attention(q, k, v, seen)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.hidden)
        self.down = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """All experts as two tensors, of which a rank may hold some."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(shape.experts, shape.width, shape.hidden) / 4)
        self.down = nn.Parameter(torch.randn(shape.experts, shape.hidden, shape.width) / 4)

    def forward(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Return what each row's expert makes of it; rows of an expert stand together."""
        up, down = (
            one.to_local() if isinstance(one, DTensor) else one for one in (self.up, self.down)
        )
        parts = rows.split(counts)
        return torch.cat([F.gelu(part @ up[e]) @ down[e] for e, part in enumerate(parts)])


class Moe(nn.Module):
    """Each token goes to the experts that the router likes best, as in Mixtral."""

    def __init__(self, shape: Shape, across: Across) -> None:
        super().__init__()
        self.router = nn.Linear(shape.width, shape.experts, bias=False)
        self.experts = Experts(shape)
        self.across, self.num_experts = across, shape.experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        shares, chosen = self.router(tokens).softmax(-1).topk(CHOSEN)
        shares = shares / shares.sum(-1, keepdim=True)
        tp = self.across.tp
        if tp is None:
            return self._mix(tokens, shares, chosen).view_as(x)
        # Each rank of tensor parallelism takes a part of the tokens.
        tokens, shares, chosen = (_own_part(one, tp) for one in (tokens, shares, chosen))
        mixed = DTensor.from_local(self._mix(tokens, shares, chosen), tp, [Shard(0)])
        return mixed.redistribute(tp, [Replicate()]).to_local().view_as(x)  # type: ignore[no-any-return]

    def _mix(
        self, tokens: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        order = chosen.flatten().argsort(stable=True)
        rows = tokens[order // CHOSEN]
        counts = chosen.flatten().bincount(minlength=self.num_experts)
        made = self._of_experts(rows, counts) * shares.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, order // CHOSEN, made)

    def _of_experts(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ep = self.across.ep
        if ep is None:
            return self.experts(rows, counts.tolist())  # type: ignore[no-any-return]
        group, ranks = ep.get_group(), ep.size()
        theirs = torch.empty_like(counts)
        all_to_all_single(theirs, counts, group=group)
        sent = counts.view(ranks, -1).sum(1).tolist()
        received = theirs.view(ranks, -1)  # by rank, by expert of this rank
        came = all_to_all_single_autograd(rows, received.sum(1).tolist(), sent, group)
        local = torch.arange(received.shape[1]).repeat(ranks).repeat_interleave(theirs)
        by_expert = local.argsort(stable=True)
        made = self.experts(came[by_expert], received.sum(0).tolist())
        back = made[by_expert.argsort()]
        return all_to_all_single_autograd(back, sent, received.sum(1).tolist(), group)


class Adapted(nn.Module):
    """A frozen layer, in bf16 or NF4, with two small fp32 matrices beside it."""

    def __init__(self, features: int, outputs: int, kind: Weights) -> None:
        super().__init__()
        base = torch.randn(outputs, features) / features**0.5
        stored = _nf4(base) if kind == "nf4" else base.bfloat16()
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.down = nn.Linear(features, RANK, bias=False)
        self.up = nn.Linear(RANK, outputs, bias=False)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._base(x) + self.up(self.down(x))  # type: ignore[no-any-return]

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "nf4":
            from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

            return linear_nf4(x.float(), self.weight).to(x.dtype)  # type: ignore[no-any-return]
        return F.linear(x.bfloat16(), self.weight).to(x.dtype)


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return to_nf4(weight, block_size=32, scaler_block_size=2)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, shape: Shape, across: Across) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = Attention(shape, across)
        self.mlp = Moe(shape, across) if shape.experts else Mlp(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Words to scores of the next word."""

    def __init__(self, shape: Shape, across: Across | None = None) -> None:
        super().__init__()
        across = across or Across()
        self.embedding = nn.Embedding(shape.words, shape.width)
        self.blocks = nn.ModuleList(Block(shape, across) for _ in range(2))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.words, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def build(shape: Shape, across: Across | None = None) -> Net:
    """Build the model of a row, with the same values on every rank and in one process."""
    torch.manual_seed(0)
    net = Net(shape, across)
    if shape.frozen:
        net.embedding.requires_grad_(False)
        net.blocks[0].attention.requires_grad_(False)  # type: ignore[operator,union-attr]
        net.blocks[1].mlp.up.bias.requires_grad_(False)  # type: ignore[union-attr,operator]
    if shape.weights in ("lora", "nf4"):
        net.requires_grad_(False)
        for block in net.blocks:
            block.mlp.up = Adapted(shape.width, shape.hidden, shape.weights)  # type: ignore[union-attr,assignment]
            block.mlp.down = Adapted(shape.hidden, shape.width, shape.weights)  # type: ignore[union-attr,assignment]
    if shape.weights == "float8":
        _to_float8(net, gathered=across is not None)
    return net


def _to_float8(net: Net, *, gathered: bool) -> None:
    """Turn the layers of blocks into torchao's, with products emulated: a CPU has none."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(enable_fsdp_float8_all_gather=gathered, emulate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in net.blocks:
            convert_to_float8_training(block, config=config)


def _own_part(whole: torch.Tensor, over: DeviceMesh) -> torch.Tensor:
    spread = DTensor.from_local(whole, over, [Replicate()], run_check=False)
    return spread.redistribute(over, [Shard(0)]).to_local()  # type: ignore[no-any-return]
