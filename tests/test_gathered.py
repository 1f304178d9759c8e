"""``mics.gathered``: whole weights, unit by unit, on the ranks of one replica."""

from __future__ import annotations

import time
import weakref
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import full
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from test_other_meshes import _sharded as experts_of_their_own
from test_whole_step import on_tp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.traffic import Key

WORLD = 4
HOP_0 = Key(0, "all_gather", "flat")


def net() -> nn.Module:
    """Uneven shards, a tied weight, statistics in buffers, a frozen bias, a counter of integers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Linear(7, 7), nn.Linear(7, 5))
    model[2].weight = model[0].weight
    model[3].bias.requires_grad_(False)
    return model


def sharded(partition: int) -> nn.Module:
    policy = MixedPrecisionPolicy()
    return mics.shard(net(), mesh=mesh_of_rank(partition), blocks=nn.Linear, mp_policy=policy)


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in mics.micro_steps(model, [torch.randn(6, 7)]):
        model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def walked(partition: int, replica: int | None) -> dict[str, Any]:
    model = sharded(partition)
    train(model)
    right = {name: full(value) for name, value in model.state_dict().items()}
    view = mics.ledger(model)
    view.reset()
    pairs = list(mics.gathered(model, replica=replica))
    found = dict(pairs)
    equal = bool(found) and all(torch.equal(found[name], right[name]) for name in right)
    named = {key: count.message_bytes for key, count in view.traffic().counts.items()}
    return {
        "names": [name for name, _ in pairs],
        "equal": equal and all(found[n].dtype == right[n].dtype for n in right),
        "bytes": named,
        "half": [
            value.dtype
            for name, value in mics.gathered(model, replica=replica, dtype=torch.bfloat16)
            if name == "3.weight"
        ],
    }


@pytest.mark.parametrize(("partition", "replica"), [(1, 0), (2, 1), (2, None), (4, 0)])
def test_one_replica_has_every_weight_as_the_state_dict_of_one_process(
    partition: int, replica: int | None
) -> None:
    found = run_ranks(walked, WORLD, partition, replica)
    names = list(net().state_dict())
    for rank, one in enumerate(found):
        if replica is not None and rank // partition != replica:
            assert one["names"] == [] == one["half"]
            assert one["bytes"] == {}
            continue
        assert sorted(one["names"]) == sorted(names)
        assert one["equal"]
        assert one["half"] == [torch.bfloat16]
        if partition > 1:
            # Shards are padded to the first one's rows: two layers of 7 with one weight, one of 5,
            # and the root's two of 7.
            rows, last = partition * -(-7 // partition), partition * -(-5 // partition)
            assert one["bytes"] == {HOP_0: 4 * (rows * (7 + 1 + 1 + 2) + last * (7 + 1))}


def spread_over_two_axes() -> bool:
    model = on_tp(1, 2)
    right = {name: full(value) for name, value in model.state_dict().items()}
    found = dict(mics.gathered(model, replica=None))
    return found.keys() == right.keys() and all(
        torch.equal(found[name], right[name]) for name in right
    )


def test_beside_tensor_parallelism_axes_of_both_kinds_are_undone() -> None:
    assert run_ranks(spread_over_two_axes, WORLD) == [True] * WORLD


def experts_under_one_name(replicated: bool) -> None:
    list(mics.gathered(experts_of_their_own("own mesh", replicated, 2)))


@pytest.mark.parametrize("replicated", [False, True])
def test_other_experts_under_one_name_are_refused(replicated: bool) -> None:
    for error in errors_of_ranks(experts_under_one_name, WORLD, replicated):
        assert "Ranks have other weights under one name: " in error
        assert "experts.0." in error


def memory() -> int:
    """The most tensors that are alive beside the one in hand, of a model of many units."""
    policy = MixedPrecisionPolicy()
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    mics.shard(model, mesh=mesh_of_rank(2), blocks=nn.Linear, mp_policy=policy)
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for _, value in mics.gathered(model, replica=None):
        seen.append(weakref.ref(value))
        del value
        most = max(most, sum(one() is not None for one in seen))
    return most


def test_what_has_been_handed_out_is_not_kept() -> None:
    assert run_ranks(memory, WORLD) == [0] * WORLD


def slow_consumer() -> int:
    """Every collective of the job ends after a second; a consumer takes two for a unit."""
    model = sharded(2)
    for group in (dist.group.WORLD, mesh_of_rank(2).get_group(0), mesh_of_rank(2).get_group(1)):
        dist.distributed_c10d._set_pg_timeout(SECOND, group)
    names = 0
    for name, _ in mics.gathered(model):
        if dist.get_rank() == 0 and name == "0.weight":
            time.sleep(2)
        names += 1
    dist.distributed_c10d._set_pg_timeout(60 * SECOND, dist.group.WORLD)
    return names


SECOND = timedelta(seconds=1)


def test_a_slow_consumer_is_waited_for_beyond_the_groups_timeout() -> None:
    names = len(net().state_dict())
    assert run_ranks(slow_consumer, WORLD) == [names, names, 0, 0]


def leaves(alone: bool) -> str:
    model = sharded(2)
    said = "to the end"
    try:
        for name, _ in mics.gathered(model):
            if name == "0.bias" and (dist.get_rank() == 0 or not alone):
                said = "left"
                break
    except mics.RankError as error:
        said = str(error)
    count = len(list(mics.gathered(model)))  # nothing is out of step
    return f"{said} {count}"


def test_a_rank_that_leaves_the_loop_alone_is_named_and_all_may_leave_together() -> None:
    names = len(net().state_dict())
    assert run_ranks(leaves, WORLD, False)[:2] == [f"left {names}"] * 2
    alone = run_ranks(leaves, WORLD, True)
    assert alone[0] == f"left {names}"
    assert "Rank(s) 0 left the loop over mics.gathered before its end." in alone[1]
    assert alone[1].endswith(f" {names}")
    assert alone[2:] == ["to the end 0"] * 2


def never_begins() -> str:
    """Only rank 0 iterates over what all have asked for."""
    model = sharded(2)
    pairs = mics.gathered(model)
    said = "goes on"
    try:
        if dist.get_rank() == 0:
            said = f"{len(list(pairs))} weights"
    except mics.RankError as error:
        said = str(error)
    del pairs
    return f"{said} {len(list(mics.gathered(model)))}"


def test_a_rank_that_never_begins_the_loop_is_named() -> None:
    names = len(net().state_dict())
    zero, *others = run_ranks(never_begins, WORLD)
    assert "Rank(s) 1 left the loop over mics.gathered before its end." in zero
    assert "0 units had been gathered" in zero and zero.endswith(f" {names}")
    assert others == [f"goes on {names}", "goes on 0", "goes on 0"]


def steps_in_the_loop() -> str:
    model = sharded(2)
    try:
        for name, _ in mics.gathered(model, replica=None):
            if name == "0.bias":
                train(model)
    except mics.MicroStepError as error:
        return f"{error} {len(list(mics.gathered(model)))}"
    return "goes on"


def test_weights_of_two_steps_are_not_mixed() -> None:
    for said in run_ranks(steps_in_the_loop, WORLD):
        assert "Weights have changed in the loop over mics.gathered" in said
        assert "1 of 3 units had been gathered" in said


def told(what: str) -> None:
    model = sharded(2)
    if what == "arguments":
        mics.gathered(model, dtype=torch.bfloat16 if dist.get_rank() % 2 else None)
    elif what == "replica":
        mics.gathered(model, replica=2)
    elif what == "step":
        with mics.micro_step(model, last=False):
            model(torch.randn(6, 7)).square().mean().backward()
        mics.gathered(model)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("arguments", "Ranks of one replica call mics.gathered with other arguments."),
        ("replica", "There is no replica 2."),
        ("step", "mics.gathered was called in a step"),
    ],
)
def test_what_cannot_be_done_is_refused_on_every_rank(what: str, said: str) -> None:
    assert all(said in error for error in errors_of_ranks(told, WORLD, what))
