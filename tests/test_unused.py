"""Ranks and replicas that use different parameters have the gradients of one process."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics

WORLD, WIDTH, BLOCKS, MICRO_STEPS = 4, 8, 4, 2
FULL = MixedPrecisionPolicy()

Uses = dict[int, str]
"""By block that runs, the experts it uses."""


class Block(nn.Module):
    """Two experts of equal size and a norm; a rank runs those that its tokens chose."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, experts: str) -> torch.Tensor:
        y = self.norm(x)
        return x + sum((torch.tanh(getattr(self, name)(y)) for name in experts), torch.zeros(()))


class Net(nn.Module):
    """A first layer, blocks and a head; each forward says what it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, uses: Uses) -> torch.Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            if i in uses:
                x = block(x, uses[i])
        return self.head(x)


ALL: Uses = dict.fromkeys(range(BLOCKS), "ab")
Plan = Callable[[int, int], Uses | None]
"""What a rank uses in a micro-step, for (micro-step, rank); None: forward, but no backward."""


def _without(*blocks: int) -> Uses:
    return {i: "ab" for i in range(BLOCKS) if i not in blocks}


def _random(seed: int) -> Plan:
    def plan(micro_step: int, rank: int) -> Uses | None:
        choose = random.Random(1000 * seed + 10 * micro_step + rank)
        blocks = [i for i in range(BLOCKS) if choose.random() < 0.6]
        return {i: choose.choice(["a", "b", "ab", ""]) for i in blocks}

    return plan


PLANS: dict[str, Plan] = {
    "layer drop per replica in the last": lambda m, q: _without(1 + q // 2) if m else ALL,
    "layer drop per rank": lambda m, q: _without((q + m) % BLOCKS),
    "the first block on one rank only": lambda m, q: ALL if q == 2 else _without(0),
    "the last block on one rank only": lambda m, q: ALL if q == 1 else _without(BLOCKS - 1),
    "experts per rank": lambda m, q: dict.fromkeys(range(BLOCKS), "ab"[(q + m) % 2]),
    "one rank uses the second expert": lambda m, q: dict.fromkeys(
        range(BLOCKS), "b" if q == 3 else "a"
    ),
    "a block nobody uses": lambda m, q: _without(2),
    "an expert nobody uses": lambda m, q: dict.fromkeys(range(BLOCKS), "a"),
    "one rank skips everything": lambda m, q: {} if q == 0 else ALL,
    "one rank leaves out its last backward": lambda m, q: None if m and q == 1 else ALL,
    "a rank leaves out every backward": lambda m, q: None if q == 2 else ALL,
    **{f"random {seed}": _random(seed) for seed in range(4)},
}


def _data(micro_step: int, rank: int) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * micro_step + rank))


def _net(frozen: str = "") -> Net:
    torch.manual_seed(0)
    net = Net()
    for name, param in net.named_parameters():
        param.requires_grad_(not (frozen and name.startswith(frozen)))
    return net


@functools.cache
def _alone(plan: Plan, frozen: str) -> dict[str, torch.Tensor | None]:
    net = _net(frozen)
    for micro_step, rank in itertools.product(range(MICRO_STEPS), range(WORLD)):
        uses = plan(micro_step, rank)
        if uses is not None:
            out = net(_data(micro_step, rank), uses)
            (out.square().mean() / (WORLD * MICRO_STEPS)).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def _micro_step(model: nn.Module, plan: Plan, micro_step: int) -> None:
    rank = dist.get_rank()
    uses = plan(micro_step, rank)
    loss = model(_data(micro_step, rank), ALL if uses is None else uses).square().mean()
    if uses is not None:
        (loss / MICRO_STEPS).backward()


def _in_loop(model: nn.Module, plan: Plan) -> None:
    for micro_step in mics.micro_steps(model, range(MICRO_STEPS)):
        _micro_step(model, plan, micro_step)


def _told_afterwards(model: nn.Module, plan: Plan) -> None:
    for micro_step in range(MICRO_STEPS):
        with mics.micro_step(model, last=None):
            _micro_step(model, plan, micro_step)
    mics.finish_step(model)


def _by_hand(model: Any, plan: Plan) -> None:
    for micro_step in range(MICRO_STEPS):
        model.set_requires_all_reduce(micro_step == MICRO_STEPS - 1)
        _micro_step(model, plan, micro_step)


def _errors(
    plan: Plan, train: Callable[[Any, Plan], None], frozen: str, **options: Any
) -> list[str]:
    """What is wrong with the gradients of a sharded model, compared with one process's."""
    layout = (options.pop("partition"), options.pop("gpus_per_node", None))
    model = mics.shard(_net(frozen), mesh=mesh_of_rank(*layout), mp_policy=FULL, **options)
    train(model, plan)
    wrong = []
    for (name, right), param in zip(_alone(plan, frozen).items(), model.parameters(), strict=True):
        mine = None if param.grad is None else param.grad.full_tensor()  # type: ignore[attr-defined]
        if mine is None and right is None:
            continue
        if mine is None or right is None:
            wrong.append(f"{name}: {'None' if mine is None else 'a gradient'}")
        elif not torch.allclose(mine, right, rtol=1e-5, atol=1e-6):
            wrong.append(f"{name}: off by {float((mine - right).abs().max()):.1e}")
    return wrong


