"""Optimizers and models that do not belong together: right, or refused before anything changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import UnevenMLP, full, loss_of, seeded, weights
from ranks import errors_of_ranks, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.utils import parametrizations

import mics
from mics.errors import MicroStepError, ShardError

FP32 = MixedPrecisionPolicy()


def _sharded(model: nn.Module | None = None, partition: int = 2, **keywords: Any) -> Any:
    model = seeded(UnevenMLP) if model is None else model
    return mics.shard(model, partition=partition, mp_policy=FP32, **keywords)


def _example(step: int = 0, rank: int | None = None) -> Any:
    rank = dist.get_rank() if rank is None else rank
    return seeded(UnevenMLP).example(10 * step + rank)


def _backward(model: nn.Module, step: int = 0) -> None:
    for example in mics.micro_steps(model, [_example(step)]):
        loss_of(model, example).backward()


@contextlib.contextmanager
def _refused(kind: type[Exception], *words: str, unchanged: nn.Module) -> Any:
    """Refuses with these words, and leaves the weights as they are."""
    before = weights(unchanged)
    with pytest.raises(kind) as raised:
        yield
    for word in words:
        assert word in str(raised.value), str(raised.value)
    after = weights(unchanged)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


class WithHead(nn.Module):
    """A head around a model that is sharded alone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.value = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value(self.body(x))


def test_an_optimizer_of_parameters_that_sharding_replaced_is_refused_at_its_first_step():
    says = "holds parameters that the sharded model does not have", "after mics.shard"

    def rank() -> None:
        model = seeded(UnevenMLP)
        adamw, sgd = torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters())
        _sharded(model)
        _backward(model)
        with _refused(ShardError, *says, "10 of 10: blocks.0.0.weight", "AdamW", unchanged=model):
            adamw.step()
        with _refused(ShardError, *says, unchanged=model):
            sgd.step(lambda: torch.zeros(()))
        right = torch.optim.AdamW(model.parameters())
        right.step()
        right.param_groups[0]["params"].append(adamw.param_groups[0]["params"][3])
        with _refused(ShardError, *says, "1 of 11: blocks.0.2.bias", unchanged=model):
            right.step()

        # between two shardings, and before the parameters had values
        model, mesh = seeded(UnevenMLP), mics.init_mesh(partition=2)
        for block in model.blocks:
            mics.fully_shard(block, mesh=mesh)
        early = torch.optim.AdamW(model.parameters())
        mics.fully_shard(model, mesh=mesh)
        _backward(model)
        with _refused(ShardError, *says, "2 of 10: out.weight, out.bias", unchanged=model):
            early.step()
        with torch.device("meta"):
            model = UnevenMLP()
        early = torch.optim.AdamW(model.parameters())
        _sharded(model)
        _backward(model)
        with _refused(ShardError, *says, unchanged=model):
            early.step()

        # after other values took the place of its parameters
        adamw = torch.optim.AdamW(model.parameters())
        _backward(model)
        adamw.step()
        values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(values, assign=True)
        _backward(model)
        with _refused(ShardError, *says, "blocks.0.0.weight", unchanged=model):
            adamw.step()
        torch.optim.AdamW(model.parameters()).step()

    run_ranks(rank, 4)


