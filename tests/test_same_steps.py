"""Ranks that run different numbers of micro-steps are told so, before anything is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from models import UnevenMLP
from parity import quiet
from ranks import errors_of_ranks, run_ranks

import mics


def _train(partition: int, batches_of_ranks: list[list[int]]) -> list[float]:
    torch.manual_seed(0)
    model = UnevenMLP()
    quiet(
        lambda: mics.shard(
            model,
            partition=partition,
            gpus_per_node=2,
            blocks=list(model.blocks),
            collectives="flat",
        )
    )
    losses = []
    for step, counts in enumerate(batches_of_ranks):
        examples = [model.example(step * 10 + j) for j in range(counts[dist.get_rank()])]
        for x, _ in mics.micro_steps(model, iter(examples)):
            loss = model(x).square().mean()
            loss.backward()
        losses.append(loss.item())
        model.zero_grad()
    return losses


@pytest.mark.parametrize("partition", [1, 2, 4])
def test_a_rank_with_more_micro_batches_is_an_error_on_every_rank(partition: int) -> None:
    for text in errors_of_ranks(_train, 4, partition, [[2, 2, 2, 2], [2, 3, 2, 2]]):
        assert "different numbers of micro-batches for one step" in text
        assert "After 2 micro-step(s) some ranks have more and others have not" in text
        assert "the same number of batches on every rank" in text


def test_as_many_in_all_but_other_numbers_per_step_is_an_error_too() -> None:
    """Their collectives would pair up to the end, and the replicas drift apart in silence."""
    errors = errors_of_ranks(_train, 4, 2, [[2, 3, 2, 2], [2, 2, 2, 2], [2, 1, 2, 2]])
    assert all("different numbers of micro-batches" in text for text in errors)


def test_steps_may_differ_in_length_where_the_ranks_agree() -> None:
    for losses in run_ranks(_train, 4, 2, [[1] * 4, [3] * 4, [2] * 4]):
        assert len(losses) == 3
