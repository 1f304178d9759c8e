"""Optimizers of every kind on sharded parameters: as in one process, or refused in words."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import full
from parity import quiet
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from test_other_meshes import _data, _sharded
from torch import nn
from torch import optim as O
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import StepLR

import mics

WORLD, WIDTH, ROWS = 4, 12, 2
Make = Callable[[nn.Module], list[torch.optim.Optimizer]]


def net(out: int = 3) -> nn.Module:
    """Matrices of 17, 5 and ``out`` rows: shards are uneven, and some empty."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, 17), nn.Tanh(), nn.Linear(17, 5), nn.Tanh(), nn.Linear(5, out)]
    return nn.Sequential(*layers, nn.LayerNorm(out))


def sharded(partition: int, out: int = 3) -> nn.Module:
    return mics.shard(
        net(out), mesh=mesh_of_rank(partition), blocks=nn.Linear, mp_policy=MixedPrecisionPolicy()
    )


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.ndim == 2]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.ndim == 1]


def data(step: int) -> torch.Tensor:
    """Of all ranks, [WORLD, ROWS, WIDTH]."""
    return torch.randn(WORLD, ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(param, DTensor) for param in model.parameters())


def one_step_of(*models: nn.Module) -> contextlib.ExitStack:
    """The micro-step of every model that is sharded."""
    stack = contextlib.ExitStack()
    for model in filter(is_sharded, models):
        stack.enter_context(mics.micro_step(model, last=True))
    return stack


def batch_for(model: nn.Module, step: int) -> torch.Tensor:
    return data(step)[dist.get_rank()] if is_sharded(model) else data(step).flatten(0, 1)


def backward(model: nn.Module, step: int) -> None:
    """One step's gradients: by all ranks together, or by one process alone."""
    batch = batch_for(model, step)
    with one_step_of(model):
        model(batch.to(next(model.parameters()).dtype)).pow(3).mean().backward()


def train(model: nn.Module, optimizers: list[Any], steps: range) -> None:
    for step in steps:
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [full(param).detach().clone() for param in model.parameters()]


