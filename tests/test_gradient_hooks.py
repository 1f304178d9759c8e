"""Hooks on gradients that sharding would lose, or that nobody would call, are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import shard_blocks
from parity import WIDTH, Stack, quiet
from ranks import errors_of_ranks, run_ranks
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics


def _mask(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * 0


def _hooked_before(with_fully_shard: bool, behind: bool) -> None:
    model = Stack()
    param = next(model.parameters())
    register: Any = param.register_post_accumulate_grad_hook if behind else param.register_hook
    register(_mask)
    if with_fully_shard:
        shard_blocks(mics.fully_shard, model)
    else:
        mics.shard(model, partition=2, gpus_per_node=2)


@pytest.mark.parametrize("with_fully_shard", [True, False])
@pytest.mark.parametrize("behind", [True, False])
def test_a_parameter_with_a_hook_is_not_sharded(with_fully_shard: bool, behind: bool) -> None:
    for text in errors_of_ranks(_hooked_before, 2, with_fully_shard, behind):
        assert "A hook on the gradient of a parameter would be lost" in text
        assert "1 with hooks: " in text


def _hooked_afterwards(partition: int) -> None:
    model = quiet(
        lambda: mics.shard(
            Stack(), partition=partition, gpus_per_node=1, mp_policy=MixedPrecisionPolicy()
        )
    )
    list(model.parameters())[1].register_hook(_mask)
    for batch in mics.micro_steps(model, [torch.randn(2, WIDTH)], normalise="micro_steps"):
        model(batch).sum().backward()


@pytest.mark.parametrize("partition", [1, 2])
def test_a_hook_on_a_shard_is_refused_in_backward(partition: int) -> None:
    for text in errors_of_ranks(_hooked_afterwards, 2, partition):
        assert "A hook of Tensor.register_hook on a sharded parameter is never called" in text


def _ignored() -> float:
    model = Stack()
    param = next(model.parameters())
    param.register_post_accumulate_grad_hook(lambda one: None)
    quiet(
        lambda: mics.shard(
            model,
            partition=2,
            gpus_per_node=2,
            ignored_params={param},
            mp_policy=MixedPrecisionPolicy(),
        )
    )
    return float(param.detach().sum())


def test_what_is_not_sharded_keeps_its_hooks() -> None:
    """As of a parameter that its own hook reduces."""
    first, second = run_ranks(_ignored, 2)
    assert first == second
