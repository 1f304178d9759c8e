"""Ranks whose optimizers have other options are refused, with the option, before they are used."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import errors_of_ranks, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.communication.optimizer_options import common_options
from mics.errors import MicroStepError

WORLD = 2
Change = Callable[[torch.optim.Optimizer], None]


def model(partition: int) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)]
    whole = nn.Sequential(*blocks, nn.Linear(6, 2))
    return quiet(
        lambda: mics.shard(
            whole,
            partition=partition,
            gpus_per_node=1,
            blocks=blocks,
            mp_policy=MixedPrecisionPolicy(),
        )
    )


def backward(sharded: nn.Module) -> None:
    batches = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    for batch in mics.micro_steps(sharded, list(batches), normalise="micro_steps"):
        sharded(batch).square().mean().backward()


def groups_of(sharded: nn.Sequential) -> list[dict[str, Any]]:
    first, *rest = sharded.parameters()
    return [{"params": [first], "weight_decay": 0.1}, {"params": rest}]


def lower(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 5e-3


def lower_a_tensor(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(5e-3)


def other_betas(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[1]["betas"] = (0.9, 0.5)


def other_members(optimizer: torch.optim.Optimizer) -> None:
    first, second = optimizer.param_groups
    first["params"].append(second["params"].pop(0))


CHANGES = {
    lower: "lr = 0.005",
    lower_a_tensor: "lr = 0.00499",
    other_betas: "betas = (0.9, 0.5)",
    other_members: "AdamW of 2 + 4 parameter(s)",
}


def _changed_between_steps(partition: int, change: Change) -> None:
    sharded = model(partition)
    optimizer = torch.optim.AdamW(groups_of(sharded), lr=1e-2)
    backward(sharded)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 1:
        change(optimizer)
    before = [param.to_local().clone() for param in sharded.parameters()]
    try:
        backward(sharded)
    except MicroStepError:
        after = [param.to_local() for param in sharded.parameters()]
        assert all(map(torch.equal, before, after))
        raise


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("partition", [1, 2])
def test_an_option_that_one_rank_has_changed_is_refused_before_it_is_used(
    partition: int, change: Change
) -> None:
    for text in errors_of_ranks(_changed_between_steps, WORLD, partition, change):
        assert "would step their shards unlike" in text
        assert "Rank(s) 0: AdamW" in text and "; rank(s) 1: AdamW" in text
        assert CHANGES[change] in text


def _from_the_beginning(partition: int, folder: Path, saves: bool) -> None:
    sharded = model(partition)
    rate = 1e-2 if dist.get_rank() == 0 else 2e-2
    optimizer = torch.optim.SGD(sharded.parameters(), lr=rate)
    backward(sharded)
    optimizer.step()
    optimizer.zero_grad()
    if saves:
        mics.save(folder, model=sharded, optimizer=optimizer)
    else:
        backward(sharded)


@pytest.mark.parametrize("partition", [1, 2])
def test_what_was_used_unlike_is_refused_in_the_next_step(partition: int, tmp_path: Path) -> None:
    """Of an optimizer that has not stepped yet nobody knows before it does."""
    for text in errors_of_ranks(_from_the_beginning, WORLD, partition, tmp_path, False):
        assert "or the same in another order or with other options" in text
        assert "Rank(s) 0: SGD, group 0, lr = 0.01; rank(s) 1: SGD, group 0, lr = 0.02." in text


def test_what_was_used_unlike_is_not_saved(tmp_path: Path) -> None:
    for text in errors_of_ranks(_from_the_beginning, WORLD, 2, tmp_path, True):
        assert "what is to be saved" in text and "weight.lr = 0.02" in text


def _clipped_by(partition: int) -> None:
    sharded = model(partition)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=1e-2)
    for norm in (1.0, 1.0 + dist.get_rank(), 1.0):
        backward(sharded)
        mics.clip_grad_norm_(sharded.parameters(), norm)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("partition", [1, 2])
def test_gradients_clipped_to_another_norm_are_refused_in_the_next_step(partition: int) -> None:
    for text in errors_of_ranks(_clipped_by, WORLD, partition):
        assert "rank(s) 1: gradients clipped to max_norm = 2.0, norm_type = 2.0" in text


def _what_is_alike() -> list[float]:
    rank = dist.get_rank()
    sharded = model(2)
    optimizer = torch.optim.AdamW(groups_of(sharded), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rates = []
    for _ in range(4):
        backward(sharded)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["mesh"] = object()  # of its rank alone
        if rank == 1:  # equal, but of other kinds
            optimizer.param_groups[0]["lr"] = np.float64(optimizer.param_groups[0]["lr"])
            optimizer.param_groups[1]["betas"] = [0.9, 0.999]
            optimizer.param_groups[1]["weight_decay"] = optimizer.param_groups[1].pop(
                "weight_decay"
            )
    return rates


def test_a_schedule_of_all_ranks_and_equal_numbers_of_other_kinds_are_right() -> None:
    for rates in run_ranks(_what_is_alike, WORLD):
        assert rates == [5e-3, 2.5e-3, 1.25e-3, 6.25e-4]


def _optimizer_made_anew() -> None:
    sharded = model(1)
    kept = []
    for number in range(4):
        optimizer = torch.optim.SGD(sharded.parameters(), lr=1e-2 / (number + 1))
        backward(sharded)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 1:
            kept.append(optimizer)  # as one that waits to be collected
            optimizer.param_groups[0]["lr"] = 7.0
        del optimizer
        gc.collect()


def test_an_optimizer_that_is_gone_on_some_ranks_has_no_say() -> None:
    run_ranks(_optimizer_made_anew, WORLD)


def _two_optimizers() -> None:
    sharded = model(2)
    first, *rest = sharded.parameters()
    optimizers = [torch.optim.SGD([first], lr=0.1), torch.optim.AdamW(rest, lr=0.1)]
    for number in range(3):
        backward(sharded)
        for one in optimizers:
            one.step()
            one.zero_grad()
        if number == 1 and dist.get_rank() == 0:
            optimizers[1].param_groups[0]["eps"] = 1e-5


def test_the_second_of_two_optimizers_is_compared_too() -> None:
    for text in errors_of_ranks(_two_optimizers, WORLD):
        assert "AdamW, group 0, eps = 1e-05" in text


def test_only_what_is_spelled_alike_wherever_it_is_equal_is_compared() -> None:
    group = {
        "params": [1],
        "lr": np.float32(0.5),
        "betas": [0.9, 1],
        "foreach": None,
        "name": "matrices",
        "capturable": True,
        "rate": torch.tensor(2.0),
        "step": 2**60,
        "rows": torch.ones(2),
        "rule": max,
        "nested": ([object()], 1),
    }
    assert common_options(group) == {
        "lr": 0.5,
        "betas": (0.9, 1.0),
        "foreach": None,
        "name": "matrices",
        "capturable": True,
        "rate": 2.0,
        "step": 2**60,
    }
