"""One step of several models, of which ranks use different ones: their hop 2 keeps one order."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import errors_of_ranks, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics

WORLD, WIDTH = 4, 8
FULL = MixedPrecisionPolicy()

Used = str
"""The models that a rank uses in a micro-step; "A" is ``a`` without its blocks."""


class Tower(nn.Module):
    """Two blocks and a head of one size; without its blocks it is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, *, short: bool) -> torch.Tensor:
        for block in () if short else self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def _towers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: Tower() for name in "ab"})


def _losses(towers: Any, micro_step: int, rank: int, used: Used) -> list[torch.Tensor]:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7 * micro_step + rank))
    return [towers[name.lower()](x, short=name.isupper()).square().mean() for name in used]


def _alone(used: list[list[Used]]) -> dict[str, torch.Tensor]:
    towers = _towers()
    for micro_step, of_ranks in enumerate(used):
        for rank, names in enumerate(of_ranks):
            if names:
                (sum(_losses(towers, micro_step, rank, names)) / WORLD).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}


def _sharded(partition: int, **keywords: Any) -> nn.ModuleDict:
    towers = _towers()
    mesh = mics.init_mesh(partition=partition, gpus_per_node=2)
    for tower in towers.values():
        for block in tower.blocks:  # type: ignore[union-attr]
            quiet(
                lambda block=block: mics.fully_shard(block, mesh=mesh, mp_policy=FULL, **keywords)
            )
        quiet(lambda tower=tower: mics.fully_shard(tower, mesh=mesh, mp_policy=FULL, **keywords))
    return towers


def _whole(towers: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in towers.named_parameters()}
    return {name: g.full_tensor() for name, g in grads.items() if g is not None}  # type: ignore[attr-defined]


Loop = Literal["together", "apart", "apart, turned", "not known"]


def _step(towers: nn.ModuleDict, used: list[list[Used]], loop: Loop) -> None:
    rank = dist.get_rank()

    def backward(micro_step: int, names: Used) -> None:
        losses = _losses(towers, micro_step, rank, names)
        for loss in losses[::-1] if loop == "apart, turned" else losses:
            if loop != "together":
                loss.backward()
        if loop == "together" and losses:
            sum(losses).backward()  # type: ignore[union-attr]

    if loop == "not known":
        for micro_step, of_ranks in enumerate(used):
            with mics.micro_step(towers, last=None):
                backward(micro_step, of_ranks[rank])
        mics.finish_step(towers)
        return
    for micro_step in mics.micro_steps(towers, range(len(used))):
        backward(micro_step, used[micro_step][rank])


def _gradients(partition: int, used: list[list[Used]], loop: Loop, collectives: Any) -> Any:
    towers = _sharded(partition, collectives=collectives)
    found = []
    for _ in range(2):  # in the second step all have run, and FSDP2 knows the roots
        _step(towers, used, loop)
        found.append(_whole(towers))
        towers.zero_grad()
    return found


ALL = ["ab"] * 4
LEFT_OUT: dict[str, list[list[Used]]] = {
    "nothing": [ALL, ALL],
    "the second on one rank": [ALL, ["ab", "a", "ab", "ab"]],
    "the first on one rank": [ALL, ["ab", "ab", "b", "ab"]],
    "each on some": [["a", "b", "ab", "ab"], ["b", "a", "ab", "b"]],
    "the second on all but one, in the only micro-step": [["a", "a", "ab", "a"]],
    "blocks of the second on one rank": [ALL, ["ab", "aB", "ab", "ab"]],
    "everything on one rank": [ALL, ["ab", "", "ab", "ab"]],
}
LOOPS: tuple[Loop, ...] = ("together", "apart", "apart, turned", "not known")


def _same_as_alone(partition: int, used: list[list[Used]], loop: Loop, collectives: str) -> None:
    alone = _alone(used)
    found = run_ranks(_gradients, WORLD, partition, used, loop, collectives)
    for rank, steps in enumerate(found):
        for step, gradients in enumerate(steps):
            assert gradients.keys() == alone.keys(), (rank, step)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, alone[name], msg=f"{rank} {step} {name}")


