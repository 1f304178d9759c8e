"""Optimizers that step inside the last micro-step, and ranks whose optimizers differ."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.errors import MicsWarning

WORLD, WIDTH = 4, 6
FULL = MixedPrecisionPolicy()


class Pair(nn.Module):
    """Two layers of equal size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.a(x)) + torch.tanh(self.b(x))


class Net(nn.Module):
    """Blocks, and a head that nobody uses unless told."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(2))

    def forward(self, x: torch.Tensor, head: int = 0) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.heads[head](x)  # type: ignore[no-any-return]


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def _sharded(partition: int) -> Net:
    return mics.shard(_net(), partition=partition, mp_policy=FULL, blocks=Pair)


def _adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.5)


def _data(step: int, rank: int) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def _leaves_out(step: int, rank: int) -> bool:
    return step == 1 and rank == 1


def _inside(model: Net, optimizer: torch.optim.Optimizer, step: int) -> None:
    rank = dist.get_rank()
    for batch in mics.micro_steps(model, [_data(step, rank)]):
        loss = model(batch).square().mean()
        if not _leaves_out(step, rank):
            loss.backward()
        optimizer.step()


def _in_a_closure(model: Net, optimizer: torch.optim.Optimizer, step: int) -> None:
    rank = dist.get_rank()
    with mics.micro_step(model, last=True):

        def closure() -> torch.Tensor:
            loss = model(_data(step, rank)).square().mean()
            if not _leaves_out(step, rank):
                loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


def _off(partition: int, step_of: Callable[..., None]) -> float:
    model, alone = _sharded(partition), _net()
    optimizer, right = _adamw(model), _adamw(alone)
    for step in range(3):
        step_of(model, optimizer, step)
        optimizer.zero_grad()
        for rank in range(WORLD):
            if not _leaves_out(step, rank):
                (alone(_data(step, rank)).square().mean() / WORLD).backward()
        right.step()
        right.zero_grad()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max(float((a.full_tensor() - b).detach().abs().max()) for a, b in pairs)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("partition", [1, 2])
@pytest.mark.parametrize("step_of", [_inside, _in_a_closure])
def test_a_step_inside_the_last_micro_step_is_one_processs(
    partition: int, step_of: Callable[..., None]
) -> None:
    """Weight decay would change the head that nobody uses, the rank that leaves out a backward."""
    assert max(run_ranks(quiet, WORLD, lambda: _off(partition, step_of))) < 1e-5


def _with_a_bad_loss(how: str) -> str:
    model = _sharded(2)
    optimizer = _adamw(model)
    rank = dist.get_rank()
    try:
        for batch in mics.micro_steps(model, [_data(0, rank)]):
            loss = model(batch, 0).square().mean()
            if how == "of another head":
                other = model(batch, 1).square().mean()
                loss = loss + other * (float("nan") if rank == 2 else 1.0)
            elif rank == 2:
                loss = loss * float("inf")
            loss.backward()
            optimizer.step()
    except mics.MicroStepError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize("how", ["of the loss", "of another head"])
def test_a_step_inside_refuses_a_loss_that_is_not_a_number(how: str) -> None:
    for said in run_ranks(quiet, WORLD, lambda: _with_a_bad_loss(how)):
        assert "not numbers came from the backward of rank 2" in said


def _plain(difference: str, partition: int) -> str:
    model = _sharded(partition)
    params, rank = list(model.parameters()), dist.get_rank()
    first, second = (torch.optim.SGD(some, 0.1) for some in (params[:4], params[4:]))
    try:
        for step in range(3):
            x = _data(step, rank)
            (model(x, 0) + model(x, 1)).square().mean().backward()
            if difference == "one less":
                if (step, rank) != (1, 3):
                    first.step()
            elif difference == "another one":
                first.step()
                (first if (step, rank) == (1, 3) else second).step()
            elif step == 1:
                frozen = model.blocks[0].a if rank == 3 else model.blocks[0].b
                frozen.requires_grad_(False)  # type: ignore[operator]
            model.zero_grad()
    except mics.MicroStepError as error:
        return str(error)
    return "nothing was said"


SAID = {
    "one less": "Ranks have taken different numbers of optimizer steps",
    "another one": "Ranks have stepped other optimizers, or the same in another order",
    "freezes another": "Ranks train different parameters: requires_grad was changed on some",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "partition"),
    [*itertools.product(["one less", "another one"], [1, 2]), ("freezes another", 1)],
)
def test_a_loop_by_hand_is_told_of_optimizers_that_differ(difference: str, partition: int) -> None:
    said: list[Any] = run_ranks(quiet, WORLD, lambda: _plain(difference, partition))
    for one in said:
        assert SAID[difference] in one
        assert "rank(s) 3:" in one


def _written_in_between(partition: int) -> list[str]:
    model, said = _sharded(partition), []
    optimizers = [torch.optim.AdamW(model.parameters(), fused=fused) for fused in (False, True)]
    optimizers += [torch.optim.SGD(model.heads.parameters(), 0.1)]
    values = model.state_dict()
    for write in (*[one.step for one in optimizers], lambda: model.load_state_dict(values)):
        model(_data(0, 0)).square().mean().backward()
        loss = model(_data(0, 1)).square().mean()
        write()
        try:
            loss.backward()
        except mics.MicroStepError as error:
            said.append(str(error))
        model.zero_grad()
        with pytest.warns(MicsWarning, match="A backward raised before its end"):
            model(_data(0, 0)).square().mean().backward()
        mine = [param.full_tensor().clone() for param in _gradients(model)]  # type: ignore[attr-defined]
        model.zero_grad()
        model(_data(0, 0)).square().mean().backward()
        right = [param.full_tensor() for param in _gradients(model)]  # type: ignore[attr-defined]
        assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))
        model.zero_grad()
    return said


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [param.grad for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("partition", [1, 2])
def test_weights_written_between_a_forward_and_its_backward_are_refused(partition: int) -> None:
    for said in run_ranks(quiet, WORLD, lambda: _written_in_between(partition)):
        assert len(said) == 4
        for one in said:
            assert "were written between a forward and its backward" in one
            assert "write(s) of its" in one
            assert "or a new forward" in one


def _saved_after_a_step_less(folder: str) -> str:
    model = _sharded(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        model(_data(step, dist.get_rank())).square().mean().backward()
        if (step, dist.get_rank()) != (1, 1):
            optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(mics.CheckpointError) as raised:
        mics.save(f"{folder}/checkpoint", model=model, optimizer=optimizer)
    return str(raised.value)


def test_a_rank_that_has_left_out_its_last_step_is_told_when_saving(tmp_path: Path) -> None:
    for said in run_ranks(quiet, WORLD, lambda: _saved_after_a_step_less(str(tmp_path))):
        assert "optimizer steps taken" in said
        assert "1 optimizer step(s)" in said
        assert "2 optimizer step(s)" in said
    assert not list(tmp_path.iterdir())
