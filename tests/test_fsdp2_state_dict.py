"""State dicts and checkpoints of a model sharded by mics.fully_shard are plain torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import TiedTransformer, UnevenMLP, full, loss_of, seeded, shard_blocks, weights
from ranks import run_ranks
from side_by_side import Answer, FullyShard, micro_batches, one_axis, same_as_torch, two_axes
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import mics

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def test_keys_and_whole_values_are_those_of_the_plain_model():
    def script(fully_shard: FullyShard) -> Answer:
        model = shard_blocks(fully_shard, seeded(TiedTransformer), mesh=two_axes())
        before = {name: full(value) for name, value in model.state_dict().items()}
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()  # the root is kept unsharded
        after = model.state_dict()
        sharded = [name for name, value in after.items() if isinstance(value, DTensor)]
        return {"weights": before, "after": {n: full(v) for n, v in after.items()}, "dt": sharded}

    ours = same_as_torch(script)[0][1]
    plain = seeded(TiedTransformer).state_dict()
    assert list(ours["weights"]) == list(plain)
    assert "positions" not in plain and "scale" in plain
    assert ours["dt"] == [name for name in plain if name != "scale"]
    for name, value in plain.items():
        assert torch.equal(ours["weights"][name], value)
        assert torch.equal(ours["after"][name], value)


def test_a_whole_state_dict_is_collected_on_the_first_rank_and_spread_from_it():
    def script(fully_shard: FullyShard) -> Answer:
        source = shard_blocks(fully_shard, seeded(UnevenMLP, 1), mesh=two_axes())
        target = shard_blocks(fully_shard, seeded(UnevenMLP, 2), mesh=two_axes())
        whole = get_model_state_dict(source, options=WHOLE)
        assert bool(whole) == (dist.get_rank() == 0)
        set_model_state_dict(
            target,
            whole,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        return {"weights": weights(target)}

    ours = same_as_torch(script)[0][1]["weights"]
    expected = weights(seeded(UnevenMLP, 1))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_meta_device_model_is_materialised_from_a_whole_state_dict():
    def script(fully_shard: FullyShard) -> Answer:
        whole = seeded(UnevenMLP, 1).state_dict()
        with torch.device("meta"):
            model = UnevenMLP()
        shard_blocks(fully_shard, model, mesh=two_axes())
        sharded = {
            name: nn.Parameter(distribute_tensor(whole[name], param.device_mesh, param.placements))
            for name, param in model.state_dict().items()
        }
        model.load_state_dict(sharded, strict=True, assign=True)
        loss_of(model, micro_batches(model, 0, 1)[0]).backward()
        grads = {name: full(param.grad) for name, param in model.named_parameters()}
        return {"weights": weights(model), "gradients": grads}

    same_as_torch(script)


def test_the_state_of_an_optimizer_is_collected_and_set():
    def script(fully_shard: FullyShard) -> Answer:
        model, optimizer = _trained(fully_shard, 1)
        whole = get_optimizer_state_dict(model, optimizer, options=WHOLE)
        other, other_optimizer = _trained(fully_shard, 2)
        set_optimizer_state_dict(
            other,
            other_optimizer,
            whole,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        states = get_optimizer_state_dict(other, other_optimizer)["state"]
        return {
            "weights": {f: {k: full(v) for k, v in s.items()} for f, s in states.items()},
            "whole": whole.get("state"),
        }

    ours = same_as_torch(script)[0][1]
    assert (
        ours["weights"].keys()
        == ours["whole"].keys()
        == dict(UnevenMLP().named_parameters()).keys()
    )
    for name, state in ours["whole"].items():
        for key, value in state.items():
            assert torch.equal(ours["weights"][name][key], value)


def _trained(fully_shard: FullyShard, seed: int, mesh: Any = None) -> tuple[Any, Any]:
    model = shard_blocks(fully_shard, seeded(UnevenMLP, seed), mesh=mesh or two_axes())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, micro_batches(model, seed, 1)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("reader", ["ours", "torch's"])
@pytest.mark.parametrize("writer", ["ours", "torch's"])
def test_a_distributed_checkpoint_loads_at_another_partition(tmp_path, writer, reader):
    """Also into and out of torch's own HSDP: the files are the same."""
    implementations = {"ours": mics.fully_shard, "torch's": torch_fully_shard}

    def save() -> dict[str, torch.Tensor]:
        model, _ = _trained(implementations[writer], 1)
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tmp_path)
        return weights(model)

    def load() -> dict[str, torch.Tensor]:
        model = shard_blocks(implementations[reader], seeded(UnevenMLP, 5), mesh=one_axis())
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=tmp_path)
        set_model_state_dict(model, state["model"])
        return weights(model)

    saved = run_ranks(save, 4)[0]
    for loaded in run_ranks(load, 4):
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_replicas_do_not_write_the_checkpoint_twice(tmp_path):
    def save() -> int:
        model = seeded(lambda: nn.Linear(301, 303))
        mics.fully_shard(model, mesh=two_axes())
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tmp_path)
        return sum(p.numel() * p.element_size() for p in model.parameters())

    size = run_ranks(save, 4)[0]
    written = sum(file.stat().st_size for file in Path(tmp_path).glob("*.distcp"))
    assert size <= written < 1.1 * size
