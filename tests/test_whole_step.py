"""``mics.WholeStep``: its gathers in the ledger and the prediction, and meshes of other axes.

On four ranks, two to a node. Weights of tensor parallelism and of experts are split over two axes,
some of them unevenly, some along one dim by both.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import full
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from test_expert_tensors import FULL, Experts
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import SGD, Adafactor, Muon

import mics
from mics.errors import ConfigError, ShardError
from mics.traffic import Key

WORLD, WIDTH, INSIDE, ODD = 4, 8, 10, 13
HOP_0 = Key(0, "all_gather", "flat")


class Mlp(nn.Module):
    """Two matrices; 10 rows are 5 and 5 by tensor parallelism, 3 and 2 of each are a shard."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, inside)
        self.down = nn.Linear(inside, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def mlps(inside: int = INSIDE) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Mlp(inside), Mlp(inside))


def on_tp(replicate: int, partition: int, inside: int = INSIDE) -> nn.Sequential:
    """Sharded over a partition group beside tensor parallelism of two."""
    names = ("replicate", "shard", "tp")
    mesh = init_device_mesh("cpu", (replicate, partition, 2), mesh_dim_names=names)
    model = mlps(inside)
    for block in model:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)  # type: ignore[arg-type]
    for module in (*model, model):
        mics.fully_shard(module, mesh=mesh["replicate", "shard"], mp_policy=FULL)
    return model


def sharded(partition: int) -> nn.Sequential:
    model = mlps()
    mics.shard(model, mesh=mesh_of_rank(partition, 2), blocks=list(model), mp_policy=FULL)
    return model


class OfExperts(nn.Module):
    """A layer beside experts that are given their gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(x))


def on_ep() -> OfExperts:
    """Experts over an axis of two, then over the two ranks with the same ones."""
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("replicate", "efsdp", "ep"))
    model = OfExperts()
    for name, param in list(model.experts.named_parameters()):
        spread = distribute_tensor(param.data, mesh["ep"], [Shard(0)])
        setattr(model.experts, name, nn.Parameter(spread))
    mics.fully_shard(model.experts, mesh=mesh["replicate", "efsdp"], mp_policy=FULL)
    mics.fully_shard(model, mesh=mesh_of_rank(4, 2), mp_policy=FULL)
    return model


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.ndim == 2]


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
    for one in mics.micro_steps(model, [x, x + 1]):
        model(one).square().mean().backward()


def give_gradients(model: nn.Module, step: int) -> None:
    """Gradients by numbers, for a model whose forward says nothing here."""
    for number, param in enumerate(model.parameters()):
        seed = torch.Generator().manual_seed(100 * step + number)
        whole = torch.randn(param.shape, generator=seed)
        assert isinstance(param, DTensor)
        at_each = [Replicate()] * param.device_mesh.ndim
        spread = DTensor.from_local(whole, param.device_mesh, at_each, run_check=False)
        param.grad = spread.redistribute(placements=param.placements)


def go_on(
    model: nn.Module, mine: Any, alone: nn.Module, right: Any, steps: range, gradients: Any
) -> list[str]:
    """What differs from one process with the same gradients, or from what was predicted."""
    wrong = []
    for step in steps:
        view = mics.ledger(model)
        view.reset()
        gradients(model, step)
        before = view.traffic()
        predicted = mics.predict_traffic(model, micro_steps=2, optimizer=mine)
        hop_1 = mics.predict_traffic(model, micro_steps=2)
        for param, of_one in zip(model.parameters(), alone.parameters(), strict=True):
            of_one.grad = full(param.grad)
        mine.step()
        right.step()
        counted = view.traffic()
        trained = gradients is backward
        if counted.counts[HOP_0] != predicted.counts[HOP_0]:
            wrong.append(f"step {step}: counted\n{counted}\npredicted\n{predicted}")
        if trained and (counted != predicted or before != hop_1):
            wrong.append(f"step {step}: in all\n{counted}\npredicted\n{predicted}")
        for (name, param), of_one in zip(model.named_parameters(), alone.parameters(), strict=True):
            if not torch.equal(full(param), of_one):
                wrong.append(f"step {step}: {name} is another")
        mine.zero_grad()
    return wrong


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "tensor parallel, p = 2": (lambda: on_tp(1, 2), mlps, backward),
    "tensor parallel, two replicas": (lambda: on_tp(2, 1), mlps, backward),
    # torch computes nothing with 7 and 6 rows, but splits and gathers them.
    "uneven": (lambda: on_tp(1, 2, ODD), lambda: mlps(ODD), give_gradients),
    "experts": (on_ep, OfExperts, give_gradients),
    "p = 4": (lambda: sharded(4), mlps, backward),
    "p = 2": (lambda: sharded(2), mlps, backward),
}


def with_states_of_torch(model: nn.Module, mine: Any, make: Any) -> str:
    """Through torch's functions into an optimizer of its own; what is then another."""
    kept = get_optimizer_state_dict(model, mine)
    fresh = make(model)
    set_optimizer_state_dict(model, fresh, kept)
    for param, state in mine.state.items():
        for key, value in state.items():
            other = fresh.state[param][key]
            if isinstance(value, DTensor) and value.placements != other.placements:
                return f"{key}: {other.placements} instead of {value.placements}"
            if not torch.equal(full(value), full(other)):
                return f"{key} of {list(param.shape)} is another"
    return "" if fresh.state else "there is no state"


