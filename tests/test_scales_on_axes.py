"""Gathers in few bits beside tensor parallelism, and of experts spread over an axis of their own.

A scale is of the piece that tensor or expert parallelism gives a rank, which its partition group
agrees on: one process with a scale for each piece computes the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from low_precision import Float8, Way, cast_linears, unquantised
from models import full
from ranks import mesh_of_rank, run_ranks
from test_expert_tensors import FULL
from test_expert_tensors import _data as tokens
from test_expert_tensors import _net as experts_net
from test_expert_tensors import _placing as placing
from test_whole_step import mlps
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import SGD

import mics
from mics.traffic import Count, Key

WORLD, WIDTH, STEPS, MICRO_STEPS, TP = 4, 8, 3, 2, 2


def batch(step: int, micro_step: int, replica: int) -> torch.Tensor:
    seed = torch.Generator().manual_seed(100 * step + 10 * micro_step + replica)
    return torch.randn(4, WIDTH, generator=seed)


def in_pieces(weight: torch.Tensor, way: Way, dim: int, pieces: int) -> torch.Tensor:
    """What a weight is with a scale for each piece of it."""
    return torch.cat([unquantised(one, way) for one in weight.chunk(pieces, dim)], dim)


# -- tensor parallelism ----------------------------------------------------------------------------


def on_tp(way: Way, replicate: int, stepped: str) -> list[str]:
    """What differs from one process, or from what was predicted."""
    names = ("replicate", "shard", "tp")
    mesh = init_device_mesh("cpu", (replicate, 2 // replicate, TP), mesh_dim_names=names)
    model = cast_linears(mlps(16), way)
    for block in model.children():
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)  # type: ignore[arg-type]
    for module in (*model.children(), model):
        mics.fully_shard(module, mesh=mesh["replicate", "shard"], mp_policy=FULL)
    optimizer: Any = SGD(model.parameters(), lr=0.1, momentum=0.5)
    if stepped == "whole":
        optimizer = mics.WholeStep(model.parameters(), SGD, lr=0.1, momentum=0.5)
    replica, wrong, view = dist.get_rank() // TP, [], mics.ledger(model)
    for step in range(STEPS):
        view.reset()
        predicted = mics.predict_traffic(model, micro_steps=MICRO_STEPS, optimizer=optimizer)
        batches = [batch(step, m, replica) for m in range(MICRO_STEPS)]
        for x in mics.micro_steps(model, batches):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if view.traffic() != predicted:
            wrong.append(f"counted\n{view.traffic()}\npredicted\n{predicted}")
    right = alone_in_pieces(way)
    for name, param in model.named_parameters():
        apart = float((full(param) - right[name]).norm() / right[name].norm())
        if not apart < 1e-6:
            wrong.append(f"{name} is {apart:.1e} off")
    return wrong


def alone_in_pieces(way: Way) -> dict[str, torch.Tensor]:
    model = mlps(16)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.5)
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            for replica in range(2):
                few = {
                    name: in_pieces(param, way, 0 if "up" in name else 1, TP)
                    for name, param in model.named_parameters()
                    if param.ndim == 2
                }
                y = torch.func.functional_call(model, few, (batch(step, micro_step, replica),))
                (y.square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.slow
def test_few_bits_beside_tensor_parallelism_train_as_one_process_and_are_counted() -> None:
    def all_ways() -> dict[str, list[str]]:
        return {
            "float8": on_tp("float8", 1, "elementwise"),
            "float8, two replicas": on_tp("float8", 2, "elementwise"),
            "float8, whole steps": on_tp("float8", 1, "whole"),
            "int8": on_tp("int8", 1, "elementwise"),
        }

    for rank in run_ranks(all_ways, WORLD, ranks_per_node=2):
        for name, wrong in rank.items():
            assert not wrong, f"{name}: {wrong[0]}"


# -- experts ---------------------------------------------------------------------------------------


def of_experts(replicate: int, *, placed: bool) -> list[str]:
    """What differs from one process, or from what was predicted."""
    names = ("replicate", "efsdp", "ep")
    mesh = init_device_mesh("cpu", (replicate, 2 // replicate, 2), mesh_dim_names=names)
    held_by, dense = mesh["replicate", "efsdp"], mesh_of_rank(4, 2)
    model = experts_net(mesh["ep"])
    for block in model[:2]:
        experts: Any = block.experts
        for name, param in list(experts.named_parameters()):
            local = distribute_tensor(param.data, mesh["ep"], [Shard(0)]).to_local()
            local = Float8(local) if name == "weight" else local
            spread = DTensor.from_local(local, mesh["ep"], [Shard(0)], run_check=False)
            setattr(experts, name, nn.Parameter(spread))
        place = placing(experts, held_by, "rows") if placed else None
        if not placed:
            mics.fully_shard(experts, mesh=held_by, mp_policy=FULL)
        mics.fully_shard(block, mesh=dense, mp_policy=FULL, shard_placement_fn=place)
    mics.fully_shard(model, mesh=dense, mp_policy=FULL)
    view, wrong = mics.ledger(model), []
    view.reset()
    predicted = mics.predict_traffic(model, micro_steps=MICRO_STEPS)
    for x in mics.micro_steps(model, [tokens(m, dist.get_rank()) for m in range(MICRO_STEPS)]):
        model(x).square().mean().backward()
    if view.traffic() != predicted:
        wrong.append(f"counted\n{view.traffic()}\npredicted\n{predicted}")
    scales = view.traffic().counts.get(Key(0, "all_reduce", "flat"), Count()).calls
    if scales != (2 * 2 * MICRO_STEPS if replicate == 1 else 0):  # one rank has nobody to ask
        wrong.append(f"{scales} scales")
    right = dict(alone_with_experts().named_parameters())
    for name, param in model.named_parameters():
        if not torch.allclose(full(param.grad), right[name].grad, rtol=1e-5, atol=1e-6):  # type: ignore[arg-type]
            wrong.append(f"gradient of {name}")
    return wrong


def alone_with_experts() -> nn.Module:
    model = experts_net()
    for micro_step in range(MICRO_STEPS):
        for rank in range(WORLD):
            few = {
                name: in_pieces(param, "float8", 0, 2)
                for name, param in model.named_parameters()
                if name.endswith("experts.weight")
            }
            y = torch.func.functional_call(model, few, (tokens(micro_step, rank),))
            (y.square().mean() / WORLD).backward()
    return model


def test_experts_are_gathered_in_few_bits_as_one_process_computes_and_are_counted() -> None:
    def all_ways() -> dict[str, list[str]]:
        return {
            "own mesh": of_experts(1, placed=False),
            "placed": of_experts(1, placed=True),
            "replicas of one rank": of_experts(2, placed=False),
        }

    for rank in run_ranks(all_ways, WORLD, ranks_per_node=2):
        for name, wrong in rank.items():
            assert not wrong, f"{name}: {wrong[0]}"
