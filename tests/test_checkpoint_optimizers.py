"""Optimizer state goes out and in as the optimizer holds it, and saving changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import UnevenMLP, full, seeded
from ranks import errors_of_ranks, run_ranks
from test_checkpoint import build, equal, train, whole
from test_checkpoint_damage import forge
from torch import nn
from torch import optim as O
from torch.distributed.tensor import DTensor

import mics

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: O.SGD(p, 0.1),
    "sgd, momentum": lambda p: O.SGD(p, 0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "sgd, nesterov": lambda p: O.SGD(p, 0.1, momentum=0.9, nesterov=True, maximize=True),
    "adam, l2": lambda p: O.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: O.AdamW(p, 0.1, amsgrad=True),
    "adamw, fused": lambda p: O.AdamW(p, 0.1, fused=True),
    "adamw, foreach": lambda p: O.AdamW(p, 0.1, foreach=True),
    "adam, rate in a tensor": lambda p: O.Adam(p, torch.tensor(0.1)),
    "rmsprop": lambda p: O.RMSprop(p, 0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: O.Adagrad(p, 0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: O.Adadelta(p, 0.1, weight_decay=0.1),
    "adamax": lambda p: O.Adamax(p, 0.1),
    "nadam": lambda p: O.NAdam(p, 0.1, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": lambda p: O.RAdam(p, 0.1),
    "rprop": lambda p: O.Rprop(p, 0.1),
    "asgd": lambda p: O.ASGD(p, 0.1),
    "adafactor": lambda p: O.Adafactor(p, 0.1),
    "muon": lambda p: O.Muon([x for x in p if x.ndim == 2], 0.1),
}


def mlp(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4))


def step(model: Any, optimizer: Any, at: int = 0, layers: int = 3) -> None:
    example = torch.randn(2, 4, generator=torch.Generator().manual_seed(at))
    out = example
    for layer in model[:layers]:
        out = layer(out)
    out.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def same(one: Any, other: Any) -> bool:
    """Equal in kind and to the last bit, containers and what is in them."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def everything(model: Any, *optimizers: Any) -> Any:
    """A copy of all that a load could change."""
    return copy.deepcopy(
        [dict(model.state_dict()), *(o.state_dict() for o in optimizers), torch.get_rng_state()]
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saves_change_no_optimizer_and_a_loaded_one_goes_on_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    """Saved before the first step, then with a layer that had no gradient yet, and at the end."""

    def run(saves: bool) -> tuple[Any, Any]:
        model = mlp()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        for at in range(4):
            if saves:
                before = everything(model, optimizer)
                mics.save(tmp_path / str(at), model=model, optimizer=optimizer)
                assert same(everything(model, optimizer), before)
            step(model, optimizer, at, layers=2 if at < 2 else 3)
        return model, optimizer

    straight = everything(*run(False))
    assert same(everything(*run(True))[:2], straight[:2])
    for saved_at in range(4):
        model = mlp(1)
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        step(model, optimizer)  # it has a state of its own, which must go
        mics.load(tmp_path / str(saved_at), model=model, optimizer=optimizer)
        for at in range(saved_at, 4):
            step(model, optimizer, at, layers=2 if at < 2 else 3)
        assert same(everything(model, optimizer)[:2], straight[:2]), saved_at


def test_what_an_optimizer_keeps_in_containers_comes_back(tmp_path: Path) -> None:
    """LBFGS keeps lists; others nest dictionaries by number, keep text, None, and shared state."""
    model = mlp()
    optimizer = O.LBFGS(model.parameters(), history_size=3)
    for at in range(3):
        x = torch.full((2, 4), float(at + 1))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    first = model[0].weight
    odd = O.SGD(model.parameters(), 0.1)
    odd.state[first] = {0: {1: torch.ones(3)}, "q": [torch.zeros(2), None], "d": {"a": {"b": 1}}}
    odd.state[model[0].bias] = {"mode": "slow", "pair": (1, torch.ones(6, dtype=torch.int8))}
    odd.state["all"] = {"round": 3}  # type: ignore[index]
    for name, made in {"lbfgs": optimizer, "odd": odd}.items():
        mics.save(tmp_path / name, model=model, optimizer=made)
        other = mlp(1)
        fresh = type(made)(other.parameters(), 0.1)
        if name == "lbfgs":
            fresh = O.LBFGS(other.parameters(), history_size=3)
        mics.load(tmp_path / name, model=other, optimizer=fresh)
        assert same(fresh.state_dict(), made.state_dict()), name


def test_state_keeps_its_dtype_where_torch_would_cast_it(tmp_path: Path) -> None:
    model = mlp().to(torch.bfloat16)
    optimizer = O.AdamW(model.parameters())
    for param in model.parameters():
        optimizer.state[param] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.rand(param.shape),
            "exp_avg_sq": torch.rand(param.shape),
        }
    mics.save(tmp_path / "c", model=model, optimizer=optimizer)
    other = mlp(1).to(torch.bfloat16)
    fresh = O.AdamW(other.parameters())
    mics.load(tmp_path / "c", model=other, optimizer=fresh)
    assert same(fresh.state_dict(), optimizer.state_dict())


