"""A script for FSDP2 trains the same with mics.fully_shard: bit for bit where sums have one order.

What is different on purpose is in ``test_fsdp2_differences.py``.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
from models import (
    FrozenBlock,
    ThriceUsed,
    TiedTransformer,
    UnevenMLP,
    gradients,
    loss_of,
    seeded,
    shard_blocks,
    weights,
)
from ranks import run_ranks
from side_by_side import (
    Answer,
    FullyShard,
    assert_like_alone,
    micro_batches,
    one_axis,
    same_as_torch,
    train,
    train_alone,
    two_axes,
    without_the_warning_about_repeats,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor

import mics

MESHES = pytest.mark.parametrize("mesh_of", [one_axis, two_axes])
MODELS = (UnevenMLP, TiedTransformer, FrozenBlock, ThriceUsed)


def test_it_takes_every_keyword_torch_takes():
    torchs = inspect.signature(torch_fully_shard).parameters
    ours = inspect.signature(mics.fully_shard).parameters
    assert list(torchs) == list(ours)[: len(torchs)]
    assert all(torchs[name].kind == ours[name].kind for name in torchs)


def test_it_returns_the_module_itself_as_an_fsdp_module():
    def script() -> None:
        model = seeded(UnevenMLP)
        block = model.blocks[0]
        assert mics.fully_shard(block, mesh=two_axes()) is block
        pair = [model.blocks[1], model.out]
        assert mics.fully_shard(pair, mesh=two_axes()) is pair
        assert mics.fully_shard(model, mesh=two_axes()) is model
        for module in (model, block, *pair):
            assert isinstance(module, FSDPModule)
        assert isinstance(model, UnevenMLP)
        assert type(model).__name__ == "FSDPUnevenMLP"
        assert all(isinstance(p, DTensor) for p in model.parameters())
        dist.barrier()

    run_ranks(script, 4)


@MESHES
def test_training_is_torchs_and_that_of_one_process(mesh_of):
    answers = same_as_torch(lambda fs: {m.__name__: train(fs, m, mesh=mesh_of()) for m in MODELS})
    for make in MODELS:
        assert_like_alone(answers[0][1][make.__name__], train_alone(make))


def test_without_a_mesh_it_shards_over_the_world():
    answers = same_as_torch(lambda fs: train(fs, UnevenMLP))
    assert_like_alone(answers[0][1], train_alone(UnevenMLP))


def test_reshard_after_forward_changes_memory_but_not_results():
    def one(fully_shard: FullyShard, mesh: DeviceMesh, reshard: bool | int) -> Answer:
        held: list[int] = []  # bytes of a whole padded weight, after forward
        whole: list[torch.Tensor] = []

        def look(model: nn.Module) -> None:
            layer = model.blocks[0][0]
            layer.register_forward_hook(lambda *_: whole.append(layer.weight))
            model.register_forward_hook(
                lambda *_: held.append(whole[-1].untyped_storage().nbytes())
            )

        answer = train(
            fully_shard, UnevenMLP, mesh=mesh, prepare=look, reshard_after_forward=reshard
        )
        return answer | {"held": held}

    def script(fully_shard: FullyShard) -> Answer:
        return {
            "freed": one(fully_shard, two_axes(), True),
            "kept": one(fully_shard, two_axes(), False),
            "kept on two": one(fully_shard, one_axis(), 2),
        }

    ours = same_as_torch(script)[0][1]
    alone = train_alone(UnevenMLP)
    for name, held in {"freed": 0, "kept": 18 * 13 * 4, "kept on two": 0}.items():
        assert ours[name].pop("held") == [held] * 2
        assert_like_alone(ours[name], alone)


@pytest.mark.slow
def test_reshard_after_forward_to_fewer_ranks_works_on_a_hsdp_mesh():
    same_as_torch(
        lambda fs: train(fs, UnevenMLP, mesh=two_axes(), reshard_after_forward=2), world=8
    )


def test_a_list_of_modules_is_one_unit():
    def script(fully_shard: FullyShard) -> Answer:
        model = seeded(TiedTransformer)
        mesh = two_axes()
        fully_shard(list(model.blocks), mesh=mesh)
        fully_shard([model.norm, model.head, model.embedding], mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        return {"gradients": gradients(model)}

    same_as_torch(script)
    counts = run_ranks(_gathers_of_a_list, 4)
    assert counts == [2] * 4  # one unit of both blocks, one of the rest; no gather in backward


def _gathers_of_a_list() -> int:
    model = seeded(UnevenMLP)
    mics.fully_shard(list(model.blocks), mesh=two_axes(), reshard_after_forward=False)
    mics.fully_shard(model, mesh=two_axes())
    loss_of(model, model.example(0)).backward()
    counts = mics.ledger(model).traffic().counts
    return sum(count.calls for key, count in counts.items() if key.collective == "all_gather")


def test_unshard_and_reshard_by_hand():
    def script(fully_shard: FullyShard) -> Answer:
        model = shard_blocks(fully_shard, seeded(UnevenMLP), mesh=two_axes())
        block = model.blocks[0]
        handle = block.unshard(async_op=True)
        handle.wait()
        assert type(block[0].weight) is nn.Parameter
        whole = block[0].weight.detach().clone()
        block.reshard()
        assert isinstance(block[0].weight, DTensor)
        assert model.blocks[1].unshard() is None
        model.blocks[1].unshard(async_op=True)  # nothing to do, and waited for by the forward
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        return {"weights": whole, "gradients": gradients(model)}

    answers = same_as_torch(script)
    torch.testing.assert_close(
        answers[0][1]["weights"],
        seeded(UnevenMLP).blocks[0][0].weight.detach(),
        rtol=0,
        atol=0,
    )


def test_explicit_prefetching_and_other_settings_change_no_result():
    def prepare(model: nn.Module) -> None:
        first, second = model.blocks
        first.set_modules_to_forward_prefetch([second])
        second.set_modules_to_backward_prefetch([first])
        model.set_modules_to_forward_prefetch([first, second])
        model.set_reshard_after_forward(True)
        first.set_unshard_in_backward(True)
        if hasattr(model, "set_reduce_scatter_max_input_buffers"):  # torch 2.13
            model.set_reduce_scatter_max_input_buffers(2)
            model.set_reduce_scatter_unused_params(True)
            model.set_separate_reduce_scatter_group(True)

    answers = same_as_torch(lambda fs: train(fs, UnevenMLP, mesh=two_axes(), prepare=prepare))
    assert_like_alone(answers[0][1], train_alone(UnevenMLP))


@MESHES
def test_accumulation_by_hand_gives_torchs_gradients(mesh_of):
    def script(fully_shard: FullyShard) -> Answer:
        return {
            how: train(fully_shard, UnevenMLP, mesh=mesh_of(), micro_steps=3, accumulate=how)
            for how in ("gradient sync", "all-reduce")
        }

    alone = train_alone(UnevenMLP, micro_steps=3)
    for answer in same_as_torch(script)[0][1].values():
        assert_like_alone(answer, alone)


def test_accumulation_with_hop_two_on_every_backward_gives_torchs_gradients():
    def script(fully_shard: FullyShard) -> Answer:
        return without_the_warning_about_repeats(
            lambda: train(fully_shard, UnevenMLP, mesh=two_axes(), micro_steps=3)
        )

    # One average of a sum against a sum of averages: rounding differs.
    answers = same_as_torch(script, tolerance=1e-5)
    assert_like_alone(answers[0][1], train_alone(UnevenMLP, micro_steps=3))


def test_accumulation_with_is_last_backward():
    def script(fully_shard: FullyShard) -> Answer:
        model = shard_blocks(fully_shard, seeded(UnevenMLP), mesh=two_axes())
        for i, example in enumerate(micro_batches(model, 0, 3)):
            model.set_is_last_backward(i == 2)
            model.set_requires_all_reduce(i == 2)
            model.set_reshard_after_backward(i == 2)
            loss_of(model, example).backward()
        return {"gradients": gradients(model)}

    same_as_torch(script)


def test_two_forwards_before_two_backwards():
    def script(fully_shard: FullyShard) -> Answer:
        model = shard_blocks(fully_shard, seeded(UnevenMLP), mesh=two_axes())
        first, second = (loss_of(model, example) for example in micro_batches(model, 0, 2))
        (first * second).backward()
        return {"gradients": gradients(model)}

    same_as_torch(script)


def test_two_backwards_of_one_forward():
    def script(fully_shard: FullyShard) -> Answer:
        model = shard_blocks(fully_shard, seeded(UnevenMLP), mesh=two_axes())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = loss_of(model, micro_batches(model, 0, 1)[0])

        def twice() -> None:
            loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()  # refused where hop 2 has missed a gradient

        without_the_warning_about_repeats(twice)
        return {"gradients": gradients(model), "weights": weights(model)}

    same_as_torch(script, tolerance=1e-6)


def test_gradients_kept_as_zeros_start_the_next_step_from_zero():
    # Warnings are errors here: that nothing is accumulated must be seen.
    answers = same_as_torch(
        lambda fs: train(fs, UnevenMLP, mesh=two_axes(), steps=3, set_to_none=False)
    )
    assert_like_alone(answers[0][1], train_alone(UnevenMLP, steps=3))


@pytest.mark.parametrize("how", ["every backward", "gradient sync", "all-reduce"])
def test_gradient_divide_factor_is_torchs(how):
    """2 is the partition size (AVG in hop 1), 3 needs sums: Gloo has no PREMUL_SUM."""

    def one(fully_shard: FullyShard, factor: float | None) -> Answer:
        def prepare(model: nn.Module) -> None:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    if factor is not None:
                        module.set_gradient_divide_factor(factor)
                    module.set_force_sum_reduction_for_comms(factor != 2.0)

        keywords = {"mesh": two_axes(), "steps": 1, "micro_steps": 3, "accumulate": how}
        return train(fully_shard, UnevenMLP, prepare=prepare, **keywords)

    def script(fully_shard: FullyShard) -> Answer:
        return without_the_warning_about_repeats(
            lambda: {str(factor): one(fully_shard, factor) for factor in (None, 2.0, 3.0)}
        )

    answers = same_as_torch(script, tolerance=1e-5)
    alone = train_alone(UnevenMLP, steps=1, micro_steps=3)["gradients"]
    for divided, answer in zip((4.0, 2.0, 3.0), answers[0][1].values(), strict=True):
        for name, gradient in answer["gradients"].items():
            expected = alone[name] * 4 / divided
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_clipping_takes_the_norm_of_the_whole_gradient():
    def script(fully_shard: FullyShard) -> Answer:
        return {
            f"{make.__name__}, {mesh_of.__name__}": train(
                fully_shard, make, mesh=mesh_of(), clip=0.05
            )
            for make in (UnevenMLP, TiedTransformer)
            for mesh_of in (one_axis, two_axes)
        }

    alone = {make.__name__: train_alone(make, clip=0.05) for make in (UnevenMLP, TiedTransformer)}
    for name, answer in same_as_torch(script)[0][1].items():
        expected = alone[name.split(",")[0]]
        assert all(norm > 0.05 for norm in expected["norms"])  # it does clip
        assert_like_alone(answer, expected)
