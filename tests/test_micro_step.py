"""One micro-batch at a time: ``mics.micro_step`` is what ``mics.micro_steps`` loops over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import UnevenMLP
from parity import quiet
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from torch import nn

import mics
from mics.errors import MicroStepError, MicsWarning
from mics.traffic import Traffic

STEPS, MICRO_STEPS = 2, 3
Losses = list[float]


def sharded(partition: int = 2, **keywords: Any) -> UnevenMLP:
    torch.manual_seed(0)
    model = UnevenMLP()
    quiet(
        lambda: mics.shard(
            model, mesh=mesh_of_rank(partition, 2), blocks=list(model.blocks), **keywords
        )
    )
    return model


def examples_of(model: UnevenMLP, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    first = 1000 * step + 100 * dist.get_rank()
    return [model.example(first + i) for i in range(MICRO_STEPS)]


def loss_of(model: UnevenMLP, example: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = example
    return (model(x) - y).square().sum()


def train(run_step: Callable[..., Losses], **keywords: Any) -> tuple[Losses, Traffic]:
    """Losses of two steps, and what was sent."""
    model = sharded(**keywords)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        losses += run_step(model, examples_of(model, step))
        optimizer.step()
        optimizer.zero_grad()
    return losses, mics.ledger(model).traffic()


def tokens_of(example: tuple[torch.Tensor, torch.Tensor]) -> int:
    return int(example[0].abs().sum() * 100) % 7 + 1


def loop(model: UnevenMLP, examples: list[Any], normalise: Any = None) -> Losses:
    losses = []
    for example in mics.micro_steps(model, examples, normalise=normalise):
        loss = loss_of(model, example)
        loss.backward()
        losses.append(loss.item())
    return losses


def function_per_micro_batch(model: UnevenMLP, examples: list[Any], normalise: Any) -> Losses:
    """As trainers do: one call per micro-batch, which is told whether it is the last."""

    def training_step(example: Any, last: bool) -> float:
        tokens = normalise(example) if callable(normalise) else None
        how = None if callable(normalise) else normalise
        with mics.micro_step(model, last=last, normalise=how, tokens=tokens):
            loss = loss_of(model, example)
            loss.backward()
        return loss.item()

    return [training_step(e, i == len(examples) - 1) for i, e in enumerate(examples)]


def told_afterwards(model: UnevenMLP, examples: list[Any], normalise: Any) -> Losses:
    """As trainers do that learn only afterwards that a micro-batch was the last."""
    losses = []
    for example in examples:
        tokens = normalise(example) if callable(normalise) else None
        how = None if callable(normalise) else normalise
        with mics.micro_step(model, last=None, normalise=how, tokens=tokens):
            loss = loss_of(model, example)
            loss.backward()
        losses.append(loss.item())
    mics.finish_step(model)
    return losses


@pytest.mark.parametrize("run_step", [function_per_micro_batch, told_afterwards])
@pytest.mark.parametrize("normalise", [None, "micro_steps", tokens_of])
def test_a_function_per_micro_batch_gives_the_loops_losses_and_bytes(
    run_step: Callable[..., Losses], normalise: Any
) -> None:
    def both() -> bool:
        in_loop = train(lambda m, e: loop(m, e, normalise))
        by_function = train(lambda m, e: run_step(m, e, normalise))
        return in_loop == by_function and in_loop[1].hop(2).inter_bytes > 0

    assert all(run_ranks(both, 4))


@pytest.mark.parametrize("partition", [1, 4])
@pytest.mark.parametrize("overlap", [False, True])
def test_so_it_does_at_other_partitions_and_without_overlap(partition: int, overlap: bool) -> None:
    def all_three() -> bool:
        layout: dict[str, Any] = {"partition": partition, "overlap": overlap}
        layout["collectives"] = "hierarchical"
        ways = (loop, function_per_micro_batch, told_afterwards)
        first, *others = [train(lambda m, e, way=way: way(m, e, None), **layout) for way in ways]
        return all(other == first for other in others)

    assert all(run_ranks(all_three, 4))


def test_micro_steps_may_be_the_last_or_not_known_to_be_in_one_step() -> None:
    def mixed(model: UnevenMLP, examples: list[Any]) -> Losses:
        losses = []
        for example, last in zip(examples, (None, False, True), strict=True):
            with mics.micro_step(model, last=last):
                loss = loss_of(model, example)
                loss.backward()
            losses.append(loss.item())
        return losses

    def same() -> bool:
        return train(loop) == train(mixed)

    assert all(run_ranks(same, 4))


# -- what is refused -----------------------------------------------------------------------------


def _step(model: UnevenMLP, lasts: list[bool | None], **keywords: Any) -> None:
    for i, last in enumerate(lasts):
        with mics.micro_step(model, last=last, **keywords):
            loss_of(model, model.example(i)).backward()


def _optimizer_when_the_last_was_never_said(last: bool | None) -> str:
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _step(model, [last, last])
    with pytest.raises(MicroStepError) as error:
        optimizer.step()
    return str(error.value)


@pytest.mark.parametrize("last", [False, None])
@pytest.mark.parametrize("ranks", [2, 4])  # one replica, two replicas
def test_an_optimizer_is_refused_when_the_last_was_never_said(
    last: bool | None, ranks: int
) -> None:
    for text in run_ranks(_optimizer_when_the_last_was_never_said, ranks, last):
        assert "optimizer.step() was called before the last" in text
        assert "optimizer.zero_grad()" in text


def _optimizer_in_a_normalised_last_one() -> str:
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(MicroStepError) as error,
        mics.micro_step(model, last=True, normalise="micro_steps"),
    ):
        loss_of(model, model.example(0)).backward()
        optimizer.step()
    return str(error.value)


def test_an_optimizer_inside_a_normalised_micro_step_is_refused() -> None:
    for text in run_ranks(_optimizer_in_a_normalised_last_one, 4):
        assert "its gradients are not normalised yet" in text
        assert "mics.finish_step(model)" in text


def _state_dict_in_between() -> str:
    model = sharded()
    _step(model, [False])
    with pytest.raises(MicroStepError) as error:
        model.state_dict()
    _step(model, [True])
    model.state_dict()
    return str(error.value)


def test_a_state_dict_between_micro_steps_is_refused_and_after_them_is_not() -> None:
    for text in run_ranks(_state_dict_in_between, 2):
        assert "state_dict() was called between micro-steps" in text
        assert "1 micro-step(s) of this step have run" in text
        assert "save after the last micro-step" in text


def _gradients_after(
    lasts_before: list[bool | None], leave: str, partition: int
) -> tuple[bool, int]:
    """Whether a step is not changed by one that was left before it, and how often that is said."""
    fresh = sharded(partition)
    _step(fresh, [False, True], normalise="micro_steps")
    model = sharded(partition)
    _step(model, lasts_before, normalise="micro_steps")
    if leave == "exception":
        with (
            pytest.raises(ZeroDivisionError),
            mics.micro_step(model, last=True, normalise="micro_steps"),
        ):
            loss_of(model, model.example(7)).backward()
            raise ZeroDivisionError
    else:
        model.zero_grad()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _step(model, [False, True], normalise="micro_steps")
    pairs: Any = zip(model.parameters(), fresh.parameters(), strict=True)
    same = all(torch.equal(mine.grad.to_local(), new.grad.to_local()) for mine, new in pairs)
    return same, sum(issubclass(warning.category, MicsWarning) for warning in said)


def _of_partitions(lasts_before: list[bool | None], leave: str) -> list[tuple[bool, int]]:
    return [_gradients_after(lasts_before, leave, partition) for partition in (2, 4)]


@pytest.mark.parametrize("lasts", [[], [False], [None, None]])
def test_an_exception_inside_ends_the_step_and_its_gradients_are_dropped(lasts: list[Any]) -> None:
    for of_two_replicas, of_one in run_ranks(_of_partitions, 4, lasts, "exception"):
        assert of_two_replicas == of_one == (True, 1)


@pytest.mark.parametrize("lasts", [[False], [None, None]])
def test_gradients_that_were_zeroed_end_the_step_too(lasts: list[Any]) -> None:
    for of_two_replicas, of_one in run_ranks(_of_partitions, 4, lasts, "zero_grad"):
        assert of_two_replicas == of_one == (True, 0)


def _as_told(lasts_of_ranks: list[list[bool | None]], finish: bool) -> None:
    model = sharded()
    _step(model, lasts_of_ranks[dist.get_rank()])
    if finish:
        mics.finish_step(model)


def test_ranks_that_disagree_on_the_last_are_all_told() -> None:
    lasts: list[list[bool]] = [[False, True], [False, True], [False, False, True], [False, True]]
    for text in errors_of_ranks(_as_told, 4, lasts, False):
        assert "Ranks were given different numbers of micro-batches for one step" in text
        assert "After 2 micro-step(s) some ranks have more and others have not" in text


def test_ranks_that_disagree_on_when_to_finish_are_all_told() -> None:
    lasts = [[None, None], [None, None, None], [None, None], [None, None]]
    for text in errors_of_ranks(_as_told, 4, lasts, True):
        assert "Ranks were given different numbers of micro-batches for one step" in text
        assert "After 2 micro-step(s) some ranks have more and others have not" in text


@pytest.mark.parametrize("other", [[None, True], [False, True]])
def test_ranks_that_say_it_in_different_ways_are_all_told(other: list[bool | None]) -> None:
    """One would run hop 2 in the order of backward, the other in the order of the units."""

    def mixed() -> None:
        model = sharded(1)
        afterwards = dist.get_rank() == 1
        _step(model, [None, None] if afterwards else other)
        if afterwards:
            mics.finish_step(model)

    for text in errors_of_ranks(mixed, 2):
        assert "Some ranks say beforehand which micro-step is the last, and others do not" in text
        assert "the same last= on every rank" in text


def test_ranks_that_disagree_are_told_on_a_model_over_two_meshes() -> None:
    def uneven() -> None:
        parts = [UnevenMLP(), UnevenMLP()]
        for part, partition in zip(parts, (2, 1), strict=True):
            mesh = mics.init_mesh(partition=partition, gpus_per_node=2)
            quiet(lambda part=part, mesh=mesh: mics.fully_shard(part, mesh=mesh))
        both = nn.ModuleList(parts)
        for i in mics.micro_steps(both, range(2 if dist.get_rank() < 2 else 1)):
            sum(loss_of(part, part.example(i)) for part in parts).backward()  # type: ignore[union-attr]

    for text in errors_of_ranks(uneven, 4):
        assert "Ranks were given different numbers of micro-batches for one step" in text


def test_tokens_on_some_ranks_only_are_an_error_on_all() -> None:
    def some() -> None:
        _step(sharded(), [True], tokens=4 if dist.get_rank() else None)

    for text in errors_of_ranks(some, 2):
        assert "Ranks normalise the gradients of one step in different ways" in text


def test_another_module_around_the_same_parameters_is_refused_in_mid_step() -> None:
    def refused() -> str:
        model = sharded()
        with mics.micro_step(nn.ModuleList([model]), last=False):
            loss_of(model, model.example(0)).backward()
        with (
            pytest.raises(MicroStepError) as error,
            mics.micro_step(nn.ModuleList([model]), last=True),
        ):
            pass
        return str(error.value)

    for text in run_ranks(refused, 2):
        assert "A step of these parameters is open on another module" in text


def test_a_state_dict_is_allowed_when_the_steps_gradients_were_dropped() -> None:
    def saved() -> bool:
        model = sharded()
        _step(model, [False])
        model.zero_grad()
        return bool(model.state_dict())

    assert all(run_ranks(saved, 2))


def test_a_loop_that_is_kept_but_was_left_does_not_stand_in_the_way() -> None:
    def gradient() -> float:
        model = sharded()
        kept = iter(mics.micro_steps(model, range(3)))
        next(kept)
        loss_of(model, model.example(0)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MicsWarning)
            _step(model, [True])
        return model.out.bias.grad.full_tensor().sum().item()  # type: ignore[union-attr]

    def alone() -> float:
        model = sharded()
        _step(model, [True])
        return model.out.bias.grad.full_tensor().sum().item()  # type: ignore[union-attr]

    assert run_ranks(gradient, 2) == run_ranks(alone, 2)


def test_an_optimizer_is_refused_after_an_exception_in_the_last_one() -> None:
    def refused() -> str:
        model = sharded()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        _step(model, [False])
        with pytest.raises(ZeroDivisionError), mics.micro_step(model, last=True):
            raise ZeroDivisionError
        with pytest.raises(MicroStepError) as error:
            optimizer.step()
        return str(error.value)

    for text in run_ranks(refused, 2):
        assert "optimizer.step() was called before the last" in text


def test_a_step_that_is_left_leaves_the_question_of_another_model_open() -> None:
    def told() -> str:
        one, other = sharded(), sharded()
        with (
            pytest.raises(MicroStepError) as error,
            mics.micro_step(one, last=dist.get_rank() == 0),
            pytest.raises(ZeroDivisionError),
            mics.micro_step(other, last=True),
        ):
            raise ZeroDivisionError
        return str(error.value)

    for text in run_ranks(told, 2):
        assert "Ranks were given different numbers of micro-batches" in text


def _misuses() -> dict[str, str]:
    model = sharded()

    def message(action: Callable[[], None]) -> str:
        with pytest.raises(MicroStepError) as error:
            action()
        return str(error.value)

    def nested() -> None:
        with mics.micro_step(model, last=False), mics.micro_step(model, last=True):
            pass

    def finish_after(*lasts: bool | None) -> None:
        model.zero_grad()
        _step(model, list(lasts))
        mics.finish_step(model)

    def other_normalisation() -> None:
        model.zero_grad()
        _step(model, [False], tokens=3)
        _step(model, [True], normalise="micro_steps")

    said = {
        "nested": message(nested),
        "finish with none open": message(lambda: mics.finish_step(sharded())),
        "finish after last=True": message(lambda: finish_after(False, True)),
        "finish after last=False": message(lambda: finish_after(None, False)),
        "both": message(lambda: _step(sharded(), [True], normalise="micro_steps", tokens=1)),
        "unknown": message(lambda: _step(sharded(), [True], normalise="mean")),
    }
    warnings.simplefilter("ignore", MicsWarning)
    said["other normalisation"] = message(other_normalisation)
    return said


def test_misuses_are_refused_in_words() -> None:
    said = run_ranks(_misuses, 2)[0]
    assert "A micro-step began inside another one" in said["nested"]
    assert "finish_step was called where no step is open" in said["finish with none open"]
    assert "finish_step was called where no step is open" in said["finish after last=True"]
    assert "where another micro-step has to end first" in said["finish after last=False"]
    assert "the latest said last=False" in said["finish after last=False"]
    assert "by micro-steps or by tokens, not by both" in said["both"]
    assert "normalise = 'mean' is not a choice" in said["unknown"]
    assert "normalised in different ways" in said["other normalisation"]
    assert "The first one: tokens, micro-step 2: micro_steps" in said["other normalisation"]
