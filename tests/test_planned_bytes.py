"""Bytes of a plan are those that ``mics.traffic`` predicts and the ledger counts."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics import traffic
from mics.anatomy.anatomy import Anatomy
from mics.anatomy.recipe import Recipe
from mics.anatomy.sizes import UnitSize
from mics.hardware.cluster import Cluster
from mics.hardware.lookup import find_node
from mics.models.building import build, load_config
from mics.planning.plan import search
from mics.planning.question import Question
from mics.planning.subject import subject
from mics.simulation.engine_step import inter_bytes
from mics.topology import Topology

NODES, K = 4, 2
WORLD = NODES * K
DTYPES = (2, 4)


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return subject("gpt2-tiny", vocabulary=1024)


def cluster(nodes: int = NODES, *, gloo: bool = False) -> Cluster:
    return Cluster(dataclasses.replace(find_node("p4d"), gpus_per_node=K, gloo=gloo), nodes)


def as_block(unit: UnitSize, recipe: Recipe, gathers: int) -> traffic.Block:
    """A unit as FSDP2 pads it; hop 2 is in the dtype of hop 1's reduction."""
    p = recipe.partition
    reduced = recipe.reduce_bytes * unit.trained(p)
    return traffic.Block(recipe.compute_bytes * unit.numel(p), reduced, reduced // p, gathers)


def by_the_ledgers_rule(anatomy: Anatomy, recipe: Recipe, rule: Any, **how: Any) -> Any:
    """Bytes that leave a node, by ``mics.traffic``, on average over all nodes."""
    blocks = [as_block(unit, recipe, 2) for unit in anatomy.blocks]
    blocks.append(as_block(anatomy.root, recipe, 1))
    topology = Topology(NODES, K, recipe.partition)
    sent = [rule(topology, blocks, recipe.micro_steps, rank=rank, **how) for rank in range(WORLD)]
    return traffic.node_inter_bytes(sent) / NODES


@pytest.mark.parametrize("partition", [1, 2, 4, 8])
def test_bytes_of_a_plan_are_the_ledgers_for_all_dtypes_forms_and_micro_steps(
    partition: int, anatomy: Anatomy
) -> None:
    for compute, reduce, micro_steps in product(DTYPES, DTYPES, (1, 2, 3, 7)):
        recipe = Recipe(
            1, micro_steps=micro_steps, sequence=64, compute_bytes=compute, reduce_bytes=reduce
        )
        question = Question(
            recipe, micro_batches=(1,), partitions=(partition,), checkpointing=(True,)
        )
        plans = search(anatomy, cluster(), question).plans
        assert len(plans) == (2 if partition > K else 1)
        for plan in plans:
            form = plan.way.form
            forms = {"all_gather": form, "reduce_scatter": form}
            expected = by_the_ledgers_rule(anatomy, plan.way, traffic.mics, **forms)
            assert plan.inter_bytes == int(expected), (compute, reduce, micro_steps, form)


@pytest.mark.parametrize("partition", [1, 2, 4, 8])
def test_bytes_of_other_engines_follow_the_reduce_dtype_too(
    partition: int, anatomy: Anatomy
) -> None:
    rules: dict[Any, tuple[Any, dict[str, Any]]] = {
        "hsdp deferred": (traffic.hsdp, {"deferred": True}),
        "hsdp every micro-step": (traffic.hsdp, {"deferred": False}),
    }
    whole: dict[Any, tuple[Any, dict[str, Any]]] = {
        "fsdp2": (traffic.fsdp, {}),
        "ddp": (traffic.ddp, {"deferred": True}),
    }
    for compute, reduce, micro_steps in product(DTYPES, DTYPES, (1, 4)):
        recipe = Recipe(
            partition, micro_steps=micro_steps, compute_bytes=compute, reduce_bytes=reduce
        )
        for engine, (rule, how) in rules.items():
            expected = by_the_ledgers_rule(anatomy, recipe, rule, **how)
            assert inter_bytes(engine, anatomy, cluster(), recipe) == expected, (engine, recipe)
        for engine, (
            rule,
            how,
        ) in whole.items():  # units are padded for the group they are split in
            group = dataclasses.replace(recipe, partition=WORLD if engine == "fsdp2" else 1)
            expected = by_the_ledgers_rule(anatomy, group, rule, **how)
            assert inter_bytes(engine, anatomy, cluster(), recipe) == expected, (engine, recipe)


def test_a_plan_in_bf16_sends_half_of_one_in_fp32_where_only_replicas_talk() -> None:
    fp32, bf16 = (
        mics.plan("gpt2-tiny", "p4d:2", partitions=[8], micro_batches=[1], reduce_bytes=reduce)[0]
        for reduce in (4, 2)
    )
    # Two replicas: a node's ranks send their gradients once, 843,520 parameters of 4 or 2 bytes.
    assert (fp32.inter_bytes, bf16.inter_bytes) == (3_374_080, 1_687_040)
    assert mics.simulate(bf16).total[2] < mics.simulate(fp32).total[2]


# -- ranks that train ----------------------------------------------------------------------------


def _counted(partition: int, form: Any, reduce_dtype: torch.dtype, bits: Any) -> int:
    """What this rank counts over the slow link in a step of two micro-steps, 2 nodes x 2 ranks."""
    torch.manual_seed(0)
    model = mics.shard(
        build(load_config("gpt2-tiny", vocabulary=1024, separator=0), device="cpu"),
        partition=partition,
        gpus_per_node=K,
        mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype),
        collectives=form,
        hop_two=bits,
    )
    ids = torch.randint(0, 1024, (2, 1, 16))
    for counted in (False, True):  # the first step sets up
        if counted:
            mics.ledger(model).reset()
        for part in mics.micro_steps(model, list(ids)):
            model(input_ids=part, labels=part).loss.backward()
        model.zero_grad()
    return int(mics.ledger(model).traffic().flow.inter_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("reduce_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("partition", "form", "bits"),
    [
        *[(2, "flat", None), (4, "flat", None), (4, "hierarchical", None)],
        *[(1, "flat", None), (1, "hierarchical", None), (1, "hierarchical", "bf16")],
        *[(2, "flat", "bf16"), (2, "flat", "fp8"), (1, "flat", "int8")],
    ],
    ids=str,
)
def test_bytes_planned_for_ranks_on_gloo_are_what_they_count(
    partition: int, form: Any, bits: Any, reduce_dtype: torch.dtype, anatomy: Anatomy
) -> None:
    counted = run_ranks(_counted, 4, partition, form, reduce_dtype, bits)
    recipe = Recipe(
        partition,
        micro_steps=2,
        form=form,
        reduce_bytes=reduce_dtype.itemsize,
        hop_two=bits,
        hop_two_form=form,
    )
    planned = inter_bytes("mics", anatomy, cluster(2, gloo=True), recipe)
    assert planned * 2 == sum(counted)
    assert planned > 0
