"""Between passes ``model.parameters()`` are the sharded ones, and nothing old is computed with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import full, loss_of, seeded, shard_blocks, weights
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import mics


class Net(nn.Module):
    """Two blocks between layers of the root; 5 rows are 2, 2, 1 and none on four ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.last = nn.Linear(5, 5)
        self.recomputes = False
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        if self.fails:
            raise ValueError("in the middle")
        return checkpoint(self.last, x, use_reentrant=False) if self.recomputes else self.last(x)

    def again(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self(x)) + self.blocks[1](x)

    def example(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)


RESHARD = [None, True, False, 2]


def _both(reshard: Any = None) -> tuple[Any, Any]:
    """The same model sharded over all ranks, and alone."""
    sharded = shard_blocks(mics.fully_shard, seeded(Net), reshard_after_forward=reshard)
    return sharded, seeded(Net)


def _without_gradients(model: Any) -> None:
    with torch.no_grad():
        model(model.example(0)[0])


def _for_inference(model: Any) -> None:
    with torch.inference_mode():
        model(model.example(0)[0])


def _and_dropped(model: Any) -> None:
    model(model.example(0)[0])


def _failing(model: Any) -> None:
    model.fails = True
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode, pytest.raises(ValueError, match="in the middle"):
            model(model.example(0)[0])
    model.fails = False


def _in_a_handler(model: Any) -> None:
    """An exception that was handled around the forward is none of the forward's."""
    with contextlib.suppress(KeyError):
        try:
            raise KeyError
        finally:
            _and_dropped(model)


def _of_a_block(model: Any) -> None:
    _without_gradients(model)  # FSDP2 wants to see the root first
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            model.blocks[1](model.example(0)[0])


PEEKS = [_without_gradients, _for_inference, _and_dropped, _failing, _in_a_handler, _of_a_block]


def _step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model, model.example(3)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _differences(one: nn.Module, other: nn.Module) -> list[str]:
    ours, theirs = weights(one), weights(other)
    return [n for n, w in theirs.items() if not torch.allclose(ours[n], w, rtol=0, atol=1e-6)]


def _peeked() -> Iterator[tuple[str, Any, Any]]:
    """A model and its equal alone after every kind of forward without a backward."""
    for reshard in RESHARD:
        for peek in PEEKS:
            sharded, alone = _both(reshard)
            peek(sharded)
            yield f"{reshard}, {peek.__name__}", sharded, alone


def test_an_optimizer_made_after_a_forward_without_backward_trains_as_in_one_process():
    def rank() -> list[str]:
        wrong = []
        for name, *models in _peeked():
            for model in models:
                model.first.bias.requires_grad_(False)
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
                for _ in range(2):
                    _step(model, optimizer)
            wrong += [f"{name}: {where}" for where in _differences(*models)]
        return wrong

    assert run_ranks(rank, 4) == [[]] * 4


def test_whoever_reads_parameters_after_a_forward_finds_the_same_ones_as_before():
    def rank() -> list[str]:
        wrong = []
        for reshard in RESHARD:
            model, _ = _both(reshard)
            before = dict(model.named_parameters())
            for peek in PEEKS:
                peek(model)
                there = dict(model.named_parameters())
                block = dict(model.blocks[0].named_parameters())
                same = all(there[name] is param for name, param in before.items())
                same &= block["bias"] is before["blocks.0.bias"]
                same &= model.get_parameter("last.weight") is before["last.weight"]
                same &= nn.ModuleList([model]).get_parameter("0.first.bias") is before["first.bias"]
                if not same:
                    wrong.append(f"{reshard}, {peek.__name__}")
        return wrong

    assert run_ranks(rank, 4) == [[]] * 4


def test_a_forward_after_the_weights_have_changed_uses_the_new_ones():
    """Also those that nothing counts: ``.data``, and what an average swaps in."""

    def edited(model: Any) -> None:
        for param in model.parameters():
            param.data.mul_(2)

    def stepped(model: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loss_of(model, model.example(3)).backward()
        _without_gradients(model)  # an evaluation between backward and step
        optimizer.step()

    def rank() -> list[str]:
        wrong = []
        for change in (edited, stepped):
            for name, *models in _peeked():
                outputs = []
                for model in models:
                    change(model)
                    with torch.no_grad():
                        outputs.append(model(model.example(1)[0]))
                    outputs.append(model(model.example(1)[0]).detach())
                if not all(torch.allclose(outputs[0], other, atol=1e-6) for other in outputs):
                    wrong.append(f"{change.__name__}: {name}")
        return wrong

    assert run_ranks(rank, 4) == [[]] * 4


def test_a_registered_method_computes_with_the_weights_of_now():
    """FSDP2 begins it without a hook of ours, and takes what a forward has left for gathered."""

    def rank() -> list[str]:
        wrong = []
        for reshard in RESHARD:
            models = _both(reshard)
            register_fsdp_forward_method(models[0], "again")
            outputs = []
            for model in models:
                model(model.example(0)[0])  # with gradients, and no backward
                with torch.no_grad():
                    for param in model.parameters():
                        param.mul_(2)
                    outputs.append(model.again(model.example(1)[0]))
                loss_of(model, model.example(3)).backward()
            if not torch.allclose(*outputs, atol=1e-6):
                wrong.append(str(reshard))
            ours, theirs = ([p.grad for p in model.parameters()] for model in models)
            if not all(
                torch.allclose(full(a), b, atol=1e-6) for a, b in zip(ours, theirs, strict=True)
            ):
                wrong.append(f"{reshard}, gradients")
        return wrong

    assert run_ranks(rank, 4) == [[]] * 4


def test_parameters_read_between_forward_and_backward_change_no_gradient():
    def read(model: Any) -> None:
        assert all(isinstance(param, DTensor) for param in model.parameters())
        model.zero_grad()
        torch.optim.SGD(model.parameters(), lr=0.1)
        model.state_dict()

    def later(model: Any, losses: Callable[[Any], list[torch.Tensor]]) -> None:
        found = losses(model)
        if isinstance(model, FSDPModule):
            read(model)
        torch.stack(found).prod().backward()

    def once(model: Any) -> list[torch.Tensor]:
        return [loss_of(model, model.example(0))]

    def twice(model: Any) -> list[torch.Tensor]:
        return [loss_of(model, model.example(seed)) for seed in range(2)]

    def rank() -> list[str]:
        wrong = []
        for reshard in RESHARD:
            for recomputes in (False, True):
                for losses in (once, twice):
                    models = _both(reshard)
                    for model in models:
                        model.recomputes = recomputes
                        later(model, losses)
                    for (name, ours), theirs in zip(
                        models[0].named_parameters(), models[1].parameters(), strict=True
                    ):
                        if not torch.allclose(full(ours.grad), theirs.grad, atol=1e-6):
                            wrong.append(f"{reshard} {recomputes} {losses.__name__} {name}")
        return wrong

    assert run_ranks(rank, 4) == [[]] * 4


def test_parameters_kept_gathered_after_backward_are_at_rest_and_not_used_after_a_step():
    def rank() -> list[str]:
        models = _both()
        models[0].set_reshard_after_backward(False)
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            for _ in range(2):
                _step(model, optimizer)
                assert model is models[1] or isinstance(model.last.weight, DTensor)
        return _differences(*models)

    assert run_ranks(rank, 2) == [[]] * 2
