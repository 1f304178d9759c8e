"""What ``mics.owned`` refuses, and that every guard of the two-hop schedule holds with it."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from test_owned import Chooses, batch, sharded, train, weights
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import mics
from mics import compat
from mics.errors import MicroStepError

WIDTH = 13


def made(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sharded(2)
    return model, torch.optim.SGD(mics.owned(model), **({"lr": 0.1} | options))


def backward(model: nn.Module, step: int = 0, scale: float = 1.0) -> None:
    (scale * model(batch(step, 0)).pow(2).mean()).backward()


# -- refused, on every rank ------------------------------------------------------------------------


def inside_a_step() -> None:
    model, optimizer = made()
    for number, one in enumerate(mics.micro_steps(model, [batch(0, 0), batch(0, 1)])):
        model(one).pow(2).mean().backward()
        if number == 0:
            optimizer.step()


def parameters_of_the_model() -> None:
    model, _ = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, steps=range(1))


def made_before() -> None:
    model = sharded(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mics.owned(model)
    train(model, optimizer, steps=range(1))


def never_dropped() -> None:
    model, optimizer = made()
    for step in range(2):
        backward(model, step)
        optimizer.step()


def added_up_by_hand() -> None:
    model, _ = made()
    backward(model)
    backward(model, 1)


def not_a_number() -> None:
    model, optimizer = made()
    with mics.micro_step(model, last=True):
        backward(model, scale=math.nan if dist.get_rank() == 1 else 1.0)
    optimizer.step()


def whole_matrices() -> None:
    model = sharded(2)
    train(model, torch.optim.Adafactor(mics.owned(model)), steps=range(1))


class Other(torch.optim.SGD.__mro__[1]):  # type: ignore[misc]
    """A rule of the user's own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"])


def unknown_rule() -> None:
    model = sharded(2)
    train(model, Other(mics.owned(model)), steps=range(1))


def lent_a_scaler() -> None:
    model = sharded(2)
    optimizer = torch.optim.SGD(mics.owned(model), lr=0.1)
    backward(model)
    optimizer.found_inf = torch.zeros(())  # as a GradScaler does for a fused one
    optimizer.step()


def frozen_later() -> None:
    model, optimizer = made()
    model[0].requires_grad_(False)
    train(model, optimizer, steps=range(1))


def moved() -> None:
    model, optimizer = made()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    train(model, optimizer, steps=range(1))


def written_before_the_shards_came() -> None:
    model, optimizer = made()
    backward(model)
    optimizer.step()
    with torch.no_grad():
        next(model.parameters()).zero_()
    model.state_dict()


def gathered_by_hand() -> None:
    model, optimizer = made()
    backward(model)
    optimizer.step()
    model[0].unshard()  # type: ignore[operator]


def with_gradients() -> None:
    model = sharded(2)
    backward(model)
    mics.owned(model)


def of_another_model() -> None:
    mics.owned(sharded(2), sharded(2).parameters())


def on_the_host() -> None:
    model = sharded(2)
    for param in list(model.parameters())[:1]:
        param.data = param.data.double()
    mics.owned(model)


def on_one_rank_another() -> None:
    model = sharded(2)
    if dist.get_rank() == 3:
        model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
    mics.owned(model)


REFUSED: dict[Callable[[], None], str] = {
    inside_a_step: "optimizer.step() was called before the last micro-step",
    parameters_of_the_model: "SGD(mics.owned(model), ...)",
    made_before: "SGD(mics.owned(model), ...)",
    never_dropped: "Owned gradients of the last step are still there",
    added_up_by_hand: "mics.micro_steps to add up several backward passes",
    not_a_number: "came from the backward of rank 1",
    whole_matrices: "mics does not know whether Adafactor",
    unknown_rule: "elementwise=[Other]",
    lent_a_scaler: "A loss scaler asks each rank by itself",
    frozen_later: "requires_grad of parameters was changed",
    moved: "are elsewhere than when mics.owned dealt them",
    written_before_the_shards_came: "written between optimizer.step() and the arrival",
    gathered_by_hand: "gathered before what other replicas have stepped",
    with_gradients: "mics.owned was called in a step",
    of_another_model: "parameters that the model does not have",
    on_the_host: "its parameters are torch.float32 and torch.float64",
    on_one_rank_another: "Ranks disagree on what mics.owned is given",
}


@pytest.mark.parametrize("wrong", REFUSED, ids=lambda one: one.__name__)
def test_it_is_refused_in_words_on_every_rank(wrong: Callable[[], None]) -> None:
    for error in errors_of_ranks(wrong, 4, ranks_per_node=2):
        assert REFUSED[wrong] in " ".join(error.split())


def left_out_a_step(in_micro_steps: bool) -> None:
    model, optimizer = made()
    for step in range(3):
        with mics.micro_step(model, last=True) if in_micro_steps else contextlib.nullcontext():
            backward(model, step)
        if dist.get_rank() != 2 or step != 0:
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("in_micro_steps", [True, False])
def test_a_rank_that_leaves_out_its_step_is_named(in_micro_steps: bool) -> None:
    for error in errors_of_ranks(left_out_a_step, 4, in_micro_steps, ranks_per_node=2):
        assert "rank(s) 2: 0 optimizer step(s)" in " ".join(error.split())


# -- allowed, and right ----------------------------------------------------------------------------


