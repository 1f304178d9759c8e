"""Run one FSDP2 script with torch's fully_shard and with ours, and compare what they return."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from models import Example, full, gradients, loss_of, seeded, shard_blocks, weights
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard as torch_fully_shard

import mics

FullyShard = Callable[..., Any]
Answer = dict[str, Any]

ON_EVERY_RANK = ("weights", "gradients", "norms")
"""Entries of an answer that are the same on every rank, being whole tensors."""


@functools.cache  # new groups for every model cost more than the models; see ranks.py
def one_axis() -> DeviceMesh:
    """FSDP over the world, as torch's tutorial writes it."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


@functools.cache  # new groups for every model cost more than the models; see ranks.py
def two_axes() -> DeviceMesh:
    """HSDP, two replicas, with the names torchtitan uses."""
    shape = (2, dist.get_world_size() // 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def same_as_torch(
    script: Callable[[FullyShard], Answer], *, world: int = 4, tolerance: float = 0.0
) -> list[tuple[Answer, Answer]]:
    """Assert that ``script`` answers the same with torch's ``fully_shard`` and with ours.

    With tolerance 0, bit for bit. Also asserts that all ranks agree on whole tensors.

    Returns:
        For each rank, torch's answer and ours.
    """
    answers = run_ranks(lambda: (script(torch_fully_shard), script(mics.fully_shard)), world)
    for rank, (torchs, ours) in enumerate(answers):
        _assert_same(torchs, ours, tolerance, f"rank {rank}")
        _assert_ranks_agree(answers[0][1], ours, f"ranks 0 and {rank}")
    return answers


def _assert_ranks_agree(first: Answer, other: Answer, where: str) -> None:
    for key, value in other.items():
        if key in ON_EVERY_RANK:
            _assert_same(first[key], value, 0.0, f"{where}, {key}")
        elif isinstance(value, dict):
            _assert_ranks_agree(first[key], value, f"{where}, {key}")


def _assert_same(expected: Any, got: Any, tolerance: float, where: str) -> None:
    assert type(expected) is type(got), f"{where}: {type(expected)} and {type(got)}"
    if isinstance(expected, dict):
        assert list(expected) == list(got), f"{where}: {list(expected)} and {list(got)}"
        for key in expected:
            _assert_same(expected[key], got[key], tolerance, f"{where}, {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(got), where
        for i, (one, other) in enumerate(zip(expected, got, strict=True)):
            _assert_same(one, other, tolerance, f"{where}, {i}")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{where}: {m}"
        )
    else:
        assert expected == got, f"{where}: {expected} and {got}"


def micro_batches(model: Any, step: int, count: int) -> list[Example]:
    """This rank's examples of one step; no two ranks or micro-steps see the same."""
    rank = dist.get_rank()
    return [model.example(1000 * step + 100 * i + rank) for i in range(count)]


def train(
    fully_shard: FullyShard,
    make: Callable[[], nn.Module],
    *,
    steps: int = 2,
    micro_steps: int = 1,
    accumulate: str = "every backward",
    clip: float | None = None,
    set_to_none: bool = True,
    prepare: Callable[[Any], None] = lambda model: None,
    **keywords: Any,
) -> Answer:
    """A training script for FSDP2, run on this rank.

    Args:
        fully_shard: torch's or ours.
        make: makes the model.
        steps: optimizer steps.
        micro_steps: backwards per step.
        accumulate: what the user switches off before the last micro-step, "gradient sync" or
            "all-reduce"; or "every backward" for nothing.
        clip: the norm to clip to.
        set_to_none: as ``zero_grad``'s.
        prepare: called with the sharded model.
        keywords: passed to ``fully_shard``.
    """
    model = shard_blocks(fully_shard, seeded(make), **keywords)
    prepare(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9, foreach=True)
    losses, norms, grads = [], [], {}
    for step in range(steps):
        examples = micro_batches(model, step, micro_steps)
        for i, example in enumerate(examples):
            last = i == micro_steps - 1
            if accumulate == "gradient sync":
                model.set_requires_gradient_sync(last)
            elif accumulate == "all-reduce":
                model.set_requires_all_reduce(last)
            loss = loss_of(model, example)
            loss.backward()
            losses.append(loss.detach())
        grads = gradients(model)
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(trainable, clip, foreach=True)
            norms.append(full(norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return {"losses": losses, "norms": norms, "gradients": grads, "weights": weights(model)}


def train_alone(
    make: Callable[[], nn.Module],
    *,
    ranks: int = 4,
    steps: int = 2,
    micro_steps: int = 1,
    clip: float | None = None,
) -> Answer:
    """What ``train`` must come to, in one process without any sharding."""
    model: Any = seeded(make)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)
    norms, grads = [], {}
    for step in range(steps):
        for i in range(micro_steps):
            for rank in range(ranks):
                loss = loss_of(model, model.example(1000 * step + 100 * i + rank))
                (loss / ranks).backward()
        grads = gradients(model)
        if clip is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(trainable, clip))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, "gradients": grads, "weights": weights(model)}


def assert_like_alone(answer: Answer, alone: Answer) -> None:
    """To the rounding of another order of summation."""
    for entry in ("norms", "gradients", "weights"):
        _assert_same(alone[entry], answer[entry], 2e-6, entry)


def without_the_warning_about_repeats(script: Callable[[], Answer]) -> Answer:
    """Run a script that accumulates with hop 2 on every backward; ours warns of it once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Hop 2 runs more than once", mics.MicsWarning)
        return script()
