"""Checkpointed, compiled, called by another name or interrupted: as with torch's fully_shard."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import (
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
    same_as_torch,
    train,
    train_alone,
    two_axes,
)
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.utils.checkpoint import checkpoint

import mics

HAS_RESET = pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="came with torch 2.13"
)


def test_wrapped_blocks_are_recomputed():
    runs = []

    class Wrapped(UnevenMLP):
        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks:
                block.register_forward_pre_hook(lambda *_: runs.append(1))
            self.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in self.blocks)

    def script(fully_shard: FullyShard) -> Answer:
        runs.clear()
        answer = train(fully_shard, Wrapped, mesh=two_axes(), steps=2)
        return answer | {"runs": len(runs)}

    ours = same_as_torch(script)[0][1]
    assert ours["runs"] == 2 * 2 * 2  # two blocks, two steps, each forward twice
    alone = weights(UnevenMLP()) | train_alone(UnevenMLP)["weights"]
    for name, weight in ours["weights"].items():
        plain = alone[name.replace("_checkpoint_wrapped_module.", "")]
        torch.testing.assert_close(weight, plain, rtol=2e-6, atol=2e-6)


def test_checkpointing_around_a_sharded_block():
    class Checkpointed(UnevenMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return self.out(x)

    answers = same_as_torch(lambda fs: train(fs, Checkpointed, mesh=two_axes()))
    assert_like_alone(answers[0][1], train_alone(UnevenMLP))


@HAS_RESET
def test_reset_iter_state_after_an_exception_in_forward():
    class Fails(UnevenMLP):
        fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.blocks[0](x)
            if self.fails:
                raise ValueError("out of memory, say")
            return self.out(x + self.blocks[1](x))

    def script(fully_shard: FullyShard) -> Answer:
        model = shard_blocks(fully_shard, seeded(Fails), mesh=two_axes())
        model.fails = True
        with pytest.raises(ValueError, match="out of memory"):
            model(model.example(0)[0])
        model.fails = False
        model.reset_iter_state()
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        return {"gradients": gradients(model)}

    same_as_torch(script)


def test_reentrant_checkpointing_of_a_sharded_block_synchronises_gradients():
    class Checkpointed(UnevenMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.requires_grad_()
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=True)
            return self.out(x)

    def script(fully_shard: FullyShard) -> Answer:
        model = shard_blocks(fully_shard, seeded(Checkpointed), mesh=two_axes())
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        return {"gradients": gradients(model)}

    same_as_torch(script)


def test_a_registered_forward_method_synchronises_gradients():
    class WithLoss(UnevenMLP):
        def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(self.forward(x), y)

    def script(fully_shard: FullyShard) -> Answer:
        model = shard_blocks(fully_shard, seeded(WithLoss), mesh=two_axes())
        register_fsdp_forward_method(model, "loss")
        model.loss(*micro_batches(model, 0, 1)[0]).backward()
        return {"gradients": gradients(model)}

    same_as_torch(script)


def test_weights_used_by_the_parent_after_unshard_are_synchronised():
    class Reaches(UnevenMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.blocks[0]
            first.unshard()
            hidden = torch.tanh(F.linear(x, first[0].weight, first[0].bias))
            x = x + F.linear(hidden, first[2].weight, first[2].bias)
            return self.out(x + self.blocks[1](x))

    def script(fully_shard: FullyShard) -> Answer:
        whole = init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp_replicate", "dp_shard"))
        answer: Answer = {}
        for mesh in (two_axes(), whole):  # a partition of 2 ranks and one of 1
            model = shard_blocks(fully_shard, seeded(Reaches), mesh=mesh)
            loss_of(model, micro_batches(model, 0, 1)[0]).backward()
            answer[f"{mesh.shape}"] = {"gradients": gradients(model)}
        return answer

    same_as_torch(script)


def test_a_list_of_modules_of_which_only_the_second_runs_is_synchronised():
    class HasUnused(UnevenMLP):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(3, 3)

    def script(fully_shard: FullyShard) -> Answer:
        model = seeded(HasUnused)
        fully_shard([model.unused, model.blocks[0]], mesh=two_axes())
        fully_shard(model, mesh=two_axes())
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        return {"gradients": gradients(model)}

    same_as_torch(script)


class _Fails(torch.autograd.Function):
    """The identity, whose backward raises while ``armed``."""

    armed = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if _Fails.armed:
            raise ValueError("out of memory, say")
        return gradient


class _FailsInBackward(UnevenMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.blocks[0](x)
        x = _Fails.apply(x)
        return self.out(x + self.blocks[1](x))


@HAS_RESET
@pytest.mark.parametrize("all_reduce", [True, False])
def test_reset_iter_state_after_an_exception_in_backward(all_reduce):
    """FSDP2 adds what the root's parameters had been given by then to their next gradients."""

    def script(fully_shard: FullyShard) -> dict[str, torch.Tensor]:
        model = shard_blocks(fully_shard, seeded(_FailsInBackward), mesh=two_axes())
        model.set_requires_all_reduce(all_reduce)
        _Fails.armed = True
        with pytest.raises(ValueError, match="out of memory"):
            loss_of(model, model.example(77)).backward()
        _Fails.armed = False
        model.reset_iter_state()
        model.zero_grad()
        model.set_requires_all_reduce(True)
        loss_of(model, model.example(dist.get_rank())).backward()
        return gradients(model)

    alone = train_alone(UnevenMLP, steps=1)["gradients"]
    for answer in run_ranks(script, 4, mics.fully_shard):
        for name, gradient in answer.items():
            torch.testing.assert_close(gradient, alone[name], rtol=2e-6, atol=2e-6)
    theirs = run_ranks(script, 4, torch_fully_shard)[0]["out.weight"]
    assert (theirs - alone["out.weight"]).abs().max() > 0.1