def in_both_modes(scenario: Callable[[nn.Module, torch.optim.Optimizer], None]) -> float:
    ended = []
    for dealt in (False, True):
        model = sharded(2)
        params = mics.owned(model) if dealt else model.parameters()
        scenario(model, torch.optim.SGD(params, lr=0.1, momentum=0.9))
        ended.append(weights(model))
    pairs = zip(*ended, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def dropped_before_its_end(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step that is left by ``zero_grad`` leaves nothing in the next one."""
    train(model, optimizer, steps=range(1))
    with mics.micro_step(model, last=False):
        backward(model, 7)
    optimizer.zero_grad()
    with mics.micro_step(model, last=True):
        backward(model, 8)
    optimizer.step()
    optimizer.zero_grad()


def dropped_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Without a step of mics: what was accumulated, and dropped, is no part of the next one."""
    for last in (False, True):
        for module in model.modules():
            if hasattr(module, "set_requires_all_reduce"):
                module.set_requires_all_reduce(last, recurse=False)
        backward(model, 3 + last)
        if not last:
            optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()


def left_by_break(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with contextlib.suppress(MicroStepError):
        for one in mics.micro_steps(model, [batch(5, 0), batch(5, 1)]):
            model(one).pow(2).mean().backward()
            break
        optimizer.step()
        raise AssertionError("the step was not refused")
    optimizer.zero_grad()
    train(model, optimizer, steps=range(2))


def not_known_to_be_the_last(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(2):
        for _ in range(2):
            with mics.micro_step(model, last=None, normalise="micro_steps"):
                backward(model, step)
        mics.finish_step(model)
        optimizer.step()
        optimizer.zero_grad()


def twice_in_the_last(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Two backward passes of one micro-step, each with a hop 2."""
    for step in range(2):
        with mics.micro_step(model, last=True):
            backward(model, step)
            backward(model, step + 10)
        optimizer.step()
        optimizer.zero_grad()


def without_steps_of_mics(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(3):
        backward(model, step)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(batch(step, 1))
        optimizer.zero_grad()


def a_closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(batch(0, 0)).pow(2).mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)  # type: ignore[arg-type]


def per_token(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(2):
        batches = [batch(step, i) for i in range(2)]
        for one in mics.micro_steps(model, batches, normalise=lambda b: b.shape[0]):
            model(one).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def dealt_micro_batches(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(2):
        for micro in mics.deal(model, 8):
            micro.backward(model(batch(step, micro.index)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()


def skipped_for_a_number(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    verdicts = mics.Verdicts()
    for step in range(3):
        loss = model(batch(step, 0)).pow(2).mean() * (math.inf if step == 1 else 1.0)
        loss.backward()
        norm = mics.clip_grad_norm_(model.parameters(), 0.1)
        if verdicts.agree(loss, norm).take:
            optimizer.step()
        optimizer.zero_grad()


def skipped_by_a_scaler(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Ranks own other gradients; one that is infinite is a reason for all."""
    warnings.simplefilter("ignore", UserWarning)  # torch makes replicated tensors of the scale
    scaler = ShardedGradScaler("cpu", init_scale=256.0)
    for step in range(3):
        with mics.micro_step(model, last=True):
            scaler.scale(model(batch(step, 0)).pow(2).mean()).backward()
        if step == 1 and dist.get_rank() == 1:
            params = optimizer.param_groups[0]["params"]
            held = [compat.local_of(param.grad) for param in params]
            next(one for one in held if one.numel()).fill_(math.inf)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 128.0


SCENARIOS = [
    skipped_by_a_scaler,
    dropped_before_its_end,
    dropped_by_hand,
    left_by_break,
    not_known_to_be_the_last,
    twice_in_the_last,
    without_steps_of_mics,
    a_closure,
    per_token,
    dealt_micro_batches,
    skipped_for_a_number,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
@pytest.mark.filterwarnings("ignore::mics.errors.MicsWarning")
def test_it_ends_as_in_the_plain_mode(
    scenario: Callable[[nn.Module, torch.optim.Optimizer], None],
) -> None:
    assert max(run_ranks(in_both_modes, 4, scenario, ranks_per_node=2)) < 1e-6


def vouched_for() -> float:
    ended = []
    for dealt in (False, True):
        model = sharded(2)
        params = mics.owned(model, elementwise=[Other]) if dealt else model.parameters()
        train(model, Other(params))
        ended.append(weights(model))
    pairs = zip(*ended, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_a_rule_that_a_user_vouches_for_is_taken() -> None:
    assert max(run_ranks(vouched_for, 4, ranks_per_node=2)) < 1e-6


def a_part_while_ranks_skip(dealt: bool, all_given: bool) -> list[torch.Tensor]:
    """An optimizer of some parameters; if all were given, units are gathered when first read."""
    model = mics.shard(
        Chooses(),
        mesh=mesh_of_rank(2),
        blocks=nn.Linear,
        mp_policy=MixedPrecisionPolicy(),
        overlap=False,
    )
    every = list(model.parameters())
    some = [p for n, p in model.named_parameters() if "bias" not in n]
    params = mics.owned(model, some) if dealt else some
    left = mics.owned(model, every) if dealt and all_given else every
    optimizer = torch.optim.SGD(params, lr=0.1)
    for step in range(3):
        train(model, optimizer, steps=range(step, step + 1))
        for param in left:
            param.grad = None
    return weights(model)


@pytest.mark.parametrize("all_given", [True, False])
def test_an_optimizer_of_a_part_is_as_the_plain_mode_whatever_ranks_skip(all_given: bool) -> None:
    plain, dealt = (
        run_ranks(a_part_while_ranks_skip, 4, mode, all_given, ranks_per_node=2)
        for mode in (False, True)
    )
    for one, other in zip(plain, dealt, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
