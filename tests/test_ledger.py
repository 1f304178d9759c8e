"""What is counted equals what is predicted, exactly."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import WIDTH, Run, Stack, batches, loss_of, quiet
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import mics
from mics import traffic
from mics.communication import backend, two_stages
from mics.communication.ledger import Seconds, Untimed
from mics.topology import possible_partitions
from mics.traffic import Block, Key

ITEM = 4  # bytes of fp32


def _sharded(run: Run) -> nn.Module:
    return quiet(
        lambda: mics.shard(
            Stack(**run.model),
            mesh=mesh_of_rank(run.partition, run.gpus_per_node),
            collectives=run.collectives,
            mp_policy=run.mp_policy,
            **run.shard,
        )
    )


def _one_step(model: nn.Module, run: Run) -> None:
    (step,) = batches(run, dist.get_world_size())
    for micro in mics.micro_steps(model, step[:, dist.get_rank()]):
        loss_of(model(micro)).backward()


def padded(shape: tuple[int, ...], p: int) -> int:
    """Elements of a parameter whose first dim is padded to a multiple of p."""
    rows = -(-shape[0] // p) * p
    return rows * shape[1] if len(shape) > 1 else rows


def blocks_by_hand(p: int, num_blocks: int) -> list[Block]:
    """The units of ``Stack`` in fp32: its blocks, and a root that stays gathered."""
    block = padded((17, WIDTH), p) + padded((17,), p) + padded((WIDTH, 17), p)
    root = 2 * padded((WIDTH, WIDTH), p)
    return [
        *[Block(ITEM * block, ITEM * block, ITEM * block // p) for _ in range(num_blocks)],
        Block(ITEM * root, ITEM * root, ITEM * root // p, gathers=1),
    ]


def _count_grid(runs: list[Run]) -> list[traffic.Traffic]:
    counted = []
    for run in runs:
        model = _sharded(run)
        _one_step(model, run)
        view = mics.ledger(model)
        counted.append(view.traffic())
        assert view.traffic() == mics.predict_traffic(model, micro_steps=run.micro_steps)
    return counted


@pytest.mark.parametrize(
    "gpus_per_node",
    [2, *(pytest.param(k, marks=pytest.mark.extra) for k in (1, 4, 8))],
)
def test_ledger_equals_traffic_on_the_whole_grid(gpus_per_node: int) -> None:
    """Every (R, N, k) of 8 ranks, s of 1 and 3, both forms, every rank, to the byte and message."""
    nodes = 8 // gpus_per_node
    runs = [
        Run(p, gpus_per_node, micro_steps=s, steps=1, collectives=form)
        for p, s, form in itertools.product(
            possible_partitions(nodes, gpus_per_node), (1, 3), ("flat", "hierarchical")
        )
    ]
    for rank, counted in enumerate(run_ranks(_count_grid, 8, runs)):
        for run, seen in zip(runs, counted, strict=True):
            form: Any = run.collectives
            blocks = blocks_by_hand(run.partition, 2)
            if form == "hierarchical" and nodes > 1:
                rows = ITEM * max(1, gpus_per_node // run.partition)  # one for each of a node
                blocks = [replace(b, sync_bytes=-(-b.sync_bytes // rows) * rows) for b in blocks]
            predicted = traffic.mics(
                mics.Topology(nodes, gpus_per_node, run.partition),
                blocks,
                run.micro_steps,
                all_gather=form,
                reduce_scatter=form,
                all_reduce=form,
                gloo=run.partition > gpus_per_node,  # inside a node it is an exchange
                rank=rank,
            )
            assert seen == predicted, (rank, run)


@pytest.mark.extra
def test_mixed_precision_and_resharding_to_a_node_are_predicted_too() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    variants: list[dict[str, Any]] = [
        {"mp_policy": policy},
        {"shard": {"reshard_after_forward": 2}},
        {"shard": {"reshard_after_forward": False}},
        {"shard": {"activation_checkpointing": True}},
        {"model": {"tied": True}},
        {"model": {"frozen": True}},
        {"shard": {"overlap": False}},
    ]
    runs = [
        Run(p, 2, micro_steps=2, steps=1, collectives="hierarchical", **variant)
        for variant in variants
        for p in (2, 4, 8)
    ]
    run_ranks(_count_grid, 8, runs)  # compares with mics.predict_traffic on every rank


def _bytes_halve_in_bf16() -> tuple[Fraction, Fraction]:
    sent = []
    for dtype in (None, torch.bfloat16):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        run = Run(2, 2, micro_steps=1, steps=1, mp_policy=policy)
        model = _sharded(run)
        _one_step(model, run)
        sent.append(mics.ledger(model).traffic().counts[Key(1, "all_gather", "flat")])
    return tuple(count.flow.intra_bytes for count in sent)  # type: ignore[return-value]


def test_bf16_parameters_halve_the_gathered_bytes() -> None:
    full, half = run_ranks(_bytes_halve_in_bf16, 4)[0]
    assert full == 2 * half > 0


def _times_and_reset(overlap: bool) -> tuple[dict[Key, Seconds], str, int]:
    layout = {"collectives": "hierarchical", "shard": {"overlap": overlap}}
    run = Run(4, 2, micro_steps=2, steps=1, **layout)
    model = _sharded(run)
    _one_step(model, run)
    view = mics.ledger(model)
    seconds, table = view.seconds(), str(view)
    view.reset()
    assert view.traffic() == traffic.Traffic({}) and view.seconds() == {}
    _one_step(model, run)
    assert view.traffic() == mics.predict_traffic(model, micro_steps=2)
    return seconds, table, len(view.ledgers)


@pytest.mark.parametrize("overlap", [False, True])
def test_every_stage_has_a_time_and_reset_starts_anew(overlap: bool) -> None:
    seconds, table, num_ledgers = run_ranks(_times_and_reset, 8, overlap)[0]
    assert num_ledgers == 3
    assert set(seconds) == {
        Key(1, "all_gather", "inter"),
        Key(1, "all_gather", "intra"),
        Key(1, "reduce_scatter", "inter"),
        Key(1, "reduce_scatter", "intra"),
        Key(2, "all_reduce", "flat"),
    }
    for key, spent in seconds.items():
        assert spent.total > 0 and spent.exposed is not None and spent.exposed > 0
        if key.hop == 1 and not overlap:  # blocking on the CPU
            assert spent.exposed == spent.total
    assert len(table.splitlines()) == 6
    assert "sent inter" in table and "ms" in table


class _Stage(Untimed):
    """A stage of a reduction, and a backend that says when it begins and ends."""

    def __init__(self, name: str, happened: list[str]) -> None:
        self.name, self.happened = name, happened

    def restart(self) -> None:
        self.happened.append(f"time of {self.name} starts")

    def reduce(self, pieces: Any, op: Any, group: Any, span: Any, issue: Any) -> Any:
        self.happened.append(f"{span.name} begins")
        yield
        self.happened.append(f"{span.name} ends")


def test_the_second_stage_of_a_reduction_is_timed_from_the_end_of_the_first() -> None:
    happened: list[str] = []
    inter, intra = _Stage("inter", happened), _Stage("intra", happened)
    two_nodes: Any = SimpleNamespace(inter=SimpleNamespace(size=lambda: 2), intra=None)
    average: Any = dist.ReduceOp.AVG
    stages: Any = inter
    backend.run(two_stages.reduce_scatter(torch.empty(1), torch.ones(4), average, two_nodes,
                                          (inter, intra), backend.at_once, stages))  # fmt: skip
    assert happened == [
        *("intra begins", "intra ends"),
        *("time of inter starts", "inter begins", "inter ends"),
    ]


def test_time_that_is_unknown_stays_unknown() -> None:
    assert (Seconds(1.0, 0.5) + Seconds(1.0, None)).exposed is None
    assert (Seconds(1.0, 0.5) + Seconds(2.0, 0.25)) == Seconds(3.0, 0.75)


def _not_ours() -> None:
    mics.ledger(nn.Linear(2, 2))


def test_the_ledger_of_a_model_that_mics_did_not_shard_is_an_error() -> None:
    (text,) = errors_of_ranks(_not_ours, 1)
    assert "Linear has no module sharded by mics" in text
    assert "mics.shard(model)" in text


def _roots_that_are_not_the_model(how: str) -> None:
    """FSDP2 makes every outermost sharded module a root, at its first forward."""
    torch.manual_seed(0)
    if how == "wrapped":  # and with a frozen block, which has no hop 2
        run = Run(2, 2, micro_steps=2, steps=1, model={"frozen": True})
        model: nn.Module = nn.Sequential(_sharded(run))
    else:
        mesh = mics.init_mesh(partition=2, gpus_per_node=2)
        run = Run(2, 2, micro_steps=2, steps=1)
        model = Stack()
        for block in model.blocks:
            mics.fully_shard(block, mesh=mesh)
        for param in model.parameters():  # what no unit reduces may not train
            param.requires_grad_(isinstance(param, DTensor))
    predicted = mics.predict_traffic(model, micro_steps=2)
    view = mics.ledger(model)
    view.reset()
    _one_step(model, run)
    assert view.traffic() == predicted == mics.predict_traffic(model, micro_steps=2)


@pytest.mark.parametrize("how", ["wrapped", "blocks alone"])
def test_traffic_is_predicted_before_the_first_step_wherever_the_root_is(how: str) -> None:
    run_ranks(_roots_that_are_not_the_model, 4, how)
