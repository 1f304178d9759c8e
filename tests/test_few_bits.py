"""torchao's optimizer state in few bits: kept bit for bit, at any layout of whole blocks."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of_rank, run_ranks
from test_checkpoint_damage import forge
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard

import mics
from mics.checkpoint.few_bits import Grid, grid_of

WORLD = 4
KINDS = {"AdamW8bit": "OptimState8bit", "AdamW4bit": "OptimState4bit", "AdamWFp8": "OptimStateFp8"}

# torchao and torch warn of each other's changes when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def torchao() -> Any:
    """Its optimizers, run without a compiler, in ranks that are forked from here too."""
    pytest.importorskip("torchao")
    torch.compiler.set_stance("force_eager")
    yield importlib.import_module("torchao.optim")
    torch.compiler.set_stance("default")


def net(*rows: int, inside: int = 64) -> nn.Sequential:
    """Linear layers of so many rows, the last one of which is frozen, and smooth units."""
    torch.manual_seed(0)
    sizes = [inside, *rows, 8]
    layers: list[nn.Module] = []
    for one, two in itertools.pairwise(sizes):
        layers += [nn.Linear(one, two), nn.Tanh()]
    layers[-2].requires_grad_(False)
    return nn.Sequential(*layers)


def sharded(partition: int | None, *rows: int, inside: int = 64) -> nn.Module:
    model = net(*rows, inside=inside)
    if partition is None:
        return model
    mesh, policy = mesh_of_rank(partition), MixedPrecisionPolicy()
    return mics.shard(model, mesh=mesh, blocks=nn.Linear, mp_policy=policy)


def train(model: Any, optimizers: list[Any], first: int, steps: int = 2) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(4, model[0].in_features, generator=generator)
        for batch in mics.micro_steps(model, [x]) if dist.is_initialized() else [x]:
            model(batch).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def here(optimizers: list[Any]) -> dict[str, torch.Tensor]:
    """Everything that this rank has of the states: codes, scales, tables, counts."""
    found = {}
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    for number, state in enumerate(states):
        for key, value in state.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            parts = local.__tensor_flatten__()[0] if hasattr(local, "codes") else []
            found |= {f"{number}.{key}.{part}": getattr(local, part).clone() for part in parts}
            if not parts:
                found[f"{number}.{key}"] = local.clone()
    return found


def whole(optimizers: list[Any], partition: int) -> list[torch.Tensor]:
    """Bytes of states as a whole: those of the ranks of a partition group behind each other."""
    mine = {name: one.view(-1).view(torch.uint8) for name, one in here(optimizers).items()}
    shards: list[Any] = [None] * WORLD
    dist.all_gather_object(shards, mine)
    return [
        one if name.endswith(("qmap", "step")) else torch.cat([s[name] for s in group])
        for group in [shards[:partition]]
        for name, one in mine.items()
    ]


def bits(optimizers: list[Any]) -> list[torch.Tensor]:
    return list(here(optimizers).values())


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    bits = ([t.view(torch.uint8) if t.dim() else t for t in tensors] for tensors in (one, other))
    return all(map(torch.equal, *bits)) and len(one) == len(other) > 0


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.clone() for p in model.parameters()]


def make(kind: Any, model: Any) -> list[Any]:
    """Weights by the kind, and what is too small for it by another optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    few = kind([p for p in trained if p.ndim == 2], lr=0.01)
    return [few, torch.optim.SGD([p for p in trained if p.ndim == 1], lr=0.1, momentum=0.9)]


# -- kept ------------------------------------------------------------------------------------------


