"""Models of every kind FSDP2 supports train with mics.fully_shard as with torch's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from models import (
    FrozenBlock,
    TiedTransformer,
    UnevenMLP,
    gradients,
    loss_of,
    seeded,
    shard_blocks,
    weights,
)
from side_by_side import (
    Answer,
    FullyShard,
    assert_like_alone,
    micro_batches,
    same_as_torch,
    train,
    train_alone,
    two_axes,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Shard


def test_ignored_parameters_stay_whole_and_local():
    def script(fully_shard: FullyShard) -> Answer:
        model = seeded(UnevenMLP)
        bias = model.out.bias
        torch.manual_seed(dist.get_rank())
        nn.init.normal_(bias)  # different on every rank: ignored means left alone
        before = bias.detach().clone()
        shard_blocks(fully_shard, model, mesh=two_axes(), ignored_params={bias})
        assert model.out.bias is bias
        assert torch.equal(bias.detach(), before)
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        local = bias.grad.clone()
        bias.grad = None
        return {"gradients": gradients(model), "local": local}

    answers = same_as_torch(script)
    locals_ = [ours["local"] for _, ours in answers]
    assert not torch.equal(locals_[0], locals_[1])  # not reduced


def test_shard_placement_fn_shards_another_dimension():
    class EvenColumns(UnevenMLP):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Sequential(nn.Linear(13, 8), nn.Linear(8, 5))

    def placement(param: nn.Parameter) -> Shard | None:
        return Shard(1) if param.ndim == 2 and param.size(1) % 2 == 0 else None

    def script(fully_shard: FullyShard) -> Answer:
        def check(model: nn.Module) -> None:
            weight = model.out[1].weight
            assert weight.placements[-1] == Shard(1)
            assert weight.to_local().shape == (5, 4)

        keywords = {"mesh": two_axes(), "shard_placement_fn": placement}
        return train(fully_shard, EvenColumns, prepare=check, **keywords)

    answers = same_as_torch(script)
    assert_like_alone(answers[0][1], train_alone(EvenColumns))


def test_frozen_parameters_get_no_gradient_and_do_not_move():
    answers = same_as_torch(lambda fs: train(fs, FrozenBlock, mesh=two_axes()))
    start = weights(seeded(FrozenBlock))
    ours = answers[0][1]
    frozen = {name for name, p in FrozenBlock().named_parameters() if not p.requires_grad}
    assert set(ours["gradients"]) == set(start) - frozen
    assert {n for n in start if torch.equal(start[n], ours["weights"][n])} == frozen


def test_freezing_and_unfreezing_between_steps():
    def script(fully_shard: FullyShard) -> Answer:
        model = shard_blocks(fully_shard, seeded(UnevenMLP), mesh=two_axes())
        steps = []
        for step, trains in enumerate([False, True, False]):
            model.blocks[1].requires_grad_(trains)
            loss_of(model, micro_batches(model, step, 1)[0]).backward()
            steps.append(gradients(model))
            model.zero_grad()
        return {"gradients": steps}

    same_as_torch(script)


def test_tied_parameters_stay_one_parameter():
    def script(fully_shard: FullyShard) -> Answer:
        def check(model: nn.Module) -> None:
            assert model.head.weight is model.embedding.weight

        return train(fully_shard, TiedTransformer, mesh=two_axes(), prepare=check)

    same_as_torch(script)


def test_evaluation_between_training_steps():
    def script(fully_shard: FullyShard) -> Answer:
        model = shard_blocks(fully_shard, seeded(TiedTransformer), mesh=two_axes())
        losses, steps = [], []
        for step in range(2):
            model.eval()
            with torch.no_grad():
                losses.append(loss_of(model, model.example(7)))
            with torch.inference_mode():
                losses.append(loss_of(model, model.example(8)).clone())
            losses.append(loss_of(model, model.example(9)).detach())  # graph thrown away
            model.train()
            loss_of(model, micro_batches(model, step, 1)[0]).backward()
            steps.append(gradients(model))
            model.zero_grad()
        return {"losses": losses, "gradients": steps}

    same_as_torch(script)


def test_two_models_in_one_process_trained_alternately():
    def script(fully_shard: FullyShard) -> Answer:
        models = [
            shard_blocks(fully_shard, seeded(UnevenMLP, seed), mesh=two_axes()) for seed in (1, 2)
        ]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
        for step in range(4):
            model, optimizer = models[step % 2], optimizers[step % 2]
            loss_of(model, micro_batches(model, step, 1)[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        x, y = micro_batches(models[0], 9, 1)[0]
        hidden = models[0](x)  # and both in one graph
        (hidden.square().mean() + models[1](x).sub(y).square().mean() * hidden.mean()).backward()
        return {
            "gradients": [gradients(m) for m in models],
            "weights": [weights(m) for m in models],
        }

    same_as_torch(script)


def test_a_meta_device_model_materialised_after_sharding():
    def script(fully_shard: FullyShard) -> Answer:
        with torch.device("meta"):
            model = UnevenMLP()
        shard_blocks(fully_shard, model, mesh=two_axes())
        assert all(p.is_meta and isinstance(p, DTensor) for p in model.parameters())
        model.to_empty(device="cpu")
        for i, param in enumerate(model.parameters()):
            nn.init.constant_(param, 0.01 * (i + 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        optimizer.step()
        return {"gradients": gradients(model), "weights": weights(model)}

    same_as_torch(script)


def test_offloading_to_the_cpu():
    policy = CPUOffloadPolicy(pin_memory=False)
    answers = same_as_torch(
        lambda fs: train(
            fs,
            UnevenMLP,
            mesh=two_axes(),
            micro_steps=2,
            accumulate="all-reduce",
            clip=0.05,
            offload_policy=policy,
        )
    )
    assert_like_alone(answers[0][1], train_alone(UnevenMLP, micro_steps=2, clip=0.05))