def test_parameters_that_nobody_reduces_are_refused_before_the_first_step():
    says = "Parameters outside every unit need a gradient", "mics.shard of the module that holds"

    def rank() -> None:
        wrapper = WithHead(_sharded())
        named = "2: value.weight, value.bias"
        with _refused(ShardError, *says, named, unchanged=wrapper):
            _backward(wrapper)
        refused = _refused(ShardError, *says, named, unchanged=wrapper)
        with refused, mics.micro_step(wrapper, last=True):
            pass
        adamw = torch.optim.AdamW(wrapper.parameters(), lr=0.1)
        loss_of(wrapper, _example()).backward()
        with _refused(ShardError, *says, "2: one of shape (5, 5)", unchanged=wrapper):
            adamw.step()

        # what needs no gradient, or is reduced by a hook or by DDP, is nobody else's business
        wrapper.value.requires_grad_(False)
        _backward(wrapper)
        adamw.step()
        wrapper.value.weight.requires_grad_(True)
        with _refused(ShardError, *says, "1: value.weight", unchanged=wrapper):
            _backward(wrapper)
        with _refused(ShardError, *says, "one of shape (5, 5)", unchanged=wrapper):
            adamw.step()
        wrapper.value.weight.register_post_accumulate_grad_hook(
            lambda param: dist.all_reduce(param.grad, dist.ReduceOp.AVG)
        )
        _backward(wrapper)
        adamw.step()
        wrapper = WithHead(_sharded())
        wrapper.value = nn.parallel.DistributedDataParallel(wrapper.value)
        _backward(wrapper)

        # adapters attached afterwards, and parameters that were ignored on purpose
        model = _sharded()
        model.out.register_parameter("adapter", nn.Parameter(torch.zeros(3)))
        with _refused(ShardError, *says, "1: out.adapter", unchanged=model):
            _backward(model)
        with _refused(ShardError, *says, "(3,)", unchanged=model):
            torch.optim.SGD(model.parameters()).step()
        model = seeded(UnevenMLP)
        _sharded(model, ignored_params={model.out.bias})
        optimizer = torch.optim.SGD(list(model.blocks.parameters()))
        optimizer.step()
        optimizer.add_param_group({"params": [model.out.bias]})
        with _refused(ShardError, *says, "(5,)", unchanged=model):
            optimizer.step()

    run_ranks(rank, 4)


def test_alone_there_is_nobody_to_reduce_with():
    def rank() -> None:
        wrapper = WithHead(_sharded(partition=1))
        _backward(wrapper)
        torch.optim.SGD(wrapper.parameters()).step()

    run_ranks(rank, 1)


def test_a_step_on_gradients_that_were_never_reduced_is_refused():
    says = "whole on every rank and not reduced", "set_requires_gradient_sync(True)"

    def rank() -> None:
        model = _sharded()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        model.set_requires_gradient_sync(False)
        loss_of(model, _example()).backward()
        with _refused(MicroStepError, *says, "0.00 MiB", unchanged=model):
            sgd.step()
        model.set_requires_gradient_sync(True)
        with _refused(MicroStepError, *says, unchanged=model):
            sgd.step()
        loss_of(model, _example()).backward()  # reduces both
        sgd.step()

    run_ranks(rank, 2)


def _three_layers() -> nn.Module:
    return seeded(lambda: nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]))


def _loss(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return model(torch.randn(4, 8, generator=generator)).square().mean()


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def _lbfgs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, lr=0.1, max_iter=3)


def test_a_closure_may_run_the_last_micro_step_and_is_checked_afterwards():
    def alone(make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Any]:
        """The mean over 4 ranks of the sum over 2 micro-steps."""
        model = _three_layers()
        optimizer = make(model.parameters())

        def closure() -> torch.Tensor:
            model.zero_grad()
            losses = [_loss(model, step, rank) for rank in range(4) for step in range(2)]
            total = torch.stack(losses).sum() / 4
            total.backward()
            return total.detach()

        for _ in range(2):
            optimizer.step(closure)
        return weights(model)

    def whole_steps(make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Any]:
        model = _sharded(_three_layers())
        optimizer = make(model.parameters())

        def closure() -> torch.Tensor:
            model.zero_grad()
            losses = []
            for step in mics.micro_steps(model, range(2)):
                losses.append(_loss(model, step, dist.get_rank()))
                losses[-1].backward()
            total = torch.stack(losses).sum().detach()
            dist.all_reduce(total)
            return total / 4

        for _ in range(2):
            optimizer.step(closure)
        return weights(model)

    def last_ones() -> dict[str, Any]:
        """The first micro-step runs before; the closure is given by keyword, too."""
        model = _sharded(_three_layers())
        optimizer = _sgd(model.parameters())

        def micro_step(step: int, last: bool) -> None:
            with mics.micro_step(model, last=last):
                _loss(model, step, dist.get_rank()).backward()

        def last() -> None:
            micro_step(1, True)

        for given in ({}, {"closure": last}):
            model.zero_grad()
            micro_step(0, False)
            optimizer.step(*([] if given else [last]), **given)
        model.zero_grad()
        with _refused(MicroStepError, "optimizer.step() was called before", unchanged=model):
            optimizer.step(lambda: micro_step(0, False))
        return weights(model)

    def rank() -> list[dict[str, Any]]:
        return [whole_steps(_sgd), last_ones(), whole_steps(_lbfgs)]

    expected = [alone(_sgd), alone(_sgd), alone(_lbfgs)]
    for found in run_ranks(rank, 4):
        for ours, theirs in zip(found, expected, strict=True):
            _assert_close(ours, theirs)