def keep(folder: Path, kind: Any, state: str) -> None:
    """Save beside training, go on; load into fresh and stepped ones, at the same p and at others.

    Shards of [70, 256] are uneven at p = 4; four rows of [256, 64] are a block of 256.
    """
    rows = (256, 70)
    model = sharded(2, *rows)
    optimizers = make(kind, model)
    mics.save(folder / "before", model=model, optimizer=optimizers)
    train(model, optimizers, 0)
    first = next(iter(optimizers[0].state.values()))
    assert {type(v.to_local()).__name__ for k, v in first.items() if k != "step"} == {state}
    ema = mics.EMA(model, decay=0.9)
    ema.update()
    pending = mics.save(folder / "c", model=model, optimizer=optimizers, ema=ema, asynchronous=True)
    kept, shards = whole(optimizers, 2), bits(optimizers)
    train(model, optimizers, 2)
    pending.wait()
    right = weights(model), bits(optimizers)
    assert not same(right[1], shards)
    for stepped in (False, True):
        other = sharded(2, *rows)
        loaded = make(kind, other)
        if stepped:
            train(other, loaded, 7, 1)
        mics.load(folder / "c", model=other, optimizer=loaded, ema=mics.EMA(other, decay=0.9))
        assert same(bits(loaded), shards)
        train(other, loaded, 2)
        assert same(weights(other), right[0]) and same(bits(loaded), right[1])
    for partition in (1, 4):
        other = sharded(partition, *rows)
        loaded = make(kind, other)
        mics.load(folder / "c", model=other, optimizer=loaded)
        assert same(whole(loaded, partition), kept)
        mics.save(folder / f"again{partition}", model=other, optimizer=loaded)
        train(other, loaded, 2)
        # Gradients are summed in another order, so a code is another now and then.
        for mine, theirs in zip(weights(other), right[0], strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 1e-3
    back = sharded(2, *rows)
    loaded = make(kind, back)
    mics.load(folder / "again4", model=back, optimizer=loaded)
    assert same(bits(loaded), shards)
    mics.load(folder / "before", model=back, optimizer=loaded)
    assert not any(map(len, loaded[0].state.values()))


@pytest.mark.slow
def test_state_in_few_bits_is_kept_bit_for_bit_at_any_layout_of_whole_blocks(
    tmp_path: Path, torchao: Any
) -> None:
    def all_kinds() -> None:
        for kind, state in KINDS.items():
            keep(tmp_path / kind, getattr(torchao, kind), state)

    run_ranks(all_kinds, WORLD)
    # One process that nothing is sharded in reads what ranks wrote.
    model = net(256, 70)
    optimizers = make(torchao.AdamW8bit, model)
    mics.load(tmp_path / "AdamW8bit" / "c", model=model, optimizer=optimizers)
    manifest = json.loads((tmp_path / "AdamW8bit" / "c" / "manifest.json").read_text())
    name = "optimizer/state.0.weight.exp_avg"
    assert manifest["tensors"][f"{name}.codes"]["shape"] == [256, 64]
    assert manifest["tensors"][f"{name}.scale"]["shape"] == [64, 1]
    assert len(manifest["tensors"][f"{name}.scale"]["chunks"]) == 2
    assert optimizers[0].state[model[0].weight]["exp_avg"].block_size == 256
    train(model, optimizers, 2)


# -- refused ---------------------------------------------------------------------------------------


def refused(folder: Path, model: Any, optimizer: Any) -> str:
    """The error of a load that changes nothing."""
    before = weights(model), bits([optimizer])
    with pytest.raises(mics.CheckpointError) as caught:
        mics.load(folder, model=model, optimizer=optimizer)
    after = weights(model), bits([optimizer])
    assert all(map(torch.equal, before[0], after[0]))
    assert len(before[1]) == len(after[1])
    assert all(map(torch.equal, before[1], after[1]))
    return str(caught.value)


def refuse(folder: Path, torchao: Any) -> dict[str, str]:
    def at(partition: int, rows: int, make: Callable[..., Any], steps: int = 0, **options: Any):  # type: ignore[no-untyped-def]
        model = sharded(partition, rows, inside=128 if rows == 134 else 64)
        optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.01, **options)
        train(model, [optimizer], 0, steps)
        return model, optimizer

    eight, found = torchao.AdamW8bit, {}
    for partition in (2, 4):
        model, optimizer = at(partition, 128, eight, 1)
        mics.save(folder / f"p{partition}", model=model, optimizer=optimizer)
    for steps in (0, 1):
        found[f"smaller {steps}"] = refused(folder / "p2", *at(4, 128, eight, steps))
        found[f"larger {steps}"] = refused(folder / "p4", *at(2, 128, eight, steps))
        found[f"blocks {steps}"] = refused(folder / "p2", *at(2, 128, eight, steps, block_size=512))
        found[f"fp8 {steps}"] = refused(folder / "p2", *at(2, 128, torchao.AdamWFp8, steps))
        found[f"fp32 {steps}"] = refused(folder / "p2", *at(2, 128, torchao._AdamW, steps))
    model, optimizer = at(4, 134, eight, 1)
    mics.save(folder / "uneven", model=model, optimizer=optimizer)
    found["cut blocks"] = refused(folder / "uneven", *at(2, 134, eight))
    model, optimizer = at(2, 127, eight, 1)  # shards of 64 and 63 rows
    with pytest.raises(mics.CheckpointError) as caught:
        mics.save(folder / "mixed", model=model, optimizer=optimizer)
    assert not (folder / "mixed").exists()
    found["mixed"] = str(caught.value)
    return found | {"columns": split_columns(folder, eight)}


