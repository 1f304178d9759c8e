"""Plans: what fits, what is fastest and why, and what to do when nothing fits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import mics
from mics.anatomy.anatomy import Anatomy
from mics.anatomy.memory import NOTHING_ELSE, OPTIMIZERS, memory
from mics.anatomy.recipe import Machine, Recipe
from mics.errors import PlanError
from mics.hardware.cluster import Cluster, Gpu, Link, Node
from mics.hardware.lookup import find_node
from mics.planning.answer import answer
from mics.planning.charts import pareto_set
from mics.planning.cost import Reliability, as_dollars, dollars, goodput, wall_seconds
from mics.planning.inverse import (
    STEP,
    fewest_nodes,
    largest_micro_batch,
    longest_sequence,
    smallest_partition,
    with_partition,
)
from mics.planning.parsing import parse_range
from mics.planning.plan import Plan, Search, search
from mics.planning.question import Question
from mics.planning.ranking import STEP_ERROR
from mics.planning.reasons import explained
from mics.planning.scaling import strong_scaling, too_large, weak_scaling
from mics.planning.subject import subject
from mics.planning.weighing import fits, needed_by
from mics.simulation.profiles import EngineName

GIB = 2**30


@pytest.fixture(scope="module")
def bert() -> Anatomy:
    return subject("bert-large")


def small(memory_gib: float = 4.0, nodes: int = 4) -> Cluster:
    """A cluster on which BERT large is tight."""
    gpu = Gpu("small", memory_gib * GIB, 125e12, 9e11, source="a test")
    machine = Machine(runtime_gib=0.3, communicator_gib=0.05)
    node = Node("small", gpu, 4, Link(1e11, 3e-6), Link(1e9, 50e-6), price=10.0, machine=machine)
    return Cluster(node, nodes)


def of_bert(*recipe: Any) -> Recipe:
    return Recipe(*recipe, sequence=128)


QUESTION = Question(Recipe(1, sequence=128), micro_batches=(1, 2, 4, 8))


@pytest.fixture(scope="module")
def found(bert: Anatomy) -> Search:
    return search(bert, small(), QUESTION)


def test_every_legal_way_is_tried() -> None:
    tried = list(QUESTION.recipes(small()))
    assert {recipe.partition for recipe in tried} == {1, 2, 4, 8, 16}
    # Two forms where a group spans nodes, with and without checkpointing, four micro-batches.
    assert len(tried) == (3 + 2 * 2) * 2 * 4
    assert len(set(tried)) == len(tried)


def test_a_plan_never_takes_what_does_not_fit(bert: Anatomy, found: Search) -> None:
    assert found.plans
    assert found.rejected
    assert len(found.plans) + len(found.rejected) == len(list(QUESTION.recipes(small())))
    for plan in found.plans:
        assert plan.needed <= small().node.gpu.memory
        assert fits(bert, small(), plan.way)
    for one in found.rejected:
        assert one.missing > 0
        assert not fits(bert, small(), one.way)


def test_equal_plans_come_first_the_smallest_partition_ahead_then_the_fastest(
    found: Search,
) -> None:
    speeds = [plan.tokens_per_second for plan in found.plans]
    equal = [speed for speed in speeds if max(speeds) / speed <= 1 + STEP_ERROR]
    assert found.equal == found.plans[: len(equal)]
    assert 1 < len(equal) < len(speeds)
    sizes = [(plan.way.partition, plan.seconds) for plan in found.equal]
    assert sizes == sorted(sizes)
    assert speeds[len(equal) :] == sorted(speeds[len(equal) :], reverse=True)
    best = found.plans[0]
    assert best.tokens == best.sequences * 128
    assert 0 < best.mfu <= best.hfu < 1


def test_all_plans_of_a_search_do_the_same_work(bert: Anatomy, found: Search) -> None:
    """The micro-steps are those of the fastest micro-batch; the others take more or fewer."""
    (work,) = {plan.sequences for plan in found.plans}
    assert work == 16 * 4 * 8  # 16 GPUs, 4 micro-steps of micro-batch 8
    assert {(p.way.micro_batch, p.way.micro_steps) for p in found.plans} >= {(4, 8), (8, 4)}
    assert found.left_out == ()
    odd = search(bert, small(), dataclasses.replace(QUESTION, micro_batches=(3, 8)))
    assert {plan.sequences for plan in odd.plans} == {work}
    assert odd.left_out == (3,)
    asked = dataclasses.replace(QUESTION, micro_batches=(3, 8), global_batch=work)
    assert search(bert, small(), asked).left_out == (3,)
    said = mics.plan("gpt2-tiny", "p4d:1", global_batch=64, micro_batches=[3, 8]).report()
    assert "every row: a step of 64 sequences; micro-batch 3 does not divide it\n" in said


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_falls_with_p(bert: Anatomy, optimizer: str, checkpointing: bool) -> None:
    recipe = Recipe(1, 2, 1, checkpointing, sequence=128, optimizer=optimizer)
    needs = [
        memory(bert, dataclasses.replace(recipe, partition=p)).peak for p in (1, 2, 4, 8, 16, 32)
    ]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] > needs[-1]


def test_what_costs_memory_costs_memory(bert: Anatomy) -> None:
    plain = Recipe(4, 4, micro_steps=1, sequence=128)
    peak = memory(bert, plain).peak

    def changed(**more: Any) -> int:
        return memory(bert, dataclasses.replace(plain, **more)).peak

    def on(**more: Any) -> int:
        machine = dataclasses.replace(NOTHING_ELSE, **more)
        return memory(bert, plain, machine, gpus=4).peak  # in the world and in a partition group

    assert changed(checkpointing=True) < peak
    assert changed(optimizer="sgd") < peak
    assert changed(micro_steps=2) > peak  # gradients are alive in the second forward
    assert on(communicator_gib=1000 / GIB) == peak + 2000
    assert on(runtime_gib=500 / GIB) == peak + 500
    assert changed(micro_batch=2) < peak
    whole = memory(bert, plain)
    assert list(whole.phases) == ["loss", "block backward", "end of backward", "optimizer step"]
    deepest = dataclasses.replace(plain, checkpointing=True, prefetch=3)
    more = memory(bert, deepest).phases["block backward"]
    one = memory(bert, dataclasses.replace(deepest, prefetch=1)).phases["block backward"]
    assert more.prefetched_blocks == 3 * one.prefetched_blocks


def test_a_reason_says_why_the_neighbours_lost(found: Search) -> None:
    plans = explained(found)
    reasons = " | ".join(plan.reason for plan in plans)
    best = plans[0]
    assert best.reason.startswith(f"p = {best.way.partition}: ")
    assert "of 4 GiB" in best.reason
    assert "x as long per token" in reasons
    assert "smallest that fits" in reasons
    assert "lacks" in reasons


def test_questions_the_other_way_round(bert: Anatomy) -> None:
    where, way = small(), of_bert(8, 4, 4, False, "hierarchical")
    p = smallest_partition(bert, where, QUESTION, way)
    assert p is not None
    assert fits(bert, where, with_partition(way, p, 4))
    assert p == 1 or not fits(bert, where, with_partition(way, p // 2, 4))
    b = largest_micro_batch(bert, where, QUESTION, way)
    assert b is not None
    assert fits(bert, where, dataclasses.replace(way, micro_batch=b))
    assert not fits(bert, where, dataclasses.replace(way, micro_batch=b + 1))
    s = longest_sequence(bert, where, way, limit=512)
    assert s is not None
    assert s % STEP == 0
    assert s <= 512
    assert fits(bert, where, dataclasses.replace(way, sequence=s))
    assert smallest_partition(bert, small(0.5), QUESTION, way) is None
    assert largest_micro_batch(bert, small(0.5), QUESTION, way) is None


def test_two_stages_need_their_groups_and_buffers_when_asked_the_other_way_round(
    bert: Anatomy,
) -> None:
    """What is said around a plan is of that plan: in two stages it has two groups more."""
    flat, staged = (of_bert(8, 4, 4, True, form) for form in ("flat", "hierarchical"))
    least = needed_by(bert, small(), flat)
    more = needed_by(bert, small(), staged)
    assert more - least > 2 * small().node.machine.communicator_gib * GIB
    between = small((least + more) / 2 / GIB)
    assert fits(bert, between, flat)
    assert not fits(bert, between, staged)
    assert largest_micro_batch(bert, between, QUESTION, staged) != largest_micro_batch(
        bert, between, QUESTION, flat
    )


@pytest.mark.parametrize(("gpus", "owners"), [(16, 8), (2, 1)])
def test_dealt_states_are_divided_by_the_replicas(bert: Anatomy, gpus: int, owners: int) -> None:
    plain, dealt = (
        memory(bert, Recipe(2, sequence=128, dealt_states=one), gpus=gpus) for one in (False, True)
    )
    for phase, need in dealt.phases.items():
        other = plain.phases[phase]
        assert need.optimizer == pytest.approx(other.optimizer / owners, rel=1e-6)
        assert need.total - need.optimizer == other.total - other.optimizer


def test_dealt_states_are_recommended_where_a_partition_stays_inside_a_node_so(
    bert: Anatomy,
) -> None:
    plans = answer(bert, small(1.9), QUESTION)
    assert plans.best.way.partition == 8 and plans.dealt is not None
    assert plans.dealt.way.partition == 4 and plans.dealt.way.dealt_states
    assert plans.dealt.sequences == plans.best.sequences
    gain = f"{plans.best.seconds / plans.dealt.seconds:.2f} times as fast"
    assert gain in plans.report() and "--dealt-states" in plans.report()
    asked = dataclasses.replace(QUESTION, recipe=plans.dealt.way)
    again = answer(bert, small(1.9), asked)
    assert again.best.way.partition == 4 and "--dealt-states" not in again.report()
    roomy = answer(bert, small(2.4), QUESTION)
    assert roomy.dealt is None and "--dealt-states" not in roomy.report()


def test_the_fewest_nodes_are_those_of_what_may_be_tried(bert: Anatomy) -> None:
    nodes = fewest_nodes(bert, small(), QUESTION)
    assert nodes is not None
    more = fewest_nodes(bert, small(memory_gib=1.45, nodes=64), QUESTION)
    assert more is not None
    assert more >= nodes
    assert fewest_nodes(bert, small(0.2), QUESTION) is None
    # Nothing is recomputed, no larger partition is used than was asked for.
    tight = small(2.3)
    plain = dataclasses.replace(QUESTION, checkpointing=(False,), micro_batches=(16,))
    free = dataclasses.replace(plain, checkpointing=(False, True))
    some, fewer = fewest_nodes(bert, tight, plain), fewest_nodes(bert, tight, free)
    assert fewer is not None
    assert some is None or some > fewer
    found = search(bert, dataclasses.replace(tight, nodes=fewer), free)
    assert found.plans
    assert not search(bert, dataclasses.replace(tight, nodes=fewer), plain).plans


def test_nodes_whose_link_nobody_measured_stand_alone(bert: Anatomy) -> None:
    node = dataclasses.replace(small().node, inter=Link(0.0, 50e-6, line=1e9))
    alone = Cluster(node, 1)
    assert mics.plan(bert, alone, sequence=128, runtime_gib=0.3, communicator_gib=0.05)
    with pytest.raises(PlanError, match=r"never measured(.|\n)*line rate is 1 GB/s"):
        Cluster(node, 2)
    plan = search(bert, alone, QUESTION).plans[0]
    told: list[str] = []
    weak = weak_scaling(plan, ("mics",), (1, 2), told.append)
    assert [gpus for gpus, _ in weak["mics"]] == [4]
    assert told == ["2 nodes are left out: the link between them was never measured"]
    assert len(weak_scaling(plan, ("mics",))["mics"]) == 1
    assert fewest_nodes(bert, dataclasses.replace(alone), QUESTION) == 1


@pytest.mark.parametrize("nodes", [0, -1, 1_000_000, 1.5])
def test_a_cluster_has_a_number_of_nodes_that_can_be(nodes: Any) -> None:
    with pytest.raises(PlanError, match="1 to 131,072 nodes"):
        Cluster(find_node("p4d"), nodes)


def test_a_step_of_a_plan_takes_what_the_plan_says(found: Search) -> None:
    plan = found.plans[0]
    with pytest.raises(PlanError, match=r"simulate takes a plan, got list(.|\n)*plans\[0\]"):
        mics.simulate([plan])  # type: ignore[arg-type]
    assert mics.simulate(plan).seconds == plan.seconds
    assert mics.simulate(plan).late > 0
    plans = mics.plan("gpt2-tiny", "p4d:2", micro_batches=[1])
    assert mics.simulate(plans) == mics.simulate(plans.best)  # as the answer of plan stands
    assert mics.simulate(plans, "ddp") == mics.simulate(plans[0], "ddp")


def test_a_longest_sequence_may_be_the_models_own(bert: Anatomy) -> None:
    way, where = of_bert(8, 4, 4, True), small()
    for limit in (100, 200, 512):
        assert longest_sequence(bert, where, way, limit=limit) == limit
    # What was asked for is never beyond what is answered.
    odd = dataclasses.replace(way, sequence=500)
    need = needed_by(bert, where, odd) / GIB
    assert longest_sequence(bert, small(need), odd, limit=512) == 500


def test_what_is_tried_twice_is_one_way(bert: Anatomy) -> None:
    twice = dataclasses.replace(
        QUESTION, micro_batches=(1, 1), partitions=(4, 4), checkpointing=(True, True)
    )
    assert len(list(twice.recipes(small()))) == 1


def test_fp32_computes_at_its_own_rate(bert: Anatomy) -> None:
    where = Cluster(find_node("p4d"), 1)
    whole, half = (
        mics.plan("bert-large", where, sequence=512, micro_batches=(16,), dtype=dtype)[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    flops = whole.model_flops / whole.seconds
    assert flops < 19.5e12
    assert half.model_flops / half.seconds > 3 * flops
    assert whole.mfu == pytest.approx(flops / 19.5e12)
    unknown = Cluster(find_node("p6-b200"), 1)
    with pytest.raises(PlanError, match="How fast B200 computes with 4 bytes a number"):
        mics.plan("bert-large", unknown, sequence=128, dtype=torch.float32)


def test_the_optimizers_step_takes_what_it_moves(bert: Anatomy) -> None:
    spent = {}
    for optimizer in OPTIMIZERS:
        recipe = dataclasses.replace(QUESTION.recipe, optimizer=optimizer)
        asked = dataclasses.replace(QUESTION, recipe=recipe, partitions=(4,))
        plan = search(bert, small(8.0), asked).plans[0]
        spent[optimizer] = plan.simulated.step.exposed[0]
    assert spent["adamw"] > spent["adamw-fused"] > spent["sgd-momentum"] > spent["sgd"] > 0
    assert spent["sgd"] == pytest.approx(spent["adamw-fused"] * 12 / 28)


def test_bytes_explain_nothing_where_they_are_not_what_time_follows_from(found: Search) -> None:
    for plan in explained(found):
        smaller = plan.way.partition < small().node.gpus_per_node
        assert not (smaller and "bytes between nodes" in plan.reason)
    assert any("bytes between nodes" in plan.reason for plan in explained(found))


def test_a_global_batch_limits_the_micro_batch(bert: Anatomy) -> None:
    where = small()
    way = of_bert(8, 1, 6, True)
    free = largest_micro_batch(bert, where, QUESTION, way)
    assert free is not None
    assert free > 7
    for of_each, largest in ((6, 6), (7, 7), (2 * free, free), (free + 1, (free + 1) // 2)):
        asked = dataclasses.replace(QUESTION, global_batch=16 * of_each)
        found = largest_micro_batch(bert, where, asked, way)
        assert found is not None
        assert of_each % found == 0
        assert found >= min(largest, 7) or (free + 1) % 2


ONLY: dict[str, Any] = {
    "micro_batches": (8,),
    "checkpointing": (False,),
    "partitions": (2,),
    "runtime_gib": 0.3,
    "communicator_gib": 0.05,
}


def test_when_nothing_fits_the_nearest_is_named(bert: Anatomy) -> None:
    with pytest.raises(PlanError) as caught:
        mics.plan(bert, small(), sequence=512, **ONLY)
    text = str(caught.value)
    assert "Nothing fits: p = 2, micro-batch 8 on 4 x small" in text
    assert "GiB more" in text
    for change in ("partition 16 saves", "micro-batch 1 saves", "checkpointing saves"):
        assert change in text
    assert "saves 0.0" not in text
    assert "saves -" not in text


@pytest.mark.parametrize("memory", [0.9, 1.2, 1.6, 2.0, 2.6, 3.2, 4.0, 5.0])
def test_what_is_advised_is_enough(bert: Anatomy, memory: float) -> None:
    """Every change that is named as the way out leads to a plan."""
    where = small(memory)
    try:
        mics.plan(bert, where, sequence=512, **ONLY)
    except PlanError as error:
        advice = error.write
    else:
        return
    for one in advice.removesuffix(", each is enough").split(" or "):
        assert followed(bert, where, one), (memory, advice)


def followed(bert: Anatomy, where: Cluster, advice: str) -> Sequence[Plan]:
    """Plan again as the advice says, and as before in all else."""
    options, sequence = dict(ONLY), 512
    for word, value in re.findall(r"(nodes|partition|p =|micro-batch|sequence) (\d+)", advice):
        if word == "nodes":
            where = dataclasses.replace(where, nodes=int(value))
        elif word == "sequence":
            sequence = int(value)
        elif word == "micro-batch":
            options["micro_batches"] = (int(value),)
        else:
            options["partitions"] = (int(value),)
    if "checkpointing" in advice:
        options["checkpointing"] = (True,)
    if "adamw-fused" in advice:
        options["optimizer"] = "adamw-fused"
    return mics.plan(bert, where, sequence=sequence, **options)


def test_another_global_batch_is_advised_where_it_would_do(bert: Anatomy) -> None:
    asked = {**ONLY, "micro_batches": (1,), "checkpointing": (True,), "partitions": None}
    with pytest.raises(PlanError) as caught:
        mics.plan(bert, small(0.9), sequence=512, global_batch=16, **asked)
    advice = caught.value.write
    found = re.match(r"nodes (\d+) with p = (\d+), micro-batch 1, .*multiple of (\d+)", advice)
    assert found, advice
    nodes, p, batch = map(int, found.groups())
    where = dataclasses.replace(small(0.9), nodes=nodes)
    asked["partitions"] = (p,)
    assert mics.plan(bert, where, sequence=512, global_batch=batch, **asked)


def test_no_nodes_are_enough_for_some(bert: Anatomy) -> None:
    with pytest.raises(PlanError, match=r"a smaller model, or GPUs with \d\.\d GiB \(p = "):
        mics.plan(bert, small(0.2), sequence=512)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro_batch": 4}, r"no option micro_batch; did you mean micro_batches\?"),
        ({"micro_batches": 4}, r"micro_batches is what to try, got 4(.|\n)*Write: \[4\]"),
        ({"micro_batches": [1.5]}, "micro_batches must be a whole number, at least 1, got 1.5"),
        ({"global_batch": 96, "micro_steps": 7}, "micro_steps follow from global_batch"),
        ({"sequence": 0}, "does not take a sequence of 0"),
        ({"sequence": 513}, "does not take a sequence of 513"),
        ({"micro_batches": []}, "micro_batches is empty"),
        ({"micro_batches": [0]}, "micro_batches must be a whole number, at least 1, got 0"),
        ({"partitions": ()}, "partitions is empty"),
        ({"checkpointing": ()}, "checkpointing is empty"),
        ({"micro_steps": 0}, "micro_steps must be a whole number, at least 1, got 0"),
        ({"global_batch": -16}, "global_batch must be a whole number, at least 1, got -16"),
        ({"fragmentation": -1.0}, "fragmentation must be a number, at least 1, got -1.0"),
        ({"fragmentation": float("nan")}, "fragmentation must be a number, at least 1, got nan"),
        ({"micro_batches": [99999999999]}, "micro_batches must be at most 65,536, got 99999999999"),
        ({"micro_steps": 10**20}, "micro_steps must be at most 4,294,967,296, got 1000"),
        ({"global_batch": 10**30}, "global_batch must be at most 4,294,967,296, got 1000"),
        ({"prefetch": 10**9}, "prefetch must be at most 1,024, got 1000000000"),
        ({"fragmentation": 1e300}, "fragmentation must be at most 10.0, got 1e[+]300"),
        ({"prefetch": -1}, "prefetch must be a whole number, at least 0"),
        ({"sigma": -0.1}, "sigma must be a number, at least 0"),
        ({"runtime_gib": float("inf")}, "runtime_gib must be a number, at least 0, got inf"),
        ({"optimizer": "adam"}, r"no optimizer 'adam'(.|\n)*adamw, adamw-fused"),
        ({"stack": "none"}, "no software stack 'none'"),
        ({"blocks": torch.nn.Linear}, "An anatomy has its loss, its blocks and its dtype"),
        ({"dtype": torch.float32}, "An anatomy has its loss, its blocks and its dtype"),
        ({"dtype": "bf16"}, "dtype must be one of torch.bfloat16"),
        ({"dtype": torch.int8}, "dtype must be one of torch.bfloat16"),
        ({"sequence": "128"}, "whole number of tokens, got '128'"),
        ({"optimizer": ["adamw"]}, "no optimizer"),
        ({"checkpointing": ["none"]}, "checkpointing must be False or True"),
        ({"pipelined": "no"}, "pipelined must be False or True"),
        ({"reduce_bytes": 3}, "reduce_bytes must be 2 or 4, got 3"),
    ],
)
def test_figures_that_cannot_be_are_refused(
    bert: Anatomy, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        mics.plan(bert, small(), **{"sequence": 128, **options})


def test_a_global_batch_decides_the_micro_steps(bert: Anatomy) -> None:
    plans = mics.plan(
        bert, small(), sequence=128, global_batch=128, runtime_gib=0.3, communicator_gib=0.05
    )
    for plan in plans:
        assert plan.way.micro_batch * plan.way.micro_steps * 16 == 128
    with pytest.raises(PlanError, match=r"divides a global batch of 100(.|\n)*--global-batch 96"):
        mics.plan(bert, small(), sequence=128, global_batch=100)


def test_an_illegal_partition_lists_the_legal_ones(bert: Anatomy) -> None:
    with pytest.raises(PlanError, match=r"partition 3 is not possible(.|\n)*1 2 4 8 16"):
        mics.plan(bert, small(), sequence=128, partitions=(3,))


@pytest.mark.parametrize("text", ["p4d", "p4d:", "p4d:0", "p4d:x", ":4", "p4d:\u00b2", 8])
def test_a_cluster_has_a_node_and_a_number(text: str) -> None:
    with pytest.raises(PlanError):
        mics.plan("bert-large", text, sequence=128)


def test_a_module_of_ones_own_is_planned() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Linear(512, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.weight(x))

    model = torch.nn.Sequential(*(Layer() for _ in range(4)))

    def loss(model: Any, micro_batch: int, sequence: int) -> torch.Tensor:
        x = torch.zeros(micro_batch, sequence, 512, device="meta", dtype=torch.bfloat16)
        value: torch.Tensor = model(x).sum()
        return value

    plans = mics.plan(model, "p4d:2", sequence=64, loss=loss, blocks=Layer)
    assert plans[0].way.partition in (1, 2, 4, 8, 16)
    assert plans[0].way.compute_bytes == 2
    whole = mics.plan(model, "p4d:2", sequence=64, loss=loss, dtype=torch.float32)
    assert whole[0].way.compute_bytes == 4
    gathers = [next(p for p in found if p.way.partition == 16) for found in (whole, plans)]
    assert gathers[0].inter_bytes > gathers[1].inter_bytes
    step = mics.simulate(plans[0], "fsdp2", timeline=True)
    assert step.timeline
    with pytest.raises(PlanError, match="no engine 'zero4'"):
        mics.simulate(plans[0], "zero4")  # type: ignore[arg-type]


def test_failures_cost() -> None:
    where = Cluster(find_node("p4d"), 8)
    assert 0.97 < goodput(where) < 1
    assert goodput(Cluster(find_node("p4d"), 2048)) < goodput(where)
    never = Reliability(failures=0.0, save=0.0)
    assert goodput(where, never) == 1.0
    assert dollars(where, 3600 * goodput(where)) == pytest.approx(8 * 21.957642)
    free = dataclasses.replace(where, node=dataclasses.replace(where.node, price=None))
    assert dollars(free, 3600) is None
    hopeless = Cluster(find_node("p4d"), 100_000)
    assert dollars(hopeless, 3600) is None
    assert wall_seconds(hopeless, 3600) is None
    assert [as_dollars(x) for x in (None, 0.000123, 0.5, 2000)] == [
        "n/a",
        "$0.00012",
        "$0.50",
        "$2,000",
    ]


def test_a_pareto_set_has_no_plan_another_beats_in_both(found: Search) -> None:
    chosen = pareto_set(found.plans)
    assert chosen[0] is max(found.plans, key=lambda plan: plan.tokens_per_second)
    for plan in found.plans:
        for best in chosen:
            assert not (
                plan.tokens_per_second > best.tokens_per_second
                and price(plan) < price(best) * (1 - 1e-9)
            )


def price(plan: Plan) -> float:
    found = plan.dollars_per_billion_tokens
    assert found is not None
    return found


def test_scaling_keeps_the_work_or_shares_it(found: Search) -> None:
    plan = found.plans[0]
    weak = weak_scaling(plan, ("mics", "fsdp2"), (4, 8, 16))
    assert [gpus for gpus, _ in weak["mics"]] == [16, 32, 64]
    speeds = [speed for _, speed in weak["mics"]]
    assert speeds == sorted(speeds)
    strong = strong_scaling(plan, ("mics",), (4, 8, 16, 12))
    assert [gpus for gpus, _ in strong["mics"]] == [16, 32, 64]  # 12 does not divide the batch
    assert strong["mics"][-1][1] <= weak["mics"][-1][1]


def test_engines_that_keep_everything_are_told_when_they_would_not_fit(found: Search) -> None:
    plan = next(p for p in found.plans if p.way.partition == 16)
    engines: tuple[EngineName, ...] = ("mics", "ddp", "zero2", "fsdp2")
    (ddp,) = too_large(dataclasses.replace(plan, cluster=small(4.0)), engines)
    assert re.match(r"ddp would need \d\.\d\d of 4 GiB for a step: it is simulated as if", ddp)
    notes = too_large(dataclasses.replace(plan, cluster=small(0.9)), engines)
    assert [note.split()[0] for note in notes] == ["ddp", "zero2"]
    assert too_large(dataclasses.replace(plan, cluster=small(64.0)), engines) == []


def test_a_range_doubles() -> None:
    assert parse_range("nodes=2..64") == [2, 4, 8, 16, 32, 64]
    assert parse_range("3..13") == [3, 6, 12]
    for text in ("2", "4..2", "0..4", "a..b", "nodes=2-4", "\u00b2..4", f"1..{'9' * 5000}"):
        with pytest.raises(PlanError, match="is no range"):
            parse_range(text)