def _compare(names: list[str], train: Any, frozen: str, options: dict[str, Any]) -> dict[str, Any]:
    def each() -> dict[str, Any]:
        wrong = {name: _errors(PLANS[name], train, frozen, **options) for name in names}
        return {name: found for name, found in wrong.items() if found}

    return quiet(each)


def _differences(
    names: list[str], train: Any, frozen: str, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """What is wrong on each rank, by name of the plan."""
    for name in names:
        _alone(PLANS[name], frozen)  # once for all ranks of all tests
    return run_ranks(_compare, WORLD, names, train, frozen, options)


HIERARCHICAL = {"partition": 4, "gpus_per_node": 2, "collectives": "hierarchical"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"partition": 1},
        {"partition": 2},
        HIERARCHICAL,
        *(
            pytest.param(options, marks=pytest.mark.extra)
            for options in (
                {"partition": 2, "activation_checkpointing": True},
                {"partition": 2, "overlap": False},
                {"partition": 4},
                {**HIERARCHICAL, "overlap": False},
                {"partition": 2, "reshard_after_forward": False},
            )
        ),
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_gradients_are_one_processs_whatever_a_rank_skips(options: dict[str, Any]) -> None:
    assert _differences(list(PLANS), _in_loop, "", options) == [{}] * WORLD


BY_HAND = [name for name in PLANS if "backward" not in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partition", "train", "names"),
    [
        (1, _told_afterwards, list(PLANS)),
        pytest.param(1, _by_hand, BY_HAND, marks=pytest.mark.extra),
        pytest.param(2, _told_afterwards, list(PLANS), marks=pytest.mark.extra),
        (2, _by_hand, BY_HAND),
    ],
)
def test_so_they_are_in_every_kind_of_loop(partition: int, train: Any, names: list[str]) -> None:
    assert _differences(names, train, "", {"partition": partition}) == [{}] * WORLD


@pytest.mark.slow
@pytest.mark.parametrize(
    "frozen",
    [
        "blocks.1.a",
        *(pytest.param(f, marks=pytest.mark.extra) for f in ("first", "blocks.0", "head")),
    ],
)
def test_so_they_are_with_frozen_parts(frozen: str) -> None:
    assert _differences(list(PLANS), _in_loop, frozen, {"partition": 2}) == [{}] * WORLD


def _rank_1_runs_nothing(model: nn.Module, plan: Plan) -> None:
    for micro_step in mics.micro_steps(model, range(MICRO_STEPS)):
        if dist.get_rank() != 1:
            _micro_step(model, plan, micro_step)


def test_so_they_are_where_a_replica_of_one_rank_runs_no_forward_in_the_very_first_step() -> None:
    """FSDP2 learns in a root's first forward which module is the root."""

    def rank() -> list[str]:
        plan: Plan = lambda _, rank: None if rank == 1 else ALL  # noqa: E731
        return _errors(plan, _rank_1_runs_nothing, "", partition=1)

    assert run_ranks(quiet, WORLD, rank) == [[]] * WORLD


class _Exits(nn.Module):
    """Every block has a head of its own; the loss of a rank may need some of them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(3))

    def forward(self, x: torch.Tensor, skipped: int = -1) -> list[torch.Tensor]:
        x, outputs = self.first(x), []
        for i, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            if i != skipped:
                x = x + torch.tanh(block(x))
            outputs.append(head(x))
        return outputs


def _off_with_exits(loss: Callable[[nn.Module, int], torch.Tensor]) -> float:
    torch.manual_seed(0)
    alone = _Exits()
    for rank in range(2):
        (loss(alone, rank) / 2).backward()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    model = mics.shard(_Exits(), partition=2, mp_policy=FULL)
    for _ in mics.micro_steps(model, range(1)):
        loss(model, dist.get_rank()).backward()  # type: ignore[no-untyped-call]
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max(float((a.grad.full_tensor() - b.grad).abs().max()) for a, b in pairs)  # type: ignore


def test_ranks_of_a_partition_group_may_have_losses_of_other_heads() -> None:
    """A root that returns what blocks return gathers ahead of what other ranks leave out."""

    def loss(model: nn.Module, rank: int) -> torch.Tensor:
        used: list[torch.Tensor] = model(_data(0, rank))[: 3 - rank]
        return torch.cat(used, 1).square().mean()

    assert max(run_ranks(quiet, 2, lambda: _off_with_exits(loss))) < 1e-6


def test_so_they_are_where_inputs_need_a_gradient_and_the_first_block_is_skipped() -> None:
    """The root is reduced as soon as its inputs have their gradient."""

    def loss(model: nn.Module, rank: int) -> torch.Tensor:
        outputs = model(_data(0, rank).requires_grad_(), 0 if rank else -1)
        return torch.cat(outputs, 1).square().mean()

    assert max(run_ranks(quiet, 2, lambda: _off_with_exits(loss))) < 1e-6


def _crossed() -> None:
    class Loop(Net):
        def forward(self, x: torch.Tensor, order: Any) -> torch.Tensor:
            x = self.first(x)
            for i in order:
                x = self.blocks[i](x, "ab")
            return self.head(x)

    model = mics.shard(Loop(), partition=2, mp_policy=FULL, overlap=False)
    with torch.no_grad():
        model(_data(0, 0), [0, 1, 2, 3, 2 if dist.get_rank() == 1 else 3])
    for micro_step in mics.micro_steps(model, range(1)):
        model(_data(micro_step, 0), range(BLOCKS)).square().mean().backward()


def test_another_block_that_runs_again_is_refused_on_every_rank_with_the_rank() -> None:
    """It has the size of the right one, so that every collective goes through."""
    for error in errors_of_ranks(_crossed, WORLD):
        assert "Ranks of one partition group used other blocks" in error
        assert "rank 0 gathers blocks.3, rank 1 gathers blocks.2" in error
        assert "Write: blocks that each run at most once in a forward" in error


def _not_a_number(partition: int, how: str) -> dict[str, Any]:
    model = mics.shard(_net(), partition=partition, mp_policy=FULL)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    said = ""
    for step in range(3):
        for micro_step in mics.micro_steps(model, range(MICRO_STEPS)):
            loss = model(_data(micro_step, dist.get_rank()), ALL).square().mean()
            if step == 1 and micro_step == 0 and dist.get_rank() in (1, 2 if how == "two" else 1):
                loss = loss * float("nan")
            loss.backward()
        if step == 1 and how == "mended":
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
        try:
            optimizer.step()
        except mics.MicroStepError as error:
            said = str(error)
        optimizer.zero_grad()
    finite = all(bool(p.to_local().isfinite().all()) for p in model.parameters())  # type: ignore[attr-defined]
    return {"said": said, "finite": finite}


@pytest.mark.slow
@pytest.mark.parametrize("partition", [1, pytest.param(2, marks=pytest.mark.extra), 4])
def test_a_loss_that_is_not_a_number_is_refused_with_its_rank_and_the_next_step_goes_on(
    partition: int,
) -> None:
    def rank() -> list[dict[str, Any]]:
        return [_not_a_number(partition, how) for how in ("one", "two", "mended")]

    for one, two, mended in run_ranks(quiet, WORLD, rank):
        assert "not numbers came from the backward of rank 1, and are on every rank" in one["said"]
        assert "Write: optimizer.zero_grad() in place of optimizer.step()" in one["said"]
        assert "from rank 1 to rank 2 were infinite" in two["said"]
        assert mended["said"] == ""
        assert one["finite"] and two["finite"] and mended["finite"]


class Bare(nn.Module):
    """Blocks alone: the root has no parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor, uses: Uses) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            if i in uses:
                x = x + torch.tanh(block(x))
        return x


