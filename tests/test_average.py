"""EMA: torch's average of one process on shards, swapped in and out, kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import full
from parity import quiet
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mics
from mics.errors import ConfigError

WORLD, DECAY = 4, 0.9


def net() -> nn.Module:
    """A tied weight, a frozen bias, statistics in buffers; nothing divides by 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Linear(7, 7), nn.Linear(7, 5))
    model[2].weight = model[0].weight
    model[3].bias.requires_grad_(False)
    return model


def sharded(partition: int, **options: Any) -> nn.Module:
    policy = MixedPrecisionPolicy()
    mesh = mesh_of_rank(partition)
    return mics.shard(net(), mesh=mesh, blocks=nn.Linear, mp_policy=policy, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(4 * step + dist.get_rank())
    for batch in mics.micro_steps(model, [torch.randn(6, 7, generator=generator)]):
        model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def copied(model: nn.Module, alone: nn.Module) -> nn.Module:
    """``alone`` with the whole weights of ``model``, and this rank's buffers."""
    alone.load_state_dict({name: full(value) for name, value in model.state_dict().items()})
    return alone


def averages(ema: mics.EMA, *, of_weights: bool = False) -> dict[str, torch.Tensor]:
    return {n: full(a) for n, a in ema.averages.items() if not (of_weights and "running" in n)}


def agrees(ema: mics.EMA, theirs: AveragedModel) -> bool:
    right = dict(theirs.module.named_parameters()) | dict(theirs.module.named_buffers())
    return all(torch.equal(value, right[name]) for name, value in averages(ema).items())


def averaged(folder: Path) -> dict[str, Any]:
    model, alone = sharded(2, reshard_after_forward=False), net()
    ema = mics.EMA(model, decay=DECAY, average_buffers=True)
    averager = get_ema_multi_avg_fn(DECAY)
    theirs = AveragedModel(alone, multi_avg_fn=averager, use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    found: dict[str, Any] = {"equal": []}
    with CommDebugMode() as sent:
        ema.update()
    theirs.update_parameters(copied(model, alone))
    for step in range(3):
        train(model, optimizer, step)
        with sent:
            ema.update()
        theirs.update_parameters(copied(model, alone))
        found["equal"].append(agrees(ema, theirs))
    # A forward that keeps weights gathered, then the average, then the weights again.
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(9))
    for one in (model, theirs, alone):
        one.eval()
    before = {name: full(value) for name, value in model.state_dict().items()}
    model(x)
    with ema.swapped(), torch.no_grad():
        found["evaluated"] = float((model(x) - theirs(x)).abs().max())
        found["is another"] = float((model(x) - alone(x)).abs().max())
    with torch.no_grad():
        found["back"] = float((model(x) - alone(x)).abs().max())
    after = {name: full(value) for name, value in model.state_dict().items()}
    found["restored"] = all(torch.equal(after[name], value) for name, value in before.items())
    found["sent"] = sent.get_total_counts()
    mics.save(folder / "one", model=model, optimizer=optimizer, ema=ema)
    model.train()
    other = sharded(4)
    again = torch.optim.AdamW(other.parameters(), lr=0.05)
    loaded = mics.EMA(other, decay=DECAY, average_buffers=True)
    mics.load(folder / "one", model=other, optimizer=again, ema=loaded)
    mine, there = averages(ema, of_weights=True), averages(loaded, of_weights=True)
    found["loaded"] = loaded.updates == 4 and all(map(torch.equal, mine.values(), there.values()))
    whole = net()
    mics.load(folder / "one", model=whole, ema=(of_one := mics.EMA(whole, average_buffers=True)))
    found["loaded by one"] = all(
        torch.equal(mine[name], value) for name, value in averages(of_one, of_weights=True).items()
    )
    return found


@pytest.mark.slow
def test_the_average_is_torchs_without_traffic_swapped_in_and_loaded_at_another_partition(
    tmp_path: Path,
) -> None:
    for found in run_ranks(quiet, WORLD, lambda: averaged(tmp_path)):
        assert found["equal"] == [True] * 3
        assert found["sent"] == 0
        assert found["evaluated"] < 1e-6 < 1e-3 < found["is another"]
        assert found["back"] < 1e-6
        assert found["restored"] and found["loaded"] and found["loaded by one"]


# -- one process -----------------------------------------------------------------------------------


def set_to(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)


def test_the_decay_warms_up_from_the_second_update() -> None:
    model = nn.Linear(1, 1)
    ema = mics.EMA(model, decay=0.5, warmup=10)
    expected = None
    for n, weight in enumerate([5.0, 1.0, 3.0, -2.0, 4.0, 1.0, 0.0, 2.0, 7.0, 1.0, 3.0, 2.0]):
        set_to(model, weight)
        ema.update()
        keep = min(0.5, (1 + n) / (10 + n))
        expected = weight if expected is None else keep * expected + (1 - keep) * weight
        assert ema.averages["weight"].item() == pytest.approx(expected)


def test_the_average_of_weights_in_bfloat16_has_32_bits_and_moves_less_than_they_can() -> None:
    model = nn.Linear(1, 1).bfloat16()
    set_to(model, 1.0)
    ema = mics.EMA(model, decay=0.999)
    ema.update()
    set_to(model, 1.5)
    ema.update()
    assert ema.averages["weight"].dtype == torch.float32
    assert ema.averages["weight"].item() == pytest.approx(1.0005)
    with ema.swapped():
        assert model.weight.item() == 1.0
    assert model.weight.item() == 1.5


def test_frozen_weights_and_buffers_are_the_models_own() -> None:
    model = net()
    names = {name for name, param in model.named_parameters() if param.requires_grad}
    assert set(mics.EMA(model).averages) == names and "3.bias" not in names
    both = {"1.running_mean", "1.running_var"}
    assert set(mics.EMA(model, average_buffers=True).averages) == names | both


def test_training_is_refused_while_the_average_is_in_the_model_and_weights_come_back() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = mics.EMA(model)
    ema.update()
    before = [param.detach().clone() for param in model.parameters()]

    def inside(run: Any) -> str:
        with pytest.raises(mics.MicroStepError) as caught, ema.swapped():
            run()
        assert all(map(torch.equal, model.parameters(), before))
        return str(caught.value)

    assert inside(lambda: model(torch.ones(1, 3))) == (
        "A forward that prepares a backward ran while the average is in the model: its gradients "
        "would be those of other weights.\n"
        "  Write: with torch.no_grad() around the evaluation, and training outside of ema.swapped()"
    )
    assert inside(optimizer.step) == (
        "optimizer.step() was called while the average is in the model.\n"
        "  Write: optimizer.step() outside of ema.swapped()"
    )
    assert inside(ema.update) == (
        "EMA.update was called while the average is in the model.\n"
        "  Write: ema.update() behind optimizer.step(), outside of ema.swapped()"
    )
    assert inside(lambda: ema.swapped().__enter__()) == (
        "The average is in the model already.\n  Write: one with ema.swapped() at a time"
    )
    assert inside(lambda: model.weight.detach().zero_()) == (
        "Weights were written while the average was in their place; what was written is gone, and "
        "the weights are those from before.\n  1 of 2 tensors, weight first.\n"
        "  Write: mics.load and edits of weights outside of ema.swapped()"
    )
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()  # and everything goes on
    ema.update()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"decay": 1.0},
            "decay = 1.0 is no part of an average that is kept.\n"
            "  Write: decay=0.999, or another number from 0 to below 1",
        ),
        ({"warmup": -1}, "warmup = -1 is no number of updates.\n  Write: warmup=10, or 0 for none"),
    ],
)
def test_numbers_that_make_no_average_are_refused(options: Any, text: str) -> None:
    with pytest.raises(mics.ConfigError) as caught:
        mics.EMA(net(), **options)
    assert str(caught.value) == text


