"""Where mics.fully_shard is different from torch's on purpose, on a mesh with replicas.

Its parameters are DTensors on the shard axis alone, and between micro-steps gradients are in
``.grad``, where torch hides a partial sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import UnevenMLP, gradients, loss_of, seeded, shard_blocks
from ranks import run_ranks
from side_by_side import FullyShard, micro_batches, one_axis, train, train_alone, two_axes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import Replicate, Shard

import mics


def test_parameters_are_dtensors_on_the_shard_axis_only():
    def script() -> None:
        torchs = torch_fully_shard(seeded(UnevenMLP), mesh=two_axes()).out.weight
        ours = mics.fully_shard(seeded(UnevenMLP), mesh=two_axes()).out.weight
        assert torchs.placements == (Replicate(), Shard(0))
        assert ours.placements == (Shard(0),)
        assert ours.device_mesh.mesh_dim_names == ("dp_shard",)
        assert torch.equal(torchs.to_local(), ours.to_local())
        dist.barrier()

    run_ranks(script, 4)


def test_off_the_boundary_partial_gradients_are_in_grad():
    def script() -> tuple[bool, dict[str, torch.Tensor]]:
        torchs, ours = (
            shard_blocks(fully_shard, seeded(UnevenMLP), mesh=two_axes())
            for fully_shard in (torch_fully_shard, mics.fully_shard)
        )
        for model in (torchs, ours):
            model.set_requires_all_reduce(False)
            loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        return not gradients(torchs), gradients(ours)

    answers = run_ranks(script, 4)
    assert all(hidden for hidden, _ in answers)
    by_rank = [partial for _, partial in answers]
    model = seeded(UnevenMLP)
    for replica in (0, 1):  # the mean over the replica's own two ranks
        model.zero_grad()
        for rank in (2 * replica, 2 * replica + 1):
            (loss_of(model, model.example(rank)) / 2).backward()
        expected = gradients(model)
        for name, partial in by_rank[2 * replica].items():
            assert torch.equal(partial, by_rank[2 * replica + 1][name])
            torch.testing.assert_close(partial, expected[name], rtol=2e-6, atol=2e-6)


def test_zero_grad_between_micro_steps_drops_the_partial_gradients():
    """torch keeps them and adds them to the next step."""

    def script() -> list[bool]:
        same = []
        for fully_shard in (torch_fully_shard, mics.fully_shard):
            dropped, fresh = (
                shard_blocks(fully_shard, seeded(UnevenMLP), mesh=two_axes()) for _ in range(2)
            )
            dropped.set_requires_all_reduce(False)
            loss_of(dropped, dropped.example(50)).backward()
            dropped.zero_grad()
            dropped.set_requires_all_reduce(True)
            for model in (dropped, fresh):
                loss_of(model, micro_batches(model, 0, 1)[0]).backward()
            one, other = gradients(dropped), gradients(fresh)
            same.append(all(torch.equal(one[name], other[name]) for name in other))
        return same

    assert run_ranks(script, 4) == [[False, True]] * 4


def test_a_block_unused_on_the_last_micro_step_keeps_its_gradient():
    """torch loses it, and adds it to the next step."""

    class Skips(UnevenMLP):
        skip = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks[:1] if self.skip else self.blocks:
                x = x + block(x)
            return self.out(x)

    def script() -> list[bool]:
        kept = []
        for fully_shard in (torch_fully_shard, mics.fully_shard):
            model = shard_blocks(fully_shard, seeded(Skips), mesh=two_axes())
            for i, example in enumerate(micro_batches(model, 0, 2)):
                model.skip = i == 1
                model.set_requires_all_reduce(i == 1)
                loss_of(model, example).backward()
            kept.append("blocks.1.0.weight" in gradients(model))
            if fully_shard is mics.fully_shard:
                answer = gradients(model)
        return [kept, answer]

    answers = run_ranks(script, 4)
    model = seeded(Skips)
    for i in (0, 1):
        model.skip = i == 1
        for rank in range(4):
            (loss_of(model, model.example(100 * i + rank)) / 4).backward()
    for kept, answer in answers:
        assert kept == [False, True]
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(answer[name], gradient, rtol=2e-6, atol=2e-6)


def test_micro_steps_add_up_in_the_parameters_dtype_when_reduced_in_bf16():
    """torch adds them up in bf16."""

    def script(fully_shard: FullyShard, many: int) -> dict[str, torch.Tensor]:
        return train(
            fully_shard,
            UnevenMLP,
            mesh=two_axes(),
            steps=1,
            micro_steps=many,
            accumulate="all-reduce",
            mp_policy=MixedPrecisionPolicy(None, torch.bfloat16),
        )["gradients"]

    many = 24
    exact = train_alone(UnevenMLP, steps=1, micro_steps=many)["gradients"]
    torchs, ours = run_ranks(
        lambda: (script(torch_fully_shard, many), script(mics.fully_shard, many)), 4
    )[0]
    off = [
        sum((answer[name] - exact[name]).square().sum() for name in exact).sqrt()
        for answer in (torchs, ours)
    ]
    whole = sum(g.square().sum() for g in exact.values()).sqrt()
    assert off[1] < 2**-8 * whole  # about one rounding to bf16
    assert off[1] < off[0]


def test_an_optimizer_step_on_partial_gradients_is_refused():
    def script() -> None:
        model = shard_blocks(mics.fully_shard, seeded(UnevenMLP), mesh=two_axes())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.set_requires_all_reduce(False)
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        one_of_its_unit = torch.optim.SGD([model.out.bias], lr=0.1)
        for of_partial in (optimizer, one_of_its_unit):
            with pytest.raises(mics.MicroStepError, match="replicas would drift apart"):
                of_partial.step()
        optimizer.zero_grad()
        model.set_requires_all_reduce(True)
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        optimizer.step()

    run_ranks(script, 4)


def test_an_optimizer_inside_backward_is_refused_with_replicas_and_works_without():
    def script() -> bool:
        refused = []
        for mesh in (one_axis(), two_axes()):
            model = shard_blocks(mics.fully_shard, seeded(UnevenMLP), mesh=mesh)
            before = model.blocks[0][0].weight.to_local().clone()
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(_descend)
            try:
                loss_of(model, micro_batches(model, 0, 1)[0]).backward()
                refused.append(False)
                assert not torch.equal(model.blocks[0][0].weight.to_local(), before)
            except mics.MicroStepError as error:
                assert "optimizer in backward" in str(error)
                refused.append(True)
        return refused

    assert run_ranks(script, 4) == [[False, True]] * 4


def _descend(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.add_(param.grad, alpha=-0.1)
    param.grad = None


def test_an_all_reduce_hook_sees_the_gradient_before_hop_two():
    """torch calls it after its all-reduce, and not at all without one."""

    def script() -> list[list[torch.Tensor]]:
        seen: list[list[torch.Tensor]] = []
        for fully_shard in (torch_fully_shard, mics.fully_shard):
            model = fully_shard(seeded(UnevenMLP), mesh=two_axes())
            calls: list[torch.Tensor] = []
            seen.append(calls)
            model.set_all_reduce_hook(lambda gradient, calls=calls: calls.append(gradient.clone()))
            for i, example in enumerate(micro_batches(model, 0, 2)):
                model.set_requires_all_reduce(i == 1)
                loss_of(model, example).backward()
        return seen

    answers = run_ranks(script, 4)
    for rank in (0, 1):  # of the first replica; rank + 2 holds the same shard in the second
        (torchs, ours), (_, others) = answers[rank], answers[rank + 2]
        assert (len(torchs), len(ours), len(others)) == (1, 2, 2)
        mean = torch.stack([*ours, *others]).sum(dim=0) / 2
        torch.testing.assert_close(torchs[0], mean, rtol=2e-6, atol=2e-6)


def test_hop_two_on_every_backward_warns_once_for_the_whole_job():
    def accumulate(model: Any) -> None:
        for example in micro_batches(model, 0, 3):
            loss_of(model, example).backward()

    def backward_twice(model: Any) -> None:
        for example in mics.micro_steps(model, micro_batches(model, 0, 2)):
            for _ in range(2):
                loss_of(model, example).backward()

    def script(repeat: Callable[[Any], None]) -> list[str]:
        model = shard_blocks(mics.fully_shard, seeded(UnevenMLP), mesh=two_axes())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            repeat(model)
        return [str(w.message) for w in caught if w.category is mics.MicsWarning]

    for repeat in (accumulate, backward_twice):
        (message,), *others = run_ranks(script, 4, repeat)
        assert message.startswith("Hop 2 runs more than once a step: in every backward of a model")
        assert "every further one inside its last micro-step" in message
        assert others == [[]] * 3


def test_meshes_with_more_axes_are_refused_with_what_to_write():
    def script() -> None:
        names = ("replicate", "inter", "intra")
        mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=names)
        with pytest.raises(mics.TopologyError, match=r'mesh\["replicate", "shard"\]'):
            mics.fully_shard(seeded(UnevenMLP), mesh=mesh)
        model = mics.fully_shard(seeded(UnevenMLP), mesh=mesh["replicate", "intra"])
        loss_of(model, model.example(dist.get_rank())).backward()

    run_ranks(script, 4)


def test_what_torch_refuses_is_refused_with_torchs_error():
    def script() -> None:
        for fully_shard in (torch_fully_shard, mics.fully_shard):
            with pytest.raises(ValueError, match="does not support containers"):
                fully_shard(seeded(UnevenMLP).blocks, mesh=two_axes())
            model = fully_shard(seeded(UnevenMLP), mesh=two_axes())
            with pytest.raises(AssertionError, match="already been applied"):
                fully_shard(model, mesh=two_axes())
            with pytest.raises(ValueError, match="reshard_after_forward"):
                fully_shard(seeded(UnevenMLP), mesh=one_axis(), reshard_after_forward=3)
        dist.barrier()

    run_ranks(script, 4)
