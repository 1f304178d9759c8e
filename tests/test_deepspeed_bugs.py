"""Every bug DeepSpeed's MiCS had and that could occur here, by name.

Numbers are DeepSpeed issues unless another project is named. "Found" are bugs without an issue,
seen by running 0.19.2 to 0.19.6.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import (
    ThriceUsed,
    UnevenMLP,
    full,
    gradients,
    loss_of,
    seeded,
    shard_blocks,
    weights,
)
from ranks import errors_of_ranks, run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import mics
from mics import compat
from mics.ranks.mesh import groups_of

Tensors = dict[str, torch.Tensor]


def train(
    make: Any, partition: int, *, micro_steps: int = 1, clip: float | None = None, **keywords: Any
) -> tuple[Tensors, Tensors]:
    """Two steps of mics on this rank; the last gradients and the weights, whole."""
    mesh = mics.init_mesh(partition=partition)
    model = shard_blocks(mics.fully_shard, seeded(make), mesh=mesh, **keywords)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    last: Tensors = {}
    for step in range(2):
        seeds = [1000 * step + 100 * i + dist.get_rank() for i in range(micro_steps)]
        for seed in mics.micro_steps(model, seeds):
            loss_of(model, model.example(seed)).backward()
        last = gradients(model)
        if clip is not None:
            last["norm"] = full(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
    return last, weights(model)


def train_alone(
    make: Any, ranks: int, *, micro_steps: int = 1, clip: float | None = None
) -> tuple[Tensors, Tensors]:
    """What ``train`` must come to, in one process."""
    model = seeded(make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    last: Tensors = {}
    for step in range(2):
        for i in range(micro_steps):
            for rank in range(ranks):
                loss = loss_of(model, model.example(1000 * step + 100 * i + rank))
                (loss / ranks).backward()
        last = gradients(model)
        if clip is not None:
            last["norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return last, weights(model)


def assert_same(answers: list[tuple[Tensors, Tensors]], alone: tuple[Tensors, Tensors]) -> None:
    """Every rank has what one process has, and all ranks have the same bits."""
    for answer in answers:
        for got, first, expected in zip(answer, answers[0], alone, strict=True):
            assert got.keys() == expected.keys()
            for name in got:
                assert torch.equal(got[name], first[name]), name
                torch.testing.assert_close(got[name], expected[name], rtol=2e-6, atol=2e-6)


class _Late(dist.Work):
    """A collective that does nothing until it is waited for."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run
        self._future: torch.futures.Future[None] = torch.futures.Future()

    def wait(self, timeout: Any = None) -> bool:
        if not self._future.done():
            self._run()
            self._future.set_result(None)
        return True

    def get_future(self) -> Any:
        return self._future


@pytest.mark.parametrize("form", ["flat", "hierarchical"])
def test_deepspeed_5080_compute_waits_for_the_gather(form, monkeypatch):
    """#5080 (open, also #4792, #5039): the handle waited for was the wrong one, the exception was
    swallowed, and compute read weights that had not arrived."""
    really = compat.all_gather
    late = []

    def all_gather(output: Any, input: Any, group: Any, async_op: bool = False) -> Any:
        if not output.is_floating_point():  # what ranks compare before they shard
            return really(output, input, group, async_op)
        if not async_op:
            return really(output, input, group)
        late.append(output.numel())
        input = input.clone()  # a view of the output
        output.fill_(float("nan"))
        return _Late(lambda: really(output, input, group))

    monkeypatch.setattr(compat, "all_gather", all_gather)

    def rank() -> tuple[Tensors, Tensors]:
        mesh = mics.init_mesh(partition=4)
        model = shard_blocks(mics.fully_shard, seeded(UnevenMLP), mesh=mesh, collectives=form)
        for block in model.blocks:
            block.unshard(async_op=True)  # under way when the forward begins
        model._set_unshard_async_op(True)
        loss_of(model, model.example(dist.get_rank())).backward()
        assert len(late) >= 5  # two by hand, the root's, two in backward
        return gradients(model), weights(model)

    answers = run_ranks(rank, 4, ranks_per_node=2)
    model = seeded(UnevenMLP)
    for r in range(4):
        (loss_of(model, model.example(r)) / 4).backward()
    assert_same(answers, (gradients(model), weights(model)))