def test_gradients_that_are_present_neither_hinder_a_save_nor_a_load(tmp_path: Path) -> None:
    model = mlp()
    optimizer = O.AdamW(model.parameters())
    step(model, optimizer)
    model(torch.ones(1, 4)).sum().backward()
    mics.save(tmp_path / "c", model=model, optimizer=optimizer)
    other = mlp(1)
    fresh = O.AdamW(other.parameters())
    other(torch.ones(1, 4)).sum().backward()
    gradient = other[0].weight.grad.clone()
    mics.load(tmp_path / "c", model=other, optimizer=fresh)
    assert same(fresh.state_dict(), optimizer.state_dict())
    assert torch.equal(other[0].weight.grad, gradient)


def test_a_parameter_frozen_later_keeps_its_state(tmp_path: Path) -> None:
    model = mlp()
    optimizer = O.AdamW(model.parameters())
    step(model, optimizer)
    mics.save(tmp_path / "c", model=model, optimizer=optimizer)
    other = mlp(1)
    other[0].weight.requires_grad_(False)
    fresh = O.AdamW(other.parameters())
    mics.load(tmp_path / "c", model=other, optimizer=fresh)
    assert same(fresh.state_dict(), optimizer.state_dict())


# -- groups ----------------------------------------------------------------------------------------


def test_groups_are_matched_by_names_and_empty_ones_by_their_order(tmp_path: Path) -> None:
    model = mlp()
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizer = O.AdamW(
        [
            {"params": weights, "lr": 0.3},
            {"params": [], "lr": 0.7},
            {"params": biases},
            {"params": [], "lr": 0.9},
        ]
    )
    step(model, optimizer)
    mics.save(tmp_path / "c", model=model, optimizer=optimizer)
    other = mlp(1)
    linears = list(other)
    fresh = O.AdamW(
        [
            {"params": [linears[1].bias], "lr": 0.5},
            {"params": [layer.weight for layer in linears[::-1]]},
            {"params": []},
            {"params": []},
            {"params": [linears[2].bias, linears[0].bias]},
        ]
    )
    mics.load(tmp_path / "c", model=other, optimizer=fresh)
    assert [group["lr"] for group in fresh.param_groups] == [1e-3, 0.3, 0.7, 0.9, 1e-3]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert same(dict(optimizer.state[one]), dict(fresh.state[two]))


def test_parameters_of_one_group_that_had_other_options_are_refused(tmp_path: Path) -> None:
    model = mlp()
    split = [{"params": [p], "lr": 0.1 * at} for at, p in enumerate(model.parameters(), 1)]
    mics.save(tmp_path / "c", model=model, optimizer=O.SGD(split))
    optimizer = O.SGD(model.parameters(), 0.5)
    before = everything(model, optimizer)
    with pytest.raises(
        mics.CheckpointError, match=r"has other groups: 0\.weight and 0\.bias"
    ) as at:
        mics.load(tmp_path / "c", model=model, optimizer=optimizer)
    assert "lr is 0.1 for the one and 0.2 for the other" in str(at.value)
    assert same(everything(model, optimizer), before)