@pytest.mark.slow
def test_whole_steps_on_two_axes_are_one_processs_and_counted_as_predicted() -> None:
    def all_models() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, (make, of_one, gradients) in MODELS.items():
            rules: dict[str, tuple[Any, Any]] = {
                "Adafactor": (
                    lambda m: mics.WholeStep(m.parameters(), Adafactor, lr=0.05),
                    lambda m: Adafactor(m.parameters(), lr=0.05),
                ),
                "Muon": (
                    lambda m: mics.WholeStep(matrices(m), Muon, lr=0.02),
                    lambda m: Muon(matrices(m), lr=0.02),
                ),
            }
            for rule, (of_shards, of_whole) in rules.items():
                model, alone = make(), of_one()
                mine, right = of_shards(model), of_whole(alone)
                wrong = go_on(model, mine, alone, right, range(2), gradients)
                wrong.append(with_states_of_torch(model, mine, of_shards))
                found[f"{name}, {rule}"] = [*filter(None, wrong)]
        return found

    for rank in run_ranks(all_models, WORLD, ranks_per_node=2):
        for name, wrong in rank.items():
            assert not wrong, f"{name}: {wrong[0]}"


def test_gathers_of_a_whole_step_are_worked_out_by_hand_and_unknown_splits_are_refused() -> None:
    def gather() -> list[Any]:
        model = sharded(4)
        optimizer = mics.WholeStep(model[0].up.parameters(), SGD, lr=0.1, momentum=0.5)
        found = []
        for step in range(2):
            mics.ledger(model).reset()
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            found.append(mics.ledger(model).traffic().counts[HOP_0])
        return found

    def refused(mesh: DeviceMesh) -> str:
        partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial(), Shard(0)], run_check=False)
        fine = nn.Parameter(torch.zeros(3))
        fine.grad = torch.ones(3)
        param = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Replicate(), Shard(0)]))
        param.grad = partial
        with pytest.raises(ShardError) as caught:
            mics.WholeStep([fine, param], SGD, lr=0.1).step()
        assert not fine.any()
        return str(caught.value)

    def both() -> tuple[list[Any], str]:
        return gather(), refused(init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))

    # 10 x 8 and 10 values of 4 bytes, padded to 12 rows: 384 and 48 bytes, of weight and gradient,
    # then of the momentum too; a rank sends 3 / 4 of it.
    for rank, ((first, second), words) in enumerate(run_ranks(both, WORLD, ranks_per_node=2)):
        assert (first.calls, first.message_bytes) == (4, 2 * 432)
        assert (second.calls, second.message_bytes) == (6, 3 * 432)
        sent = (second.flow.intra_bytes, second.flow.inter_bytes)
        assert sent == ((0, Fraction(972)) if rank % 2 else (Fraction(972), 0))
        assert "A tensor cannot be gathered whole: it is a sum that is not complete" in words
        assert "Shape [8, 4], placements [Partial(sum), Shard(dim=0)] on a mesh of [2, 2]" in words


