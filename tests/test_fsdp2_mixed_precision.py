"""MixedPrecisionPolicy and gradient scaling behave with mics.fully_shard as with torch's."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from models import TiedTransformer, UnevenMLP, gradients, loss_of, seeded, shard_blocks, weights
from ranks import run_ranks
from side_by_side import (
    Answer,
    FullyShard,
    micro_batches,
    one_axis,
    same_as_torch,
    train,
    train_alone,
    two_axes,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics

POLICIES = {
    "bf16, reduced in fp32": MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    "bf16, reduced in bf16": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16),
    "bf16, reduce dtype left out": MixedPrecisionPolicy(torch.bfloat16),
    "fp16, reduced in fp32": MixedPrecisionPolicy(torch.float16, torch.float32),
    "fp16, reduce dtype left out": MixedPrecisionPolicy(torch.float16),
    "fp32, reduced in bf16": MixedPrecisionPolicy(None, torch.bfloat16),
}


def test_every_policy_gives_torchs_results_and_dtypes():
    def script(fully_shard: FullyShard) -> Answer:
        return {
            f"{name}, {mesh_of.__name__}": _train_and_look(fully_shard, mesh_of(), policy)
            for name, policy in POLICIES.items()
            for mesh_of in (one_axis, two_axes)
        }

    answers = same_as_torch(script)
    alone = train_alone(UnevenMLP)
    for name, answer in answers[0][1].items():
        policy = POLICIES[", ".join(name.split(", ")[:-1])]
        computes = policy.param_dtype or torch.float32
        for seen in answer["seen"]:
            assert set(seen.values()) == {str(computes)}, name
        assert all(g.dtype == torch.float32 for g in answer["gradients"].values()), name
        for param, weight in answer["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][param], rtol=0, atol=2e-2)


def _train_and_look(
    fully_shard: FullyShard, mesh: Any, policy: MixedPrecisionPolicy, make: Any = UnevenMLP
) -> Answer:
    seen: list[dict[str, torch.dtype]] = []

    def look(model: nn.Module) -> None:
        def after(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            weight = module[0].weight
            seen.append({"weight": weight.dtype, "input": inputs[0].dtype, "output": output.dtype})

        model.blocks[0].register_forward_hook(after)

    # Kept unsharded, so that the hook sees what the block computed with.
    keywords = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": False}
    answer = train(fully_shard, make, prepare=look, **keywords)
    return answer | {"seen": [{k: str(v) for k, v in one.items()} for one in seen]}


def test_inputs_are_cast_only_when_asked():
    def script(fully_shard: FullyShard) -> Answer:
        dtypes = []
        for cast in (True, False):
            policy = replace(POLICIES["bf16, reduced in fp32"], cast_forward_inputs=cast)
            model = seeded(UnevenMLP)
            model.register_forward_pre_hook(lambda m, args: dtypes.append(str(args[0].dtype)))
            fully_shard(model, mesh=two_axes(), mp_policy=policy)
            x, _ = model.example(0)
            model(x if cast else x.bfloat16())
        return {"dtypes": dtypes}

    same_as_torch(script)


def test_outputs_are_cast_to_the_output_dtype():
    def script(fully_shard: FullyShard) -> Answer:
        policy = POLICIES["bf16, reduced in fp32"]
        model = seeded(UnevenMLP)
        for block in model.blocks:
            fully_shard(block, mesh=two_axes(), mp_policy=policy)
        fully_shard(model, mesh=two_axes(), mp_policy=replace(policy, output_dtype=torch.float64))
        x, y = micro_batches(model, 0, 1)[0]
        output = model(x)
        (output - y).square().mean().backward()
        return {"dtype": str(output.dtype), "gradients": gradients(model)}

    assert same_as_torch(script)[0][1]["dtype"] == "torch.float64"


def test_a_model_in_bf16_trains_in_bf16():
    def script(fully_shard: FullyShard) -> Answer:
        model = seeded(TiedTransformer).bfloat16()
        shard_blocks(fully_shard, model, mesh=two_axes())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, micro_batches(model, step, 1)[0]).backward()
            optimizer.step()
        return {"gradients": gradients(model), "weights": weights(model)}

    answers = same_as_torch(script)
    assert {g.dtype for g in answers[0][1]["gradients"].values()} == {torch.bfloat16}


def test_a_gradient_scaler_skips_the_same_steps():
    def script(fully_shard: FullyShard) -> Answer:
        policy = POLICIES["fp16, reduce dtype left out"]
        model = shard_blocks(fully_shard, seeded(UnevenMLP), mesh=two_axes(), mp_policy=policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, backoff_factor=2.0**-6)
        scales = []
        for step in range(4):
            scaler.scale(loss_of(model, micro_batches(model, step, 1)[0])).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        return {"scales": scales, "weights": weights(model)}

    answers = same_as_torch(script)
    scales = answers[0][1]["scales"]
    assert scales[0] < 2.0**20  # one step at least overflowed
    assert scales[-1] == scales[-2]  # and one did not


def test_accumulation_in_fp32_of_bf16_gradients_by_hand():
    def script(fully_shard: FullyShard) -> Answer:
        return {
            how: train(
                fully_shard,
                UnevenMLP,
                mesh=two_axes(),
                micro_steps=3,
                accumulate=how,
                mp_policy=POLICIES["bf16, reduced in fp32"],
            )
            for how in ("gradient sync", "all-reduce")
        }

    same_as_torch(script)


class Adapted(nn.Module):
    """A frozen bf16 base and a trainable fp32 adapter in one block, as with LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        self.adapter = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x.bfloat16()).float() + self.adapter(x)


def _train_adapters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), Adapted())
    alone = copy.deepcopy(model)
    mesh = mics.init_mesh(partition=2, gpus_per_node=2)
    for module in (*model, model):
        mics.fully_shard(module, mesh=mesh)
    data = torch.randn(4, 3, 6)
    model(data[dist.get_rank()]).square().mean().backward()
    alone(data.flatten(0, 1)).square().mean().backward()
    for ours, exact in zip(model, alone, strict=True):
        gradient = ours.adapter.weight.grad
        assert gradient is not None and exact.adapter.weight.grad is not None
        # bf16 would be 4e-3 away.
        torch.testing.assert_close(
            gradient.full_tensor(), exact.adapter.weight.grad, rtol=1e-5, atol=1e-6
        )
    assert mics.ledger(model).traffic() == mics.predict_traffic(model)


def test_a_frozen_base_of_another_dtype_lowers_no_gradients_precision():
    run_ranks(_train_adapters, 4)