def test_an_optimizer_of_other_parameters_is_refused_by_name(tmp_path: Path) -> None:
    model = mlp()
    mics.save(tmp_path / "c", model=model, optimizer=O.SGD(model[:2].parameters()))
    for params, words in (
        (model.parameters(), "0 only there; 2 only here (2.bias, 2.weight); 4 in both"),
        (model[0].parameters(), "2 only there (1.bias, 1.weight); 0 only here; 2 in both"),
    ):
        with pytest.raises(mics.CheckpointError, match="names of parameters differ") as caught:
            mics.load(tmp_path / "c", model=model, optimizer=O.SGD(params))
        assert words in str(caught.value)


def test_names_that_an_optimizer_was_given_are_not_compared(tmp_path: Path) -> None:
    model = mlp()
    mics.save(tmp_path / "c", model=model, optimizer=O.SGD(model.parameters()))
    named = O.SGD(model.named_parameters())
    mics.load(tmp_path / "c", model=model, optimizer=named)
    assert named.param_groups[0]["param_names"][0] == "0.weight"


@pytest.mark.parametrize("schedule", [(True, False), (False, True), (True, True)])
def test_a_scheduler_may_be_made_before_or_after_a_load(
    schedule: tuple[bool, bool], tmp_path: Path
) -> None:
    saved, loaded = schedule
    model = mlp()
    optimizer = O.SGD(model.parameters(), 0.4)
    if saved:
        scheduler = O.lr_scheduler.StepLR(optimizer, 1, 0.5)
        step(model, optimizer)
        scheduler.step()
    mics.save(tmp_path / "c", model=model, optimizer=optimizer)
    fresh = O.SGD(model.parameters(), 0.9)
    if loaded:
        O.lr_scheduler.StepLR(fresh, 1, 0.5)
    mics.load(tmp_path / "c", model=model, optimizer=fresh)
    group = fresh.param_groups[0]
    assert group["lr"] == (0.2 if saved else 0.4)
    O.lr_scheduler.StepLR(fresh, 1, 0.5)
    assert group is fresh.param_groups[0]
    assert group["initial_lr"] == (0.4 if saved else 0.9)


# -- several optimizers, and those that do not belong ----------------------------------------------


def two(model: Any) -> tuple[Any, Any]:
    weights = [p for p in model.parameters() if p.ndim == 2]
    return O.Muon(weights, 0.1), O.AdamW([p for p in model.parameters() if p.ndim == 1], 0.2)


def test_two_optimizers_are_saved_as_a_list_and_loaded_in_any_order(tmp_path: Path) -> None:
    model = mlp()
    muon, adamw = two(model)
    step(model, muon)
    mics.save(tmp_path / "c", model=model, optimizer=[muon, adamw])
    other = mlp(1)
    muon2, adamw2 = two(other)
    mics.load(tmp_path / "c", model=other, optimizer={"b": adamw2, "a": muon2})
    assert same(muon2.state_dict(), muon.state_dict())
    assert same(adamw2.state_dict(), adamw.state_dict())
    with pytest.raises(mics.CheckpointError, match="all of them in a list"):
        mics.load(tmp_path / "c", model=other, optimizer=muon2)


def test_optimizers_that_do_not_belong_are_refused_in_words(tmp_path: Path) -> None:
    model = mlp()
    mine, theirs = O.AdamW(model.parameters()), O.AdamW(mlp().parameters())
    mics.save(tmp_path / "good", model=model, optimizer=mine)
    for optimizer, words in (
        (theirs, "This AdamW is of another model.\n  6 of its 6 parameters are not in this one."),
        ([mine, O.SGD([model[0].weight])], "A parameter is in two optimizers"),
        ("adamw", "A str is no optimizer"),
        ([None], "A NoneType is no optimizer"),
    ):
        for call, path in ((mics.save, tmp_path / "bad"), (mics.load, tmp_path / "good")):
            with pytest.raises(mics.CheckpointError) as caught:
                call(path, model=model, optimizer=optimizer)  # type: ignore[operator]
            assert words in str(caught.value)


class Quantised(torch.Tensor):
    """Stands for state in 8 bits, whose blocks depend on the size of the shard."""