def _bare(partition: int) -> list[str]:
    torch.manual_seed(0)
    alone = Bare()
    torch.manual_seed(0)
    model = mics.shard(Bare(), partition=partition, mp_policy=FULL)
    wrong = []
    in_loop = ("layer drop per rank", "the first block on one rank only", "a block nobody uses")
    for name, train in [*((name, _in_loop) for name in in_loop), (in_loop[-1], _by_hand)]:
        plan = PLANS[name]
        for micro_step, rank in itertools.product(range(MICRO_STEPS), range(WORLD)):
            out = alone(_data(micro_step, rank), plan(micro_step, rank) or {})
            (out.square().mean() / (WORLD * MICRO_STEPS)).backward()
        train(model, plan)
        for right, mine in zip(alone.parameters(), model.parameters(), strict=True):
            whole = None if mine.grad is None else mine.grad.full_tensor()  # type: ignore[attr-defined]
            same = (whole is None) == (right.grad is None) and (
                whole is None or right.grad is None or torch.allclose(whole, right.grad, atol=1e-6)
            )
            wrong += [] if same else [f"{name}, {train.__name__}"]
        alone.zero_grad()
        model.zero_grad()
    return wrong


@pytest.mark.parametrize("partition", [2, 4])
def test_so_they_are_where_the_root_has_no_parameters(partition: int) -> None:
    """In the loop and, where nobody knows of steps, by hand."""
    assert run_ranks(quiet, WORLD, lambda: _bare(partition)) == [[]] * WORLD


