"""mics.deal: what it refuses, and that what does not count gives nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import errors_of_ranks, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import mics
from mics import compat

WIDTH = 4


def build(kind: str = "mics") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    if kind == "plain":
        return model
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2 flat":
        return fully_shard(model)
    if kind == "fsdp2":
        return fully_shard(model, mesh=mics.init_mesh(partition=1))
    return mics.shard(model, partition=1, blocks=[nn.Linear], mp_policy=MixedPrecisionPolicy())


def x_of(index: int) -> torch.Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(index))


def _gradients(kind: str, micro_batches: int) -> list[torch.Tensor]:
    model = build(kind)
    for micro in mics.deal(model, micro_batches):
        micro.backward(model(x_of(micro.index)).square().mean())
    return [compat.local_of(p.grad).clone() for p in model.parameters()]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mics", "fsdp2"])
def test_the_gradient_is_the_mean_over_what_counts(kind: str) -> None:
    """Also where a rank has nothing that counts."""
    model = build("plain")
    for micro_batches in (2, 5):
        model.zero_grad()
        for index in range(micro_batches):
            (model(x_of(index)).square().mean() / micro_batches).backward()
        for found in run_ranks(_gradients, 3, kind, micro_batches):
            for one, param in zip(found, model.parameters(), strict=True):
                assert param.grad is not None
                torch.testing.assert_close(one, param.grad, rtol=1e-5, atol=1e-7)


def _by_hand(model: nn.Module) -> None:
    for micro in mics.deal(model, 4):
        model(x_of(micro.index)).mean().backward()


def _twice(model: nn.Module) -> None:
    for micro in mics.deal(model, 4):
        loss = model(x_of(micro.index)).mean()
        micro.backward(loss)
        micro.backward(loss)


def _vector(model: nn.Module) -> None:
    for micro in mics.deal(model, 4):
        micro.backward(model(x_of(micro.index)).mean(dim=1))


def _some_tokens(model: nn.Module) -> None:
    for at, micro in enumerate(mics.deal(model, 4)):
        micro.backward(model(x_of(micro.index)).sum(), tokens=8 if at else None)


def _tokens_here_only(model: nn.Module) -> None:
    here = dist.get_rank() == 0
    for micro in mics.deal(model, 4):
        parts = model(x_of(micro.index))
        micro.backward(parts.sum() if here else parts.mean(), tokens=8 if here else None)


def _tokens(model: nn.Module) -> None:
    for micro in mics.deal(model, 4):
        micro.backward(model(x_of(micro.index)).sum(), tokens=8)


def _others(model: nn.Module) -> None:
    for _ in mics.deal(model, 4 + dist.get_rank()):
        pass


def _none(model: nn.Module) -> None:
    mics.deal(model, 0)


def _elsewhere(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    mics.deal(model, 4, over=mesh["tp"])
    mics.deal(model, 4, over=mesh)
    mics.deal(model, 4, over=_Other())  # type: ignore[arg-type]


def _later(model: nn.Module, other: int) -> None:
    for number in (4, 6, other if dist.get_rank() else 6):
        for micro in mics.deal(model, number):
            micro.backward(model(x_of(micro.index)).mean())
        model.zero_grad()


def _more_later(model: nn.Module) -> None:
    _later(model, 8)


def _less_later(model: nn.Module) -> None:
    _later(model, 5)  # in as many micro-steps


class _Other:
    mesh = torch.tensor([7, 8])


def _refused(kind: str, loop: Callable[[Any], None]) -> None:
    loop(build(kind))


@pytest.mark.parametrize(
    ("kind", "loop", "words"),
    [
        ("mics", _by_hand, "its backward was not called"),
        ("fsdp2", _by_hand, "its backward was not called"),
        ("mics", _twice, "called twice for one micro-batch"),
        ("mics", _vector, "backward takes one number"),
        ("ddp", _vector, "backward takes one number"),
        ("mics", _some_tokens, "Some micro-batches of one step were given tokens"),
        ("mics", _tokens_here_only, "2 with tokens, 2 without"),
        ("fsdp2", _tokens, "mics has not sharded the model"),
        ("mics", _others, "disagree on micro-batches of a step"),
        *((kind, _more_later, "disagree on micro-batches") for kind in ("ddp", "fsdp2", "mics")),
        *((kind, _less_later, "disagree on micro-batches") for kind in ("ddp", "fsdp2", "mics")),
        ("mics", _none, "deal takes the number of micro-batches"),
        ("plain", _by_hand, "gradients nobody reduces"),
        ("mics", _elsewhere, "none of those that micro-batches are dealt to"),
    ],
)
def test_a_loop_that_would_go_wrong_later_is_refused_at_once(
    kind: str, loop: Callable[[Any], None], words: str
) -> None:
    for error in errors_of_ranks(_refused, 2, kind, loop):
        assert words in error


def _verdicts(state: dict[str, Any] | None, steps: int) -> Any:
    model = build()
    verdicts = mics.Verdicts(spike_loss=1.5)
    if state is not None:
        verdicts.load_state_dict(state)
    answers = []
    for _ in range(steps):
        total = torch.zeros(())
        for micro in mics.deal(model, 5):
            total += micro.backward(model(x_of(micro.index)).square().mean())
        answers.append(verdicts.agree(total, 1.0, summed_over=5))
        model.zero_grad()
    return answers, verdicts.state_dict()


def test_a_step_on_fewer_ranks_is_no_spike() -> None:
    """Nor is one of which a rank has nothing."""
    before, state = run_ranks(_verdicts, 3, None, 17)[0]
    assert all(verdict.take for verdict in before)
    for ranks in (1, 2, 6):
        for after, _ in run_ranks(_verdicts, ranks, state, 2):
            assert [verdict.why for verdict in after] == ["", ""]
            assert after[0].loss == pytest.approx(before[0].loss, rel=1e-5)


@pytest.mark.parametrize("summed_over", [0, -1.0, float("nan")])
def test_a_sum_is_over_some(summed_over: float) -> None:
    with pytest.raises(mics.MicsError, match="summed_over is what the sum"):
        mics.Verdicts().agree(1.0, 1.0, summed_over=summed_over)


def _fractions(tokens: float) -> list[torch.Tensor]:
    model = build()
    for micro in mics.deal(model, 4):
        micro.backward(model(x_of(micro.index)).square().mean() * tokens, tokens=tokens)
    return [compat.local_of(p.grad).clone() for p in model.parameters()]  # type: ignore[arg-type]


def test_tokens_may_be_parts_of_one_altogether() -> None:
    """As weights of samples are."""
    (small, _), (usual, _) = (run_ranks(_fractions, 2, tokens) for tokens in (0.1, 10.0))
    for one, other in zip(small, usual, strict=True):
        torch.testing.assert_close(one, other)


LEFT = ["ddp", "fsdp2", "fsdp2 flat", "mics"]


def _left(kind: str) -> bool:
    """Step after a break; then a whole step, whose gradients are those of nothing before it."""
    model = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [compat.local_of(p.detach()).clone() for p in model.parameters()]
    for micro in mics.deal(model, 4):
        micro.backward(model(x_of(7 + micro.index)).square().mean())
        with pytest.raises(mics.MicroStepError, match="was called before the"):
            optimizer.step()
        break
    with pytest.raises(mics.MicroStepError, match="was called before the"):
        optimizer.step()
    now = [compat.local_of(p.detach()) for p in model.parameters()]
    assert all(map(torch.equal, before, now))
    if kind != "mics":
        with contextlib.nullcontext() if kind == "fsdp2" else pytest.warns(mics.MicsWarning):
            first = next(dealt := mics.deal(model, 4))
        first.backward(model(x_of(first.index)).square().mean())
        with pytest.raises(mics.MicroStepError, match="began before another one"):
            next(mics.deal(model, 4))
        dealt.close()  # type: ignore[attr-defined]
    optimizer.zero_grad()
    for micro in mics.deal(model, 4):
        micro.backward(model(x_of(micro.index)).square().mean())
    found = [compat.local_of(p.grad).clone() for p in model.parameters()]  # type: ignore[arg-type]
    optimizer.step()
    optimizer.zero_grad()
    wanted = build("plain")
    for index in range(4):
        (wanted(x_of(index)).square().mean() / 4).backward()
    for one, param in zip(found, wanted.parameters(), strict=True):
        assert param.grad is not None
        half = param.grad.shape[0] // 2
        at = half * dist.get_rank() if kind == "fsdp2 flat" else 0
        torch.testing.assert_close(one, param.grad[at : at + one.shape[0]], rtol=1e-5, atol=1e-7)
    return True


@pytest.mark.parametrize("kind", LEFT)
def test_gradients_of_a_loop_that_was_left_are_refused_and_spoil_no_later_step(kind: str) -> None:
    assert run_ranks(_left, 2, kind) == [True, True]


def _some_ranks(kind: str) -> tuple[list[int], list[torch.Tensor]]:
    """Two pairs of ranks that know nothing of each other; the mesh says not what they are."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    if kind == "ddp":
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        pair = pairs[dist.get_rank() // 2]
        model = nn.parallel.DistributedDataParallel(model, process_group=pair)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        fully_shard(model, mesh=mesh["b"])
    seen = []
    for micro in mics.deal(model, 3):
        micro.backward(model(x_of(micro.index)).square().mean())
        seen += [micro.index] if micro.counts else []
    gradients = [p.grad for p in model.parameters()]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return seen, whole  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_that_a_model_is_averaged_over_get_all_micro_batches(kind: str) -> None:
    wanted = build("plain")
    for index in range(3):
        (wanted(x_of(index)).square().mean() / 3).backward()
    found = run_ranks(_some_ranks, 4, kind)
    assert [seen for seen, _ in found] == [[0, 2], [1]] * 2
    for _, gradients in found:
        for one, param in zip(gradients, wanted.parameters(), strict=True):
            assert param.grad is not None
            torch.testing.assert_close(one, param.grad, rtol=1e-5, atol=1e-7)


def _crossed() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    fully_shard(model[0], mesh=mesh["a"])
    fully_shard(model, mesh=mesh["b"])
    with pytest.raises(mics.MicroStepError, match="averaged over different ranks"):
        mics.deal(model, 4)


def test_parameters_on_meshes_that_cross_are_refused() -> None:
    run_ranks(_crossed, 4)


def _along_tokens() -> list[int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "cp_shard"))
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    names = mesh.mesh_dim_names
    assert names is not None
    dims = compat_dims(shard="cp_shard", replicate="dp_replicate")
    mics.fully_shard(model, mesh=mesh, dp_mesh_dims=dims)
    with pytest.raises(mics.MicroStepError, match="see the same micro-batches"):
        mics.deal(model, 4)
    found = []
    for micro in mics.deal(model, 4, over=mesh["dp_replicate"]):
        found.append(micro.index)
        micro.backward(model(x_of(micro.index)).mean())
    return found


def compat_dims(**names: str) -> Any:
    from torch.distributed.fsdp import DataParallelMeshDims

    return DataParallelMeshDims(**names)


def test_ranks_that_see_parts_of_the_same_samples_get_the_same_ones() -> None:
    assert run_ranks(_along_tokens, 4) == [[0, 2], [0, 2], [1, 3], [1, 3]]