def test_a_checkpoint_of_another_average_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = net()
    ema = mics.EMA(model)
    mics.save(tmp_path / "without", model=model)
    mics.save(tmp_path / "with", model=model, ema=ema)
    assert not mics.load(tmp_path / "with", model=model).extra  # left alone
    set_to(model, 3.0)

    def refused(folder: str, ema: mics.EMA) -> str:
        with pytest.raises(mics.CheckpointError) as caught:
            mics.load(tmp_path / folder, model=model, ema=ema)
        assert all(bool((param == 3).all()) for param in model.parameters())
        return str(caught.value).replace(str(tmp_path), "run")

    assert refused("without", ema) == (
        "run/without holds no average.\n"
        "  Write: mics.load(path, model=model) without ema, and mics.EMA(model) behind it"
    )
    assert refused("with", mics.EMA(model, average_buffers=True)) == (
        "run/with has an average of other tensors.\n  0 only there; 2 only here "
        "(1.running_mean, 1.running_var); 6 in both.\n"
        "  Write: mics.EMA with the average_buffers it had, and the same weights frozen"
    )
    assert refused("with", mics.EMA(net())) == (
        "This EMA is of another model.\n  Write: ema=mics.EMA(model), of the model that is given"
    )


def test_an_average_made_before_sharding_is_refused() -> None:
    def rank() -> tuple[str, int]:
        model = nn.Linear(4, 2)  # a row on each rank: one part of the average would be spread
        ema = mics.EMA(model)
        mics.fully_shard(model)
        with pytest.raises(ConfigError) as raised:
            ema.update()
        return str(raised.value), ema.updates

    for said, updates in run_ranks(quiet, 2, rank):
        assert "weight was sharded, or sharded otherwise, since its average was made" in said
        assert "This rank has [1, 4] of it; its part of the average is [2, 4]" in said
        assert "mics.EMA(model) behind mics.shard(model)" in said
        assert updates == 0