def test_deepspeed_hang_with_several_shard_groups():
    """Found (0.19.3 to 0.19.6): with more than one shard group some ranks skipped the replica
    all-reduce and the job hung at the first accumulation boundary."""

    def rank() -> Any:
        return train(UnevenMLP, 2, micro_steps=3)

    assert_same(run_ranks(rank, 6), train_alone(UnevenMLP, 6, micro_steps=3))


def test_deepspeed_replicas_seeded_differently_start_equal():
    """Found (0.19.3 to 0.19.6): ranks seeded differently started from different weights, because
    parameters were broadcast inside the shard group only."""

    def rank() -> list[Tensors]:
        started = []
        for partition in (1, 2, 4):
            torch.manual_seed(2222 + dist.get_rank())
            mesh = mics.init_mesh(partition=partition)
            started.append(weights(shard_blocks(mics.fully_shard, UnevenMLP(), mesh=mesh)))
        return started

    torch.manual_seed(2222)
    expected = weights(UnevenMLP())
    for started in run_ranks(rank, 4):
        for answer in started:
            assert all(torch.equal(answer[name], expected[name]) for name in expected)


def _with_adamw(partition: int, seed: int) -> tuple[Any, Any]:
    mesh = mics.init_mesh(partition=partition)
    model = shard_blocks(mics.fully_shard, seeded(UnevenMLP, seed), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer


def _step(model: Any, optimizer: Any, seed: int) -> None:
    loss_of(model, model.example(seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _whole_state(model: Any, optimizer: Any) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {f: {k: full(v) for k, v in s.items()} for f, s in optimizer_state["state"].items()}
    return {"model": {n: full(v) for n, v in model_state.items()}, "optimizer": state}


def test_deepspeed_checkpoint_loads_optimizer_state_at_another_partition(tmp_path):
    """Found (0.14.5 to 0.19.6): loading any checkpoint raised a TypeError, and with that repaired
    another shard size raised "The size of tensor a (134016) must match ... b (268032)"."""

    def write() -> dict[str, Any]:
        model, optimizer = _with_adamw(2, 1)
        for step in range(2):
            _step(model, optimizer, 10 * step + dist.get_rank())
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "2")
        written = _whole_state(model, optimizer)
        _step(model, optimizer, 7)
        return {"written": written, "next": weights(model)}

    def pass_on(partition: int, source: str) -> dict[str, Any]:
        model, optimizer = _with_adamw(partition, 99)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=tmp_path / source)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=tmp_path / f"{source}-{partition}",
        )
        loaded = _whole_state(model, optimizer)
        _step(model, optimizer, 7)
        return {"written": loaded, "next": weights(model)}

    first = run_ranks(write, 4)[0]
    second = run_ranks(pass_on, 4, 4, "2")
    third = run_ranks(pass_on, 2, 1, "2-4")
    for answer in (*second, *third):
        _assert_equal(answer["written"], first["written"])
        for name, weight in answer["next"].items():
            torch.testing.assert_close(weight, first["next"][name], rtol=1e-5, atol=1e-6)
    steps = {float(s["step"]) for s in first["written"]["optimizer"].values()}
    assert steps == {2.0}


