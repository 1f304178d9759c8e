"""All experts of a block as one parameter, spread over an axis of their own, then sharded.

torchtitan's way: experts are DTensors over "ep" before they are sharded over the ranks that hold
the same ones. Trained, clipped, counted, saved and loaded on four ranks beside one process.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import DataParallelMeshDims, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import get_total_norm

import mics
from mics.errors import ShardError

WORLD, WIDTH, TOKENS, MICRO_STEPS, EXPERTS = 4, 8, 8, 2, 4
FULL = MixedPrecisionPolicy()


class Experts(nn.Module):
    """Each its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 3)
        self.bias = nn.Parameter(torch.randn(EXPERTS, 1, WIDTH) / 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if isinstance(weight, DTensor):
            weight, bias = weight.to_local(), bias.to_local()  # type: ignore[attr-defined]
        return torch.baddbmm(bias, rows, weight)


class Dense(nn.Linear):
    """Computes with its parameters as they are on this rank."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if isinstance(weight, DTensor):
            weight, bias = weight.to_local(), bias.to_local()  # type: ignore[attr-defined]
        return nn.functional.linear(x, weight, bias)


class Block(nn.Module):
    """A layer for all tokens, then one of the experts: they take turns."""

    def __init__(self, ep: DeviceMesh | None) -> None:
        super().__init__()
        self.dense = Dense(WIDTH, WIDTH)
        self.experts = Experts()
        self.ep = ep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.dense(x))
        rows = torch.stack([y[i::EXPERTS] for i in range(EXPERTS)])
        if self.ep is None:
            return x + self.experts(rows).transpose(0, 1).flatten(0, 1)
        group, n = self.ep.get_group(), self.ep.size()
        mine = all_to_all_single_autograd(rows.flatten(0, 1), None, None, group)
        mine = mine.view(n, EXPERTS // n, -1, WIDTH).transpose(0, 1).flatten(1, 2)
        out = self.experts(mine).view(EXPERTS // n, n, -1, WIDTH).transpose(0, 1).flatten(0, 2)
        rows = all_to_all_single_autograd(out.contiguous(), None, None, group)
        return x + rows.view(EXPERTS, -1, WIDTH).transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class Layout:
    """Where the model is: p of the dense part, and axes of the experts' mesh."""

    partition: int
    replicate: int
    ep: int
    way: Literal["placed", "own mesh", "columns", "named axes"] = "placed"


TRAINED = (
    Layout(2, 1, 2),
    Layout(2, 2, 2),
    Layout(2, 1, 4, "own mesh"),
    Layout(4, 2, 2, "columns"),
    Layout(2, 1, 2, "named axes"),
    Layout(2, 2, 2, "named axes"),
)
LOADED = (*TRAINED[:4], Layout(4, 1, 1), Layout(1, 1, 2, "own mesh"))


def _net(ep: DeviceMesh | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(ep), Block(ep), Dense(WIDTH, 3))


@cache
def _experts_mesh(replicate: int, ep: int) -> DeviceMesh:
    shape = (replicate, WORLD // replicate // ep, ep)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "efsdp", "ep"))


def _sharded(layout: Layout, around: Callable[[nn.Sequential], nn.Module] = lambda n: n) -> Any:
    whole, mesh = _experts_mesh(layout.replicate, layout.ep), mesh_of_rank(layout.partition)
    held_by = whole["replicate", "efsdp"]
    net = _net(whole["ep"])
    for block in net[:2]:
        experts: Any = block.experts
        for name, param in list(experts.named_parameters()):
            spread = distribute_tensor(param.data, whole["ep"], [Shard(0)])
            setattr(experts, name, nn.Parameter(spread))
        place = None
        if layout.way == "own mesh":
            mics.fully_shard(experts, mesh=held_by, mp_policy=FULL)
        else:
            place = _placing(experts, held_by, layout.way)
        mics.fully_shard(block, mesh=mesh, mp_policy=FULL, shard_placement_fn=place)
    return mics.fully_shard(around(net), mesh=mesh, mp_policy=FULL)


def _on_whole_meshes(layout: Layout) -> nn.Module:
    """Every parameter on all ranks of one of two meshes, whose axes are told by their names."""
    experts, dense = _experts_mesh(layout.replicate, layout.ep), mesh_of_rank(layout.partition)
    net, place, dims = _net(experts["ep"]), {}, DataParallelMeshDims
    info = _get_mesh_info(experts, dims(shard="efsdp", replicate="replicate"))
    for module in net.modules():
        own = isinstance(module, Experts)
        axes = [Replicate(), Replicate(), Shard(0)] if own else [Replicate(), Replicate()]
        for name, param in list(module.named_parameters(recurse=False)):
            spread = distribute_tensor(param.data, experts if own else dense, axes)
            setattr(module, name, nn.Parameter(spread))
            if own:
                place[getattr(module, name)] = ShardPlacementResult(Shard(0), info)
    for module in (*net[:2], net):
        mics.fully_shard(
            module,
            mesh=dense,
            dp_mesh_dims=dims(shard="shard", replicate="replicate"),
            mp_policy=FULL,
            shard_placement_fn=place.get,
        )
    return net


def _placing(experts: Experts, held_by: DeviceMesh, way: str) -> Any:
    info, mine = _get_mesh_info(held_by), set(experts.parameters())
    weight = experts.weight

    def place(param: nn.Parameter) -> Any:
        dim = 1 if way == "columns" and param is weight else 0
        return ShardPlacementResult(Shard(dim), info) if param in mine else None

    return place


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


def _trained(layout: Layout, normalise: Any, wrong: list[str]) -> nn.Sequential:
    """A model with the gradients of a step, compared with one process'."""
    model = _on_whole_meshes(layout) if layout.way == "named axes" else _sharded(layout)
    right = dict(_alone(normalise).named_parameters())
    case = f"{layout}, {normalise}"
    view = mics.ledger(model)
    view.reset()
    batches = [_data(m, dist.get_rank()) for m in range(MICRO_STEPS)]
    how: Any = (lambda batch: TOKENS) if normalise == "tokens" else normalise
    for batch in mics.micro_steps(model, batches, normalise=how):
        loss = model(batch).square()
        (loss.sum() if normalise == "tokens" else loss.mean()).backward()
    for name, param in model.named_parameters():
        if not torch.allclose(_full(param.grad), right[name].grad, rtol=1e-5, atol=1e-6):  # type: ignore[arg-type]
            wrong.append(f"{case}: gradient of {name}")
    gradients = [param.grad for param in right.values() if param.grad is not None]
    for order in (2.0, float("inf")):
        norm = float(mics.clip_grad_norm_(model.parameters(), 1e9, order))
        ratio = norm / float(get_total_norm(gradients, order))
        if abs(ratio - 1) > 1e-5:
            wrong.append(f"{case}: the norm of order {order} is {ratio} times what is right")
    if view.traffic() != mics.predict_traffic(model, micro_steps=MICRO_STEPS):
        wrong.append(f"{case}: counted {view.traffic()}")
    return model


def _full(tensor: Any) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()  # type: ignore[no-any-return]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = {name: _full(param) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        state |= {f"{name}.{key}": _full(v) for key, v in optimizer.state[param].items()}
    return state


def _differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def _errors(folder: Path) -> list[str]:
    warnings.simplefilter("ignore")  # full_tensor of shards beside shards
    wrong: list[str] = []
    for number, layout in enumerate(TRAINED):
        for normalise in (None, "micro_steps", "tokens")[number % 3 :: 2]:
            model = _trained(layout, normalise, wrong)
        optimizer = _adamw(model)
        optimizer.step()
        saved = _state(model, optimizer)
        mics.save(folder / str(number), model=model, optimizer=optimizer)
        for other in LOADED[(number + 1) % 5 :][:2]:
            into = _sharded(other)
            fresh = _adamw(into)
            mics.load(folder / str(number), model=into, optimizer=fresh)
            if differ := _differences(saved, _state(into, fresh)):
                wrong.append(f"{layout} loaded as {other}: {differ}")
    return wrong


@pytest.mark.slow
def test_experts_as_one_tensor_train_as_in_one_process_and_load_anywhere(tmp_path: Path) -> None:
    assert run_ranks(quiet, WORLD, lambda: _errors(tmp_path)) == [[]] * WORLD


def _errors_of_torch(folder: Path) -> list[str]:
    """What differs after a round by torch's own functions, in parts and as a whole."""
    warnings.simplefilter("ignore")
    layout, other = TRAINED[1], TRAINED[0]
    model = _trained(layout, None, wrong := [])
    optimizer = _adamw(model)
    optimizer.step()
    saved = _state(model, optimizer)
    parts = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    state_dict_saver.save(parts, checkpoint_id=folder)
    into = _sharded(other)
    fresh = _adamw(into)
    parts = {
        "model": get_model_state_dict(into),
        "optimizer": get_optimizer_state_dict(into, fresh),
    }
    state_dict_loader.load(parts, checkpoint_id=folder)
    set_model_state_dict(into, parts["model"])
    set_optimizer_state_dict(into, fresh, parts["optimizer"])
    wrong += [f"in parts: {name}" for name in _differences(saved, _state(into, fresh))]
    whole = StateDictOptions(full_state_dict=True)
    full = get_model_state_dict(model, options=whole)
    wrong += [
        f"whole: {name}" for name, value in full.items() if not torch.equal(value, saved[name])
    ]
    into = _sharded(other)
    set_model_state_dict(into, full, options=whole)
    wrong += [
        f"set: {name}" for name, p in into.named_parameters() if _full(p).ne(saved[name]).any()
    ]
    return wrong


@pytest.mark.slow
def test_torchs_own_functions_save_and_load_experts_as_one_tensor(tmp_path: Path) -> None:
    assert run_ranks(quiet, WORLD, lambda: _errors_of_torch(tmp_path)) == [[]] * WORLD


def _errors_of_copies(folder: Path) -> list[str]:
    """A norm beside tensor parallelism is on every rank of it, and a plain parameter on all."""
    wrong: list[str] = []
    for shape in ((2, 1, 2), (1, 2, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
        states = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8))
            parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
            mics.fully_shard(model, mesh=mesh["replicate", "shard"])
            optimizer = _adamw(model)
            for batch in mics.micro_steps(model, [torch.ones(4, 8) * (1 + seed)]):
                model(batch).square().mean().backward()
            optimizer.step()
            if seed == 0:
                mics.save(folder / str(shape), model=model, optimizer=optimizer)
            else:
                mics.load(folder / str(shape), model=model, optimizer=optimizer)
            states.append(_state(model, optimizer))
        wrong += [f"{shape}: {name}" for name in _differences(*states)]
    return wrong


def test_what_ranks_beside_each_other_have_copies_of_is_written_once(tmp_path: Path) -> None:
    assert run_ranks(quiet, WORLD, lambda: _errors_of_copies(tmp_path)) == [[]] * WORLD


class Skipping(nn.Module):
    """The net of this file, whose second block is left out where wished."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.first, self.second, self.head = net

    def forward(self, x: torch.Tensor, skip: bool) -> torch.Tensor:
        x = self.first(x)
        return self.head(x if skip else self.second(x))  # type: ignore[no-any-return]


def _skips(pattern: str, rank: int, micro_step: int) -> bool:
    """Ranks that exchange tokens, 0 and 1, 2 and 3, do so alike."""
    return {
        "one pair": rank < 2,
        "one pair once": rank < 2 and micro_step == 0,
        "the other pair": rank > 1,
        "everybody once": micro_step == 0,
    }[pattern]


def _errors_of_skipping(pattern: str, layout: Layout) -> list[str]:
    model = _sharded(layout, Skipping)
    alone = Skipping(_net())
    for micro_step, rank in itertools.product(range(MICRO_STEPS), range(WORLD)):
        loss = alone(_data(micro_step, rank), _skips(pattern, rank, micro_step)).square().mean()
        (loss / (WORLD * MICRO_STEPS)).backward()
    view = mics.ledger(model)
    view.reset()
    batches = [_data(m, dist.get_rank()) for m in range(MICRO_STEPS)]
    for number, batch in enumerate(mics.micro_steps(model, batches, normalise="micro_steps")):
        model(batch, _skips(pattern, dist.get_rank(), number)).square().mean().backward()
    right = dict(alone.named_parameters())
    wrong = [
        f"gradient of {name}"
        for name, param in model.named_parameters()
        if not torch.allclose(_full(param.grad), right[name].grad, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]
    ]
    if view.traffic() != mics.predict_traffic(model, micro_steps=MICRO_STEPS):
        wrong.append("bytes")
    return [f"{pattern}, {layout}: {one}" for one in wrong]


def _all_errors_of_skipping() -> list[str]:
    warnings.simplefilter("ignore")
    patterns = ("one pair", "one pair once", "the other pair", "everybody once")
    layouts = (Layout(2, 1, 2), Layout(4, 1, 2, "own mesh"), Layout(2, 2, 2))
    return [
        error
        for pattern, layout in itertools.product(patterns, layouts)
        for error in _errors_of_skipping(pattern, layout)
    ]


@pytest.mark.slow
def test_blocks_with_experts_that_some_ranks_skip_get_the_gradients_of_one_process() -> None:
    assert run_ranks(quiet, WORLD, _all_errors_of_skipping) == [[]] * WORLD


def _word_of_experts_outside() -> str:
    ep = _experts_mesh(1, 2)["ep"]
    net = _net(ep)
    for block in net[:2]:
        for name, param in list(block.experts.named_parameters()):
            spread = nn.Parameter(distribute_tensor(param.data, ep, [Shard(0)]))
            setattr(block.experts, name, spread)
    for part in (net[0].dense, net[1].dense, net[2]):
        mics.fully_shard(part, mesh=mesh_of_rank(2))
    with pytest.raises(ShardError) as raised:
        next(iter(mics.micro_steps(net, [_data(0, 0)])))
    return str(raised.value)


def test_experts_that_are_spread_and_not_sharded_are_outside_every_unit() -> None:
    for said in run_ranks(quiet, WORLD, _word_of_experts_outside):
        assert "Parameters outside every unit need a gradient" in said
        assert "4: 0.experts.weight, 0.experts.bias, 1.experts.weight and 1 more" in said
