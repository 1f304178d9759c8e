"""Experts on another mesh than the rest of their block, on four ranks beside one process.

Two experts, spread over two ranks; every rank sends half of its tokens to each. So each expert has
two holders, ranks apart, and sees the tokens of all four ranks.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import run_ranks
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import get_total_norm

import mics
from mics.errors import CheckpointError

WORLD, WIDTH, TOKENS, MICRO_STEPS, EXPERTS = 4, 8, 6, 2, 2
FULL = MixedPrecisionPolicy()

Way = Literal["placed", "own mesh"]


class Block(nn.Module):
    """A layer for all tokens, then one of two experts: even tokens go to the first."""

    def __init__(self, experts: DeviceMesh | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.spread_over = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.dense(x))
        sorted_ = torch.cat([y[0::2], y[1::2]])
        if self.spread_over is None:
            halves = sorted_.chunk(EXPERTS)
            out = torch.cat(
                [expert(half) for expert, half in zip(self.experts, halves, strict=True)]
            )
        else:
            group = self.spread_over.get_group()
            mine = all_to_all_single_autograd(sorted_, None, None, group)
            out = all_to_all_single_autograd(self.experts[0](mine), None, None, group)
        return x + torch.stack(out.chunk(EXPERTS), dim=1).flatten(0, 1)


def _net(experts: DeviceMesh | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*[Block(experts) for _ in range(2)], nn.Linear(WIDTH, 3))
    if experts is not None:
        for block in net[:2]:
            block.experts = nn.ModuleList([block.experts[experts.get_local_rank()]])  # type: ignore[assignment]
    return net


def _meshes(replicated: bool) -> tuple[DeviceMesh, DeviceMesh]:
    """What experts are spread over, and what each of them is sharded over."""
    if replicated:
        whole = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "ep"))
        return whole["ep"], whole["replicate", "shard"]
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    return whole["ep"], whole["efsdp"]


def _sharded(way: Way, replicated: bool, partition: int) -> nn.Sequential:
    over, held_by = _meshes(replicated)
    net = _net(over)
    mesh = mics.init_mesh(partition=partition)
    info = _get_mesh_info(held_by, None)
    for block in net[:2]:
        place = None
        if way == "own mesh":
            mics.fully_shard(block.experts[0], mesh=held_by, mp_policy=FULL)  # type: ignore[union-attr,index]
        else:
            mine = set(block.experts.parameters())  # type: ignore[union-attr]

            def place(param: nn.Parameter, mine: set[nn.Parameter] = mine) -> Any:
                return ShardPlacementResult(Shard(0), info) if param in mine else None

        mics.fully_shard(block, mesh=mesh, mp_policy=FULL, shard_placement_fn=place)
    return mics.fully_shard(net, mesh=mesh, mp_policy=FULL)  # type: ignore[no-any-return]


def _data(micro_step: int, rank: int) -> torch.Tensor:
    seed = torch.Generator().manual_seed(10 * micro_step + rank)
    return torch.randn(TOKENS, WIDTH, generator=seed)


def _alone(normalise: Any) -> nn.Sequential:
    net = _net()
    for micro_step, rank in itertools.product(range(MICRO_STEPS), range(WORLD)):
        loss = net(_data(micro_step, rank)).square()
        if normalise == "tokens":
            (loss.sum() / (WORLD * MICRO_STEPS * TOKENS)).backward()
        else:
            (loss.mean() / (WORLD * (1 if normalise is None else MICRO_STEPS))).backward()
    return net


def _holder_of(name: str, rank: int) -> str:
    """The name in one process of a parameter of one rank."""
    return name.replace("experts.0", f"experts.{rank % EXPERTS}")


def _gradients(params: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    return [param.grad for param in params.values() if param.grad is not None]


def _errors(way: Way, replicated: bool, partition: int) -> list[str]:
    wrong = []
    for normalise in (None, "micro_steps", "tokens"):
        model = _sharded(way, replicated, partition)
        right = dict(_alone(normalise).named_parameters())
        view = mics.ledger(model)
        view.reset()
        batches = [_data(m, dist.get_rank()) for m in range(MICRO_STEPS)]
        how = (lambda batch: TOKENS) if normalise == "tokens" else normalise
        for batch in mics.micro_steps(model, batches, normalise=how):  # type: ignore[arg-type]
            loss = model(batch).square()
            (loss.sum() if normalise == "tokens" else loss.mean()).backward()
        for name, param in model.named_parameters():
            mine = param.grad.full_tensor()  # type: ignore[union-attr]
            whole = right[_holder_of(name, dist.get_rank())].grad
            assert whole is not None
            if not torch.allclose(mine, whole, rtol=1e-5, atol=1e-6):
                ratio = float((mine / whole).nanmedian())
                wrong.append(f"{normalise}: {name} is {ratio:.3f} times what is right")
        for order in (2.0, float("inf")):
            norm = float(mics.clip_grad_norm_(model.parameters(), 1e9, order))
            if abs(norm / float(get_total_norm(_gradients(right), order)) - 1) > 1e-5:
                wrong.append(f"{normalise}: the norm of order {order} is {norm}")
        if view.traffic() != mics.predict_traffic(model, micro_steps=MICRO_STEPS):
            wrong.append(f"{normalise}: counted {view.traffic()}")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("partition", [2, 1])
@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("way", ["placed", "own mesh"])
def test_experts_on_other_ranks_get_the_gradients_of_one_process_and_are_counted(
    way: Way, replicated: bool, partition: int
) -> None:
    got = run_ranks(quiet, WORLD, lambda: _errors(way, replicated, partition))
    assert got == [[]] * WORLD


def _of_two_blocks_in_one_unit() -> list[str]:
    """Parameters that are not what the rank had, or was told to train."""
    over, held_by = _meshes(replicated=False)
    net, right = _net(over), dict(_alone(None).named_parameters())
    had = {name: param.detach().clone() for name, param in net.named_parameters()}
    mine = {param for block in net[:2] for param in block.experts.parameters()}  # type: ignore[union-attr]
    info = _get_mesh_info(held_by, None)

    def place(param: nn.Parameter) -> Any:
        return ShardPlacementResult(Shard(0), info) if param in mine else None

    mesh = mics.init_mesh(partition=2)
    mics.fully_shard([net[0], net[1]], mesh=mesh, mp_policy=FULL, shard_placement_fn=place)
    mics.fully_shard(net, mesh=mesh, mp_policy=FULL)
    wrong = [n for n, p in net.named_parameters() if not torch.equal(p.full_tensor(), had[n])]  # type: ignore[attr-defined]
    for batch in mics.micro_steps(net, [_data(m, dist.get_rank()) for m in range(MICRO_STEPS)]):
        net(batch).square().mean().backward()
    for name, param in net.named_parameters():
        whole = right[_holder_of(name, dist.get_rank())].grad
        if not torch.allclose(param.grad.full_tensor(), whole, rtol=1e-5, atol=1e-6):  # type: ignore[union-attr,arg-type]
            wrong.append(f"the gradient of {name}")
    return wrong


def test_experts_of_two_blocks_in_one_unit_keep_their_own_values() -> None:
    """Parameters of both have the same names in their blocks."""
    assert run_ranks(quiet, WORLD, _of_two_blocks_in_one_unit) == [[]] * WORLD


def _refusals(folder: Path) -> list[str]:
    """What saving says of experts under one name, with state, and of ones that are not sharded."""
    model = _sharded("own mesh", replicated=True, partition=2)
    for batch in mics.micro_steps(model, [_data(0, dist.get_rank())]):
        model(batch).square().mean().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    alone = nn.Linear(2, 2)
    with torch.no_grad():
        alone.weight.fill_(dist.get_rank() % 2)
        alone.bias.zero_()
    pair = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
    rows_or_columns = [Shard(int(dist.get_rank() > 1))]
    askew = nn.ParameterList([distribute_tensor(torch.zeros(4, 4), pair, rows_or_columns)])
    said = []
    for kept, state in ((model, optimizer), (alone, None), (askew, None)):
        with pytest.raises(CheckpointError) as raised:
            mics.save(folder / "kept", model=kept, optimizer=state)
        said.append(str(raised.value))
    return [*said, *(path.name for path in folder.iterdir())]


def test_experts_under_one_name_with_other_values_are_not_saved_as_one(tmp_path: Path) -> None:
    for said, plain, askew, *left in run_ranks(quiet, WORLD, lambda: _refusals(tmp_path)):
        assert "Ranks hold different values of model/0.experts.0.weight" in said
        assert "a checkpoint would have those of one" in said
        assert "Ranks 0 and 1 both have the part of it at [0, 0], with other values" in said
        assert 'DTensor.from_local(weights, mesh["ep"], [Shard(0)])' in said
        assert "Ranks disagree on parameters that are not sharded: rank(s) 1, 3 differ" in plain
        assert "Ranks hold model/0 in parts that do not fit together" in askew
        assert "Their parts have 32 cells together, and it has 16" in askew
        assert left == []


def _on_more_ranks_than_the_root() -> str:
    dense = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))["shard"]
    more = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("efsdp",))
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    expert = mics.fully_shard(net[1], mesh=more, mp_policy=FULL)
    mics.fully_shard(net, mesh=dense, mp_policy=FULL)
    with pytest.raises(mics.ShardError) as raised:
        net(_data(0, 0))
    expert.set_gradient_divide_factor(2)
    expert.set_force_sum_reduction_for_comms(True)  # Gloo can not divide
    net(_data(0, 0)).square().mean().backward()
    return str(raised.value)


def test_experts_on_more_ranks_than_the_root_need_a_divide_factor() -> None:
    for said in run_ranks(quiet, WORLD, _on_more_ranks_than_the_root):
        assert "1 is on more ranks than the root of its model" in said
        assert "4 ranks, the root is on 2" in said
        assert "set_gradient_divide_factor(ranks that have other tokens)" in said


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


def _layers_on_two_meshes(form: Any, without: int) -> tuple[list[torch.Tensor], bool]:
    """Layers of one size, every other one on another mesh of the same ranks."""
    torch.manual_seed(0)
    net = nn.Sequential(*[_Layer() for _ in range(6)])
    alone = copy.deepcopy(net)
    meshes = [
        init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard")) for _ in range(2)
    ]
    for number, layer in enumerate(net):
        mics.fully_shard(layer, mesh=meshes[number % 2], mp_policy=FULL, collectives=form)
    mics.fully_shard(net, mesh=meshes[0], mp_policy=FULL, collectives=form)
    expected = mics.predict_traffic(net, micro_steps=MICRO_STEPS)
    for number, _ in enumerate(mics.micro_steps(net, range(MICRO_STEPS))):
        loss = net(_data(number, dist.get_rank())).square().mean()
        if dist.get_rank() != without:
            loss.backward()
        for rank in {*range(WORLD)} - {without}:
            (alone(_data(number, rank)).square().mean() / WORLD).backward()
    for param, reference in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(param.grad.full_tensor(), reference.grad)  # type: ignore[union-attr]
    found = [param.grad.full_tensor() for param in net.parameters()]  # type: ignore[union-attr]
    counted = mics.ledger(net).traffic()
    return found, {k: v for k, v in counted.counts.items() if k.hop == 2} == {
        k: v for k, v in expected.counts.items() if k.hop == 2
    }


@pytest.mark.parametrize("form", ["flat", "hierarchical"])
@pytest.mark.parametrize("without", [1, -1])
def test_a_rank_without_a_backward_sends_what_the_others_do_on_two_meshes(
    form: str, without: int
) -> None:
    ranks = run_ranks(_layers_on_two_meshes, WORLD, form, without, ranks_per_node=2)
    for found, as_predicted in ranks:
        assert as_predicted
        assert all(torch.equal(a, b) for a, b in zip(found, ranks[0][0], strict=True))
