"""Hop 2 in two stages, where several nodes have several replicas each."""

from __future__ import annotations

import copy
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import (
    WIDTH,
    Run,
    Skipping,
    Stack,
    batches,
    distance,
    identical,
    loss_of,
    quiet,
    train_alone,
    train_sharded,
)
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics import traffic
from mics.communication import forms
from mics.communication.forms import choices_of
from mics.communication.two_stages import all_reduces_in_a_row
from mics.ranks import issuing
from mics.ranks.mesh import stage_groups
from mics.sharding.units import units_of
from mics.topology import Topology
from mics.traffic import Key, UnitBytes

DEEP = {"num_blocks": 40}
IN_TWO = {
    Key(2, "reduce_scatter", "intra"),
    Key(2, "all_reduce", "inter"),
    Key(2, "all_gather", "intra"),
}
FLAT = {Key(2, "all_reduce", "flat")}
BF16 = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
FP16 = MixedPrecisionPolicy(reduce_dtype=torch.float16)


def _sharded(model: nn.Module, partition: int = 1, k: int = 2, **arguments: Any) -> Any:
    arguments = {"collectives": "hierarchical", **arguments}
    return quiet(lambda: mics.shard(model, mesh=mesh_of_rank(partition, k), **arguments))


def _hop_2(sent: traffic.Traffic) -> set[Key]:
    return {key for key in sent.counts if key.hop == 2}


# -- bytes ----------------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    """3 nodes of 4 replicas and a message of 120 bytes: rows of 40 cross, by 2 x 2/3 of each."""
    view = traffic.View(5, (5,), tuple(range(12)), 4)
    sent = traffic.hop_2_traffic(view, 120, form="hierarchical")
    assert _hop_2(sent) == IN_TWO
    between = sent.counts[Key(2, "all_reduce", "inter")]
    assert (between.calls, between.message_bytes) == (1, 30)
    assert between.flow.inter_bytes == Fraction(2 * 30 * 2, 3) and not between.flow.intra_bytes
    for collective in ("reduce_scatter", "all_gather"):
        inside = sent.counts[Key(2, collective, "intra")]  # type: ignore[arg-type]
        assert (inside.calls, inside.message_bytes) == (1, 120)
        assert inside.flow.intra_bytes == 90 and not inside.flow.inter_bytes


@pytest.mark.parametrize(
    ("nodes", "k", "of_flat"), [(4, 2, Fraction(6, 7)), (2, 8, Fraction(8, 15))]
)
def test_a_node_sends_less_by_what_its_replicas_sum_inside(
    nodes: int, k: int, of_flat: Fraction
) -> None:
    unit = [UnitBytes(960, 960, 960)]

    def leaves(form: Any) -> Fraction:
        topology = Topology(nodes, k, 1)
        ranks = [traffic.mics(topology, unit, 1, all_reduce=form, rank=r) for r in range(k)]
        return traffic.node_inter_bytes(ranks)

    assert leaves("hierarchical") / leaves("flat") == of_flat


def test_there_are_no_two_stages_among_replicas_on_a_node_each_or_on_one_node() -> None:
    for nodes, k, p in [(4, 2, 2), (1, 4, 1), (4, 2, 4)]:
        sent = traffic.mics(
            Topology(nodes, k, p), [UnitBytes(64, 64, 64)], 1, all_reduce="hierarchical"
        )
        assert _hop_2(sent) == FLAT


# -- what is trained ------------------------------------------------------------------------------