def test_a_rule_that_computes_the_loss_in_its_step_is_refused_when_it_is_made() -> None:
    with pytest.raises(ConfigError) as caught:
        mics.WholeStep([nn.Parameter(torch.ones(2, 2))], torch.optim.LBFGS, lr=0.1)
    assert "LBFGS computes the loss anew inside of its step" in str(caught.value)


def test_a_closure_runs_once_before_whole_steps_and_ends_the_step() -> None:
    """It runs the micro-steps; what it computes is what a step without it uses."""

    def weights(with_closure: bool) -> list[torch.Tensor]:
        model = sharded(2)
        optimizer = mics.WholeStep(model.parameters(), SGD, lr=0.1, momentum=0.5)
        calls = []

        def closure() -> float:
            optimizer.zero_grad()
            calls.append(backward(model, len(calls)))
            return 4.5

        for step in range(2):
            if with_closure:
                assert optimizer.step(closure) == 4.5
            else:
                optimizer.zero_grad()
                backward(model, step)
                optimizer.step()
        assert len(calls) == 2 * with_closure
        return [param.full_tensor() for param in model.parameters()]  # type: ignore[attr-defined]

    def same() -> bool:
        pairs = zip(weights(True), weights(False), strict=True)
        return all(torch.equal(one, other) for one, other in pairs)

    assert run_ranks(same, WORLD) == [True] * WORLD


# -- ranks that step otherwise ---------------------------------------------------------------------


def leave_out(model: nn.Module, optimizer: Any, here: bool) -> None:
    if not here:
        optimizer.step()


def drop_a_gradient(model: nn.Module, optimizer: Any, here: bool) -> None:
    if here:
        matrices(model)[0].grad = None
    optimizer.step()


def choose_another_rate(model: nn.Module, optimizer: Any, here: bool) -> None:
    optimizer.param_groups[0]["lr"] = 0.01 if here else 0.02
    optimizer.step()


def in_another_order(model: nn.Module, optimizer: Any, here: bool) -> None:
    if here:
        optimizer.param_groups[0]["params"].reverse()
    optimizer.step()


STEPS_APART = "Ranks disagree on what {} steps: rank(s) 3 differ from rank"
APART = {
    leave_out: ["Ranks wait for each other in different places", "rank(s) 3 in the all-gather"],
    drop_a_gradient: [STEPS_APART, "up.weight (parameter 0 of unit 0): no gradient'"],
    choose_another_rate: [STEPS_APART, "'lr': 0.01"],
    in_another_order: [STEPS_APART, "Entry 0: rank", "of unit 1): weight of float32, gradient of"],
}
"""What a rank may do that the others do not, and what all of them are told then."""


def told(words: list[str], whose: str) -> list[str]:
    return [one.format(whose) for one in words]


def run_apart(make: Any, gradients: Any, wrong: Any) -> str:
    """What rank 3 does otherwise in the second of three steps; what is said before it changed."""
    model = make()
    optimizer = mics.WholeStep(model.parameters(), SGD, lr=0.02, momentum=0.5)
    for step in range(3):
        gradients(model, step)
        here = (step, dist.get_rank()) == (1, 3)
        before = [param.to_local().clone() for param in model.parameters()]  # type: ignore[attr-defined]
        try:
            wrong(model, optimizer, here)
        except mics.MicsError:
            after = [param.to_local() for param in model.parameters()]  # type: ignore[attr-defined]
            assert all(map(torch.equal, before, after)), "something was changed"
            raise
        optimizer.zero_grad()
    return "nothing was said"


