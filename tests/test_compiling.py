"""Compiled models on four ranks beside a process of one; graphs and memory of accelerators."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.ranks import device
from mics.sharding import passes

WORLD, WIDTH, MICRO_STEPS, STEPS = 4, 16, 2, 2
FULL = MixedPrecisionPolicy()


class Block(nn.Module):
    """A norm and two layers with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(2)], nn.Linear(WIDTH, 3))


def _data(step: int, micro_step: int, rank: int) -> torch.Tensor:
    seed = (step * MICRO_STEPS + micro_step) * WORLD + rank
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))


def _alone() -> list[torch.Tensor]:
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            for rank in range(WORLD):
                loss = net(_data(step, micro_step, rank)).square().mean()
                (loss / WORLD / MICRO_STEPS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in net.parameters()]


def _trained(blocks: dict[str, Any] | bool, whole: dict[str, Any] | None) -> list[torch.Tensor]:
    torch.compiler.reset()
    net = mics.shard(_net(), partition=2, blocks=Block, mp_policy=FULL, compile=blocks)
    called = net if whole is None else torch.compile(net, **whole)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    view = mics.ledger(net)
    for step in range(STEPS):
        view.reset()
        batches = [_data(step, i, dist.get_rank()) for i in range(MICRO_STEPS)]
        for batch in mics.micro_steps(net, batches, normalise="micro_steps"):
            called(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert view.traffic() == mics.predict_traffic(net, micro_steps=MICRO_STEPS)
    return [param.full_tensor().detach() for param in net.parameters()]  # type: ignore[attr-defined]


@pytest.mark.extra
# Dynamo looks whether an activation has a gradient, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("blocks", "whole"),
    [
        pytest.param(True, None, id="blocks with inductor"),
        pytest.param(False, {}, id="the whole with inductor"),
        pytest.param(False, {"backend": "aot_eager"}, id="the whole with aot_eager"),
    ],
)
def test_compiled_models_equal_single_process(
    blocks: dict[str, Any] | bool, whole: dict[str, Any] | None
) -> None:
    right = _alone()
    for trained in run_ranks(quiet, WORLD, lambda: _trained(blocks, whole)):
        for ours, one in zip(trained, right, strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-5, atol=2e-6)


def _captured() -> str:
    net = mics.shard(_net(), partition=1, blocks=Block, mp_policy=FULL)
    net(_data(0, 0, 0))
    passes.is_capturing = lambda device: True
    with pytest.raises(mics.MicroStepError) as raised:
        net(_data(0, 0, 0))
    return str(raised.value)


def test_a_graph_captured_around_a_sharded_model_is_refused() -> None:
    said: list[str] = run_ranks(quiet, 1, _captured)
    assert "A graph of the accelerator is being captured around a sharded model" in said[0]
    assert "3 unit(s) on this mesh" in said[0]
    assert "graphs inside of a block" in said[0]


def test_graphs_are_asked_for_on_accelerators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not device.is_capturing(torch.device("cpu"))
    fake = SimpleNamespace(is_current_stream_capturing=lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    assert device.is_capturing(torch.device("cuda", 0))


def test_segments_of_an_accelerator_grow_unless_the_user_has_set_its_allocator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    device.expand_segments("cpu")
    assert not os.environ
    device.expand_segments("cuda")
    assert os.environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    os.environ.clear()
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:64"
    device.expand_segments("cuda")
    assert os.environ == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