def _assert_equal(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            _assert_equal(got[key], expected[key])
    else:
        assert torch.equal(got, expected)


def test_deepspeed_4012_plain_parameters_need_no_special_init():
    """#4012 (open): "'Parameter' object has no attribute 'comm'" unless the model was made inside
    MiCS_Init; the configuration also had offloading, which #4792 reports broken with replicas."""

    def rank() -> Any:
        return train(UnevenMLP, 2, micro_steps=2, offload_policy=CPUOffloadPolicy(pin_memory=False))

    assert_same(run_ranks(rank, 4), train_alone(UnevenMLP, 4, micro_steps=2))


def test_deepspeed_3862_no_deprecated_collective_warns():
    """#3862: ``all_reduce_coalesced`` is deprecated and warned in every step. Warnings are errors
    in these tests; here, what is only shown outside them is too."""

    def rank() -> Any:
        import warnings

        warnings.simplefilter("error")
        return [
            train(UnevenMLP, partition, micro_steps=2, collectives=form)
            for partition, form in ((2, "auto"), (4, "hierarchical"), (4, "flat"), (1, "auto"))
        ]

    alone = train_alone(UnevenMLP, 4, micro_steps=2)
    for answers in zip(*run_ranks(rank, 4, ranks_per_node=2), strict=True):
        assert_same(list(answers), alone)


def test_deepspeed_4731_arguments_cannot_slip_by_position():
    """#4731, again in #7585: a constructor with 40 positional arguments lost one on the way."""

    def rank() -> None:
        mesh = mics.init_mesh(partition=2)
        with pytest.raises(TypeError):
            mics.fully_shard(seeded(UnevenMLP), mesh)
        with pytest.raises(TypeError):
            mics.shard(seeded(UnevenMLP), 2)
        with pytest.raises(TypeError):
            mics.init_mesh(2)
        dist.barrier()

    run_ranks(rank, 2)


def test_deepspeed_options_are_never_silently_ignored():
    """Found: qwZ, qgZ, hpZ, LoCo and others were accepted beside MiCS and had no effect."""

    def rank() -> None:
        mesh = mics.init_mesh(partition=2)
        for option in ("zero_quantized_weights", "quantize", "mesh_dims"):
            with pytest.raises(TypeError, match=option):
                mics.fully_shard(seeded(UnevenMLP), mesh=mesh, **{option: True})
            with pytest.raises(TypeError, match=option):
                mics.shard(seeded(UnevenMLP), mesh=mesh, **{option: True})
        with pytest.raises(mics.ShardError, match="hierarchic"):
            mics.fully_shard(seeded(UnevenMLP), mesh=mesh, collectives="hierarchic")
        with pytest.raises(mics.ShardError, match="partition"):
            mics.shard(seeded(UnevenMLP), mesh=mesh, partition=2)
        dist.barrier()

    run_ranks(rank, 2)


def test_deepspeed_layer_used_three_times_has_the_right_gradient():
    """DeepSpeed tested that this trains without error, not its result, and not on a CPU."""

    def rank() -> Any:
        return train(ThriceUsed, 2, micro_steps=2)

    assert_same(run_ranks(rank, 4), train_alone(ThriceUsed, 4, micro_steps=2))


def test_deepspeed_clipping_takes_the_norm_over_all_shards():
    """Never tested there; a norm over one rank's shard alone would clip ranks differently."""

    def rank() -> Any:
        return [train(UnevenMLP, partition, clip=0.05) for partition in (1, 2, 4)]

    alone = train_alone(UnevenMLP, 4, clip=0.05)
    assert alone[0]["norm"] > 0.05
    for answers in zip(*run_ranks(rank, 4), strict=True):
        assert_same(list(answers), alone)


class _Wide(nn.Module):
    """128 rows on three ranks: the last shard is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(7, 128)])
        self.out = nn.Linear(128, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.blocks[0](x)))

    def example(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(4, 7, generator=generator), torch.randn(4, 2, generator=generator)


def test_deepspeed_sizes_that_do_not_divide_are_padded():
    """Never tested there: 128 rows on 3 ranks, 2 rows on 3 ranks (one rank holds nothing)."""

    def rank() -> Any:
        return train(_Wide, 3, clip=0.05, micro_steps=2)

    assert_same(run_ranks(rank, 3), train_alone(_Wide, 3, clip=0.05, micro_steps=2))


def test_deepspeed_shard_size_one_and_whole_world_are_ordinary():
    """With several shard groups 0.19.3 to 0.19.6 hung at size 1 and not at the world's."""

    def rank() -> Any:
        return [train(UnevenMLP, partition, micro_steps=2) for partition in (1, 2, 4)]

    alone = train_alone(UnevenMLP, 4, micro_steps=2)
    for answers in zip(*run_ranks(rank, 4), strict=True):
        assert_same(list(answers), alone)


def test_deepspeed_bf16_gives_the_losses_of_fp32_to_its_rounding():
    """Tested there only for not failing."""

    def rank() -> Any:
        return train(UnevenMLP, 2, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))

    alone = train_alone(UnevenMLP, 4)
    answers = run_ranks(rank, 4)
    for answer in answers:
        for got, first, expected in zip(answer, answers[0], alone, strict=True):
            for name in got:
                assert torch.equal(got[name], first[name])
                assert got[name].dtype == torch.float32
                torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-2)