TWO: Any = {"collectives": "hierarchical"}
RUNS = {
    "a replica is a rank": (4, Run(1, 2, **TWO)),
    "two replicas of a node": (8, Run(2, 4, **TWO)),
    "blocking": (4, Run(1, 2, shard={"overlap": False}, **TWO)),
    "AdamW and clipping": (4, Run(1, 2, optimizer="adamw", clip=0.1, **TWO)),
    "frozen": (4, Run(1, 2, model={"frozen": True}, **TWO)),
    "tied, two uses": (4, Run(1, 2, model={"tied": True, "uses": 2}, **TWO)),
    "joined": (4, Run(1, 2, model=DEEP, **TWO)),
    "bf16 between replicas": (4, Run(1, 2, shard={"hop_two": "bf16"}, **TWO)),
    "bf16": (4, Run(1, 2, mp_policy=BF16, **TWO)),
    "fp16": (4, Run(1, 2, mp_policy=FP16, **TWO)),
    "measured": (4, Run(1, 2, collectives="auto")),
    "flat": (4, Run(1, 2, collectives="flat")),
}
ROUNDED = {"bf16 between replicas": 2e-2, "bf16": 2e-2, "fp16": 2e-3}


def _train_all(runs: list[Run]) -> list[Any]:
    return [train_sharded(run) for run in runs]


@pytest.mark.parametrize("world", [4, 8])
def test_it_trains_as_one_process_does(world: int) -> None:
    runs = {name: run for name, (ranks, run) in RUNS.items() if ranks == world}
    k = world // 2
    per_rank = run_ranks(_train_all, world, list(runs.values()), ranks_per_node=k)
    for number, (name, run) in enumerate(runs.items()):
        alone, outcomes = train_alone(run, world), [found[number] for found in per_rank]
        for outcome in outcomes:
            assert distance(outcome, alone) < ROUNDED.get(name, 1e-4), name
            assert identical(outcome, outcomes[0]), name