def split_columns(folder: Path, kind: Any) -> str:
    """Blocks inside rows are kept from columns to rows; those that span rows are refused."""

    def wide(dim: int, rows: int, columns: int) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(columns, rows, bias=False))
        mics.fully_shard(model, mesh=mesh_of_rank(2), shard_placement_fn=lambda _: Shard(dim))
        return model, kind(model.parameters(), lr=0.01)

    model, optimizer = wide(1, 8, 1024)
    train(model, [optimizer], 0)
    mics.save(folder / "columns", model=model, optimizer=optimizer)
    other, loaded = wide(0, 8, 1024)
    mics.load(folder / "columns", model=other, optimizer=loaded)
    for key in ("exp_avg", "exp_avg_sq"):
        (one,), (two,) = (
            [values(state[key]) for state in each.state.values()] for each in (optimizer, loaded)
        )
        assert torch.equal(one, two) and one.count_nonzero() > 0
    model, optimizer = wide(1, 128, 64)
    train(model, [optimizer], 0)
    with pytest.raises(mics.CheckpointError) as caught:
        mics.save(folder / "rows", model=model, optimizer=optimizer)
    return str(caught.value)


def values(state: DTensor) -> torch.Tensor:
    local: Any = state.to_local()
    like = {"run_check": False, "shape": state.shape, "stride": state.stride()}
    mesh = state.device_mesh
    return DTensor.from_local(local.dequantize(), mesh, state.placements, **like).full_tensor()


@pytest.mark.slow
def test_state_that_would_change_its_precision_is_refused_on_every_rank(
    tmp_path: Path, torchao: Any
) -> None:
    first, *others = run_ranks(lambda: refuse(tmp_path, torchao), WORLD)
    assert all(other == first for other in others)
    name = "has optimizer/state.0.weight.exp_avg as another optimizer or layout keeps it: "
    write = "  Write: partition=2, as it was saved, and the optimizer it was saved from; or "
    for steps in (0, 1):
        text = first[f"smaller {steps}"]
        assert f"{name}OptimState8bit there, unquantised here" in text
        assert "4096 elements there (partition 2), 2048 on this rank; a block has 256." in text
        assert f"{write}mics.load(path, model=model) and a fresh optimizer" in text
        text = first[f"larger {steps}"]
        assert f"{name}unquantised there, OptimState8bit here" in text
        assert "2048 elements there (partition 4), 4096 on this rank" in text
        assert "blocks of 256, signed=True there, blocks of 512" in first[f"blocks {steps}"]
        assert "OptimState8bit there, OptimStateFp8 here" in first[f"fp8 {steps}"]
        assert "OptimState8bit there, unquantised here" in first[f"fp32 {steps}"]
    assert "4096 and 4352 elements there (partition 4), 8576 on this rank" in first["cut blocks"]
    assert "0.weight.exp_avg cannot be kept: blocks of a shard are none of" in first["columns"]
    assert "is [128, 64], this rank's shard [128, 32], a block has 256" in first["columns"]
    assert "some ranks have it in few bits and others have not" in first["mixed"]
    assert (
        "Shards of [127, 64]: OptimState8bit of 4096 elements; unquantised of 4032 elements."
        in first["mixed"]
    )


