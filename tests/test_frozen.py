"""Checkpoints without the parameters that do not train: resumed at another layout, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import mics
from mics.checkpoint import prints
from mics.checkpoint.manifest import read_manifest
from mics.checkpoint.prints import print_of_part, whole_print
from mics.errors import CheckpointError

WORLD, WIDTH, RANK = 4, 64, 4
FULL = MixedPrecisionPolicy()


class Layer(nn.Module):
    """A frozen weight, in bf16 or NF4, an adapter in fp32 beside it, and a buffer that counts."""

    seen: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, WIDTH, bias=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return torch.tanh(_product(x, self.weight) + self.up(self.down(x)))


class Net(nn.Module):
    """Two such layers between a frozen table and its transpose."""

    def __init__(self, quantise: Callable[[torch.Tensor], torch.Tensor], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(16, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(
            Layer(quantise(torch.randn(WIDTH, WIDTH) / 8)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids.flatten())


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if type(weight) is torch.Tensor or isinstance(weight, nn.Parameter):
        return nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

    return linear_nf4(x, weight)  # type: ignore[no-any-return]


def _bf16(weight: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16()


def _nf4(weight: torch.Tensor, block_size: int = 32) -> torch.Tensor:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return to_nf4(weight, block_size=block_size, scaler_block_size=2)  # type: ignore[no-any-return]


def _sharded(model: nn.Module, partition: int) -> tuple[Any, torch.optim.Optimizer]:
    mesh = mesh_of_rank(partition)
    mics.shard(model, mesh=mesh, blocks=Layer, mp_policy=FULL)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)  # the frozen ones too


def _train(model: Any, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    losses = []
    for step in steps:
        seeded = torch.Generator().manual_seed(10 * step + dist.get_rank())
        batches = [torch.randint(16, (2, 8), generator=seeded) for _ in range(2)]
        for batch in mics.micro_steps(model, batches, normalise="micro_steps"):
            loss = model(batch)
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _state(model: Any, optimizer: torch.optim.Optimizer, ema: Any = None) -> dict[str, Any]:
    """Everything of a model that can be gathered, by name."""
    named = dict(model.named_parameters())
    kept = {name: p for name, p in named.items() if p.requires_grad or p.dtype != torch.float32}
    plain = {n: p for n, p in kept.items() if type(_local(p)) is torch.Tensor}
    found = {n: _whole(p) for n, p in (*plain.items(), *model.named_buffers())}
    for name, param in named.items():
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name} {key}"] = _whole(value)
    if ema is not None:
        found |= {f"{name} average": _whole(value) for name, value in ema.averages.items()}
    return found


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _error(work: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as raised:
        work()
    return str(raised.value)


def _resumed(folder: Path, quantise: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Train, save without the base, train on; resume in other models at two partition sizes."""
    found: dict[str, Any] = {}
    model, optimizer = _sharded(Net(quantise), 4)
    ema = mics.EMA(model, decay=0.5)
    for step in range(2):
        _train(model, optimizer, [step])
        ema.update()
    mics.save(folder, model=model, optimizer=optimizer, ema=ema, frozen=False)
    saved = _state(model, optimizer, ema)
    losses = _train(model, optimizer, [2, 3])
    for partition in (4, 2):
        other, later = _sharded(Net(quantise), partition)
        average = mics.EMA(other, decay=0.5)
        mics.load(folder, model=other, optimizer=later, ema=average)
        found[f"state at {partition}"] = _same(saved, _state(other, later, average))
        apart = zip(losses, _train(other, later, [2, 3]), strict=True)
        found[f"apart at {partition}"] = max(abs(a - b) for a, b in apart)
    manifest = read_manifest(folder)
    found["frozen"] = sorted(manifest.frozen)
    found["kept"] = sorted(name for name in manifest.tensors if name.startswith("model/"))
    found["options"] = sorted(n for n in manifest.values if "layers.0.weight.lr" in n)
    found["aliases"] = manifest.aliases
    return found


def _refusals(folder: Path, quantise: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, str]:
    """What is said where a model, or its frozen set, is another one; nothing may change."""
    said: dict[str, str] = {}

    def load(name: str, model: nn.Module, partition: int = 2, at: Path = folder) -> None:
        sharded, optimizer = _sharded(model, partition)
        before = _state(sharded, optimizer)
        said[name] = _error(lambda: mics.load(at, model=sharded, optimizer=optimizer))
        assert _same(before, _state(sharded, optimizer)), name

    load("other base", Net(quantise, seed=1))
    other = Net(quantise)
    with torch.no_grad():
        other.table.weight[15, WIDTH - 1] += 1e-3
    load("one cell", other)
    other = Net(quantise)
    other.table.weight.requires_grad_(True)
    load("trains here", other)
    other = Net(quantise)
    other.head.weight = nn.Parameter(other.table.weight.detach().clone(), requires_grad=False)
    load("not tied here", other)
    return said


