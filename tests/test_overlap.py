"""Gathering ahead and reducing beside the backward pass change when things happen, nothing else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import seeded
from parity import Run, Stack, train_sharded
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

import mics
from mics import compat
from mics.communication.landing import Reductions
from mics.sharding.units import units_on

WIDTH = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Skipping(nn.Module):
    """Blocks of which some can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.skip: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            if index not in self.skip:
                x = block(x)
        return x


def sharded(model: nn.Module, partition: int = 4, **keywords: object) -> nn.Module:
    layout = {"partition": partition, "gpus_per_node": 2, "mp_policy": MixedPrecisionPolicy()}
    return mics.shard(model, **layout | keywords)


def losses_and_weights(run: Run) -> tuple[list[float], dict[str, torch.Tensor]]:
    outcome = train_sharded(run)
    return outcome.losses, outcome.weights


LAYOUTS: list[dict[str, Any]] = [
    {"collectives": "flat"},
    {"collectives": "hierarchical"},
    {"partition": 2},
    {"partition": 8, "collectives": "hierarchical"},
    {"collectives": "hierarchical", "model": {"frozen": True}},
    {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
]
ODDITIES: list[dict[str, Any]] = [
    {"collectives": "hierarchical", "model": {"tied": True}},
    {"collectives": "hierarchical", "model": {"uses": 3}},
]


@pytest.mark.parametrize(
    "variants",
    [LAYOUTS, pytest.param(ODDITIES, marks=pytest.mark.extra)],
    ids=["layouts", "oddities"],
)
def test_overlap_changes_no_bit(variants: list[dict[str, Any]]) -> None:
    def both(variant: dict[str, Any]) -> bool:
        blocking = Run(**variant, shard={"overlap": False})
        beside = Run(**variant, shard={"overlap": True})
        losses, weights = losses_and_weights(blocking)
        other_losses, other_weights = losses_and_weights(beside)
        same = all(torch.equal(weights[name], other_weights[name]) for name in weights)
        return same and losses == other_losses

    def changed() -> list[dict[str, Any]]:
        return [variant for variant in variants if not both(variant)]

    assert run_ranks(changed, 8) == [[]] * 8


def _waiting_in_first_block(gradients: bool) -> list[bool]:
    model = sharded(seeded(Skipping), collectives="hierarchical")
    x = torch.ones(2, WIDTH)
    model(x).sum().backward()  # the first forward tells FSDP2 who the root is
    (following,) = units_on(model.blocks[1])
    seen: list[bool] = []

    def look(*_: object) -> None:
        if not compat.in_backward():
            seen.append(following.group._all_gather_result is not None)

    model.blocks[0].up.register_forward_pre_hook(look)
    with torch.set_grad_enabled(gradients):
        model(x)
    return seen


@pytest.mark.parametrize("gradients", [True, False])
def test_a_block_is_gathered_while_the_one_before_it_computes(gradients: bool) -> None:
    """Without gradients nothing would drop a gather that is not used: then it is not ahead."""
    assert run_ranks(_waiting_in_first_block, 4, gradients) == [[gradients]] * 4


def _train_with_skips(overlap: bool) -> dict[str, torch.Tensor]:
    model = sharded(seeded(Skipping), overlap=overlap, collectives="hierarchical")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        model.skip = {step % 3}
        for micro in mics.micro_steps(model, range(2)):
            x = torch.full((2, WIDTH), 1.0 + micro + dist.get_rank())
            (model(x) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.full_tensor() for name, param in model.named_parameters()}


def test_a_block_that_was_gathered_ahead_and_skipped_has_the_next_steps_weights() -> None:
    def same() -> bool:
        blocking, beside = _train_with_skips(False), _train_with_skips(True)
        return all(torch.equal(blocking[name], beside[name]) for name in blocking)

    assert all(run_ranks(same, 8))


def _seen_by_a_hook(overlap: bool) -> list[torch.Tensor]:
    model = sharded(seeded(Skipping), overlap=overlap, collectives="hierarchical")
    seen: list[torch.Tensor] = []
    weight = model.blocks[1].up.weight
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.to_local().clone()))
    for _ in range(2):
        (model(torch.ones(2, WIDTH)) ** 2).mean().backward()
    return seen


def test_a_users_gradient_hook_sees_the_whole_gradient() -> None:
    """One replica, so hooks are allowed; a result that lands later would come too late for them."""

    def same() -> bool:
        blocking, beside = _seen_by_a_hook(False), _seen_by_a_hook(True)
        return all(torch.equal(a, b) for a, b in zip(blocking, beside, strict=True))

    assert all(run_ranks(same, 4))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("in the middle of backward")