@pytest.mark.slow
def test_a_manifest_that_says_what_was_never_saved_of_codes_is_refused(
    tmp_path: Path, torchao: Any
) -> None:
    def made() -> tuple[nn.Module, Any]:
        model = net(64)
        return model, torchao.AdamW8bit(model.parameters(), lr=0.01)

    model, optimizer = made()
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    name = "optimizer/state.0.weight.exp_avg"
    edits: list[Callable[[Any], object]] = [
        lambda m: m["values"][name]["quantised"].update(kind="os.system"),
        lambda m: m["values"][name]["quantised"].update(block=0),
        lambda m: m["values"][name]["quantised"].update(block=True),
        lambda m: m["values"][name]["quantised"].update(more=1),
        lambda m: m["values"][name]["quantised"].update(signed="yes"),
        lambda m: m["values"][name].update(tensor=name),
        lambda m: m["values"].update({name: {"quantised": []}}),
        lambda m: m["values"][name]["quantised"]["parts"].pop("scale"),
        lambda m: m["values"][name]["quantised"]["parts"].update(scale={"tensor": "x"}),
        lambda m: m["values"][name]["quantised"]["parts"].update(codes=["model/0.weight"]),
        lambda m: m["tensors"].pop(f"{name}.scale"),
        lambda m: m["tensors"][f"{name}.scale"].update(dtype="int32"),
        lambda m: m["values"].update({f"{name}.x": m["values"].pop(name)}),
    ]  # fmt: skip
    for number, edit in enumerate(edits):
        folder = tmp_path / str(number)
        mics.save(folder, model=model, optimizer=optimizer)
        forge(folder, edit)
        other, loaded = made()
        before = weights(other)
        with pytest.raises(mics.CheckpointError) as caught:
            mics.load(folder, model=other, optimizer=loaded)
        assert "never saved" in str(caught.value) or "never converted" in str(caught.value), number
        assert not loaded.state and same(weights(other), before)


# -- without torchao -------------------------------------------------------------------------------


def test_codes_of_another_library_are_refused_when_they_are_saved(tmp_path: Path) -> None:
    """bitsandbytes keeps them beside scales of blocks, in plain tensors."""
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        codes = torch.zeros(8, 8, dtype=dtype)
        for state in ({"state1": codes}, {"inside": {"state1": codes}}):
            optimizer.state[model[0].weight] = {**state, "absmax1": torch.ones(1)}
            with pytest.raises(mics.CheckpointError) as caught:
                mics.save(tmp_path / "c", model=model, optimizer=optimizer)
            assert "cannot be kept: it seems to be codes" in str(caught.value)
            assert f"It is {dtype} in the shape of the parameter, beside " in str(caught.value)
    optimizer.state[model[0].weight] = {"signs": torch.ones(8, 8, dtype=torch.int8)}
    mics.save(tmp_path / "c", model=model, optimizer=optimizer)


@pytest.mark.parametrize(
    ("shape", "block", "grid"),
    [
        ((256, 64), 256, Grid(0, 4, (64, 1))),
        ((134, 128), 256, Grid(0, 2, (67, 1))),
        ((70, 256), 256, Grid(1, 256, (70, 1, 1))),
        ((8, 96), 256, Grid(0, 8, (1, 3))),
        ((3, 8, 64), 256, Grid(1, 4, (3, 2, 1))),
        ((4096,), 256, Grid(0, 256, (16, 1))),
        ((7, 64), 256, None),
    ],
)
def test_blocks_are_a_grid(shape: tuple[int, ...], block: int, grid: Grid | None) -> None:
    assert grid_of(shape, block) == grid