def _quantised(folder: Path) -> dict[str, Any]:
    """NF4 below the adapters, and what is said of it without the option, and of other bases."""
    warnings.simplefilter("ignore")
    found = _resumed(folder / "kept", _nf4)
    found["said"] = said = _refusals(folder / "kept", _nf4)
    model, _ = _sharded(Net(_nf4), 2)
    said["not asked"] = _error(lambda: mics.save(folder / "x", model=model))
    for name, quantise in {"bf16": _bf16, "blocks": lambda w: _nf4(w, block_size=16)}.items():
        other, _ = _sharded(Net(quantise), 2)
        said[name] = _error(lambda other=other: mics.load(folder / "kept", model=other))
    other, _ = _sharded(Net(_bf16), 2)
    mics.save(folder / "bf16", model=other)
    said["of a whole one"] = _error(lambda: mics.load(folder / "bf16", model=model))
    strange = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    strange[0].weight = nn.Parameter(Strange(torch.ones(2, 2)), requires_grad=False)
    said["strange"] = _error(lambda: mics.save(folder / "x", model=strange, frozen=False))
    alone = Net(_nf4)
    mics.load(folder / "kept", model=alone)
    mics.load(folder / "kept", model=model)
    ours, sharded = (dict(m.named_parameters()) for m in (alone, model))
    trained = [name for name, param in ours.items() if param.requires_grad]
    found["unsharded"] = all(torch.equal(ours[n], _whole(sharded[n])) for n in trained)
    found["nothing left"] = not (folder / "x").exists()
    return found


