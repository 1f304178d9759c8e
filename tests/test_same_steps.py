"""Ranks that run different numbers of micro-steps are told so, before anything is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from models import UnevenMLP
from parity import quiet
from ranks import errors_of_ranks, run_ranks

import mics
from mics.communication.step_facts import Facts, disagreement, facts


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
        assert "rank(s) 0, 2-3: no more; rank(s) 1: more." in text
        assert "the same number of batches on every rank" in text


def test_as_many_in_all_but_other_numbers_per_step_is_an_error_too() -> None:
    """Their collectives would pair up to the end, and the replicas drift apart in silence."""
    errors = errors_of_ranks(_train, 4, 2, [[2, 3, 2, 2], [2, 2, 2, 2], [2, 1, 2, 2]])
    assert all("different numbers of micro-batches" in text for text in errors)


def test_steps_may_differ_in_length_where_the_ranks_agree() -> None:
    for losses in run_ranks(_train, 4, 2, [[1] * 4, [3] * 4, [2] * 4]):
        assert len(losses) == 3


def _steps(partition: int, odd: Callable[[int, UnevenMLP, torch.optim.Optimizer], bool]) -> int:
    """Three steps of two models that take turns.

    Args:
        partition: p.
        odd: called before every step; whether this rank leaves out its forward and backward.

    Returns:
        How many optimizer steps this rank has taken.
    """
    taken = 0
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = UnevenMLP()
        blocks = list(model.blocks)
        quiet(lambda m=model, b=blocks: mics.shard(m, partition=partition, gpus_per_node=2,
                                                   blocks=b, collectives="flat"))  # fmt: skip
        models.append((model, torch.optim.SGD(model.parameters(), lr=0.1)))
    for step in range(3):
        for model, optimizer in models:
            skips = odd(step, model, optimizer)
            for x, _ in mics.micro_steps(model, [model.example(step)]):
                if not skips:
                    model(x).square().mean().backward()
            optimizer.step()
            taken += 1
            optimizer.zero_grad()
    return taken


def test_any_schedule_of_optimizers_will_do_where_ranks_agree() -> None:
    def like_a_gan(step: int, model: UnevenMLP, optimizer: torch.optim.Optimizer) -> bool:
        if step == 1:
            optimizer.step()
        model.out.requires_grad_(step != 1)  # frozen and back, on every rank
        torch.optim.SGD([torch.ones(1)]).step() if dist.get_rank() else None  # nobody's business
        return False

    assert run_ranks(_steps, 4, 2, like_a_gan) == [6] * 4


@pytest.mark.parametrize("more", [True, False])
def test_a_rank_with_another_number_of_optimizer_steps_is_named(more: bool) -> None:
    def one_differs(step: int, model: UnevenMLP, optimizer: torch.optim.Optimizer) -> bool:
        if step == 1 and (dist.get_rank() == 3) == more:
            optimizer.zero_grad()
            optimizer.step()  # changes nothing, and would not be seen in the weights
        return False

    for text in errors_of_ranks(_steps, 4, 2, one_differs):
        assert "Ranks have taken different numbers of optimizer steps" in text
        few, many = ("0-2", "3") if more else ("3", "0-2")
        assert f"rank(s) {few}: 1 optimizer step(s); rank(s) {many}: 2 optimizer step(s)." in text
        assert "optimizer.step() on every rank or on none" in text


def test_a_rank_that_freezes_a_parameter_alone_is_named_before_anything_is_gathered() -> None:
    def one_freezes(step: int, model: UnevenMLP, optimizer: torch.optim.Optimizer) -> bool:
        if step == 1 and dist.get_rank() == 2:
            model.out.bias.requires_grad_(False)
        return False

    texts = errors_of_ranks(_steps, 4, 2, one_freezes)
    words = "Rank 2 trains other parameters since its last step, and not every rank does."
    assert f"MicroStepError: {words}" in texts[2]
    assert "param.requires_grad_(...) on every rank" in texts[2]
    for rank in (0, 1, 3):
        assert "RankError: Rank 2 alone has left micro-step 1 of step 2" in texts[rank]
        assert words in texts[rank]


def test_ranks_that_freeze_other_parameters_before_the_first_step_are_named() -> None:
    def frozen() -> None:
        model = UnevenMLP()
        quiet(lambda: mics.shard(model, partition=2, gpus_per_node=2, blocks=list(model.blocks)))
        model.out.requires_grad_(dist.get_rank() != 1)
        for x, _ in mics.micro_steps(model, [model.example(0)]):
            model(x).sum().backward()

    for text in errors_of_ranks(frozen, 2):
        assert "Ranks train different parameters: requires_grad was changed on some" in text
        assert "rank(s) 1: the checksum" in text


def test_a_rank_that_skips_the_forward_of_a_step_is_named() -> None:
    """Its next forward would be paired with the others' last one, step after step, in silence."""

    def one_skips() -> None:
        model = UnevenMLP()
        quiet(lambda: mics.shard(model, partition=2, gpus_per_node=2, blocks=list(model.blocks)))
        for step in range(4):
            for x, _ in mics.micro_steps(model, [model.example(0)]):
                if step != 1 or dist.get_rank() != 1:
                    model(x).sum().backward()

    for text in errors_of_ranks(one_skips, 2):  # the other one is still in its last forward
        assert "Ranks wait for each other in different places" in text
        assert "rank(s) 1 in the end of the step among ranks 0-1" in text


def test_ranks_that_ran_other_numbers_of_collectives_are_named_by_partition_group() -> None:
    def facts_of(collectives: int) -> Facts:
        return facts(0, more=True, said="beforehand", normalise=None, optimizer_steps=0,
                     optimizers=0, trained=0, issued=(0, collectives))  # fmt: skip

    error = disagreement(dict(enumerate(map(facts_of, [7, 7, 9, 8]))), 2)
    assert str(error) == (
        "Ranks of a partition group have run different numbers of its collectives: one has left "
        "out a forward or a backward, and what the others sent was taken for its next one's.\n"
        "  After 0 micro-step(s) of this step: rank(s) 3: 8 collective(s); rank(s) 2: 9 "
        "collective(s).\n"
        "  Write: the same forward and backward passes on every rank of a partition group"
    )
