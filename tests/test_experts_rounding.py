"""A mixture of experts of transformers beside one process: what parts them is rounding alone."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import mesh_of_rank, run_ranks
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics

WORLD, MICRO_STEPS, STEPS, WORDS, LENGTH = 4, 2, 100, 256, 32


def _net(dtype: torch.dtype) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    )
    make = transformers.Qwen3MoeForCausalLM._from_config
    return make(config, experts_implementation="eager").to(dtype)  # the others have no fp64


def _text() -> torch.Tensor:
    """A sequence with something in it to be learnt."""
    text = torch.randint(0, WORDS, (4000,), generator=torch.Generator().manual_seed(1)).tolist()
    for i in range(2, len(text)):
        text[i] = (3 * text[i - 1] + text[i - 2] + text[i] % 3) % WORDS
    return torch.tensor(text)


TEXT = _text()


def _batch(step: int, micro_step: int, rank: int) -> torch.Tensor:
    seed = torch.Generator().manual_seed(1000 * step + 10 * micro_step + rank)
    starts = torch.randint(0, len(TEXT) - LENGTH, (2,), generator=seed)
    return torch.stack([TEXT[start : start + LENGTH] for start in starts])


def _alone(dtype: torch.dtype) -> list[float]:
    net = _net(dtype)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=3e-3), []
    for step in range(STEPS):
        total = 0.0
        for micro_step, rank in itertools.product(range(MICRO_STEPS), range(WORLD)):
            batch = _batch(step, micro_step, rank)
            loss = net(input_ids=batch, labels=batch).loss / (MICRO_STEPS * WORLD)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _sharded(dtype: torch.dtype) -> list[float]:
    warnings.simplefilter("ignore")
    net = mics.shard(_net(dtype), mesh=mesh_of_rank(2, 2), mp_policy=MixedPrecisionPolicy())
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=3e-3), []
    for step in range(STEPS):
        own = [_batch(step, m, dist.get_rank()) for m in range(MICRO_STEPS)]
        total = torch.zeros((), dtype=torch.float64)
        for batch in mics.micro_steps(net, own, normalise="micro_steps"):
            loss = net(input_ids=batch, labels=batch).loss
            loss.backward()
            total += loss.detach().double() / (MICRO_STEPS * WORLD)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def _apart(dtype: torch.dtype) -> float:
    ours = run_ranks(quiet, WORLD, lambda: _sharded(dtype))[0]
    return max(abs(a / b - 1) for a, b in zip(ours, _alone(dtype), strict=True))


@pytest.mark.extra
def test_in_fp64_losses_stay_one_process_and_in_fp32_routing_parts_them() -> None:
    """transformers works out the loss itself in fp32, whose last bit is 6e-8."""
    assert _apart(torch.float64) < 1e-6
    assert _apart(torch.float32) > 1e-5
