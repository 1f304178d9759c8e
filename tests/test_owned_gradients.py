"""Gradients of ``mics.owned``: where they are not, what reads them is refused or right.

What would train wrongly without a word beside it: rules, options and writes of ranks alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import errors_of_ranks, run_ranks
from test_owned import sharded, train, weights
from test_owned_guards import backward, in_both_modes, made
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import mics

# -- refused, on every rank ------------------------------------------------------------------------


class Layerwise(torch.optim.SGD):
    """LARS and the like: a step of its own, by the norms of parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"] * float(param.norm()))


def layerwise_rule() -> None:
    model = sharded(2)
    train(model, Layerwise(mics.owned(model), lr=0.1), steps=range(1))


def reads(read: Callable[[nn.Module, list[nn.Parameter]], Any]) -> Callable[[], None]:
    def run() -> None:
        model = sharded(2)
        params = mics.owned(model)
        backward(model)
        read(model, params)
        torch.optim.SGD(params, lr=0.1).step()

    return run


def sets_a_gradient() -> None:
    model, optimizer = made()
    backward(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()


def zeros_before_the_end() -> None:
    model, optimizer = made()
    with mics.micro_step(model, last=False):
        backward(model)
    optimizer.zero_grad(set_to_none=False)


def written(waits: bool) -> Callable[[], None]:
    def run() -> None:
        model = sharded(2)
        params = mics.owned(model)
        optimizer = torch.optim.SGD(params, lr=0.1)
        for step in range(2):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            if waits:
                model.state_dict()
            with torch.no_grad():
                for param in params:
                    param.clamp_(-0.1, 0.1)

    return run


def other_options() -> None:
    model = sharded(2)
    optimizer = torch.optim.SGD(mics.owned(model), lr=0.1 * (1 + (dist.get_rank() == 2)))
    train(model, optimizer, steps=range(2))


def dropped_on_one_rank() -> None:
    model, optimizer = made()
    for step in range(2):
        backward(model, step)
        if dist.get_rank() == 2:
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()


DEALT = "mics.owned has dealt its optimizer, and gradients are with what each rank owns."
A_PART = "A norm was asked for of gradients of which this rank owns a part"
REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "torch clips the model": (reads(lambda m, _: clip_grad_norm_(m.parameters(), 0.1)), DEALT),
    "values of the model": (reads(lambda m, _: clip_grad_value_(m.parameters(), 0.1)), DEALT),
    "data of the model": (reads(lambda m, _: next(m.parameters()).grad.data), "By data."),
    "torch clips what is owned": (reads(lambda _, ps: clip_grad_norm_(ps, 0.1)), A_PART),
    "norms of what is owned": (reads(lambda _, ps: [p.grad.norm() for p in ps]), A_PART),
    "sets a gradient": (sets_a_gradient, "A gradient was set on a parameter of the model"),
    "zeros before the end": (zeros_before_the_end, "without set_to_none=False, to drop"),
    "a rule by layers": (layerwise_rule, "elementwise=[Layerwise]"),
    "written in flight": (written(False), "was written outside of an optimizer's step"),
    "written later": (written(True), "was written outside of an optimizer's step"),
    "dropped on one rank": (dropped_on_one_rank, "rank(s) 2: steps what it owns of"),
    "other options": (other_options, "with other options"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_it_is_refused_in_words_on_every_rank(wrong: str) -> None:
    run, words = REFUSED[wrong]
    for error in errors_of_ranks(run, 4, ranks_per_node=2):
        assert words in " ".join(error.split())


# -- allowed, and right ----------------------------------------------------------------------------


def dropped_by_the_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """``model.zero_grad`` behind a step, in place of one, and of some parameters only."""
    for step in range(4):
        backward(model, step)
        if step == 1:
            model.zero_grad()
        if step == 2:
            next(model.parameters()).grad = None
        optimizer.step()
        model.zero_grad()


def edited_element_by_element(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    params = optimizer.param_groups[0]["params"]
    for step in range(2):
        backward(model, step)
        torch.nn.utils.clip_grad_value_(params, 0.01)
        for param in params:
            param.grad.mul_(0.5).add_(param.grad.sign(), alpha=0.01)
        optimizer.step()
        optimizer.zero_grad()


def normed_by_mics(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Of the gradients of the model and of those of what is owned it is the same."""
    for step in range(2):
        backward(model, step)
        given = model.parameters(), optimizer.param_groups[0]["params"]
        of_model, owned = (
            mics.get_total_norm([p.grad for p in params if p.grad is not None]) for params in given
        )
        assert of_model == owned > 0
        assert mics.clip_grad_norm_(model.parameters(), 0.01) == owned
        optimizer.param_groups[0]["lr"] = 0.1 * float(owned)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "scenario", [dropped_by_the_model, edited_element_by_element, normed_by_mics]
)
def test_it_ends_as_in_the_plain_mode(
    scenario: Callable[[nn.Module, torch.optim.Optimizer], None],
) -> None:
    assert max(run_ranks(in_both_modes, 4, scenario, ranks_per_node=2)) < 1e-6


def trained_later(dealt: bool) -> list[torch.Tensor]:
    """A unit that was frozen when the others were dealt."""
    model = sharded(2)
    first = list(model[0].parameters())
    model[0].requires_grad_(False)
    rest = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(mics.owned(model) if dealt else rest, lr=0.1)
    train(model, optimizer, steps=range(1))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": mics.owned(model, first) if dealt else first})
    train(model, optimizer, steps=range(1, 3))
    return weights(model)


def test_a_unit_that_is_trained_later_leaves_what_was_dealt_with_its_optimizer() -> None:
    plain, dealt = (run_ranks(trained_later, 4, mode, ranks_per_node=2) for mode in (False, True))
    for one, other in zip(plain, dealt, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
