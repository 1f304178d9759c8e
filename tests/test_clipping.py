"""Gradients clipped by every norm as in one process, with empty shards and on two meshes."""

from __future__ import annotations

import functools
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import full, seeded
from parity import quiet
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mics
from mics.errors import ConfigError
from mics.ranks.issuing import all_reduce
from mics.sharding import clipping

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


# -- the norm alone ------------------------------------------------------------------------------


class _Reads(TorchDispatchMode):
    """Counts what waits for a device: reading a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _right(tensors: list[torch.Tensor], order: float) -> float:
    flat = [tensor.double().flatten() for tensor in tensors]
    return float(torch.linalg.vector_norm(torch.cat(flat), order))


def _dtypes(dtype: torch.dtype) -> list[str]:
    """What is wrong about the norm of gradients of one dtype, of copies of them, and of weights."""
    wrong = []
    model = _layers().to(dtype)
    whole = [param.detach().clone() for param in model.parameters()]
    mics.fully_shard(model, mesh=mesh_of_rank(2))
    for param, value in zip(model.parameters(), whole, strict=True):
        param.grad = distribute_tensor(200 * value, param.device_mesh, param.placements)
    gradients = [param.grad for param in model.parameters()]
    for order, foreach in itertools.product(NORMS, (None, True, False)):
        for tensors, factor in (
            (gradients, 200),
            (iter(gradients), 200),
            ([2 * gradient for gradient in gradients], 400),
            (model.parameters(), 1),
        ):
            with _Reads() as reads:
                norm = mics.get_total_norm(tensors, order, foreach=foreach)
            right = _right([factor * value for value in whole], order)
            if reads.count or norm.dtype != torch.promote_types(dtype, torch.float32):
                wrong.append(f"{dtype}: {reads.count} reads, {norm.dtype}")
            if not abs(float(norm) / right - 1) < 1e-5:
                wrong.append(f"{dtype}, {order}, {foreach}: {float(norm)} for {right}")
    return wrong


def test_get_total_norm_is_one_processs_for_every_dtype_and_reads_nothing():
    """fp16 gradients of 200 times the weights: their squares are above what fp16 holds."""

    def rank() -> list[str]:
        dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        wrong = [one for dtype in dtypes for one in _dtypes(dtype)]
        model = mics.fully_shard(_layers(), mesh=mesh_of_rank(2))
        model(torch.ones(2, 5)).sum().backward()
        gradients = [param.grad for param in model.parameters()]
        for function in (mics.get_total_norm, partial(_clip, model)):
            with _Reads() as reads:
                function(gradients, error_if_nonfinite=True)
            assert reads.count == 1
        if dist.get_rank() % 2:
            gradients[0].to_local().view(-1)[0] = math.nan
        for function in (mics.get_total_norm, partial(_clip, model)):
            before = [full(gradient) for gradient in gradients[1:]]
            with pytest.raises(RuntimeError, match=r"norm of order 2.0 is not finite") as raised:
                function(gradients, error_if_nonfinite=True)
            assert isinstance(raised.value, mics.MicsError)
            assert "error_if_nonfinite=False" in str(raised.value)
            after = [full(gradient) for gradient in gradients[1:]]
            assert all(map(torch.equal, before, after))
        assert mics.get_total_norm([]) == 0
        return wrong

    assert run_ranks(quiet, 4, rank) == [[]] * 4


def _clip(model: nn.Module, _: Any, error_if_nonfinite: bool) -> torch.Tensor:
    return mics.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=error_if_nonfinite)


class _WithExpert(nn.Module):
    """A layer of all ranks and an expert that only every other rank has."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.dense = nn.Linear(5, 5)
        self.expert = seeded(lambda: nn.Linear(5, 3), 10 + number)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expert(self.dense(x))


def _expert_norms(partition: int, unused: bool) -> tuple[list[float], list[tuple[int, ...]]]:
    """Norms of all orders, and the ranks of the groups they were added up over."""
    names = ("replicate", "shard", "ep")
    held_by = _expert_mesh(names)
    number = dist.get_rank() % 2
    model = seeded(lambda: _WithExpert(number))
    mics.fully_shard(model.expert, mesh=held_by["replicate", "shard"])
    mics.fully_shard(model, mesh=mesh_of_rank(partition))
    model(torch.ones(2, 5)).sum().backward()
    for param in model.parameters():  # of known values
        param.grad.to_local().fill_(1.0)
    for param in model.expert.parameters():
        param.grad.to_local().fill_(2.0 + number)
        param.grad = None if unused and number else param.grad
    asked: list[tuple[int, ...]] = []

    def noted(part: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **named: Any):
        asked.append(tuple(dist.get_process_group_ranks(group)))
        all_reduce(part, op, group, **named)

    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipping, "all_reduce", noted)
        norms = [float(mics.get_total_norm(gradients, order)) for order in NORMS]
    return norms, asked


def _refuse_copies_on_a_mesh_that_two_share() -> None:
    """A layer with replicas and one without, over the same shards."""
    model = _layers()
    mics.fully_shard(model[0], mesh=mesh_of_rank(2)["shard"])
    mics.fully_shard(model, mesh=mesh_of_rank(2))
    model(torch.ones(2, 5)).sum().backward()
    gradients = [param.grad for param in model.parameters()]
    assert mics.get_total_norm(gradients) > 0
    with pytest.raises(ConfigError, match="nobody can tell how many ranks hold it") as raised:
        mics.get_total_norm([gradient.clone() for gradient in gradients])
    assert "They are on 2 and 4 ranks." in str(raised.value)
    assert "mics.get_total_norm of the gradients themselves" in str(raised.value)


@functools.cache
def _expert_mesh(names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=names)


def test_the_norm_of_experts_is_added_up_inside_a_replica_that_has_all_of_them():
    """Also where the experts of some ranks have no gradient, which those do not hand in."""

    def rank() -> list[Any]:
        _refuse_copies_on_a_mesh_that_two_share()
        cases = itertools.product((2, 1, 4), (False, True))
        return [_expert_norms(partition, unused) for partition, unused in cases]

    for number, answers in enumerate(run_ranks(quiet, 4, rank)):
        for (partition, unused), (norms, asked) in zip(
            itertools.product((2, 1, 4), (False, True)), answers, strict=True
        ):
            values = [1.0] * 30 + [2.0] * 18 + [3.0] * (0 if unused else 18)
            right = [float(torch.linalg.vector_norm(torch.tensor(values), o)) for o in NORMS]
            assert norms == pytest.approx(right, rel=1e-5), (partition, unused)
            own = {tuple(range(number // 2 * 2, number // 2 * 2 + 2))}
            if partition == 2:
                assert set(asked) == own