class _FailsInsideABlock(UnevenMLP):
    """When it fails, one parameter of a block has a gradient that nobody has reduced yet."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.blocks[0](x)
        first, activation, second = self.blocks[1]
        failing = nn.Sequential(first, activation, _FailsHere(), second)
        self.blocks[1].forward = lambda y: nn.Sequential.forward(failing, y)
        return self.out(x + self.blocks[1](x))


class _FailsHere(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Fails.apply(x)


@pytest.mark.parametrize("failing", [_FailsInBackward, _FailsInsideABlock])
def test_micro_steps_start_afresh_after_an_exception_in_the_last_backward(failing):
    def script() -> dict[str, torch.Tensor]:
        model = shard_blocks(mics.fully_shard, seeded(failing), mesh=two_axes())
        _Fails.armed = True
        with pytest.raises(ValueError, match="out of memory"):
            for example in mics.micro_steps(model, [model.example(77)]):
                loss_of(model, example).backward()
        _Fails.armed = False
        warnings.filterwarnings("ignore", "A step was left")
        for example in mics.micro_steps(model, [model.example(dist.get_rank())]):
            loss_of(model, example).backward()
        return gradients(model)

    answers = run_ranks(script, 4)
    alone = train_alone(UnevenMLP, steps=1)["gradients"]
    for answer in answers:
        for name, gradient in answer.items():
            torch.testing.assert_close(gradient, alone[name], rtol=2e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.extra
def test_compiled_blocks():
    def script(fully_shard: FullyShard) -> Answer:
        torch.compiler.reset()
        # Dynamo looks whether an activation has a gradient, and torch warns of that.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        graphs = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return lookup_backend("aot_eager")(graph, inputs)

        class Compiled(TiedTransformer):
            def __init__(self) -> None:
                super().__init__()
                for block in self.blocks:
                    block.compile(backend=backend)

        keywords = {"mesh": two_axes(), "micro_steps": 2, "accumulate": "all-reduce"}
        return train(fully_shard, Compiled, **keywords) | {"graphs": len(graphs)}

    ours = same_as_torch(script)[0][1]
    assert ours.pop("graphs") > 0
    assert_like_alone(ours, train_alone(TiedTransformer, micro_steps=2))