def test_deepspeed_ndev_per_node_is_not_taken_from_the_visible_devices(monkeypatch):
    """Found: node size was ``device_count()``, which is 1 when every process sees one device; the
    NDEV_PER_NODE variable was the way out."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(os.environ, "NDEV_PER_NODE", "1")

    def rank() -> tuple[int, int, int]:
        by_launcher = groups_of(mics.init_mesh(partition=4)).gpus_per_node
        plain = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        by_fully_shard = groups_of(plain).gpus_per_node
        argued = mics.init_mesh(partition=2, gpus_per_node=1)
        dist.barrier()  # a rank that ends while others still connect breaks them
        return by_launcher, by_fully_shard, groups_of(argued).gpus_per_node

    assert run_ranks(rank, 4, ranks_per_node=2) == [(2, 2, 1)] * 4


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class _Tensors(nn.Module):
    """Sizes that tensor parallelism divides."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Residual() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def example(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)


@pytest.mark.slow
def test_deepspeed_groups_under_tensor_parallelism_come_from_the_mesh():
    """Found: groups were made of consecutive global ranks whatever the tensor-parallel layout."""

    def rank() -> tuple[Tensors, Tensors]:
        shape = (2, 2, 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
        model = seeded(_Tensors)
        for block in model.blocks:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
        shard_blocks(mics.fully_shard, model, mesh=mesh["replicate", "shard"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        last: Tensors = {}
        for step in range(2):
            # One batch per tensor-parallel pair.
            seeds = [1000 * step + 100 * i + dist.get_rank() // 2 for i in range(2)]
            for seed in mics.micro_steps(model, seeds):
                loss_of(model, model.example(seed)).backward()
            last = gradients(model)
            last["norm"] = full(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05))
            optimizer.step()
            optimizer.zero_grad()
        return last, weights(model)

    assert_same(run_ranks(rank, 8), train_alone(_Tensors, 4, micro_steps=2, clip=0.05))


def test_deepspeed_misleading_shape_errors_name_the_parameter(tmp_path):
    """Found: another model or shard size gave "size of tensor a must match b" or a bare
    AssertionError, on different ranks."""

    def write() -> None:
        model = shard_blocks(mics.fully_shard, seeded(UnevenMLP), mesh=mics.init_mesh(partition=2))
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)

    def read() -> None:
        model = seeded(UnevenMLP)
        model.out = nn.Linear(13, 6)
        shard_blocks(mics.fully_shard, model, mesh=mics.init_mesh(partition=2))
        dcp.load({"model": model.state_dict()}, checkpoint_id=tmp_path)

    run_ranks(write, 4)
    for error in errors_of_ranks(read, 4):
        assert "Size mismatch" in error
        assert "model.out.weight" in error or "model.out.bias" in error


def test_deepspeed_ranks_with_other_shapes_are_named_before_anything_hangs():
    """Found: ranks that disagreed hung in the next collective."""

    def rank() -> None:
        model = seeded(UnevenMLP)
        if dist.get_rank() == 3:
            model.out = nn.Linear(13, 6)
        shard_blocks(mics.fully_shard, model, mesh=mics.init_mesh(partition=2))

    for error in errors_of_ranks(rank, 4):
        assert "out.weight (5, 13)" in error and "out.weight (6, 13)" in error


def test_deepspeed_megatron_328_nothing_needs_a_configuration():
    """Megatron-DeepSpeed #328: MiCS_Init insisted on a configuration file."""

    def rank() -> Tensors:
        model = mics.fully_shard(seeded(UnevenMLP))
        loss_of(model, model.example(0)).backward()
        return weights(model)

    expected = weights(seeded(UnevenMLP))
    for answer in run_ranks(rank, 2):
        assert all(torch.equal(answer[name], expected[name]) for name in expected)


def test_deepspeed_gathered_parameters_are_freed_and_counted_as_hierarchical():
    """DeepSpeed tested that a gather by hand is freed again; what it missed is that such a gather
    ran flat over the whole shard group, hierarchical or not."""

    def rank() -> tuple[list[int], set[str]]:
        mesh = mics.init_mesh(partition=4)
        model = mics.fully_shard(seeded(UnevenMLP), mesh=mesh, collectives="hierarchical")
        model.unshard()
        whole = model.blocks[0][0].weight
        sizes = [whole.untyped_storage().nbytes()]
        model.reshard()
        sizes.append(whole.untyped_storage().nbytes())
        return sizes, {key.stage for key in mics.ledger(model).traffic().counts}

    for sizes, stages in run_ranks(rank, 4, ranks_per_node=2):
        assert sizes[0] >= 13 * 17 * 4 and sizes[1] == 0
        assert stages == {"inter", "intra"}
