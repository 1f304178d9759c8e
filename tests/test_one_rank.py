"""A replica of one rank: the whole parameters are the shards' memory, gradients are added once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import Run, Stack, batches, loss_of, quiet
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import mics
from mics import compat
from mics.sharding.units import units_of


def _alone(**shard: Any) -> nn.Module:
    torch.manual_seed(0)
    policy = shard.pop("mp_policy", MixedPrecisionPolicy())
    mesh = mesh_of_rank(1, 2)
    return quiet(lambda: mics.shard(Stack(), mesh=mesh, mp_policy=policy, **shard))


def _pointers(model: nn.Module) -> list[tuple[int, int]]:
    """Where each whole parameter is, and where its shard."""
    return [
        (compat.local_of(whole).data_ptr(), compat.local_of(shard).data_ptr())
        for unit in units_of(model)
        for whole, shard in zip(
            compat.gathered_params(unit.group), compat.sharded_params(unit.group), strict=True
        )
    ]


class _Copies(TorchDispatchMode):
    """Counts elements of floating numbers that are copied or concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        copies = (torch.ops.aten.copy_, torch.ops.aten.clone, torch.ops.aten.cat)
        if func.overloadpacket in copies and out.is_floating_point():
            self.elements += out.numel()
        return out


def _train(model: nn.Module, steps: int) -> list[Any]:
    """Losses; the elements that were copied in the last step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, copies = [], _Copies()
    for number, step in enumerate(batches(Run(steps=steps), dist.get_world_size())):
        with copies if number == steps - 1 else torch.enable_grad():
            for micro in mics.micro_steps(model, step[:, dist.get_rank()]):
                loss = loss_of(model(micro))
                loss.backward()
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return [losses, copies.elements]


def _nothing_is_copied() -> None:
    model = _alone()
    _, elements = _train(model, 3)
    assert all(whole == shard for whole, shard in _pointers(model))
    # The first micro-step's gradients come into the buffer of hop 2, the only copy of a step.
    assert elements == sum(p.numel() for p in model.parameters())


def test_a_step_copies_no_parameter_and_every_gradient_once() -> None:
    run_ranks(_nothing_is_copied, 2, ranks_per_node=2)


def _beside_ddp() -> None:
    ours = _alone()
    torch.manual_seed(0)
    theirs = DistributedDataParallel(Stack())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (ours, theirs)]
    for step in batches(Run(steps=3), dist.get_world_size()):
        mine = step[:, dist.get_rank()]
        for micro in mics.micro_steps(ours, mine):
            loss_of(ours(micro)).backward()
        for i, micro in enumerate(mine):
            theirs.require_backward_grad_sync = i == len(mine) - 1
            loss_of(theirs(micro)).backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(compat.local_of(own), other.data, rtol=1e-6, atol=1e-6)


def test_it_trains_as_ddp_does() -> None:
    run_ranks(_beside_ddp, 4, ranks_per_node=2)


def _frozen_for_a_while(reshard_after_backward: bool, mesh: tuple[int, int]) -> None:
    torch.manual_seed(0)
    alone = Stack()
    torch.manual_seed(0)
    ours: Any = quiet(
        lambda: mics.shard(Stack(), mesh=mesh_of_rank(*mesh), mp_policy=MixedPrecisionPolicy())
    )
    ours.set_reshard_after_backward(reshard_after_backward)
    models = alone, ours
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    for step, batch in enumerate(batches(Run(steps=4), 1)):  # the same on every rank
        ours(batch[0, 0])  # whose backward is left out
        for model, optimizer in zip(models, optimizers, strict=True):
            for name, param in model.named_parameters():
                if name.startswith("blocks.0."):
                    param.requires_grad_(step % 2 == 0)
            loss_of(model(batch[0, 0])).backward()
            optimizer.step()
        for (name, right), own in zip(alone.named_parameters(), ours.parameters(), strict=True):
            assert (own.grad is None) == (right.grad is None), (step, name)
            torch.testing.assert_close(own.full_tensor(), right.data, rtol=1e-6, atol=1e-6)
        for one in optimizers:
            one.zero_grad()


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)])
@pytest.mark.parametrize("reshard_after_backward", [True, False])
def test_what_is_frozen_between_steps_of_a_loop_by_hand_stays_as_it_is(
    reshard_after_backward: bool, mesh: tuple[int, int]
) -> None:
    run_ranks(_frozen_for_a_while, 2, reshard_after_backward, mesh, ranks_per_node=2)


def _as_fsdp2_would(variant: dict[str, Any]) -> None:
    """With and without what FSDP2 does itself for a group of one rank: not one bit apart."""
    outcomes = []
    for ours in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not ours:
                patch.setattr(compat, "can_stay_whole", lambda _: False)
                patch.setattr(compat, "whole_gradients_are_sums", lambda _: False)
            model = _alone(**variant)
            losses, _ = _train(model, 3)
            outcomes.append((losses, [compat.local_of(p).clone() for p in model.parameters()]))
    (losses, weights), (other_losses, other_weights) = outcomes
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"mp_policy": BF16},
    "reduced in bf16": {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)},
    "fp16": {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float16)
    },
    "recomputed": {"activation_checkpointing": True},
    "resharded": {"reshard_after_forward": True},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "not overlapped": {"overlap": False},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_bit_is_that_of_fsdp2s_own_way(variant: dict[str, Any]) -> None:
    run_ranks(_as_fsdp2_would, 2, variant, ranks_per_node=2)


def _edited() -> None:
    model = _alone()
    _train(model, 1)
    x = torch.ones(2, 13)
    with torch.no_grad():
        before = model(x)
        for param in model.parameters():
            param.mul_(0.5)
        assert not torch.equal(model(x), before)
    with torch.inference_mode():
        edited = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.reshard()  # type: ignore[operator]  # what FSDP2 frees is nothing of the shards
    model.unshard()  # type: ignore[operator]
    model.reshard()  # type: ignore[operator]
    _train(model, 1)
    assert not torch.equal(model(x), edited)
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(x), edited)
    assert all(whole == shard for whole, shard in _pointers(model))


def test_shards_that_were_edited_freed_or_replaced_are_the_next_forwards() -> None:
    run_ranks(_edited, 2, ranks_per_node=2)


def _looks_in_between() -> None:
    model, plain = _alone(), _alone()
    x = next(iter(batches(Run(steps=1), dist.get_world_size())))[0, dist.get_rank()]
    for one in (model, plain):
        with torch.inference_mode():
            one(x)
        output = one(x)
        if one is model:
            with torch.inference_mode():
                assert torch.equal(one(x), output)  # between a forward and its backward
        loss_of(output).backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(compat.local_of(own.grad), compat.local_of(other.grad))


def test_a_look_under_inference_mode_leaves_training_alone() -> None:
    run_ranks(_looks_in_between, 2)
