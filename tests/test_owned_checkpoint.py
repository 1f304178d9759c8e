"""Checkpoints of optimizer state that is dealt to replicas: they load at any layout and mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import full
from ranks import errors_of_ranks, run_ranks
from test_owned import sharded, train, weights
from torch import nn

import mics
from mics.checkpoint.dealt_state import whole_state
from mics.checkpoint.names import parameter_names
from mics.checkpoint.optimizers import pack


def made(partition: int, *, dealt: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sharded(partition)
    params = list(model.parameters())
    groups = [[p for p in params if p.ndim == 2], [p for p in params if p.ndim == 1]]
    if dealt:
        groups = [mics.owned(model, group) for group in groups]
    options: list[dict[str, Any]] = [{"weight_decay": 0.2}, {"weight_decay": 0.0}]
    both = [{"params": one, **more} for one, more in zip(groups, options, strict=True)]
    return model, torch.optim.AdamW(both, lr=0.01)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and whole optimizer state by names."""
    found = dict(zip(model.state_dict(), weights(model), strict=True))
    names = parameter_names(model)[1]
    (packed,) = pack([optimizer], names)
    for number, param in packed.by_number().items():
        state = packed.state[number]
        if id(param) in packed.owners:
            state = whole_state(packed.owners[id(param)], state)
        for key, value in state.items():
            found[f"{names[id(param)]} {key}"] = full(value).clone()
    return found


def saved(path: Path, partition: int, dealt: bool) -> dict[str, torch.Tensor]:
    model, optimizer = made(partition, dealt=dealt)
    train(model, optimizer, steps=range(2))
    mics.save(path, model=model, optimizer=optimizer)
    return state_of(model, optimizer)


def loaded(path: Path, partition: int, dealt: bool, again: Path) -> dict[str, torch.Tensor]:
    model, optimizer = made(partition, dealt=dealt)
    train(model, optimizer, steps=range(5, 6))  # there is a state that has to go
    mics.load(path, model=model, optimizer=optimizer)
    state = state_of(model, optimizer)
    mics.save(again, model=model, optimizer=optimizer)
    return state


LAYOUTS = [  # world, p, dealt: of the save, of the load
    ((4, 2, True), (4, 2, False)),
    ((4, 2, False), (4, 1, True)),
    ((4, 1, True), (2, 1, True)),
    ((2, 1, True), (4, 2, True)),
]


@pytest.mark.parametrize(("first", "second"), LAYOUTS)
def test_a_checkpoint_loads_at_any_layout_dealt_or_not(
    first: tuple[int, int, bool], second: tuple[int, int, bool], tmp_path: Path
) -> None:
    """Bit for bit, and what is saved again is the same files' content."""
    one, two = tmp_path / "one", tmp_path / "two"
    wanted = run_ranks(saved, first[0], one, *first[1:], ranks_per_node=2)[0]
    assert any(name.endswith("exp_avg_sq") for name in wanted)
    for found in run_ranks(loaded, second[0], one, *second[1:], two, ranks_per_node=2):
        assert found.keys() == wanted.keys()
        assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def resumed(path: Path, whole: bool) -> list[torch.Tensor]:
    """Weights after four steps, in one go or with a load in the middle."""
    model, optimizer = made(2, dealt=True)
    if whole:
        train(model, optimizer, steps=range(4))
        return weights(model)
    train(model, optimizer, steps=range(2))
    mics.save(path, model=model, optimizer=optimizer)
    model, optimizer = made(2, dealt=True)
    mics.load(path, model=model, optimizer=optimizer)
    train(model, optimizer, steps=range(2, 4))
    return weights(model)


def test_a_run_that_is_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = run_ranks(resumed, 4, tmp_path, True, ranks_per_node=2)[0]
    again = run_ranks(resumed, 4, tmp_path / "half", False, ranks_per_node=2)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def saved_and_not_yet_stepped(path: Path) -> list[int]:
    model, optimizer = made(2, dealt=True)
    mics.save(path, model=model, optimizer=optimizer)
    train(model, optimizer, steps=range(1))
    mics.load(path, model=model, optimizer=optimizer)
    return [len(state) for state in optimizer.state.values() if state]


def test_state_that_was_not_there_is_not_there_afterwards(tmp_path: Path) -> None:
    assert run_ranks(saved_and_not_yet_stepped, 4, tmp_path / "a", ranks_per_node=2) == [[]] * 4


def keeps(_: Any = None) -> None:
    model, optimizer = made(2, dealt=True)
    mics.Snapshots(model, optimizer, job="dealt")


def test_snapshots_of_state_that_exists_once_are_refused() -> None:
    for error in errors_of_ranks(keeps, 4, ranks_per_node=2):
        assert "exists once" in error
        assert "RecoveryError" in error


def both_states() -> list[float]:
    """How far each weight and state of one mode is from the other's."""
    states = []
    for dealt in (False, True):
        model, optimizer = made(2, dealt=dealt)
        train(model, optimizer, steps=range(2))
        states.append(state_of(model, optimizer))
    plain, dealt_ = states
    assert plain.keys() == dealt_.keys()
    return [float((plain[name] - dealt_[name]).abs().max()) for name in plain]


def test_what_is_kept_is_the_state_of_the_plain_mode() -> None:
    assert max(map(max, run_ranks(both_states, 4, ranks_per_node=2))) < 1e-6


class Skipping(torch.optim.Optimizer):
    """Goes by element, and has no state of what is empty."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            if param.grad is not None and param.numel():
                sums = self.state[param].setdefault("sum", torch.zeros_like(param))
                param.sub_(sums.add_(param.grad), alpha=self.param_groups[0]["lr"])


def save_what_is_not_everywhere(path: Path) -> None:
    model = sharded(2)
    optimizer = Skipping(mics.owned(model, elementwise=[Skipping]))
    train(model, optimizer, steps=range(1))
    mics.save(path, model=model, optimizer=optimizer)


def test_state_that_some_ranks_have_not_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    run = save_what_is_not_everywhere, 4, tmp_path / "one"
    for text in errors_of_ranks(*run, ranks_per_node=2):
        assert "Ranks disagree on the state of an optimizer of mics.owned" in text
