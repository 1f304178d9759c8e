"""Small units share a message of hop 2: which do, what is counted, and what is trained."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parity import Run, Skipping, Stack, batches, loss_of, quiet, train_alone, train_sharded
from ranks import mesh_of_rank, run_ranks
from torch import nn

import mics
from mics.communication import joined as joining
from mics.communication.joined import joined
from mics.traffic import Key

MIB = 2**20
DEEP = {"num_blocks": 40}
HOP_2 = Key(2, "all_reduce", "flat")


@pytest.mark.parametrize(
    ("sizes", "messages"),
    [
        ([MIB] * 16, [[i] for i in range(16)]),
        ([MIB] * 32, [[i, i + 1] for i in range(0, 32, 2)]),
        ([MIB, 1, 1, 100 * MIB], [[0, 1, 2], [3]]),
        ([20 * MIB] * 100, [[i] for i in range(100)]),
        ([10 * MIB] * 99, [[i, i + 1] for i in range(0, 98, 2)] + [[98]]),
        ([], []),
    ],
    ids=["sixteen", "thirty-two", "small ones before", "25 MiB hold one", "two", "none"],
)
def test_units_that_follow_each_other_are_joined_while_they_are_small(
    sizes: list[int], messages: list[list[int]]
) -> None:
    assert joined(sizes, ["alike"] * len(sizes)) == messages


def test_units_of_another_kind_or_of_none_are_not_joined() -> None:
    assert joined([1] * 64, ["a"] * 3 + ["b"] * 61)[0] == [0, 1, 2]
    assert joined([1] * 64, [None] * 64) == [[i] for i in range(64)]


def _deep(partition: int, **model: object) -> nn.Module:
    torch.manual_seed(0)
    mesh = mesh_of_rank(partition, 2)
    return quiet(lambda: mics.shard(Stack(**DEEP, **model), mesh=mesh, collectives="flat"))


def _calls(partitions: list[int]) -> list[tuple[int, int]]:
    counted = []
    for partition in partitions:
        model = _deep(partition)
        (step,) = batches(Run(steps=1), dist.get_world_size())
        before = mics.predict_traffic(model, micro_steps=3)
        for micro in mics.micro_steps(model, step[:, dist.get_rank()]):
            loss_of(model(micro)).backward()
        sent = mics.ledger(model).traffic()
        assert sent == before == mics.predict_traffic(model, micro_steps=3)
        hop_2 = sent.counts[HOP_2]
        counted.append((hop_2.calls, hop_2.message_bytes))
    return counted


def test_deep_models_have_fewer_messages_of_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = run_ranks(_calls, 4, [1, 2], ranks_per_node=2)
    monkeypatch.setattr(joining, "MOST_BYTES", 0)  # inherited by the forked ranks
    alone = run_ranks(_calls, 4, [1, 2], ranks_per_node=2)
    for few, many in zip(together, alone, strict=True):
        for (calls, num_bytes), (units, all_bytes) in zip(few, many, strict=True):
            assert (units, num_bytes) == (41, all_bytes)
            assert calls == 21  # 40 blocks by twos, and the root, which is small too


def test_joined_units_train_as_one_process_does() -> None:
    runs = [
        Run(1, 2, model=DEEP),
        Run(2, 2, model=DEEP),
        Run(2, 2, model=DEEP | {"frozen": True}),
        Run(2, 2, model=DEEP, shard={"overlap": False}, optimizer="adamw"),
    ]
    for run in runs:
        alone = train_alone(run, 4)
        for outcome in run_ranks(train_sharded, 4, run, ranks_per_node=2):
            assert outcome.losses == pytest.approx(alone.losses, rel=1e-5)
            for name, weight in alone.weights.items():
                torch.testing.assert_close(outcome.weights[name], weight, rtol=1e-4, atol=1e-5)


def _skipping(partition: int) -> list[torch.Tensor | None]:
    """Ranks of the second node leave out every third block, and nobody uses the second."""
    torch.manual_seed(0)
    model = quiet(lambda: mics.shard(Skipping(num_blocks=40), mesh=mesh_of_rank(partition, 2)))
    model.left_out = frozenset([1, *range(0, 40 if dist.get_rank() > 1 else 0, 3)])
    generator = torch.Generator().manual_seed(1)
    for micro in mics.micro_steps(model, torch.randn(2, 4, 13, generator=generator)):
        loss_of(model(micro)).backward()
    return [
        None if p.grad is None else p.grad.full_tensor()  # type: ignore[attr-defined]
        for p in model.parameters()
    ]


@pytest.mark.parametrize("partition", [1, 2])
def test_blocks_that_a_replica_skips_get_what_they_get_alone(
    partition: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = run_ranks(_skipping, 4, partition, ranks_per_node=2)
    monkeypatch.setattr(joining, "MOST_BYTES", 0)
    alone = run_ranks(_skipping, 4, partition, ranks_per_node=2)
    for few, many in zip(together, alone, strict=True):
        assert [g is None for g in few] == [g is None for g in many]
        assert sum(g is None for g in few) == 3  # of the block that nobody uses
        for one, other in zip(few, many, strict=True):
            if one is not None and other is not None:
                torch.testing.assert_close(one, other)