@pytest.mark.parametrize("wrong", APART, ids=lambda one: one.__name__)
def test_a_rank_that_steps_otherwise_is_named_before_anything_is_gathered(
    wrong: Callable[[nn.Module, Any, bool], None],
) -> None:
    args = (lambda: sharded(2)), backward, wrong
    for text in errors_of_ranks(run_apart, WORLD, *args, ranks_per_node=2):
        assert all(words in text for words in told(APART[wrong], "mics.WholeStep")), text


BESIDE = {
    "tensor parallel, p = 2": lambda: on_tp(1, 2),
    "tensor parallel, two replicas": lambda: on_tp(2, 1),
    "experts": on_ep,
}


@pytest.mark.parametrize("wrong", [drop_a_gradient, in_another_order], ids=lambda w: w.__name__)
@pytest.mark.parametrize("name", BESIDE)
def test_ranks_with_other_parts_beside_the_data_are_told_of_it_too(name: str, wrong: Any) -> None:
    for text in errors_of_ranks(run_apart, WORLD, BESIDE[name], give_gradients, wrong):
        assert "Ranks disagree on what mics.WholeStep steps: rank(s) 3 differ" in text, text


def test_parameters_of_a_users_own_mesh_are_compared_where_they_are_split() -> None:
    """Ranks 0 and 1 have nothing to do with 2 and 3; plain tensors are every rank's own."""

    def run() -> str:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        torch.manual_seed(0)
        weights = [torch.randn(8, 4) for _ in range(2)]
        split = [Replicate(), Shard(0)]
        params = [nn.Parameter(distribute_tensor(one, mesh, split)) for one in weights]
        plain = nn.Parameter(torch.ones(3))
        optimizer = mics.WholeStep([plain, *params], SGD, lr=0.5)
        for param in params:
            param.grad = distribute_tensor(torch.ones(8, 4), mesh, split)
        plain.grad = torch.ones(3) if dist.get_rank() else None
        optimizer.step()
        for param, weight in zip(params, weights, strict=True):
            assert torch.equal(full(param), weight - 0.5)
        assert torch.equal(plain, torch.full((3,), 0.5 if dist.get_rank() else 1.0))
        if dist.get_rank() == 3:
            params[0].grad = None
        try:
            optimizer.step()
        except mics.MicsError as error:
            return str(error)
        return ""

    first, second, *rest = run_ranks(run, WORLD)
    assert first == second == ""
    for text in rest:
        assert "what mics.WholeStep steps: rank(s) 3 differ from rank 2." in text
        assert "rank 3 has 'one of shape [8, 4]: no gradient'" in text


def test_what_ranks_may_do_alike_is_not_refused() -> None:
    """Frozen parameters, groups, schedules, a gradient that nobody has, two models, p = 1."""

    def run() -> bool:
        for partition in (1, 2):
            models = [sharded(partition), sharded(partition)]
            alone = [mlps(), mlps()]
            both = []
            for pair, make in ((models, mics.WholeStep), (alone, None)):
                for model in pair:
                    model[0].up.weight.requires_grad_(False)  # type: ignore[union-attr]
                of_first = {"params": list(pair[0].parameters()), "lr": 0.2}
                groups = [of_first, {"params": list(pair[1].parameters())}]
                both.append(make(groups, SGD, lr=0.1) if make else SGD(groups, lr=0.1))
            for step in range(3):
                for model, other in zip(models, alone, strict=True):
                    if step < 2 or model is models[0]:  # the second model rests in the end
                        backward(model, step)
                    for param, of_one in zip(model.parameters(), other.parameters(), strict=True):
                        of_one.grad = None if param.grad is None else full(param.grad)
                for optimizer in both:
                    optimizer.step()
                    optimizer.zero_grad()
                    optimizer.param_groups[0]["lr"] /= 2
            for model, other in zip(models, alone, strict=True):
                pairs = zip(model.parameters(), other.parameters(), strict=True)
                assert all(torch.equal(full(one), of_one) for one, of_one in pairs)
        return True

    assert run_ranks(run, WORLD, ranks_per_node=2) == [True] * WORLD