def test_quantised_state_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    model = mlp()
    optimizer = O.AdamW(model.parameters())
    step(model, optimizer)
    state = optimizer.state[model[0].weight]
    state["exp_avg"] = state["exp_avg"].as_subclass(Quantised)
    with pytest.raises(mics.CheckpointError) as caught:
        mics.save(tmp_path / "c", model=model, optimizer=optimizer)
    assert "optimizer/state.0.weight.exp_avg cannot be kept: it is a Quantised" in str(caught.value)
    assert "Quantised state depends on how its parameter is sharded" in str(caught.value)


def test_state_is_not_loaded_where_it_is_quantised_and_would_be_rounded(tmp_path: Path) -> None:
    """It was saved where shards were too small to be quantised, for one."""
    model = mlp()
    optimizer = O.AdamW(model.parameters())
    step(model, optimizer)
    mics.save(tmp_path / "c", model=model, optimizer=optimizer)
    state = optimizer.state[model[0].weight]
    kept, state["exp_avg"] = state["exp_avg"], state["exp_avg"].clone().as_subclass(Quantised)
    with pytest.raises(mics.CheckpointError, match="unquantised there, Quantised here"):
        mics.load(tmp_path / "c", model=model, optimizer=optimizer)
    assert same(state["exp_avg"].as_subclass(torch.Tensor), kept)


def test_a_refused_load_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """The weights, state and options of optimizers, a scheduler, the random state, gradients."""
    for name, wide in (("model", True), ("optimizer", False)):
        other = nn.Sequential(nn.Linear(3, 3)) if wide else mlp(2)
        mics.save(tmp_path / name, model=other, optimizer=O.Adam(other.parameters()))
    for warm in (False, True):
        model = mlp()
        optimizer = O.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        scheduler = O.lr_scheduler.StepLR(optimizer, 1)
        if warm:
            step(model, optimizer)
        before = everything(model, optimizer), copy.deepcopy(scheduler.state_dict())
        for name in ("model", "optimizer"):
            with pytest.raises(mics.CheckpointError):
                mics.load(tmp_path / name, model=model, optimizer=optimizer)
        assert same((everything(model, optimizer), scheduler.state_dict()), before)
        assert bool(optimizer.state) == warm


# -- the format of before --------------------------------------------------------------------------


def as_it_was(table: Any) -> None:
    """A manifest as versions before this one wrote it: no forms, nested state under dots."""
    for entry in table["tensors"].values():
        entry.pop("form")
    for name in [n for n in table["values"] if "empty_groups" in n]:
        del table["values"][name]