def _assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, weight in other.items():
        torch.testing.assert_close(one[name], weight, rtol=0, atol=1e-6)


def test_parameters_frozen_and_trained_again_by_all_ranks_train_as_in_one_process():
    def train(model: Any, backward: Callable[[int], None]) -> dict[str, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.requires_grad_(False)
        model.out.requires_grad_(True)
        for step, change in enumerate(
            [
                lambda: None,
                lambda: model.requires_grad_(True),
                lambda: model.blocks[0].requires_grad_(False),
                lambda: model.out.weight.requires_grad_(False),
                lambda: model.requires_grad_(True),
            ]
        ):
            change()
            backward(step)
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    def rank() -> dict[str, Any]:
        model = _sharded()
        return train(model, lambda step: _backward(model, step))

    model = seeded(UnevenMLP)

    def backward(step: int) -> None:
        for rank in range(4):
            (loss_of(model, _example(step, rank)) / 4).backward()

    expected = train(model, backward)
    for answer in run_ranks(rank, 4):
        _assert_close(answer, expected)


def test_parameters_replaced_after_sharding_are_refused_by_the_next_forward():
    says = "Parameters were replaced after the model was sharded", "before mics.shard"

    def replace(model: Any) -> None:
        model.out.weight = nn.Parameter(torch.zeros(5, 13))

    def tie(model: Any) -> None:
        model.blocks[0][0].weight = model.blocks[1][0].weight

    def reparametrise(model: Any) -> None:
        parametrizations.weight_norm(model.out)

    def remove(model: Any) -> None:
        model.out.bias = None

    def meta(model: Any) -> None:
        model.to("meta")

    def dtype(model: Any) -> None:
        model.to(torch.bfloat16)

    def rank() -> None:
        example = _example()
        for change, name in (
            (replace, "1: out.weight."),
            (tie, "blocks.0.0.weight"),
            (reparametrise, "out.weight"),
            (remove, "out.bias"),
        ):
            for after_a_forward in (True, False):
                model = _sharded()
                if after_a_forward:
                    loss_of(model, example).backward()
                change(model)
                with pytest.raises(ShardError) as raised:
                    loss_of(model, example)
                for word in says:
                    assert word in str(raised.value)
                assert name in str(raised.value) or not after_a_forward, str(raised.value)
        for change, words in ((meta, "went to the meta device"), (dtype, "went to torch.bfloat16")):
            model = _sharded()
            loss_of(model, example).backward()
            change(model)
            with pytest.raises(ShardError, match=words):
                loss_of(model, example)

        # what tells FSDP2 goes on: other dtypes before the first forward, assigned values
        model = _sharded().to(torch.float64)
        values = {name: value.detach() * 2 for name, value in model.state_dict().items()}
        model.load_state_dict(values, assign=True)
        output = model(example[0].double()).detach()
        alone = seeded(UnevenMLP).double()
        with torch.no_grad():
            for param in alone.parameters():
                param.mul_(2)
        torch.testing.assert_close(output, alone(example[0].double()).detach())
        model.load_state_dict(values, assign=True)
        torch.testing.assert_close(model(example[0].double()).detach(), output)
        assert full(model.out.weight).dtype == torch.float64

    run_ranks(rank, 4)


def test_a_parameter_frozen_on_one_rank_alone_is_named_on_every_rank():
    """Before anything is reduced: also where the whole model is frozen on that rank."""

    def rank(change: Callable[[Any], Any], partition: int) -> None:
        model = _sharded(partition=partition)
        _backward(model)
        if dist.get_rank() == 1:
            change(model)
        _backward(model)

    def one(model: Any) -> None:
        model.blocks[1][0].bias.requires_grad_(False)

    def block(model: Any) -> None:
        model.blocks[0].requires_grad_(False)

    for change, partition in ((one, 2), (block, 4)):
        for text in errors_of_ranks(rank, 4, change, partition):
            assert "Rank 1 trains other parameters since its last step, and not every rank" in text
            assert "param.requires_grad_(...) on every rank" in text
