"""Gradients clipped by every norm as in one process, with empty shards and on two meshes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import full, seeded
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.errors import ConfigError

NORMS = (1.0, 2.0, 3.0, math.inf)


def _layers() -> nn.Module:
    return seeded(lambda: nn.Sequential(*[nn.Linear(5, 5) for _ in range(3)]))


def _clipped(norm_type: float, model: Any, clip: Any) -> list[torch.Tensor]:
    """The norm before, the norm when nothing is to be clipped, and the gradients."""
    params = [*model.parameters(), nn.Parameter(torch.ones(2))]  # one without a gradient
    model.zero_grad()
    model(torch.ones(2, 5)).square().sum().backward()
    before = clip(params, 0.3, norm_type=norm_type)
    after = clip(params, 1e6, norm_type=norm_type)
    assert float(after) == pytest.approx(0.3, rel=1e-4)
    return [before, *(full(param.grad) for param in model.parameters())]


def test_clipping_sharded_gradients_gives_one_processs_norm_and_gradients():
    """5 rows over 4 ranks are 2, 2, 1 and none; over 2 ranks there are two replicas."""

    def rank() -> list[Any]:
        found = []
        for partition in (4, 2):
            model = mics.shard(_layers(), partition=partition, mp_policy=MixedPrecisionPolicy())
            found += [_clipped(norm, model, mics.clip_grad_norm_) for norm in NORMS]
        model.zero_grad()
        assert mics.clip_grad_norm_(model[0].weight, 1.0) == 0
        with pytest.raises(ConfigError, match=r"norm_type = 0 is not the order of a norm"):
            mics.clip_grad_norm_(model.parameters(), 1.0, 0)
        return found

    expected = [_clipped(norm, _layers(), nn.utils.clip_grad_norm_) for norm in NORMS] * 2
    for answer in run_ranks(rank, 4):
        for ours, alone in zip(answer, expected, strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-7)


def test_clipping_over_two_meshes_and_whole_gradients_counts_each_once():
    def rank() -> list[Any]:
        model = _layers()
        for layer, partition in zip(model[:2], (4, 2), strict=True):
            mics.fully_shard(layer, mesh=mics.init_mesh(partition=partition))
        return [_clipped(norm, model, mics.clip_grad_norm_) for norm in NORMS]

    expected = [_clipped(norm, _layers(), nn.utils.clip_grad_norm_) for norm in NORMS]
    for answer in run_ranks(rank, 4):
        for ours, alone in zip(answer, expected, strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_no_number_on_one_rank_makes_no_finite_norm_on_any():
    def rank() -> list[float]:
        model = mics.shard(_layers(), partition=4, mp_policy=MixedPrecisionPolicy())
        model(torch.ones(2, 5)).sum().backward()
        if dist.get_rank() == 1:
            model[0].weight.grad.to_local()[0, 0] = math.nan
        return [float(mics.clip_grad_norm_(model.parameters(), 1.0, n)) for n in (2.0, math.inf)]

    for norms in run_ranks(rank, 4):
        assert not any(map(math.isfinite, norms))