@pytest.mark.parametrize("collectives", ["flat", "hierarchical"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_models_that_ranks_leave_out_get_the_gradients_of_one_process(
    left_out: str, loop: Loop, collectives: str
) -> None:
    _same_as_alone(1, LEFT_OUT[left_out], loop, collectives)


LEFT_OUT_BY_REPLICAS: dict[str, list[list[Used]]] = {
    "the second by one replica": [ALL, ["a", "a", "ab", "ab"]],
    "the first by one replica": [ALL, ["b", "b", "ab", "ab"]],
    "blocks of the second on one rank": [ALL, ["ab", "aB", "ab", "ab"]],
    "blocks of each on some": [["Ab", "ab", "ab", "aB"], ["ab", "aB", "Ab", "ab"]],
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("left_out", LEFT_OUT_BY_REPLICAS)
def test_so_do_they_where_partitions_are_larger(left_out: str, loop: Loop) -> None:
    used = LEFT_OUT_BY_REPLICAS[left_out]
    if loop != "together" or "blocks" not in left_out:
        _same_as_alone(2, used, loop, "flat")
        return
    # In one pass the blocks of one model are reduced between those of the other.
    for text in errors_of_ranks(_gradients, WORLD, 2, used, loop, "flat"):
        assert "RankError" in text or "MicroStepError" in text


def _stepped_inside() -> dict[str, torch.Tensor]:
    towers = _sharded(1)
    optimizer = torch.optim.SGD(towers["a"].parameters(), lr=1.0)
    for i in mics.micro_steps(towers, range(2)):
        for loss in _losses(towers, i, dist.get_rank(), "ab"):
            loss.backward()
            if i == 1:
                optimizer.step()  # its hop 2 waits for that of the model behind it
                return {name: p.full_tensor() for name, p in towers["a"].named_parameters()}
    raise AssertionError


def test_an_optimizer_inside_the_last_micro_step_sees_hop_2_of_all_models() -> None:
    alone = _towers()
    for i in range(2):
        for rank in range(WORLD):
            (_losses(alone, i, rank, "a")[0] / WORLD).backward()
    torch.optim.SGD(alone["a"].parameters(), lr=1.0).step()
    for stepped in run_ranks(_stepped_inside, WORLD):
        for name, param in alone["a"].named_parameters():
            torch.testing.assert_close(stepped[name], param.detach(), msg=name)


def _each_in_a_step_of_its_own(used: list[Used], apart: bool) -> dict[str, torch.Tensor]:
    towers = _sharded(1)
    mine = used[dist.get_rank()]
    with mics.micro_step(towers["a"], last=True), mics.micro_step(towers["b"], last=True):
        losses = _losses(towers, 0, dist.get_rank(), mine)
        for loss in losses if apart else [sum(losses)]:
            loss.backward()  # type: ignore[union-attr]
    return _whole(towers)


TOGETHER: dict[str, list[Used]] = {
    "nothing": ALL,
    "the outer on one rank": ["ab", "b", "ab", "ab"],
    "the inner on some": ["ab", "a", "ab", "a"],
    "each on some": ["b", "a", "ab", "b"],
    "blocks of the outer": ["ab", "Ab", "ab", "ab"],
}


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("left_out", TOGETHER)
def test_so_do_models_whose_steps_are_open_together(left_out: str, apart: bool) -> None:
    used = TOGETHER[left_out]
    alone = _alone([used])
    for rank, gradients in enumerate(run_ranks(_each_in_a_step_of_its_own, WORLD, used, apart)):
        assert gradients.keys() == alone.keys(), rank
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, alone[name], msg=f"{rank} {name}")


def _stepped_in_both(used: list[Used]) -> dict[str, torch.Tensor]:
    towers = _sharded(1)
    optimizers = [torch.optim.SGD(tower.parameters(), lr=1.0) for tower in towers.values()]
    rank = dist.get_rank()
    with mics.micro_step(towers["a"], last=True), mics.micro_step(towers["b"], last=True):
        sum(_losses(towers, 0, rank, used[rank])).backward()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.full_tensor() for name, p in towers.named_parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("left_out", TOGETHER)
def test_optimizers_may_step_inside_of_both(left_out: str) -> None:
    used = TOGETHER[left_out]
    alone = _towers()
    for rank, names in enumerate(used):
        (sum(_losses(alone, 0, rank, names)) / WORLD).backward()  # type: ignore[union-attr]
    torch.optim.SGD(alone.parameters(), lr=1.0).step()
    for stepped in run_ranks(_stepped_in_both, WORLD, used):
        for name, param in alone.named_parameters():
            torch.testing.assert_close(stepped[name], param.detach(), msg=name)


def _one_after_the_other(used: list[Used]) -> dict[str, torch.Tensor]:
    towers = _sharded(1)
    rank = dist.get_rank()
    with mics.micro_step(towers["a"], last=True):
        for loss in _losses({"a": towers["a"]}, 0, rank, used[rank].replace("b", "")):
            loss.backward()
        with mics.micro_step(towers["b"], last=True):
            for loss in _losses({"b": towers["b"]}, 0, rank, used[rank].replace("a", "")):
                loss.backward()
    return _whole(towers)


def test_a_step_that_begins_when_only_some_have_started_the_other_is_refused() -> None:
    for text in errors_of_ranks(_one_after_the_other, WORLD, ["ab", "b", "ab", "ab"]):
        assert "Ranks ran hop 2 of other units" in text or "RankError" in text
    alone = _alone([ALL])
    for gradients in run_ranks(_one_after_the_other, WORLD, ALL):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, alone[name], msg=name)


def _without_steps(used: list[list[Used]]) -> dict[str, torch.Tensor]:
    towers = _sharded(1)
    for of_ranks in used:
        for loss in _losses(towers, 0, dist.get_rank(), of_ranks[dist.get_rank()]):
            loss.backward()
    return _whole(towers)


def test_passes_without_steps_that_leave_out_a_model_are_refused() -> None:
    used = [["ab", "b", "ab", "ab"], ALL]
    for text in errors_of_ranks(_without_steps, WORLD, used):
        assert "Ranks ran hop 2 of other units" in text
