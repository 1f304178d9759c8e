"""Replicas that begin with other weights are refused before their first optimizer step."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from parity import WIDTH, Stack, quiet
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics import compat

FP32 = MixedPrecisionPolicy()
Edit = Callable[[nn.Module], None]


def sharded(partition: int) -> nn.Module:
    torch.manual_seed(0)
    return quiet(lambda: mics.shard(Stack(), mesh=mesh_of_rank(partition, 1), mp_policy=FP32))


def last_of(model: nn.Module) -> torch.Tensor:
    """This rank's part of the last layer."""
    return compat.local_of(model.get_parameter("last.weight").detach())


def backward(model: nn.Module) -> None:
    for batch in mics.micro_steps(model, [torch.ones(2, WIDTH)] * 2, normalise="micro_steps"):
        model(batch).square().mean().backward()


def drawn_by_each_rank(model: nn.Module) -> None:
    torch.manual_seed(dist.get_rank())
    last_of(model).normal_()


def swapped_on_the_last_rank(model: nn.Module) -> None:
    """The same values in other places."""
    if dist.get_rank() == dist.get_world_size() - 1:
        last_of(model).copy_(last_of(model).flip(0))


def frozen_and_other(model: nn.Module) -> None:
    model.get_submodule("last").requires_grad_(False)
    drawn_by_each_rank(model)


EDITS = [drawn_by_each_rank, swapped_on_the_last_rank, frozen_and_other]


def _begins(partition: int, edit: Edit, by_hand: bool) -> None:
    model = sharded(partition)
    edit(model)
    before = [compat.local_of(param.detach()).clone() for param in model.parameters()]
    try:
        if by_hand:
            model(torch.ones(2, WIDTH)).square().mean().backward()
        else:
            backward(model)
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    finally:
        after = [compat.local_of(param.detach()) for param in model.parameters()]
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("partition", [1, 2])
def test_replicas_that_begin_with_other_weights_are_refused(
    partition: int, edit: Edit, by_hand: bool
) -> None:
    for text in errors_of_ranks(_begins, 4, partition, edit, by_hand):
        assert "Replicas begin with other weights" in text
        assert re.search(r"Rank\(s\) [0-2, -]+: last.weight.*; rank\(s\) [23]: last.weight", text)


def _goes_on() -> list[str]:
    """Alike at first; afterwards nothing is compared, which would wait for a device."""
    model = sharded(2)
    torch.manual_seed(7)
    last_of(model).normal_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(3):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(str(mics.ledger(model).traffic() == mics.predict_traffic(model, micro_steps=2)))
        mics.ledger(model).reset()
    return seen


def test_replicas_that_begin_alike_train() -> None:
    assert run_ranks(_goes_on, 4) == [["True"] * 3] * 4


def _one_replica() -> None:
    model = sharded(4)
    drawn_by_each_rank(model)
    backward(model)


def test_one_replica_has_nobody_to_be_compared_with() -> None:
    run_ranks(_one_replica, 4)
