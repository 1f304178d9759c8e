"""A model is saved under its plain names and loads by its own load_state_dict, hooks and all."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import full, shard_blocks
from ranks import run_ranks
from test_checkpoint_damage import forge
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mics


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(5, 4)
        self.o = nn.Linear(4, 5, bias=False)
        self.o.weight = self.e.weight


def pair() -> Any:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def wrapped(*wrappers: Callable[[Any], Any]) -> Any:
    model = pair()
    for wrap in wrappers:
        model[1] = wrap(model[1])
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


WRAPPED: dict[str, Callable[[], Any]] = {
    "compiled": lambda: compiled(pair()),
    "a compiled block": lambda: wrapped(compiled),
    "a compiled block in a wrapper": lambda: wrapped(compiled, checkpoint_wrapper),
    "a wrapped block compiled": lambda: wrapped(checkpoint_wrapper, compiled),
    "data parallel": lambda: nn.DataParallel(pair()),
    "data parallel, compiled": lambda: compiled(nn.DataParallel(wrapped(checkpoint_wrapper))),
}


def values(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def save(path: Path, model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for param in model.parameters():
        optimizer.state[param] = {"momentum_buffer": torch.rand(param.shape)}
    mics.save(path, model=model, optimizer=optimizer)


def load(path: Path, model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    mics.load(path, model=model, optimizer=optimizer)
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_leave_no_trace_in_names(name: str, tmp_path: Path) -> None:
    model = WRAPPED[name]()
    save(tmp_path / "c", model)
    names = json.loads((tmp_path / "c" / "manifest.json").read_text())["tensors"]
    models = sorted(n for n in names if n.startswith("model/"))
    assert models == ["model/0.bias", "model/0.weight", "model/1.bias", "model/1.weight"]
    plain, again = pair(), WRAPPED[name]()
    for other in (plain, again):
        load(tmp_path / "c", other)
        assert all(map(torch.equal, values(other), values(model)))


def test_a_tied_model_loads_with_a_wrapper_and_without(tmp_path: Path) -> None:
    for at, (saved, loaded) in enumerate(
        [(compiled(Tied()), Tied()), (Tied(), compiled(Tied())), (Tied(), Tied())]
    ):
        save(tmp_path / str(at), saved)
        load(tmp_path / str(at), loaded)
        assert all(map(torch.equal, values(loaded), values(saved)))
        table = json.loads((tmp_path / str(at) / "manifest.json").read_text())
        assert table["aliases"] == {"model/o.weight": "model/e.weight"}

    def as_it_was(table: Any) -> None:
        """Manifests once had the names that the wrapper gives."""
        kept = [name for name in table["tensors"] if name.startswith("model/")]
        for name in kept:
            table["tensors"][wrapped_name(name)] = table["tensors"].pop(name)
        table["aliases"] = {wrapped_name(n): wrapped_name(f) for n, f in table["aliases"].items()}

    def wrapped_name(name: str) -> str:
        return name.replace("model/", "model/_orig_mod.")

    forge(tmp_path / "0", as_it_was)
    again = Tied()
    load(tmp_path / "0", again)
    assert torch.equal(again.o.weight, again.e.weight)


def test_a_tied_weight_that_was_kept_twice_loads_if_both_are_equal(tmp_path: Path) -> None:
    """Checkpoints of compiled models once held both."""
    model = Tied()
    loose = copy.deepcopy(model)
    loose.o.weight = nn.Parameter(loose.e.weight.detach().clone())
    mics.save(tmp_path / "equal", model=loose)
    other = Tied()
    mics.load(tmp_path / "equal", model=other)
    assert torch.equal(other.e.weight, loose.e.weight)
    loose.o.weight.data[0, 0] += 1
    mics.save(tmp_path / "other", model=loose)
    before = values(other)
    with pytest.raises(mics.CheckpointError, match="are one here, and differ there"):
        mics.load(tmp_path / "other", model=other)
    assert all(map(torch.equal, values(other), before))


def test_two_modules_of_one_plain_name_are_refused(tmp_path: Path) -> None:
    model = pair()
    model[0].add_module("_orig_mod", nn.Linear(1, 1))
    with pytest.raises(mics.CheckpointError, match=r"two of its names are 0\.(weight|bias)"):
        mics.save(tmp_path / "c", model=model)


# -- extra state and hooks -------------------------------------------------------------------------


class Scaled(nn.Linear):
    """Keeps a number beside its weights, as modules of 8-bit libraries do."""

    def __init__(self, kind: Callable[[float], Any], amax: float) -> None:
        super().__init__(4, 4)
        self.kind, self.amax = kind, amax

    def get_extra_state(self) -> Any:
        return self.kind(self.amax)

    def set_extra_state(self, state: Any) -> None:
        if state == "broken":
            raise ValueError("cannot be set")
        while isinstance(state, dict | list | tuple):
            state = next(iter(state.values() if isinstance(state, dict) else state))
        self.amax = float(torch.as_tensor(state).flatten()[0])


KINDS: dict[str, Callable[[float], Any]] = {
    "a number": lambda amax: amax,
    "a tensor": lambda amax: torch.tensor([amax]),
    "a tensor whose size changes": lambda amax: torch.tensor([amax] * int(amax)),
    "a dictionary": lambda amax: {"amax": (amax, None, b"\0\1"), 3: [1]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_extra_state_comes_back(kind: str, tmp_path: Path) -> None:
    mics.save(tmp_path / "c", model=compiled(nn.Sequential(Scaled(KINDS[kind], 7.5))))
    model = nn.Sequential(Scaled(KINDS[kind], 1.0))
    mics.load(tmp_path / "c", model=model)
    assert model[0].amax == 7.5


def test_an_extra_state_that_is_refused_leaves_everything_as_it_was(tmp_path: Path) -> None:
    make = KINDS["a number"]
    mics.save(tmp_path / "c", model=nn.Sequential(Scaled(make, 7.5), Scaled(make, 8.5)))
    forge(tmp_path / "c", lambda t: t["values"].update({"model/1._extra_state": "broken"}))
    model = nn.Sequential(Scaled(make, 1.0), Scaled(make, 2.0))
    before = values(model)
    with pytest.raises(mics.CheckpointError, match="does not load the state") as caught:
        mics.load(tmp_path / "c", model=model)
    assert "ValueError: cannot be set" in str(caught.value)
    assert (model[0].amax, model[1].amax) == (1.0, 2.0)
    assert all(map(torch.equal, values(model), before))


def test_an_extra_state_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(Scaled(lambda amax: object(), 1.0))
    with pytest.raises(mics.CheckpointError, match=r"model/0\._extra_state cannot be kept"):
        mics.save(tmp_path / "c", model=model)


class Split(nn.Module):
    """Saves one weight as two under other names, and takes it back so."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.rand(4, 2))
        self.register_buffer("scratch", torch.rand(2), persistent=False)
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._join)
        self.told = 0
        self.register_load_state_dict_post_hook(self._tell)

    @staticmethod
    def _split(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        whole = state.pop(f"{prefix}qk")
        state[f"{prefix}q"], state[f"{prefix}k"] = whole[:2] * 2, whole[2:] * 2

    @staticmethod
    def _join(module: Any, state: Any, prefix: str, *_: Any) -> None:
        parts = [state.pop(f"{prefix}{name}") / 2 for name in ("q", "k")]
        state[f"{prefix}qk"] = torch.cat(parts)

    @staticmethod
    def _tell(module: Any, incompatible: Any) -> None:
        module.told += 1


def test_hooks_of_state_dict_and_load_state_dict_run(tmp_path: Path) -> None:
    model = nn.Sequential(Split())
    mics.save(tmp_path / "c", model=model)
    names = json.loads((tmp_path / "c" / "manifest.json").read_text())["tensors"]
    assert {n for n in names if n.startswith("model/")} == {"model/0.q", "model/0.k"}
    other = nn.Sequential(Split())
    scratch = other[0].scratch.clone()
    mics.load(tmp_path / "c", model=other)
    assert torch.equal(other[0].qk, model[0].qk)
    assert torch.equal(other[0].scratch, scratch)
    assert other[0].told > 0


def test_a_model_that_does_not_take_its_own_state_is_refused_unchanged(tmp_path: Path) -> None:
    model = pair()
    mics.save(tmp_path / "c", model=model)
    other = pair()
    before = values(other)

    def refuse(*_: Any) -> None:
        raise RuntimeError("not today")

    other[1].register_load_state_dict_pre_hook(refuse)
    with pytest.raises(mics.CheckpointError, match="RuntimeError: not today") as caught:
        mics.load(tmp_path / "c", model=other)
    assert "a model whose load_state_dict takes what its state_dict gives" in str(caught.value)
    assert all(map(torch.equal, values(other), before))


# -- buffers ---------------------------------------------------------------------------------------


class Buffers(nn.Module):
    def __init__(self, value: float, dense: bool = False) -> None:
        super().__init__()
        self.l = nn.Linear(2, 2)
        mask = torch.full((3, 1), value).expand(3, 4)
        self.register_buffer("mask", mask.clone() if dense else mask)
        shared = torch.full((2,), value)
        self.register_buffer("one", shared)
        self.register_buffer("two", shared)


def test_expanded_and_tied_buffers_come_back_as_such(tmp_path: Path) -> None:
    mics.save(tmp_path / "c", model=Buffers(3.0))
    for dense in (False, True):
        model: Any = Buffers(1.0, dense)
        mics.load(tmp_path / "c", model=model)
        assert (model.mask == 3).all()
        assert model.mask.stride() == ((4, 1) if dense else (1, 0))
        assert model.one is model.two
        assert (model.one == 3).all()


def test_cells_that_differ_do_not_go_into_an_expanded_buffer(tmp_path: Path) -> None:
    dense: Any = Buffers(3.0, dense=True)
    dense.mask[0, 0] = 4
    mics.save(tmp_path / "c", model=dense)
    model: Any = Buffers(1.0)
    before = values(model)
    with pytest.raises(mics.CheckpointError, match="model/mask is expanded here"):
        mics.load(tmp_path / "c", model=model)
    assert (model.mask == 1).all()
    assert all(map(torch.equal, values(model), before))


# -- configuration ---------------------------------------------------------------------------------


def test_the_configuration_of_a_transformers_model_is_kept_by_itself(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from mics.models.interchange.exporting import export

    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    mics.save(tmp_path / "c", model=model)
    kept = json.loads((tmp_path / "c" / "assets" / "model" / "config.json").read_text())
    assert kept["architectures"] == ["GPT2LMHeadModel"]
    export(tmp_path / "c", tmp_path / "out", dtype=None, shard_bytes=1 << 20, told=lambda *_: None)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert all(map(torch.equal, values(loaded), values(model)))
    mics.save(tmp_path / "own", model=model, assets={"model/config.json": b"{}"})
    assert (tmp_path / "own" / "assets" / "model" / "config.json").read_bytes() == b"{}"


# -- shards ----------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """What the tests above have one by one, in blocks that are sharded."""

    def __init__(self, amax: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scaled(KINDS["a tensor"], amax), nn.Linear(4, 4)])
        self.register_buffer("mask", torch.full((1,), amax).expand(4))


def _mixed(path: Path, save: bool, wrap: bool) -> Any:
    torch.manual_seed(0 if save else 1)
    model: Any = Mixed(7.5 if save else 1.0)
    shard_blocks(mics.fully_shard, model)
    outer = compiled(model) if wrap else model
    if save:
        mics.save(path, model=outer)
    else:
        mics.load(path, model=outer)
    weights = {name: full(param) for name, param in model.named_parameters()}
    return weights, model.blocks[0].amax, model.mask.tolist()


def test_extra_state_wrappers_and_buffers_of_a_sharded_model(tmp_path: Path) -> None:
    saved = run_ranks(_mixed, 2, tmp_path / "c", True, True)[0]
    for world in (1, 3):
        for weights, amax, mask in run_ranks(_mixed, world, tmp_path / "c", False, False):
            assert (amax, mask) == saved[1:]
            assert all(torch.equal(weights[name], value) for name, value in saved[0].items())