def _after_a_failed_backward(overlap: bool, set_to_none: bool) -> list[torch.Tensor]:
    model = sharded(seeded(Skipping), overlap=overlap, collectives="hierarchical")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(2, WIDTH)
    for _ in range(2):
        model(x).sum().backward()
    breaking = model.blocks[1].register_forward_hook(lambda module, args, out: Fails.apply(out))
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x).sum().backward()
    breaking.remove()
    compat.reset_iteration(model)
    optimizer.zero_grad(set_to_none=set_to_none)
    model(x).sum().backward()
    return [param.grad.full_tensor() for param in model.parameters()]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_a_failed_backward_left_under_way_lands_nowhere(set_to_none: bool) -> None:
    def same() -> bool:
        blocking = _after_a_failed_backward(False, set_to_none)
        beside = _after_a_failed_backward(True, set_to_none)
        return all(torch.equal(a, b) for a, b in zip(blocking, beside, strict=True))

    assert all(run_ranks(same, 4))


class Reentrant(nn.Module):
    """Every second block recomputes in a backward pass of its own, inside the outer one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) if number % 2 else checkpoint(block, x, use_reentrant=True)
            x = torch.tanh(x)
        return x


def _with_reentrant_checkpoints(overlap: bool, partition: int) -> list[torch.Tensor]:
    # Each inner pass ends with a hop 2 of its own, which the next one takes back, and says so.
    warnings.simplefilter("ignore", mics.MicsWarning)
    model = mics.shard(
        seeded(Reentrant),
        partition=partition,
        gpus_per_node=2,
        blocks=nn.Linear,
        mp_policy=MixedPrecisionPolicy(),
        collectives="hierarchical",
        overlap=overlap,
    )
    for _ in range(3):
        model.zero_grad()
        for _ in mics.micro_steps(model, range(2)):
            x = torch.full((2, WIDTH), 1.0 + dist.get_rank(), requires_grad=True)
            model(x).sum().backward()
    return [param.grad.full_tensor() for param in model.parameters()]


@pytest.mark.parametrize("partition", [2, 4])
def test_a_backward_inside_another_loses_no_gradient(partition: int) -> None:
    def same() -> bool:
        blocking = _with_reentrant_checkpoints(False, partition)
        beside = _with_reentrant_checkpoints(True, partition)
        return all(torch.allclose(a, b) for a, b in zip(blocking, beside, strict=True))

    assert all(run_ranks(same, 4))


def _reductions_beside(micro_steps: int) -> int:
    """The most reduce-scatters that were still under way when the next unit's began."""
    run = Run(4, 2, micro_steps=micro_steps, steps=1, collectives="hierarchical")
    model = sharded(Stack(num_blocks=4), collectives=run.collectives)
    under_way: list[int] = []
    (unit, *_) = units_on(model)
    queue = unit.landing.reductions if unit.landing else None
    assert isinstance(queue, Reductions)
    start = Reductions.start

    def counting(self: Reductions, reduction: object) -> None:
        under_way.append(len(self._under_way))
        start(self, reduction)

    queue.start = counting.__get__(queue)  # of this object only
    for _ in mics.micro_steps(model, range(micro_steps)):
        model(torch.ones(2, 13)).sum().backward()
    return max(under_way)


def test_one_reduction_is_still_under_way_when_the_next_begins_and_no_more() -> None:
    assert run_ranks(_reductions_beside, 8, 2) == [1] * 8


def _backwards_and_hops(gpus_per_node: int) -> list[str]:
    """Backwards of the blocks and beginnings of hop 2, in the last micro-step."""
    model = sharded(seeded(Skipping), partition=2, gpus_per_node=gpus_per_node, collectives="flat")
    happened: list[str] = []
    modules = {"root": model, **{str(number): block for number, block in enumerate(model.blocks)}}
    for name, module in modules.items():
        (unit,) = units_on(module)
        start = unit.hop_two.start
        unit.hop_two.start = lambda n=name, s=start: (happened.append(f"hop {n}"), s())
        if name != "root":
            module.up.register_full_backward_hook(lambda *_, n=name: happened.append(n))
    for _ in mics.micro_steps(model, range(2)):
        happened.clear()
        model(torch.ones(2, WIDTH)).sum().backward()
    return happened


def test_hop_2_of_a_block_starts_beside_the_backward_of_those_before_it() -> None:
    """In a node at once; between nodes with the next block, when its own reduction has landed."""
    inside, between = run_ranks(lambda: [_backwards_and_hops(k) for k in (2, 1)], 4)[0]
    assert inside == ["2", "hop 2", "1", "hop 1", "0", "hop 0", "hop root"]
    assert between == ["2", "1", "hop 2", "0", "hop 1", "hop 0", "hop root"]
