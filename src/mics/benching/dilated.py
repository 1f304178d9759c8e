"""A large model on a real cluster, every time stretched by one factor, on one machine.

Nodes become slower links and smaller blocks. Computation is a sleep inside a real module,
communication is real, so 16 nodes fit on 2 cores. With

    B, b    bytes of a block in the model, in the stand-in
    r, l    bytes per second of a node's link in the cluster (the catalogue's, over 8 nodes), and of
            the stand-in's link
    f       FLOPs of one block's forward on one micro-batch, F those a GPU computes per second

every time is stretched by D = (b / l) / (B / r): a block that takes B / r on the cluster's link
takes D times as long on the stand-in's, and sleeps D f / F in forward and D 3 f / F in backward
(backward is twice a forward, and recomputes it first). What mics sends does not depend on the
number of GPUs of a node: M (n - 1) / n per two-stage gather over n nodes, and 2 M (R - 1) / R per
hop 2 with one replica per node. So few ranks may stand for a node's 8 GPUs. A flat ring over all p
ranks sends M (p - 1) / p: 0.75 with 2 nodes of 2 ranks, 0.94 with 8 GPUs each. All messages count
as 16 bits; gradients reduced in fp32, as mics does by default, would be twice as long. What is not
scaled: the link inside a node (loopback here), and the number of blocks, of which there are fewer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

from mics.anatomy.flops import block_forward_flops
from mics.benching.options import Dilation
from mics.errors import MicsError
from mics.hardware.lookup import find_node
from mics.models.presets import PRESETS
from mics.planning.subject import subject

NODES = 8
"""How many nodes the cluster's link is taken to join: with more of them a p3dn's carries less."""

_WIDTH = 64  # of what travels between the blocks


@dataclass(frozen=True)
class Computing:
    """What a GPU of a node reaches in training.

    Args:
        of_peak: the share of the catalogue's peak, in 16 bits.
        source: where that is from.
    """

    of_peak: float
    source: str


CLUSTERS = {
    "p3dn": Computing(0.5, "half of its peak, an assumption"),
    "p4d": Computing(
        170 / 312,
        "170 of 312 TFLOPS, the MiCS paper's abstract, for its 100B model on p4d.24xlarge",
    ),
}
"""The clusters that are stood for, by the name of their node in the catalogue."""


@dataclass(frozen=True)
class Arithmetic:
    """How the stand-in's times come about.

    Times are in seconds, sizes in bytes, rates in bytes and FLOPs per second; ``real_`` is what is
    stood for.
    """

    real_link: float
    real_gpu: float
    real_block_bytes: float
    real_block_on_link: float
    real_forward: float
    block_bytes: int
    block_on_link: float
    factor: float
    forward: float
    backward: float
    source: str
    scale: float  # parameters of the stand-in per parameter of the model

    @property
    def computation(self) -> float:
        """Seconds that one block computes in one micro-step."""
        return self.forward + self.backward


def arithmetic(dilation: Dilation, link_bits: float) -> Arithmetic:
    """Work out the factor and the sleeps.

    Args:
        dilation: what stands for what.
        link_bits: bits per second of the stand-in's link.
    """
    _check(dilation)
    node, computing = find_node(dilation.cluster), CLUSTERS[dilation.cluster]
    real_link, real_gpu = node.inter.over(NODES), computing.of_peak * node.gpu.peak
    parameters, layers, flops = _block(dilation.model, dilation.micro_batch, dilation.sequence)
    real_bytes = 2.0 * parameters  # fp16 on the wire
    real_on_link = real_bytes / real_link
    on_link = dilation.block_bytes * 8 / link_bits
    factor = on_link / real_on_link
    real_forward = flops / real_gpu
    return Arithmetic(
        real_link=real_link,
        real_gpu=real_gpu,
        real_block_bytes=real_bytes,
        real_block_on_link=real_on_link,
        real_forward=real_forward,
        block_bytes=dilation.block_bytes,
        block_on_link=on_link,
        factor=factor,
        forward=factor * real_forward,
        backward=factor * 3 * real_forward,
        source=f"link: {node.name} over {NODES} nodes, the catalogue ({node.source}); "
        f"GPU: {computing.source}",
        scale=dilation.block_bytes / 4 * dilation.blocks / (parameters * layers),
    )


def _check(dilation: Dilation) -> None:
    row = 4 * _WIDTH
    if dilation.model not in PRESETS:
        raise MicsError(
            f"There is no model {dilation.model!r}.", numbers=f"Presets: {', '.join(PRESETS)}."
        )
    for name in ("micro_batch", "sequence", "micro_steps", "blocks"):
        if getattr(dilation, name) < 1:
            raise MicsError(f"{name} must be at least 1, got {getattr(dilation, name)}.")
    if dilation.block_bytes < row or dilation.block_bytes % row:
        raise MicsError(
            f"A stand-in's block has rows of {row} bytes.",
            numbers=f"block_bytes = {dilation.block_bytes}.",
            write=f"--dilation.block-bytes {max(round(dilation.block_bytes / row), 1) * row}",
        )


@cache
def _block(model: str, micro_batch: int, sequence: int) -> tuple[int, int, int]:
    """Parameters of one block, how many blocks, and FLOPs of a forward of one on a micro-batch."""
    settings = dict(PRESETS[model].settings)
    config = transformers.AutoConfig.for_model(PRESETS[model].model_type, **settings)
    layers = config.num_hidden_layers
    config.num_hidden_layers = 2  # they are all alike, and a short model is traced at once
    anatomy = subject(config)
    trace = anatomy.trace(micro_batch, anatomy.sequence_or(sequence))
    return anatomy.blocks[0].numel(), layers, block_forward_flops(trace)


class Stretched:
    """The stand-in as a workload: the same weights and batches for every engine."""

    def __init__(self, dilation: Dilation, link_bits: float) -> None:
        self.arithmetic = arithmetic(dilation, link_bits)
        self._dilation = dilation

    def model(self) -> nn.Module:
        """Blocks that sleep, between two small layers."""
        torch.manual_seed(0)
        return _Stack(self._dilation, self.arithmetic)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks of its model."""
        assert isinstance(model, _Stack)
        return list(model.blocks)

    def batches(self, rank: int, step: int) -> list[torch.Tensor]:
        """Inputs of every micro-step of one rank."""
        generator = torch.Generator().manual_seed(1000 * step + rank)
        count = self._dilation.micro_steps
        return list(torch.randn(count, 2, _WIDTH, generator=generator))

    def loss(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """How far the model is from giving back its input."""
        loss: torch.Tensor = ((model(batch) - batch) ** 2).mean()
        return loss


class _Stack(nn.Module):
    def __init__(self, dilation: Dilation, times: Arithmetic) -> None:
        super().__init__()
        self.first = nn.Linear(_WIDTH, _WIDTH)
        self.blocks = nn.ModuleList(_Block(times) for _ in range(dilation.blocks))
        self.last = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        last: torch.Tensor = self.last(x)
        return last


class _Block(nn.Module):
    """A block whose weights all take part at no cost, and which then sleeps as it would compute."""

    def __init__(self, times: Arithmetic) -> None:
        super().__init__()
        rows = times.block_bytes // 4 // _WIDTH
        self.weight = nn.Parameter(torch.randn(rows, _WIDTH))
        self.forward_seconds = times.forward
        self.backward_seconds = times.backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(x * self.weight.sum(0) / len(self.weight) ** 0.5)
        seconds = (self.forward_seconds, self.backward_seconds)
        slept: torch.Tensor = _Sleep.apply(x, *seconds)  # type: ignore[no-untyped-call]
        return slept


class _Sleep(torch.autograd.Function):
    """Last in forward, so first in backward: gradients are there when the time is over."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        time.sleep(forward)
        ctx.seconds = backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        return gradients[0], None, None