class Strange(torch.Tensor):
    """A type that does not say what is inside of it."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_adapters_on_nf4_are_kept_with_their_optimizer_and_other_bases_are_refused(
    tmp_path: Path,
) -> None:
    pytest.importorskip("torchao")
    for found in run_ranks(quiet, WORLD, lambda: _quantised(tmp_path)):
        _check_resumed(found)
        said = found["said"]
        for name in ("other base", "one cell", "bf16", "blocks"):
            assert (
                "was saved without its frozen parameters, and this model has others" in said[name]
            )
        assert "2 of 3 differ: model/layers.0.weight, model/layers.1.weight." in said["bf16"]
        assert "NF4Tensor(block_size=32, " in said["bf16"]
        assert ", and is [64, 64] bfloat16 of 4096 " in said["bf16"]
        assert "NF4Tensor(block_size=16, " in said["blocks"]
        for name in ("not asked", "of a whole one"):
            assert "cannot be kept: its values are not one tensor of its shape" in said[name]
            assert "Write: mics.save(..., frozen=False), which leaves out what does" in said[name]
        assert "model/0.weight cannot be left out: no fingerprint of its values" in said["strange"]
        assert "It is a Strange. It does not say which tensors are inside" in said["strange"]
        assert found["nothing left"] and found["unsharded"]


def _prints() -> dict[str, list[str]]:
    """The fingerprints of equal values at many layouts, by what the values are."""
    torch.manual_seed(0)
    two = init_device_mesh("cpu", (2, 2))
    found: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64):
        for shape in ((), (1,), (7,), (6, 8), (8, 3, 5)):
            whole = (10 * torch.randn(shape)).to(dtype)
            layouts: list[list[Any]] = [[Replicate(), Replicate()]]
            layouts += [[Shard(d), Replicate()] for d in range(len(shape))]
            layouts += [[Shard(d), Shard(e)] for d in range(len(shape)) for e in range(len(shape))]
            tensors = [whole, *(distribute_tensor(whole, two, layout) for layout in layouts)]
            found[f"{dtype} {shape}"] = [_print(tensor) for tensor in tensors]
    return found


def _print(tensor: torch.Tensor) -> str:
    parts: list[Any] = [None] * WORLD
    dist.all_gather_object(parts, print_of_part("w", tensor))
    return whole_print("w", tensor.shape, parts)


@pytest.mark.slow
def test_a_fingerprint_is_the_same_at_every_layout() -> None:
    """Cut along any dim, over one axis or two, unevenly, or whole."""
    for found in run_ranks(quiet, WORLD, _prints):
        for what, each in found.items():
            assert len(set(each)) == 1, what
        assert len({each[0] for each in found.values()}) == len(found)


def test_a_fingerprint_tells_every_cell_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(tensor: torch.Tensor) -> str:
        return whole_print("w", tensor.shape, [print_of_part("w", tensor)])

    weight = torch.arange(24, dtype=torch.float32).view(4, 6)
    others = [weight.T.contiguous().view(4, 6), weight.view(6, 4), weight.double(), weight.int()]
    others += [weight.flip(0), weight.roll(1), weight.view(2, 2, 6)]
    for cell in range(24):
        other = weight.clone()
        bits = other.view(-1).view(torch.int32)
        bits[cell] ^= 1 << cell
        others.append(other)
    found = [of(each) for each in [weight, *others]]
    assert len(set(found)) == len(found)
    monkeypatch.setattr(prints, "_PIECE", 5)
    assert [of(each) for each in [weight, *others]] == found


class Pair(torch.Tensor):
    """Values spread over two tensors, which can be detached and nothing else."""

    @staticmethod
    def __new__(cls, high: torch.Tensor, low: torch.Tensor) -> Pair:
        made: Pair = torch.Tensor._make_wrapper_subclass(cls, high.shape, dtype=high.dtype)
        made.high, made.low = high, low
        return made

    high: torch.Tensor
    low: torch.Tensor

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, float]]:
        return ["high", "low"], {"scale": 0.5}

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default, func
        return cls(args[0].high, args[0].low)


def test_a_frozen_parameter_of_a_type_of_ones_own_is_never_copied(tmp_path: Path) -> None:
    def model(low: float) -> nn.Module:
        made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        pair = Pair(torch.ones(2, 2), torch.full((2, 2), low))
        made[0].weight = nn.Parameter(pair, requires_grad=False)
        return made

    saved, other = model(0.5), model(0.5)
    mics.save(tmp_path / "kept", model=saved, frozen=False)
    assert not torch.equal(saved[1].weight, other[1].weight)
    mics.load(tmp_path / "kept", model=other)
    assert torch.equal(saved[1].weight, other[1].weight)
    said = _error(lambda: mics.load(tmp_path / "kept", model=model(0.25)))
    assert "1 of 1 differ: model/0.weight" in said
    assert "The first was [2, 2] float32 Pair(scale=0.5) high float32 of 4 " in said


def test_frozen_parameters_that_were_two_load_where_they_are_one_if_they_are_equal(
    tmp_path: Path,
) -> None:
    def model(*, tied: bool, other: float = 0.0) -> nn.Module:
        made = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
        for at in (0, 1):
            made[at].weight = nn.Parameter(torch.full((2, 2), 1 + at * other), requires_grad=False)
        if tied:
            made[1].weight = made[0].weight
        return made

    mics.save(tmp_path / "equal", model=model(tied=False), frozen=False)
    mics.load(tmp_path / "equal", model=model(tied=True))
    mics.save(tmp_path / "two", model=model(tied=False, other=0.5), frozen=False)
    said = _error(lambda: mics.load(tmp_path / "two", model=model(tied=True)))
    assert "1 of 2 differ: model/1.weight" in said


def _frozen_later(folder: Path) -> dict[str, Any]:
    """A norm that has trained, and is frozen then, is no more what a fresh model has."""
    model, optimizer = _sharded(Net(_bf16), 4)
    _train(model, optimizer, [0])
    for param in model.norm.parameters():
        param.requires_grad_(False)
    mics.save(folder, model=model, optimizer=optimizer, frozen=False)
    fresh = Net(_bf16)
    fresh.norm.requires_grad_(False)
    other, later = _sharded(fresh, 2)
    found = {"fresh": _error(lambda: mics.load(folder, model=other, optimizer=later))}
    values = [_whole(param) for param in model.norm.parameters()]
    alike = Net(_bf16)
    alike.norm.requires_grad_(False)
    with torch.no_grad():
        for param, value in zip(alike.norm.parameters(), values, strict=True):
            param.copy_(value)
    other, later = _sharded(alike, 2)
    mics.load(folder, model=other, optimizer=later)
    state = [
        _whole(each.state[m.norm.weight]["exp_avg"])
        for each, m in ((optimizer, model), (later, other))
    ]
    return found | {"state of the frozen": torch.equal(*state)}


@pytest.mark.slow
def test_a_frozen_base_is_left_out_and_training_goes_on_at_another_partition(
    tmp_path: Path,
) -> None:
    def work() -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
        found = _resumed(tmp_path / "kept", _bf16)
        return found, _refusals(tmp_path / "kept", _bf16), _frozen_later(tmp_path / "later")

    for found, said, later in run_ranks(quiet, WORLD, work):
        _check_resumed(found)
        for name in ("other base", "one cell", "not tied here"):
            assert "was saved without its frozen parameters, and this model" in said[name] or (
                name == "not tied here" and "other parameters are tied" in said[name]
            ), name
        assert "3 of 3 differ: model/layers.0.weight, model/layers.1.weight, " in said["other base"]
        assert (
            "1 of 3 differ: model/table.weight. The first was [16, 64] float32" in said["one cell"]
        )
        assert "the weights that it was trained on into the model before" in said["one cell"]
        assert "and some of them train here" in said["trains here"]
        assert "1 of 3: model/table.weight" in said["trains here"]
        assert "requires_grad_(False) on them until the load has ended" in said["trains here"]
        assert "2 of 5 differ: model/norm.bias, model/norm.weight" in later["fresh"]
        assert later["state of the frozen"]


def _check_resumed(found: dict[str, Any]) -> None:
    assert found["state at 4"] and found["state at 2"]
    assert found["apart at 4"] == 0
    assert found["apart at 2"] < 1e-5  # sums of gradients in another order
    weights = [f"model/layers.{layer}.weight" for layer in range(2)]
    assert found["frozen"] == [*weights, "model/table.weight"]
    assert not {*found["frozen"]} & {*found["kept"]}
    assert "model/layers.0.seen" in found["kept"] and "model/layers.1.up.weight" in found["kept"]
    assert found["aliases"]["model/head.weight"] == "model/table.weight"
    assert found["options"] == ["optimizer/param_groups.layers.0.weight.lr"]