def _gradients_of_small_numbers(form: str, policy: MixedPrecisionPolicy, factor: bool) -> Any:
    """Whole numbers, of which sums are exact in every order, in messages of odd lengths."""
    model = _sharded(_Odd(), collectives=form, mp_policy=policy, blocks=_Table)
    if factor:
        for block in model.blocks:
            block.set_gradient_divide_factor(1.0)
            block.set_force_sum_reduction_for_comms(True)
    generator = torch.Generator().manual_seed(dist.get_rank())
    found = []
    warnings.simplefilter("ignore", mics.MicsWarning)
    for _ in range(2):  # the second one adds to what went through hop 2
        given = [torch.randint(-8, 8, (7, 3), generator=generator).float() for _ in range(3)]
        for micro in mics.micro_steps(model, [given]):
            model(micro).backward()
        found.append([p.grad.full_tensor().clone() for p in model.parameters()])
    return found


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(7, 3))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return (self.table * given).sum()


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Table() for _ in range(3))

    def forward(self, given: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([b(one) for b, one in zip(self.blocks, given, strict=True)]).sum()


def _exact_sums() -> list[tuple[Any, Any]]:
    return [
        tuple(
            _gradients_of_small_numbers(form, policy, factor) for form in ("flat", "hierarchical")
        )
        for policy in (MixedPrecisionPolicy(), BF16, FP16)
        for factor in (False, True)
    ]


def test_exact_sums_are_those_of_the_flat_form_to_the_bit() -> None:
    for found in run_ranks(_exact_sums, 4, ranks_per_node=2):
        for flat, two in found:
            for step, expected in zip(two, flat, strict=True):
                assert any(one.abs().sum() > 0 for one in expected)
                for one, other in zip(step, expected, strict=True):
                    assert torch.equal(one, other)


def _skipping(partition: int, k: int, form: str) -> list[torch.Tensor | None]:
    """Each replica leaves out other blocks, one leaves out a backward, nobody uses the second."""
    torch.manual_seed(0)
    model = _sharded(Skipping(num_blocks=9), partition, k, collectives=form)
    replica = dist.get_rank() // partition
    model.left_out = frozenset([1, *range(replica % 4, 9, 3)])
    generator = torch.Generator().manual_seed(1)
    for micro in mics.micro_steps(model, torch.randn(3, 4, WIDTH, generator=generator)):
        loss = loss_of(model(micro))
        if replica != 1:
            loss.backward()
    return [
        None if p.grad is None else p.grad.full_tensor()  # type: ignore[attr-defined]
        for p in model.parameters()
    ]


@pytest.mark.parametrize(("world", "partition"), [(4, 1), (8, 2)])
def test_ranks_may_skip_what_others_use(world: int, partition: int) -> None:
    k = world // 2
    flat = run_ranks(_skipping, world, partition, k, "flat", ranks_per_node=k)
    two = run_ranks(_skipping, world, partition, k, "hierarchical", ranks_per_node=k)
    for ours, reference in zip(two, flat, strict=True):
        assert [g is None for g in ours] == [g is None for g in reference]
        assert sum(g is None for g in ours) == 3
        for one, other, first in zip(ours, reference, two[0], strict=True):
            if one is not None and other is not None and first is not None:
                torch.testing.assert_close(one, other)
                assert torch.equal(one, first)


def _twice(form: str) -> None:
    """Two backwards of one forward, which uses a block twice on some ranks."""
    torch.manual_seed(0)
    alone = Stack(num_blocks=3)
    model = _sharded(copy.deepcopy(alone), collectives=form, mp_policy=MixedPrecisionPolicy())
    given = torch.randn(4, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    warnings.simplefilter("ignore", mics.MicsWarning)  # hop 2 runs twice
    for rank, own in enumerate(given):
        alone.uses = 1 + rank % 2
        (2 * loss_of(alone(own)) / 4).backward()
    model.uses = 1 + dist.get_rank() % 2
    for micro in mics.micro_steps(model, given[dist.get_rank()].unsqueeze(0)):
        loss = loss_of(model(micro))
        loss.backward(retain_graph=True)
        loss.backward()
    for param, reference in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(param.grad.full_tensor(), reference.grad)


@pytest.mark.parametrize("form", ["flat", "hierarchical"])
def test_a_second_backward_may_use_blocks_as_often_as_no_other_rank(form: str) -> None:
    run_ranks(_twice, 4, form, ranks_per_node=2)


class _Noted:
    """What hop 2 issues, by unit and collective."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[int, str]] = []
        for number, unit in enumerate(units_of(model)):
            issue = unit.ledger.issue

            def noting(
                hop: int, collective: Any, *more: Any, n: int = number, to: Any = issue
            ) -> Any:
                if hop == 2:
                    self.calls.append((n, collective))
                return to(hop, collective, *more)

            unit.ledger.issue = noting  # type: ignore[method-assign]


def _order(unused: bool) -> list[tuple[int, str]]:
    torch.manual_seed(0)
    model = _sharded(Skipping(num_blocks=2))
    noted = _Noted(model)
    if unused and dist.get_rank() % 2:
        model.left_out = frozenset([0, 1])
    for micro in mics.micro_steps(model, torch.ones(2, 4, WIDTH)):
        loss_of(model(micro)).backward()
    return noted.calls


@pytest.mark.parametrize("unused", [False, True])
def test_a_message_goes_on_when_the_next_starts_and_gathers_at_the_end(unused: bool) -> None:
    """Unit 0 is the root, 1 and 2 are blocks; a backward pass ends with the root."""
    first, second, third = "reduce_scatter", "all_reduce", "all_gather"
    expected = [
        *[(2, first), (1, first), (2, second), (0, first), (1, second)],
        *[(0, second), (2, third), (1, third), (0, third)],
    ]
    for calls in run_ranks(_order, 4, unused, ranks_per_node=2):
        assert calls == expected


def _of_two_minds() -> dict[Key, int]:
    torch.manual_seed(0)
    mesh = mesh_of_rank(1, 2)
    model = Stack(num_blocks=40)
    for i, block in enumerate(model.blocks):
        form: Any = "flat" if i < 19 else "hierarchical"  # messages are of two blocks
        quiet(lambda b=block, f=form: mics.fully_shard(b, mesh=mesh, collectives=f))
    quiet(lambda: mics.fully_shard(model, mesh=mesh, collectives="flat"))
    before = mics.predict_traffic(model)
    for micro in mics.micro_steps(model, [torch.ones(4, WIDTH)]):
        loss_of(model(micro)).backward()
    assert mics.ledger(model).traffic() == before
    return {key: count.message_bytes for key, count in before.counts.items() if key.hop == 2}


def test_units_that_choose_their_form_otherwise_share_no_message() -> None:
    block = 4 * sum(p.numel() for p in Stack().blocks[0].parameters())
    for sent in run_ranks(_of_two_minds, 4, ranks_per_node=2):
        assert sent[Key(2, "all_gather", "intra")] in range(21 * block, 21 * block + 4 * 21)
        assert sent[Key(2, "all_reduce", "flat")] == 19 * block + 4 * 2 * WIDTH**2


# -- what is counted ------------------------------------------------------------------------------


def _counted(partition: int, k: int, arguments: dict[str, Any], model: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    sharded = _sharded(Stack(**model), partition, k, **arguments)
    (step,) = batches(Run(steps=1), dist.get_world_size())
    before = mics.predict_traffic(sharded, micro_steps=3)
    for micro in mics.micro_steps(sharded, step[:, dist.get_rank()]):
        loss_of(sharded(micro)).backward()
    sent = mics.ledger(sharded).traffic()
    assert sent == before == mics.predict_traffic(sharded, micro_steps=3), (arguments, model)
    return {key: count.calls for key, count in sent.counts.items() if key.hop == 2}


def _counted_all(ways: list[tuple[int, dict[str, Any], Any]], k: int) -> list[Any]:
    models: list[dict[str, Any]] = [{}, DEEP, {"frozen": True}]
    return [_counted(p, k, given, model) for p, given, _ in ways for model in models]


@pytest.mark.parametrize(
    ("world", "ways"),
    [
        (8, [(2, {}, IN_TWO)]),
        (
            4,
            [
                (1, {}, IN_TWO),
                (1, {"collectives": "flat"}, FLAT),
                (2, {}, FLAT),
                (1, {"hop_two": "bf16"}, IN_TWO),
                (1, {"mp_policy": BF16, "overlap": False}, IN_TWO),
                (1, {"collectives": "auto"}, None),
                (1, {"collectives": "auto", "hop_two": "auto"}, None),
            ],
        ),
    ],
    ids=["p = 2", "p = 1"],
)
def test_what_is_counted_is_what_was_predicted(
    world: int, ways: list[tuple[int, dict[str, Any], set[Key] | None]]
) -> None:
    k = world // 2
    ranks = run_ranks(_counted_all, world, ways, k, ranks_per_node=k)
    assert all(calls == ranks[0] for calls in ranks)
    for number, calls in enumerate(ranks[0]):
        _, given, keys = ways[number // 3]
        assert keys is None or set(calls) == keys, given
        if keys == IN_TWO:
            assert len(set(calls.values())) == 1, given


def _form_of_small_ones(units: int) -> tuple[set[Key], set[Key]]:
    """A size is measured for each message's; here only those of several units are cut in two."""
    torch.manual_seed(0)
    few, many = Stack(), Stack(num_blocks=units)
    keys = []
    for model in (few, many):
        sharded = _sharded(model, collectives="auto")
        choices = choices_of(units_of(sharded)[0].groups)
        of_unit = max(c.size_class for c in choices if c.collective == "all_reduce")
        for choice in list(choices):
            choices[choice] = "flat"
            larger = choice._replace(size_class=of_unit + 1)
            choices[larger] = "hierarchical"
        before = mics.predict_traffic(sharded)
        for micro in mics.micro_steps(sharded, [torch.ones(2, WIDTH)]):
            loss_of(sharded(micro)).backward()
        assert mics.ledger(sharded).traffic() == before
        keys.append(_hop_2(before))
        choices.clear()
    return keys[0], keys[1]


def test_the_form_is_that_of_the_message_not_of_its_units() -> None:
    for few, many in run_ranks(_form_of_small_ones, 4, 40, ranks_per_node=2):
        assert few == FLAT
        assert many >= IN_TWO


# -- the choice -----------------------------------------------------------------------------------


def _chosen(slow: str) -> Any:
    forms._time_forms = lambda *_: (2.0, 1.0) if slow == "flat" else (1.0, 2.0)  # type: ignore[assignment]
    torch.manual_seed(0)
    model = _sharded(Stack(), collectives="auto")
    choices = choices_of(units_of(model)[0].groups)
    return {form for c, form in choices.items() if c.collective == "all_reduce"}


def test_auto_takes_what_was_faster() -> None:
    assert run_ranks(_chosen, 4, "flat", ranks_per_node=2) == [{"hierarchical"}] * 4
    assert run_ranks(_chosen, 4, "hierarchical", ranks_per_node=2) == [{"flat"}] * 4


def _three_in_a_row(stages: bool) -> tuple[list[str], list[list[float]]]:
    issued = []

    def noted(name: str) -> None:
        issue = getattr(issuing, name)

        def instead(*args: Any, **keywords: Any) -> Any:
            issued.append(name)
            return issue(*args, **keywords)

        setattr(issuing, name, instead)

    groups = units_of(_sharded(Stack()))[0].groups
    assert groups.replicas is not None
    pair = stage_groups(groups, range(4))
    noted("all_reduce")
    noted("all_gather")
    messages = [torch.arange(5.0) + dist.get_rank() * 10**i for i in range(3)]  # 5: one is padded
    total = dist.ReduceOp.SUM
    all_reduces_in_a_row(messages, total, groups.replicas, pair if stages else None)
    return issued, [message.tolist() for message in messages]


def test_what_is_timed_in_a_row_is_under_way_together() -> None:
    sums = [[4.0 * j + 6 * 10**i for j in range(5)] for i in range(3)]
    for issued, found in run_ranks(_three_in_a_row, 4, True, ranks_per_node=2):
        assert issued == ["all_reduce"] * 3 + ["all_gather"] * 3
        assert found == sums
    for issued, found in run_ranks(_three_in_a_row, 4, False, ranks_per_node=2):
        assert issued == ["all_reduce"] * 3
        assert found == sums


def _dealt(form: str) -> set[Key]:
    torch.manual_seed(0)
    model = _sharded(Stack(), collectives=form)
    optimizer = torch.optim.SGD(mics.owned(model), lr=0.1)
    view = mics.ledger(model)
    view.reset()
    before = mics.predict_traffic(model)
    for micro in mics.micro_steps(model, [torch.ones(2, WIDTH)]):
        loss_of(model(micro)).backward()
    optimizer.step()
    model.state_dict()
    assert view.traffic() == before
    return _hop_2(before)


@pytest.mark.parametrize("form", ["auto", "hierarchical"])
def test_a_unit_that_is_dealt_has_messages_of_its_own(form: str) -> None:
    for keys in run_ranks(_dealt, 4, form, ranks_per_node=2):
        assert keys == {Key(2, "reduce_scatter", "flat"), Key(2, "all_gather", "flat")}


def _uneven() -> set[Key]:
    """On nodes of 3 the first column has two ranks on each of two, the second has not."""
    torch.manual_seed(0)
    mesh = DeviceMesh(
        "cpu", [[0, 1], [2, 3], [4, 6], [5, 7]], mesh_dim_names=("replicate", "shard")
    )
    model = quiet(lambda: mics.fully_shard(Stack(), mesh=mesh, gpus_per_node=3))
    for micro in mics.micro_steps(model, [torch.ones(2, WIDTH)]):
        loss_of(model(micro)).backward()
    return _hop_2(mics.ledger(model).traffic())


def test_where_one_column_of_a_mesh_has_no_two_stages_all_stay_flat() -> None:
    assert run_ranks(_uneven, 8, ranks_per_node=8) == [FLAT] * 8