def off(model: nn.Module, alone: nn.Module) -> float:
    """The largest relative difference of a weight."""
    pairs = zip(weights(model), weights(alone), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


# -- rules that need whole matrices ----------------------------------------------------------------


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": matrices(model)}, {"params": vectors(model), "lr": 0.03}]


# Each: optimizers of one process, and those of the sharded model, from its parameters.
RULES: dict[str, tuple[Make, Make]] = {
    "Muon": (
        lambda m: [O.Muon(matrices(m), lr=0.02), O.AdamW(vectors(m), lr=0.01)],
        lambda m: [mics.WholeStep(matrices(m), O.Muon, lr=0.02), O.AdamW(vectors(m), lr=0.01)],
    ),
    "Muon as Moonshot's": (
        lambda m: [O.Muon(matrices(m), lr=0.02, adjust_lr_fn="match_rms_adamw")],
        lambda m: [mics.WholeStep(matrices(m), O.Muon, lr=0.02, adjust_lr_fn="match_rms_adamw")],
    ),
    "Adafactor": (
        lambda m: [O.Adafactor(two_groups(m), lr=0.05)],
        lambda m: [mics.WholeStep(two_groups(m), O.Adafactor, lr=0.05)],
    ),
    "Rprop": (
        lambda m: [O.Rprop(m.parameters(), lr=0.01)],
        lambda m: [mics.WholeStep(m.named_parameters(), O.Rprop, lr=0.01)],
    ),
}


def go_on_together(
    model: nn.Module, optimizers: list[Any], alone: nn.Module, right: list[Any], steps: range
) -> bool:
    """Train both on the gradients that the sharded model has; whether weights stay bit-equal."""
    schedules = [StepLR(one, 2, 0.5) for one in [*optimizers, *right]]
    for step in steps:
        backward(model, step)
        for param, mine in zip(alone.parameters(), model.parameters(), strict=True):
            param.grad = full(mine.grad)
        for one in [*optimizers, *right, *schedules]:
            one.step()
        for one in [*optimizers, *right]:
            one.zero_grad()
    return all(map(torch.equal, weights(model), weights(alone)))


def whole_steps(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (of_one, of_shards) in RULES.items():
        model, alone = sharded(2), net()
        mine, right = of_shards(model), of_one(alone)
        found[name] = [go_on_together(model, mine, alone, right, range(3))]
        path = folder / name.replace(" ", "-").replace("'", "")
        mics.save(path, model=model, optimizer=mine)
        other = sharded(4)
        loaded = of_shards(other)
        mics.load(path, model=other, optimizer=loaded)
        found[name].append(go_on_together(other, loaded, alone, right, range(3, 5)))
        mics.save(path.with_suffix(".alone"), model=alone, optimizer=right)
        again = sharded(2)
        loaded = of_shards(again)
        mics.load(path.with_suffix(".alone"), model=again, optimizer=loaded)
        found[name].append(go_on_together(again, loaded, alone, right, range(5, 7)))
    momentum = mics.WholeStep(matrices(model := sharded(4)), O.Muon, lr=0.02)
    train(model, [momentum], range(1))
    found["state is a shard"] = all(
        momentum.state[p]["momentum_buffer"].placements == p.placements for p in matrices(model)
    )
    alone = net()
    train(model := sharded(4), RULES["Adafactor"][1](model), range(5))
    train(alone, RULES["Adafactor"][0](alone), range(5))
    found["off"] = off(model, alone)
    return found


@pytest.mark.slow
def test_a_rule_of_whole_matrices_is_one_processs_on_shards_and_goes_on_at_another_partition(
    tmp_path: Path,
) -> None:
    for found in run_ranks(quiet, WORLD, lambda: whole_steps(tmp_path)):
        for name in RULES:
            assert found[name] == [True] * 3, name
        assert found["state is a shard"]
        assert found["off"] < 1e-5


def distances_of_muon() -> tuple[float, float]:
    """How far from the whole matrix's step are torch's Muon on shards, and one that sees a shard.

    Relative to the step; the larger of the two matrices that have a shard on every rank.
    """
    model, alone, blind = sharded(2), net(), net()
    backward(model, 0)
    names = ["0.weight", "2.weight"]
    wholes = {name: full(model.get_parameter(name).grad) for name in names}
    before = [alone.get_parameter(name).detach().clone() for name in names]
    for name, whole in wholes.items():
        alone.get_parameter(name).grad = whole
        blind.get_parameter(name).grad = whole
    O.Muon(matrices(model), lr=0.1, weight_decay=0).step()
    O.Muon(matrices(alone), lr=0.1, weight_decay=0).step()
    for name in names:
        rows = [nn.Parameter(rows) for rows in blind.get_parameter(name).detach().chunk(2)]
        for part, grad in zip(rows, wholes[name].chunk(2), strict=True):
            part.grad = grad
        O.Muon(rows, lr=0.1, weight_decay=0).step()
    right = [
        alone.get_parameter(name).detach() - old for name, old in zip(names, before, strict=True)
    ]

    def distance(of: nn.Module) -> float:
        steps = [
            full(of.get_parameter(name)) - old for name, old in zip(names, before, strict=True)
        ]
        pairs = zip(steps, right, strict=True)
        return max(float((mine - step).norm() / step.norm()) for mine, step in pairs)

    return distance(model), distance(blind)


def raised_by(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Counting(O.SGD):
    """Keeps a number in its group, as rules do that look at all parameters together."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        return super().step(closure)


def refusals() -> dict[str, tuple[str, bool]]:
    """What is said of an optimizer, and whether every weight is what it was."""
    made: dict[str, Make] = {
        "Adafactor": lambda m: [O.Adafactor(m.parameters())],
        "Rprop": lambda m: [O.Rprop(m.parameters())],
        "Muon": lambda m: [O.Muon(matrices(m))],
        "a count": lambda m: [mics.WholeStep(m.parameters(), Counting, lr=0.1)],
    }
    found = {}
    for name, make in made.items():
        model = sharded(4)
        before = weights(model)
        optimizers = make(model)
        text = raised_by(lambda m=model, o=optimizers: train(m, o, range(1)))  # type: ignore[misc]
        found[name] = text, all(map(torch.equal, weights(model), before))
    return found


@pytest.mark.slow
def test_muon_on_shards_steps_the_whole_matrix_and_rules_that_cannot_are_refused_untouched() -> (
    None
):
    for (near, blind), found in run_ranks(quiet, WORLD, lambda: (distances_of_muon(), refusals())):
        # Muon multiplies in bfloat16: one process is 17 and 27 percent off its own step in float64.
        assert near < 0.1 < 0.5 < blind
        assert all(untouched for _, untouched in found.values())
        write = (
            "\n  Write: mics.WholeStep(model.parameters(), torch.optim.{0}, ...), which gathers "
            "one matrix at a time inside its partition group"
        )
        assert found["Adafactor"][0] == (
            "ShardError: torch.optim.Adafactor takes means over rows and columns of whole "
            "matrices, which shards have not.\n"
            "  8 of its parameters are such: [17, 12], [17], [5, 17] and 5 more."
            + write.format("Adafactor")
        )
        assert found["Rprop"][0] == (
            "ShardError: torch.optim.Rprop writes by a mask, which torch cannot on a shard.\n"
            "  8 of its parameters are such: [17, 12], [17], [5, 17] and 5 more."
            + write.format("Rprop")
        )
        assert found["Muon"][0] == (
            "ShardError: torch.optim.Muon multiplies whole matrices, and torch cannot for those "
            "with fewer rows than ranks.\n  1 of its parameters are such: [3, 5]."
            + write.format("Muon")
        )
        assert found["a count"][0] == (
            "ConfigError: Counting keeps something for all parameters of a group, and "
            "mics.WholeStep steps each parameter by itself.\n"
            "  A step has changed 'k' of its group.\n"
            "  Write: Counting(model.parameters(), ...) itself, if its rule goes element by element"
        )


def test_a_rule_that_does_not_take_a_parameter_says_so_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        mics.WholeStep(net().parameters(), O.Muon)
    optimizer = mics.WholeStep(matrices(model := net()), O.Muon)
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        optimizer.add_param_group({"params": vectors(model)})


def test_whole_parameters_are_stepped_as_by_the_rule_itself() -> None:
    model, alone = net(), net()
    mine = mics.WholeStep(model.parameters(), O.AdamW, lr=0.1)
    assert go_on_together(model, [mine], alone, [O.AdamW(alone.parameters(), lr=0.1)], range(3))
    loss = mine.step(lambda: model(data(0)).square().mean().backward() or 5.0)
    assert loss == 5.0
    assert mics.WholeStep([{"params": model.parameters()}], O.SGD).defaults["lr"] == 1e-3


# -- loops of one step, of several models, of several optimizers -----------------------------------


class Layers(nn.Module):
    """Two layers of a generator or of its critic."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, inside), nn.Linear(inside, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def adversaries(partition: int | None) -> list[nn.Module]:
    torch.manual_seed(1)
    models = [Layers(9, WIDTH), Layers(7, 1)]
    if partition is None:
        return models
    mesh, policy = mesh_of_rank(partition), MixedPrecisionPolicy()
    return [mics.shard(m, mesh=mesh, blocks=nn.Linear, mp_policy=policy) for m in models]


def play(generator: nn.Module, critic: nn.Module, *, both: bool) -> nn.Module:
    """A critic that is used three times in its step, and whose gradients of the other are dropped.

    Args:
        generator: of what the critic judges.
        critic: of the real and the made.
        both: whether the critic is in the step of the generator too, or only passed through.
    """
    makes = O.AdamW(generator.parameters(), lr=0.01)
    judges = O.SGD(critic.parameters(), lr=0.1, momentum=0.5)
    for step in range(4):
        real, noise = batch_for(critic, step), batch_for(critic, 100 + step)
        judges.zero_grad()
        with one_step_of(critic):
            made = generator(noise).detach()
            (critic(made).mean() - critic(real).mean() + critic(real).square().mean()).backward()
        judges.step()
        makes.zero_grad()
        with one_step_of(generator, *([critic] if both else [])):
            (-critic(generator(noise)).mean()).backward()
        makes.step()
    return nn.ModuleList([generator, critic])


def use_twice(model: nn.Module, *, backwards: int) -> nn.Module:
    optimizer = O.SGD(model.parameters(), lr=0.005)
    for step in range(4):
        one, other = batch_for(model, step), batch_for(model, 50 + step)
        with one_step_of(model):
            if backwards == 1:
                (model(one) * model(other)).mean().backward()
            else:
                model(one).pow(3).mean().backward()
                model(other).pow(3).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def scale(model: nn.Module, *, clip: bool, fused: bool) -> tuple[nn.Module, list[float]]:
    """A loss scaler, and in the third step a loss that is infinite on one rank.

    A fused optimizer is called for that step too: its kernel leaves it out.
    """
    optimizer = O.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    scales = []
    for step in range(6):
        with one_step_of(model):
            loss = model(batch_for(model, step)).pow(3).mean()
            if step == 2 and (dist.get_rank() == WORLD - 1 or not is_sharded(model)):
                loss = loss * float("inf")
            scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            mics.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return model, scales


def take_turns(model: nn.Module) -> nn.Module:
    """Two optimizers, one of which steps every other time on the sum of two gradients."""
    every, second = O.AdamW(vectors(model), lr=0.01), O.SGD(matrices(model), lr=0.05)
    for step in range(4):
        backward(model, step)
        every.step()
        every.zero_grad()
        if step % 2:
            second.step()
            second.zero_grad()
    return model


def loops() -> dict[str, float]:
    warnings.simplefilter("ignore", mics.MicsWarning)  # hop 2 runs more than once in some of them
    found = {}
    for both in (False, True):
        ours, alone = (play(*adversaries(p), both=both) for p in (2, None))
        found[f"a critic {'in' if both else 'beside'} the step"] = off(ours, alone)
    for times in (1, 2):
        ours, alone = (use_twice(m, backwards=times) for m in (sharded(2), net()))
        found[f"used twice, {times} backward"] = off(ours, alone)
    for clip, fused in itertools.product((False, True), repeat=2):
        (ours, scales), (alone, right) = (
            scale(m, clip=clip, fused=fused) for m in (sharded(2), net())
        )
        assert scales == right == [256.0, 256.0, 128.0, 128.0, 128.0, 256.0]
        found[f"scaled, clip={clip}, fused={fused}"] = off(ours, alone)
    found["two optimizers"] = off(take_turns(sharded(2)), take_turns(net()))
    for partition in (2, 4):
        ours, alone = sharded(partition).bfloat16(), net().bfloat16()
        mine, right = O.AdamW(ours.parameters(), lr=0.01), O.AdamW(alone.parameters(), lr=0.01)
        assert go_on_together(ours, [mine], alone, [right], range(3))
        assert {s["exp_avg"].dtype for s in mine.state.values()} == {torch.bfloat16}
    return found


@pytest.mark.slow
def test_loops_of_several_models_passes_and_optimizers_are_one_processs() -> None:
    for found in run_ranks(quiet, WORLD, loops):
        assert len(found) == 9
        assert max(found.values()) < 1e-5, found


def overflow_of_an_expert(scaler: torch.amp.GradScaler) -> list[float]:
    """The gradient of an expert's weight overflows in the second step, on one rank alone."""
    net = _sharded("own mesh", replicated=False, partition=2)
    optimizer = O.SGD(sorted(net.parameters(), key=torch.Tensor.numel), lr=0.01)
    scales = []
    for step in range(3):
        for batch in mics.micro_steps(net, [_data(step, dist.get_rank())]):
            scaler.scale(net(batch).square().mean()).backward()
        if step == 1 and dist.get_rank() == 1:
            net[0].experts[0].weight.grad.to_local().fill_(float("inf"))  # type: ignore[union-attr,index]
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


def scale_experts() -> None:
    warnings.simplefilter("ignore", UserWarning)  # torch makes replicated tensors of the scale
    everybody = ShardedGradScaler("cpu", init_scale=256.0)
    assert overflow_of_an_expert(everybody) == [256.0, 128.0, 128.0]
    overflow_of_an_expert(torch.amp.GradScaler("cpu", init_scale=256.0))


@pytest.mark.slow
def test_torchs_sharded_scaler_skips_a_step_on_every_rank_where_an_expert_overflows() -> None:
    """GradScaler asks the ranks of one mesh only; the next step names who skipped."""
    for text in errors_of_ranks(scale_experts, WORLD):
        assert "Ranks have taken different numbers of optimizer steps" in text
        assert (
            "  Write: optimizer.step() on every rank or on none, by what all ranks know (an "
            "all-reduced loss; for experts on a mesh of their own torch's ShardedGradScaler, not "
            "GradScaler)" in text
        )


def free_of_schedules(kind: Any, model: nn.Module) -> tuple[nn.Module, torch.Tensor, Any]:
    optimizer, outputs = kind(model.parameters(), lr=0.01, warmup_steps=2), []
    for step in range(4):
        optimizer.train()
        train(model, [optimizer], range(step, step + 1))
        optimizer.eval()
        with torch.no_grad():
            outputs.append(model(data(77).flatten(0, 1)))
    return model, torch.stack(outputs), optimizer


def schedule_free(folder: Path, kind: Any) -> dict[str, Any]:
    alone, right, _ = free_of_schedules(kind, net(8))
    ours, outputs, optimizer = free_of_schedules(kind, sharded(2, 8))
    found = {"off": off(ours, alone), "evaluated": float((outputs - right).abs().max())}
    mics.save(folder / "c", model=ours, optimizer=optimizer)
    other = sharded(4, 8)
    loaded = kind(other.parameters(), lr=0.01, warmup_steps=2)
    mics.load(folder / "c", model=other, optimizer=loaded)
    for model, one in ((ours, optimizer), (other, loaded)):
        one.train()
        train(model, [one], range(4, 6))
        one.eval()
    return found | {"goes on": off(other, ours)}


@pytest.mark.slow
def test_a_schedule_free_optimizer_is_one_processs_in_both_of_its_modes(tmp_path: Path) -> None:
    kind = pytest.importorskip("schedulefree").AdamWScheduleFree
    for found in run_ranks(quiet, WORLD, lambda: schedule_free(tmp_path, kind)):
        assert found["off"] < 1e-5 and found["evaluated"] < 1e-4 and found["goes on"] < 1e-5, found