class Tower(nn.Module):
    """What only some batches need: a unit with blocks that are units of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor, uses: Uses) -> torch.Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            if i in uses:
                x = block(x, uses[i])
        return self.last(x)


class Towers(nn.Module):
    """A tower whose input needs no gradient, one whose input does, and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.images, self.sounds, self.text = Tower(), Tower(), Block()

    def forward(self, x: torch.Tensor, uses: dict[str, Uses]) -> torch.Tensor:
        y = self.first(x)
        y = y + self.images(x, uses["images"]) if "images" in uses else y
        y = y + self.sounds(y, uses["sounds"]) if "sounds" in uses else y
        return self.head(self.text(y, "ab") if "text" in uses else y)

    def units(self) -> list[nn.Module]:
        blocks = [block for tower in (self.images, self.sounds) for block in tower.blocks]
        experts = [expert for block in blocks[:3] for expert in (block.a, block.b)]
        return [*experts, *blocks, self.images, self.sounds, self.text, self]


def _random_towers(seed: int, micro_step: int, rank: int) -> dict[str, Uses]:
    choose = random.Random(1000 * seed + 10 * micro_step + rank)
    uses = {name: _random(seed)(micro_step, rank) or {} for name in ("images", "sounds", "text")}
    return {name: used for name, used in uses.items() if choose.random() < 0.6}


def _towers(partition: int, gpus_per_node: int, overlap: bool) -> list[str]:
    wrong = []
    for seed in range(6):
        torch.manual_seed(0)
        alone = Towers()
        torch.manual_seed(0)
        model = Towers()
        mesh = mesh_of_rank(partition, gpus_per_node)
        for unit in model.units():
            mics.fully_shard(unit, mesh=mesh, overlap=overlap)
        for step in range(2):
            seen = range(2 * step, 2 * step + 2)
            for m in mics.micro_steps(model, seen):
                out = model(_data(m, dist.get_rank()), _random_towers(seed, m, dist.get_rank()))
                out.square().mean().backward()
            for m, rank in itertools.product(seen, range(WORLD)):
                out = alone(_data(m, rank), _random_towers(seed, m, rank))
                (out.square().mean() / WORLD).backward()
            pairs = zip(alone.parameters(), model.named_parameters(), strict=True)
            for right, (name, mine) in pairs:
                whole = None if mine.grad is None else mine.grad.full_tensor()  # type: ignore[attr-defined]
                same = (whole is None) == (right.grad is None) and (
                    whole is None
                    or right.grad is None
                    or torch.allclose(whole, right.grad, rtol=1e-5, atol=1e-6)
                )
                wrong += [] if same else [f"{seed}: {name}"]
            alone.zero_grad()
            model.zero_grad()
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partition", "gpus_per_node", "overlap"),
    [
        (2, 4, False),
        *(pytest.param(*one, marks=pytest.mark.extra) for one in ((1, 4, True), (4, 2, True))),
    ],
)
def test_so_they_are_where_units_are_inside_units(
    partition: int, gpus_per_node: int, overlap: bool
) -> None:
    got = run_ranks(quiet, WORLD, lambda: _towers(partition, gpus_per_node, overlap))
    assert got == [[]] * WORLD