def test_a_checkpoint_of_the_first_format_loads(tmp_path: Path) -> None:
    model = mlp()
    optimizer = O.AdamW(model.parameters())
    step(model, optimizer)
    mics.save(tmp_path / "c", model=model, optimizer=optimizer)
    forge(tmp_path / "c", as_it_was)
    table = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert table["format"] == 1
    assert table["values"]["optimizer/param_groups.0.weight.betas"] == {"tuple": [0.9, 0.999]}
    assert "optimizer/state.0.weight.exp_avg" in table["tensors"]
    other = mlp(1)
    fresh = O.AdamW(other.parameters(), 0.7)
    mics.load(tmp_path / "c", model=other, optimizer=fresh)
    assert same(everything(other, fresh), everything(model, optimizer))

    def nest(table: Any) -> None:
        """Dictionaries of tensors lay under names with dots, compiled blocks under their own."""
        for name in list(table["tensors"]):
            if ".exp_avg" in name:
                table["tensors"][name.replace(".exp", ".deep.exp")] = table["tensors"].pop(name)
            if name.startswith("model/1."):
                wrapped = name.replace("1.", "1._orig_mod.")
                table["tensors"][wrapped] = table["tensors"].pop(name)

    forge(tmp_path / "c", nest)
    odd = O.SGD(other.parameters(), 0.1)
    odd.param_groups[0] = fresh.param_groups[0]
    mics.load(tmp_path / "c", model=other, optimizer=odd)
    deep = odd.state[other[0].weight]["deep"]
    assert torch.equal(deep["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


# -- shards ----------------------------------------------------------------------------------------


def _optimizers_of_shards(path: Path, partition: int, save: bool) -> list[Any]:
    results = []
    for name, make in OPTIMIZERS.items():
        model, _ = build(UnevenMLP, partition, seed=0 if save else 5)
        optimizer = make(list(model.parameters()))
        try:
            train(model, optimizer, 0, 2)
        except Exception:  # torch's own, which do not take sharded parameters
            results.append((name, None))
            continue
        if save:
            mics.save(path / name, model=model, optimizer=optimizer)
        else:
            mics.load(path / name, model=model, optimizer=optimizer)
        results.append((name, whole(model, optimizer)))
        train(model, optimizer, 2, 3)
    return results


@pytest.mark.slow
def test_state_of_shards_of_every_optimizer_loads_at_another_layout(tmp_path: Path) -> None:
    saved = run_ranks(_optimizers_of_shards, 4, tmp_path, 2, True)[0]
    loaded = run_ranks(_optimizers_of_shards, 2, tmp_path, 2, False)[0]
    worked = {name for name, state in saved if state is not None}
    assert {"sgd, momentum", "adamw, fused", "rmsprop", "nadam", "asgd"} <= worked
    for (name, one), (_, other) in zip(saved, loaded, strict=True):
        assert one is None or equal(one, other), name


def _between_shards_and_one_process(path: Path, world: int) -> Any:
    if world == 1:
        model = seeded(UnevenMLP, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    else:
        model, optimizer = build(UnevenMLP, 2, seed=3)
    before = [torch.get_rng_state()]
    mics.load(path, model=model, optimizer=optimizer)
    del before
    kinds = {
        (key, type(value) is DTensor)
        for state in optimizer.state.values()
        for key, value in state.items()
    }
    names = {name: full(value) for name, value in model.named_parameters()}
    state = {
        name: {key: full(value) for key, value in optimizer.state[param].items()}
        for name, param in model.named_parameters()
    }
    return kinds, names, state


def _save_part(path: Path) -> None:
    model, optimizer = build(UnevenMLP, 2)
    train(model, optimizer, 0, 1)
    for param in list(optimizer.state)[:2]:
        del optimizer.state[param]
    mics.save(path, model=model, optimizer=optimizer)


def test_a_state_that_is_missing_stays_missing_at_any_layout(tmp_path: Path) -> None:
    run_ranks(_save_part, 2, tmp_path / "c")
    alone = _between_shards_and_one_process(tmp_path / "c", 1)
    sharded = run_ranks(_between_shards_and_one_process, 2, tmp_path / "c", 2)[0]
    assert sharded[0] == {("step", False), ("exp_avg", True), ("exp_avg_sq", True)}
    assert same(list(alone[1:]), list(sharded[1:]))
    assert sum(not state for state in sharded[2].values()) == 2


def _state_of_shards_that_says_nothing(path: Path) -> None:
    model, optimizer = build(UnevenMLP, 2)
    train(model, optimizer, 0, 1)
    for param, state in optimizer.state.items():
        state["scale"] = torch.full((2,), float(dist.get_rank() + 1))  # as quantisers keep it
        assert isinstance(param, DTensor)
    mics.save(path, model=model, optimizer=optimizer)


def _other_state_on_a_rank(path: Path) -> None:
    model, optimizer = build(UnevenMLP, 2)
    train(model, optimizer, 0, 1)
    if dist.get_rank() == 1:
        optimizer.state.pop(next(iter(optimizer.state)))
    mics.save(path, model=model, optimizer=optimizer)


def _value_on_a_rank(path: Path) -> None:
    model, optimizer = build(UnevenMLP, 2)
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["friend"] = object()
    mics.save(path, model=model, optimizer=optimizer)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            _state_of_shards_that_says_nothing,
            "Ranks disagree on optimizer state that is not sharded",
        ),
        (_other_state_on_a_rank, "Ranks disagree on what is to be saved: rank(s) 1 differ"),
        (_value_on_a_rank, "friend cannot be kept"),
    ],
)
def test_ranks_that_hold_other_state_are_refused_together(
    function: Any, words: str, tmp_path: Path
) -> None:
    for text in errors_of_ranks(function, 2, tmp_path / "c"):
        assert "CheckpointError" in text
        assert words in text
    assert list(tmp_path.iterdir()) == []
