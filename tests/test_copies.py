"""Copies along an axis of tensor parallelism stay alike, or are refused with name and numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import full
from parity import quiet
from ranks import run_ranks
from torch import nn
from torch.distributed import _functional_collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mics
from mics.communication import digests
from mics.errors import CheckpointError, MicroStepError

FP32 = MixedPrecisionPolicy()
WIDTH, HEADS, STEPS = 8, 4, 3
Hook = Callable[[torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Heads that are scaled by one weight of the size of a head, as norms of queries are.

    With tensor parallelism a rank has some of the heads: the weight's gradient there is their part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HEADS * WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.down = nn.Linear(HEADS * WIDTH, WIDTH)
        self.sums: Hook | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.up(self.norm(x)).unflatten(-1, (-1, WIDTH))
        scale = self.scale
        if isinstance(scale, DTensor):
            scale = scale.to_local(grad_placements=[Partial()])
        if self.sums is not None:
            scale = scale * 1
            scale.register_hook(self.sums)
        return x + self.down(torch.relu(heads * scale).flatten(-2))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


def _mesh(shape: tuple[int, int, int]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))


def _parallel(mesh: DeviceMesh) -> Net:
    torch.manual_seed(0)
    net = Net()
    for block in net.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)
    return net


def _sharded(net: Net, mesh: DeviceMesh) -> Net:
    return mics.shard(net, mesh=mesh["replicate", "shard"], blocks=Block, mp_policy=FP32)


def _batch(step: int, replica: int) -> torch.Tensor:
    seed = torch.Generator().manual_seed(100 * step + replica)
    return torch.randn(4, WIDTH, generator=seed)


def _train(
    net: nn.Module,
    replica: int,
    before_step: Callable[[], None] = lambda: None,
    steps: int = STEPS,
) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(
        [param for param in net.parameters() if param.requires_grad], lr=1e-2
    )
    for step in range(steps):
        for batch in mics.micro_steps(net, [_batch(step, replica)] * 2):
            (net(batch).square().mean() / 2).backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _replica(mesh: DeviceMesh) -> int:
    return mesh.get_local_rank(0) * mesh.size(1) + mesh.get_local_rank(1)


def _refused(net: Net, mesh: DeviceMesh, replica: int | None = None) -> tuple[int, str]:
    """In which step, and with which words."""
    steps: list[None] = []
    with pytest.raises(MicroStepError) as raised:
        _train(net, _replica(mesh) if replica is None else replica, lambda: steps.append(None))
    return len(steps), str(raised.value)


# -- refused -------------------------------------------------------------------------------------


def _all_refusals(shape: tuple[int, int, int]) -> list[tuple[int, str]]:
    mesh = _mesh(shape)
    parts = _sharded(_parallel(mesh), mesh)

    other_data = _parallel(mesh)
    for block in other_data.blocks:
        block.scale.requires_grad_(False)
    _sharded(other_data, mesh)

    other_values = _parallel(mesh)
    for module in (*other_values.blocks, other_values):
        mics.fully_shard(module, mesh=mesh["replicate", "shard"], mp_policy=FP32)
    with torch.no_grad():  # after sharding, as a loop that loads weights itself
        other_values.head.weight.mul_(1 + 0.5 * mesh.get_local_rank("tp"))
    return [
        _refused(parts, mesh),
        _refused(other_data, mesh, dist.get_rank()),
        _refused(other_values, mesh),
    ]


@pytest.mark.parametrize(
    "shape", [(1, 2, 2), (1, 1, 2), pytest.param((2, 1, 2), marks=pytest.mark.extra)]
)
def test_copies_that_would_drift_are_refused_on_every_rank(shape: tuple[int, int, int]) -> None:
    world = shape[0] * shape[1] * shape[2]
    said = run_ranks(quiet, world, lambda: _all_refusals(shape))
    assert all(one == said[0] for one in said)
    parts, other_data, other_values = said[0]
    for step, text in (parts, other_data):
        assert step == 1  # before the optimizer's second step
        assert "and used other gradients for it in the step before" in text
        assert "Of its gradient, rank 0's has the norm" in text and "rank 1's" in text
        assert "param.to_local(grad_placements=[Partial()])" in text
    assert "Ranks along 'tp' have a copy of blocks." in parts[1]
    step, text = other_values
    assert step == 0  # before the first
    assert "Ranks along 'tp' have a copy of head.weight each, and their values differ" in text
    assert (
        "allowed is 1% before the first optimizer step" in text
        and "the same seed and the same file" in text
    )


def test_the_parameter_of_local_heads_is_the_one_that_is_named() -> None:
    def rank() -> str:
        mesh = _mesh((1, 1, 2))
        net = _parallel(mesh)
        for name, param in net.named_parameters():
            param.requires_grad_(name == "blocks.1.scale")
        return _refused(_sharded(net, mesh), mesh)[1]

    for text in run_ranks(quiet, 2, rank):
        assert "have a copy of blocks.1.scale each, and used other gradients" in text


def test_an_optimizer_that_steps_on_some_ranks_of_an_axis_only_is_refused() -> None:
    def rank() -> str:
        mesh = _mesh((1, 1, 2))
        net = _parallel(mesh)
        for block in net.blocks:
            block.scale.requires_grad_(False)
        net = _sharded(net, mesh)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        with pytest.raises(MicroStepError) as raised:
            for step in range(2):
                for batch in mics.micro_steps(net, [_batch(step, 0)]):
                    net(batch).square().mean().backward()
                if dist.get_rank() == 0:
                    optimizer.step()
                optimizer.zero_grad()
        return str(raised.value)

    for text in run_ranks(quiet, 2, rank):
        assert "an optimizer has stepped it on some of them only" in text
        assert "1 on rank 0, 0 on rank 1" in text


def test_a_copy_that_is_frozen_on_some_ranks_of_an_axis_only_is_refused() -> None:
    def rank() -> tuple[int, str]:
        mesh = _mesh((1, 1, 2))
        net = _sharded(_parallel(mesh), mesh)
        net.head.bias.requires_grad_(dist.get_rank() == 0)
        return _refused(net, mesh)

    for step, text in run_ranks(quiet, 2, rank):
        assert step == 0
        assert "have a copy of head.bias each, and not all of them train it" in text
        assert "requires_grad is True on rank 0, False on rank 1" in text


def _after_an_overflow(scaler: torch.amp.GradScaler) -> list[float]:
    """A gradient of one part of a matrix is infinite in the second step."""
    mesh = _mesh((1, 1, 2))
    net = _parallel(mesh)
    for block in net.blocks:
        block.scale.requires_grad_(False)
    _sharded(net, mesh)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    scales = []
    for step in range(3):
        for batch in mics.micro_steps(net, [_batch(step, 0)]):
            scaler.scale(net(batch).square().mean()).backward()
        if step == 1 and dist.get_rank() == 0:
            net.blocks[0].up.weight.grad.to_local().fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.filterwarnings("ignore:Found a non-scalar tensor with numel=1:UserWarning")
def test_a_loss_scaler_that_skips_on_some_ranks_of_an_axis_only_is_refused() -> None:
    """torch's GradScaler asks the ranks of no mesh but a parameter's; the sharded one asks all."""

    def rank() -> tuple[list[float], str]:
        with pytest.raises(MicroStepError) as raised:
            _after_an_overflow(torch.amp.GradScaler("cpu", init_scale=256.0))
        everybody = ShardedGradScaler("cpu", init_scale=256.0)
        return _after_an_overflow(everybody), str(raised.value)

    for scales, text in run_ranks(quiet, 2, rank):
        assert scales == [256.0, 128.0, 128.0]
        assert "stepped it on some of them only" in text and "0 on rank 0, 1 on rank 1" in text
        assert "ShardedGradScaler, not GradScaler" in text


# -- right ---------------------------------------------------------------------------------------


def _alone(frozen: bool, replicas: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = Net()
    if frozen:
        _freeze(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        for replica in range(replicas):
            (net(_batch(step, replica)).square().mean() / replicas).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in net.named_parameters()}


def _freeze(net: Net) -> None:
    """The first parameter of a unit, and one that is spread."""
    net.blocks[0].norm.weight.requires_grad_(False)
    net.blocks[1].up.weight.requires_grad_(False)


def _ways() -> list[str]:
    mesh = _mesh((1, 2, 2))
    group = mesh["tp"].get_group()
    wrong = []
    for way in ("placement", "hook in backward", "afterwards", "frozen"):
        net = _parallel(mesh)
        for block in net.blocks:
            if way in ("placement", "frozen"):
                scale = DTensor.from_local(block.scale.detach(), mesh["tp"], [Replicate()])
                block.scale = nn.Parameter(scale)
            elif way == "hook in backward":
                block.sums = lambda g: _functional_collectives.all_reduce(g, "sum", group)
        if way == "frozen":
            _freeze(net)
        _sharded(net, mesh)

        def before_step(way: str = way, net: Net = net) -> None:
            for block in net.blocks if way == "afterwards" else ():
                dist.all_reduce(block.scale.grad.to_local(), group=group)

        _train(net, _replica(mesh), before_step)
        right = _alone(way == "frozen", 2)
        for name, param in net.named_parameters():
            if not torch.allclose(full(param), right[name], rtol=1e-4, atol=1e-5):
                wrong.append(f"{way}: {name}")
    return wrong


def test_gradients_that_are_summed_over_the_axis_in_any_way_train_as_in_one_process() -> None:
    """Those of frozen parameters beside them too."""
    assert run_ranks(quiet, 4, _ways) == [[]] * 4


def test_copies_that_drifted_are_told_from_experts_when_they_are_saved(tmp_path: Path) -> None:
    def rank() -> str:
        mesh = _mesh((1, 2, 2))
        net = _sharded(_parallel(mesh), mesh)
        _train(net, _replica(mesh), steps=1)  # the last step is compared by nobody
        with pytest.raises(CheckpointError) as raised:
            mics.save(tmp_path / "kept", model=net)
        return str(raised.value)

    for text in run_ranks(quiet, 4, rank):
        assert "Ranks along 'tp' hold different values of model/blocks." in text
        assert "the copies were set otherwise or have drifted apart" in text
        assert "experts" not in text


# -- digests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [1, 7, 2**14, 2**14 + 1, 3 * 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_digests_are_as_far_apart_as_the_tensors(numel: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    one = torch.randn(numel)
    near = one + 0.01 * one.norm() * nn.functional.normalize(torch.randn(numel), dim=0)
    tensors = [one, near, -one.flip(0), None, torch.zeros(0), torch.zeros(numel)]
    found = digests.Digests([t if t is None else t.to(dtype) for t in tensors]).read()
    assert found.shape == (6, digests.SIZE)
    assert not found[3:].any()
    apart = (found - found[0]).abs().amax(dim=1) / found[0, -1]
    assert apart[1] < 0.04
    assert apart[2] > 0.2


def test_digests_tell_large_tensors_apart_that_have_the_same_values_in_another_order() -> None:
    torch.manual_seed(0)
    large = torch.randn(2**14)
    found = digests.Digests([large, large.roll(1)]).read()
    assert float(found[0, -1]) == pytest.approx(float(found[1, -1]), rel=1e-4)
    assert float((found[0] - found[1]).abs().max() / found[0, -1]) > 0.2


def test_digests_see_a_few_rows_of_a_large_table() -> None:
    table = torch.zeros(50_000, 512)
    table[::500] = 1.0
    assert digests.Digests([table]).read()[0, -1] > 0
