"""What gather hooks send themselves is in the ledger and in the prediction, byte for byte.

On four ranks, two to a node. What is really sent is seen by a dispatch mode of the tests' own,
which knows neither of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from low_precision import FLOAT8, Cast, Float8, scale_of
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode

import mics
from mics.errors import ConfigError
from mics.traffic import Count, Key

WORLD, WIDTH, MICRO_STEPS = 4, 8, 3
FULL = MixedPrecisionPolicy()
HOP_0 = Key(0, "all_reduce", "flat")


class Agreed(Float8):
    """Float8 whose scale may be known beforehand, as torchao's."""

    known: torch.Tensor | None = None

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> Any:
        if self.known is None:
            return super().fsdp_pre_all_gather(mesh, outer_size, outer_stride, module, mp_policy)
        return ((self.values * self.known).to(FLOAT8),), self.known


class FewArguments(Agreed):
    """The same with the older hook."""

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:  # type: ignore[override]
        outer = (len(self.values) * mesh.size(), *self.values.shape[1:])
        return super().fsdp_pre_all_gather(mesh, outer, None, None, None)


class Wire(TorchDispatchMode):
    """Notes the all-reduces of one float to other ranks, which are scales."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allreduce_" in str(func) and dist.ProcessGroup.unbox(args[1]).size() > 1:
            (tensor,) = args[0]
            self.calls += tensor.numel() == 1 and tensor.is_floating_point() and not tensor.is_meta
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Way:
    """One way to shard and to communicate."""

    partition: int
    collectives: Literal["flat", "hierarchical"] = "flat"
    reshard: bool | None = None
    overlap: bool = True
    kind: type[Float8] = Agreed


WAYS = [
    Way(4, "hierarchical", kind=FewArguments),
    Way(4, reshard=True),
    Way(4, reshard=False, overlap=False),
    Way(2, reshard=True, overlap=False),
    Way(1),
]


def net(kind: type[Float8]) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]
    for block in blocks:
        block[0].weight = nn.Parameter(kind(block[0].weight.detach()))
    return nn.Sequential(*blocks)


def hop_0(model: nn.Module) -> Count:
    return mics.ledger(model).traffic().counts.get(HOP_0, Count())


def step(model: nn.Module, wire: Wire) -> str:
    """Train one step; what was counted otherwise than predicted, or than was sent."""
    predicted = mics.predict_traffic(model, micro_steps=MICRO_STEPS)
    view = mics.ledger(model)
    view.reset()
    wire.calls = 0
    with wire:
        for x in mics.micro_steps(model, [torch.ones(2, WIDTH)] * MICRO_STEPS):
            model(x).square().mean().backward()
    counted = view.traffic()
    if counted == predicted and hop_0(model).calls == wire.calls:
        return ""
    return f"counted\n{counted}\npredicted\n{predicted}\nsent {wire.calls}"


def train(way: Way) -> tuple[list[str], list[int]]:
    """What went wrong, and how many scales there were: in steps, evaluation, with known scales."""
    model, wire = net(way.kind), Wire()
    mics.shard(
        model,
        mesh=mesh_of_rank(way.partition, 2),
        blocks=list(model),
        mp_policy=FULL,
        collectives=way.collectives,
        reshard_after_forward=way.reshard,
        overlap=way.overlap,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong, calls = [], []
    for _ in range(2):
        wrong.append(step(model, wire))
        calls.append(hop_0(model).calls)
        optimizer.step()
        optimizer.zero_grad()
    mics.ledger(model).reset()
    wire.calls = 0
    with wire, torch.no_grad():
        model.eval()
        model(torch.ones(2, WIDTH))
        model(torch.ones(2, WIDTH))
        model.train()
    calls.append(hop_0(model).calls)
    wrong.append("" if calls[-1] == wire.calls else f"{calls[-1]} of {wire.calls} in evaluation")
    wrong.append(step(model, wire))  # FSDP2 would gather a block more, see ``compat.num_uses``
    optimizer.zero_grad()
    for block in model:
        whole = block[0].weight.full_tensor()
        block[0].weight._local_tensor.known = scale_of(whole.abs().amax(), FLOAT8)
    wrong.append(step(model, wire))
    calls.append(hop_0(model).calls)
    return wrong, calls


def test_scales_that_hooks_agree_on_are_counted_and_predicted_while_they_are_sent() -> None:
    def all_ways() -> list[Any]:
        return [train(way) for way in WAYS]

    for rank in run_ranks(all_ways, WORLD, ranks_per_node=2):
        for way, (wrong, calls) in zip(WAYS, rank, strict=True):
            assert not any(wrong), f"{way}: {wrong}"
            in_forward = 0 if way.partition == 1 else 3 * MICRO_STEPS
            in_backward = 0 if way.reshard is False else in_forward
            assert calls[:2] == [in_forward + in_backward] * 2, way
            assert calls[2] == (0 if way.partition == 1 else 6), way
            assert calls[3] == 0, way


def test_a_scale_is_counted_on_the_link_that_it_takes() -> None:
    def gather() -> list[Count]:
        found = []
        for partition in (2, 4):
            model = net(Agreed)[:1]
            mics.fully_shard(model, mesh=mesh_of_rank(partition, 2), mp_policy=FULL)
            mics.ledger(model).reset()
            model(torch.ones(1, WIDTH)).sum().backward()
            assert mics.ledger(model).traffic() == mics.predict_traffic(model)
            found.append(hop_0(model))
        return found

    ranks = run_ranks(gather, WORLD, ranks_per_node=2)
    # 4 bytes: 2 x 4 x (n - 1) / n to the next rank, which is on another node behind ranks 1 and 3.
    for rank, (inside, between) in enumerate(ranks):
        assert (inside.calls, inside.message_bytes, inside.flow.intra_bytes) == (1, 4, 4)
        assert inside.flow.inter_bytes == 0
        flow = between.flow
        sent = (flow.intra_bytes, flow.inter_bytes)
        assert sent == ((0, Fraction(6)) if rank % 2 else (Fraction(6), 0))


class Told(Cast):
    """Broadcasts before each gather."""

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        first = dist.get_process_group_ranks(mesh.get_group())[0]
        dist.broadcast(self.values.new_zeros(3), first, mesh.get_group())
        return (self.values,), None

    def fsdp_post_all_gather(self, gathered: Any, _: Any, dtype: Any, *, out: Any = None) -> Any:
        return (gathered[0], gathered) if out is None else None


class ToAll(Cast):
    """Agrees on something with all ranks, whatever the partition."""

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        dist.all_reduce(self.values.new_zeros(2))
        return (self.values,), None

    def fsdp_post_all_gather(self, gathered: Any, _: Any, dtype: Any, *, out: Any = None) -> Any:
        return (gathered[0], gathered) if out is None else None


def test_what_a_hook_sends_and_nobody_counts_is_said_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def shard_all() -> str:
        for kind, partition in ((Told, 2), (ToAll, 1), (Told, 2), (Float8, 2)):
            model = nn.Sequential(nn.Linear(4, 4))
            model[0].weight = nn.Parameter(kind(model[0].weight.detach()))
            mics.fully_shard(model, mesh=mesh_of_rank(partition), mp_policy=FULL)
        with pytest.raises(ConfigError) as caught:
            mics.precompute_scales(model)
        return str(caught.value)

    (refused, _) = run_ranks(shard_all, 2)
    said = capfd.readouterr()
    text = said.out + said.err
    assert "Sequential has no sharded weight of torchao's float8 training" in refused
    words = "0.weight communicates itself whenever FSDP2 asks what is gathered of it ({}); the"
    assert text.count(words.format("broadcast of 12 bytes over 2 ranks")) == 1
    assert text.count(words.format("all_reduce of 8 bytes over 2 ranks")) == 1
    assert text.count("leave this out") == 2
