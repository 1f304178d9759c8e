"""``mics.DealtStep``: each matrix stepped once among all ranks, counted, kept and loaded anywhere.

On four ranks, two to a node: one, two and four replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from models import full
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from test_optimizers import Counting, raised_by
from test_other_meshes import _data, _sharded
from test_whole_step import (
    APART,
    FULL,
    WIDTH,
    Mlp,
    backward,
    give_gradients,
    in_another_order,
    matrices,
    on_ep,
    on_tp,
    told,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adafactor, AdamW, Muon
from torch.optim.lr_scheduler import StepLR

import mics
from mics.communication.owners import Owner
from mics.sharding import one_owner
from mics.traffic import Count, Key, Traffic

WORLD = 4
ODD = (10, 13, 3)  # rows inside of the blocks: uneven and empty shards, 6 matrices for 4 ranks


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*map(Mlp, ODD))


def sharded(partition: int) -> nn.Sequential:
    model = blocks()
    mics.shard(model, mesh=mesh_of_rank(partition, 2), blocks=list(model), mp_policy=FULL)
    return model


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    vectors = [param for param in model.parameters() if param.ndim == 1]
    return [{"params": matrices(model)}, {"params": vectors, "lr": 0.03, "weight_decay": 0.1}]


RULES: dict[str, Any] = {
    "Muon": (Muon, matrices, {"lr": 0.02}),
    "Adafactor": (Adafactor, two_groups, {"lr": 0.05}),
    "AdamW": (AdamW, two_groups, {"lr": 0.01}),
    "SGD": (SGD, nn.Module.parameters, {"lr": 0.1, "momentum": 0.5}),
}


def dealt(model: nn.Module, rule: str = "Muon") -> Any:
    kind, params, options = RULES[rule]
    return mics.DealtStep(params(model), kind, **options)


def by_itself(model: nn.Module, rule: str = "Muon") -> Any:
    kind, params, options = RULES[rule]
    return kind(params(model), **options)


def hop_0(traffic: Traffic) -> dict[Key, Count]:
    return {key: count for key, count in traffic.counts.items() if key.hop == 0}


def go_on(
    model: nn.Module, mine: Any, alone: nn.Module, right: Any, steps: range, gradients: Any
) -> list[str]:
    """What differs from one process with the same gradients, or from what was predicted."""
    wrong = []
    schedules = [StepLR(one, 2, 0.5) for one in (mine, right)]
    for step in steps:
        view = mics.ledger(model)
        view.reset()
        gradients(model, step)
        predicted = mics.predict_traffic(model, micro_steps=2, optimizer=mine)
        for param, of_one in zip(model.parameters(), alone.parameters(), strict=True):
            of_one.grad = full(param.grad)
        for one in (mine, right, *schedules):
            one.step()
        counted = view.traffic()
        same = counted == predicted if gradients is backward else hop_0(counted) == hop_0(predicted)
        if not same or not hop_0(counted):
            wrong.append(f"step {step}: counted\n{counted}\npredicted\n{predicted}")
        for (name, param), of_one in zip(model.named_parameters(), alone.parameters(), strict=True):
            if not torch.equal(full(param), of_one):
                wrong.append(f"step {step}: {name} is another")
        for one in (mine, right):
            one.zero_grad()
    return wrong


def test_owners_are_loaded_alike_few_parameters_go_to_all_replicas_and_later_groups_move_none() -> (
    None
):
    shapes = [(4, 4), (4, 16), (4, 4), (4, 16), (4, 4), (4, 4), (4, 4)]
    params = [nn.Parameter(torch.empty(shape)) for shape in shapes]
    mesh: Any = SimpleNamespace(groups=SimpleNamespace(shard=_Two(), num_replicas=2))
    units = {id(param): mesh for param in params[:-1]}  # the last one has no unit

    def owners(*groups: list[nn.Parameter]) -> list[Owner | None]:
        (dealt,) = one_owner.deal_owners(groups, units)
        return [dealt.owners.get(param) for param in params]

    first = owners(params[:4])
    # 256 of work for each of the two large ones, then 64 for each of two small ones.
    assert first[:4] == [Owner(0, 1), Owner(0, 0), Owner(1, 1), Owner(1, 0)]
    later = owners(params[:4], params[4:])
    assert later[:4] == first[:4]
    assert later[4:] == [Owner(0, 1), Owner(1, 1), None]
    (dealt,) = one_owner.deal_owners([params], units)
    wanted = set(params) - {params[0]}
    assert [*dealt.packs(wanted)] == [[params[n] for n in (1, 3, 2, 4, 5)]]


class _Two:
    """A partition group of two, of which nothing but its size is asked."""

    def size(self) -> int:
        return 2


@pytest.mark.slow
@pytest.mark.parametrize("pack_bytes", [1, 64 * 2**20])
def test_dealt_steps_are_one_processs_bit_for_bit_and_counted_as_predicted(
    pack_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_owner, "_PACK_BYTES", pack_bytes)

    def all_layouts() -> dict[str, list[str]]:
        found = {}
        for partition in (1, 2, 4):
            for rule in RULES:
                model, alone = sharded(partition), blocks()
                given = dealt(model, rule), alone, by_itself(alone, rule), range(3), backward
                found[f"{rule}, p = {partition}"] = go_on(model, *given)
        return found

    for rank in run_ranks(all_layouts, WORLD, ranks_per_node=2):
        for name, wrong in rank.items():
            assert not wrong, f"{name}: {wrong[0]}"


def test_what_a_dealt_step_sends_is_worked_out_by_hand() -> None:
    def send() -> list[dict[Key, Count]]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5)))
        mics.shard(model, mesh=mesh_of_rank(2, 2), blocks=list(model), mp_policy=FULL)
        optimizer = mics.DealtStep(model.parameters(), SGD, lr=0.1, momentum=0.5)
        found = []
        for step in range(3):
            backward(model, step)
            mics.ledger(model).reset()
            optimizer.step()
            optimizer.zero_grad()
            found.append(hop_0(mics.ledger(model).traffic()))
            if step == 1:
                optimizer.shard_state()
        return found

    # Matrices of 8 x 8 values have shards of 4 x 8 x 4 = 128 bytes. The first rank of replica 0
    # owns two of five, everybody else one. To the owners: rows of two weights and two gradients in
    # replica 0, of one and one in replica 1, and of two and one momenta after shard_state; back:
    # rows of the weights. Between replicas: rows of three shards, those of replica 0.
    for rank, (first, second, third) in enumerate(run_ranks(send, WORLD, ranks_per_node=2)):
        owned = 2 if rank < 2 else 1
        exchange, gather = Key(0, "all_to_all", "flat"), Key(0, "all_gather", "flat")
        assert first == second and first.keys() == {exchange, gather}
        for count, tensors in ((first[exchange], 2 + 1), (third[exchange], 3 + 1)):
            assert count.calls == 2
            assert count.message_bytes == 2 * owned * tensors * 128
            assert count.flow.intra_bytes == owned * tensors * 128
        assert (first[gather].calls, first[gather].message_bytes) == (1, 2 * 3 * 128)
        assert first[gather].flow.inter_bytes == 3 * 128
        assert third[gather] == first[gather]


# -- state on one rank -----------------------------------------------------------------------------


def of_state(folder: Path) -> dict[str, Any]:
    """What differs where state goes from owners to all ranks, to files, and back."""
    found: dict[str, Any] = {}
    for rule in ("Muon", "Adafactor"):
        model, alone = sharded(2), blocks()
        mine, right = dealt(model, rule), by_itself(alone, rule)
        found[f"{rule}, before"] = go_on(model, mine, alone, right, range(2), backward)
        path = folder / rule
        mics.save(path, model=model, optimizer=mine)
        found[f"{rule}, saved"] = go_on(model, mine, alone, right, range(2, 3), backward)
        mics.save(path.with_suffix(".later"), model=model, optimizer=mine)
        for partition in (1, 4):
            other, twin = sharded(partition), blocks()
            kind, params, options = RULES[rule]
            loaded = mics.WholeStep(params(other), kind, **options)
            mics.load(path, model=other, optimizer=loaded)
            mics.save(path.with_suffix(f".{partition}"), model=other, optimizer=loaded)
            again, twins = dealt(other, rule), by_itself(twin, rule)
            mics.load(path.with_suffix(f".{partition}"), model=other, optimizer=again)
            mics.load(path, model=twin, optimizer=twins)
            name = f"{rule}, p = {partition}"
            found[name] = go_on(other, again, twin, twins, range(2, 4), backward)
    return found


@pytest.mark.slow
def test_state_of_owners_is_kept_as_shards_at_any_partition_and_saving_changes_nothing(
    tmp_path: Path,
) -> None:
    for rank in run_ranks(lambda: of_state(tmp_path), WORLD, ranks_per_node=2):
        for name, wrong in rank.items():
            assert not wrong, f"{name}: {wrong[0]}"


class Noting(SGD):
    """Notes the shapes of what it steps."""

    noted: ClassVar[list[torch.Size]] = []

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.noted.append(self.param_groups[0]["params"][0].shape)
        return super().step(closure)


def stepped_by_this_rank(partition: int) -> tuple[list[torch.Size], list[torch.Size], int]:
    """What this rank steps, all matrices, and the values of momentum that it has in the end."""
    model = sharded(partition)
    optimizer = mics.DealtStep(matrices(model), Noting, lr=0.1, momentum=0.9)
    Noting.noted.clear()
    backward(model, 0)
    optimizer.step()
    tried, *noted = Noting.noted
    assert tried == (1, 1)
    held = sum(one.numel() for state in optimizer._owned.values() for one in state.values())
    return noted, [param.shape for param in matrices(model)], held


def odd_steps() -> list[str]:
    """Steps that are not like the others, beside one process; what differs."""
    model, alone = sharded(2), blocks()
    first, rest = matrices(model)[:3], matrices(model)[3:]
    mine = mics.DealtStep(first, Muon, lr=0.02)
    right = Muon(matrices(alone)[:3], lr=0.02)

    def gradients(model: nn.Module, step: int) -> None:
        if step == 1:
            mine.add_param_group({"params": rest, "lr": 0.01})
            right.add_param_group({"params": matrices(alone)[3:], "lr": 0.01})
        for one in (first, matrices(alone)[:3]):
            one[0].requires_grad_(step != 2)  # frozen, then trained again
        give_gradients(model, step)
        if step == 3:
            rest[0].grad = None

    def forget(step: int) -> None:
        if step in (2, 3):
            param = first[0] if step == 2 else rest[0]
            param.grad = None

    wrong = []
    for step in range(5):
        gradients(model, step)
        forget(step)
        for param, of_one in zip(model.parameters(), alone.parameters(), strict=True):
            of_one.grad = None if param.grad is None else full(param.grad)
        mine.step()
        right.step()
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        wrong += [f"step {step}: {list(b.shape)}" for a, b in pairs if not torch.equal(full(a), b)]
    return wrong


def beside_experts() -> list[str]:
    """Experts on a mesh of their own; ranks with the same experts and all others' layers agree."""
    wrong = []
    for replicated in (False, True):
        model = _sharded("own mesh", replicated, 2)
        params = [param for param in model.parameters() if param.ndim == 2]
        alone = [nn.Parameter(full(param).detach().clone()) for param in params]
        mine, right = mics.DealtStep(params, Muon, lr=0.02), Muon(alone, lr=0.02)
        for step in range(2):
            batches = [_data(10 * step + m, dist.get_rank()) for m in range(2)]
            mics.ledger(model).reset()
            for batch in mics.micro_steps(model, batches):
                model(batch).square().mean().backward()
            predicted = mics.predict_traffic(model, micro_steps=2, optimizer=mine)
            for param, of_one in zip(params, alone, strict=True):
                of_one.grad = full(param.grad)
            mine.step()
            right.step()
            if mics.ledger(model).traffic() != predicted:
                wrong.append(f"counted\n{mics.ledger(model).traffic()}\npredicted\n{predicted}")
            if not all(torch.equal(full(a), b) for a, b in zip(params, alone, strict=True)):
                wrong.append(f"replicated {replicated}, step {step}")
            mine.zero_grad()
    return wrong


@pytest.mark.slow
def test_each_matrix_is_stepped_and_kept_once_and_odd_steps_are_one_processs() -> None:
    def all_of_it() -> Any:
        stepped = [stepped_by_this_rank(partition) for partition in (1, 2, 4)]
        return stepped, odd_steps(), beside_experts()

    ranks = run_ranks(all_of_it, WORLD, ranks_per_node=2)
    for layout in range(3):
        by_rank = [rank[0][layout] for rank in ranks]
        every = by_rank[0][1]
        assert sorted(shape for noted, _, _ in by_rank for shape in noted) == sorted(every)
        assert all(1 <= len(noted) <= 2 for noted, _, _ in by_rank)
        assert sum(held for _, _, held in by_rank) == sum(shape.numel() for shape in every)
    for _, odd, experts in ranks:
        assert odd == []
        assert experts == []


# -- refusals --------------------------------------------------------------------------------------


def refused_untouched(model: nn.Module, run: Callable[[], Any]) -> str:
    before = [full(param).detach().clone() for param in model.parameters()]
    text = raised_by(run)
    after = [full(param) for param in model.parameters()]
    assert all(map(torch.equal, before, after))
    return text


class Listing(SGD):
    """Keeps what cannot be sent."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            self.state[param]["history"] = [1, 2]


def refused_steps() -> dict[str, str]:
    """What is said before a parameter is stepped."""
    found = {}
    for name, model in (("tensor parallel", on_tp(1, 2)), ("experts", on_ep())):
        give_gradients(model, 0)
        optimizer = mics.DealtStep(model.parameters(), SGD)
        found[name] = refused_untouched(model, optimizer.step)
    plain = blocks()
    plain(torch.ones(2, WIDTH)).sum().backward()
    found["plain"] = refused_untouched(plain, dealt(plain).step)
    model = sharded(2)
    backward(model, 0)
    counting = mics.DealtStep(matrices(model)[:1], Counting, lr=0.1)  # which one rank owns
    found["a count"] = refused_untouched(model, counting.step)
    model.zero_grad()
    muon = dealt(model)
    for number, x in enumerate(mics.micro_steps(model, [torch.ones(1, WIDTH)] * 2)):
        model(x).sum().backward()
        if number == 0:
            found["early"] = refused_untouched(model, muon.step)
    return found


def refused_states() -> dict[str, str]:
    """What is said of state that is with its owners; torch's functions take what is sharded."""
    found, model = {}, sharded(2)
    backward(model, 0)
    listing = mics.DealtStep(matrices(model), Listing, lr=0.1)
    listing.step()
    found["state"] = refused_untouched(model, listing.shard_state)
    muon = dealt(model)
    muon.step()
    for name, read in (("kept", muon.state_dict), ("kept by torch", None)):
        read = read or (lambda: get_optimizer_state_dict(model, muon))
        found[name] = refused_untouched(model, read)
    removed = muon.param_groups[0]["params"].pop(0)
    found["moved"] = refused_untouched(model, muon.step)
    muon.param_groups[0]["params"].insert(0, removed)
    model.zero_grad()
    muon.shard_state()
    fresh = dealt(model)
    set_optimizer_state_dict(model, fresh, get_optimizer_state_dict(model, muon))
    for param, state in muon.state.items():
        momentum = full(state["momentum_buffer"])
        assert torch.equal(full(fresh.state[param]["momentum_buffer"]), momentum)
    assert len(fresh.state) == 6
    return found


@pytest.mark.slow
def test_what_cannot_be_dealt_is_refused_on_every_rank_untouched() -> None:
    elsewhere = (
        "ShardError: mics.DealtStep steps parameters that mics has sharded over their partition "
        "group and over nothing else."
    )
    for found in run_ranks(lambda: refused_steps() | refused_states(), WORLD, ranks_per_node=2):
        assert found["tensor parallel"].startswith(elsewhere)
        assert "Write: mics.WholeStep for it" in found["tensor parallel"]
        assert "on a mesh of [2, 2] ranks" in found["experts"]
        assert found["plain"].startswith(elsewhere) and "is no mesh" in found["plain"]
        assert "mics.DealtStep steps each parameter by itself" in found["a count"]
        assert "State 'history' of mics.DealtStep cannot be sent" in found["state"]
        assert found["kept"].startswith("CheckpointError: state_dict() of mics.DealtStep was")
        assert found["kept by torch"] == found["kept"]
        assert "were taken out of its groups" in found["moved"]
        assert "optimizer.step() was called before" in found["early"]


@pytest.mark.parametrize("wrong", APART, ids=lambda one: one.__name__)
def test_a_rank_that_steps_otherwise_is_named_before_anything_is_sent(
    wrong: Callable[[nn.Module, Any, bool], None],
) -> None:
    when = 0 if wrong is in_another_order else 1  # later it would have other owners

    def run() -> None:
        model = sharded(2)
        optimizer = mics.DealtStep(matrices(model), SGD, lr=0.02)
        for step in range(3):
            backward(model, step)
            wrong(model, optimizer, (step, dist.get_rank()) == (when, 3))
            optimizer.zero_grad()

    for text in errors_of_ranks(run, WORLD, ranks_per_node=2):
        assert all(words in text for words in told(APART[wrong], "mics.DealtStep"))


# -- in the memory of nodes ------------------------------------------------------------------------


def survive(until: int) -> tuple[int, list[torch.Tensor]]:
    """Steps kept in memory up to one; where it began, and the weights of this rank."""
    model = sharded(2)
    optimizer = dealt(model)
    snapshots = mics.Snapshots(model, optimizer)
    first = step = snapshots.restore()
    while step < until:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        step = snapshots.keep(step + 1)
    if until == 5:
        snapshots.close()
    else:
        assert snapshots._writing is not None
        snapshots._writing.end()
    return first, [full(param).detach().clone() for param in model.parameters()]


@pytest.mark.slow
def test_snapshots_keep_the_state_of_owners_and_go_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICS_MEMORY", str(tmp_path))
    monkeypatch.setenv("MICS_JOB", "dealt")
    right = run_ranks(survive, WORLD, 5)
    run_ranks(survive, WORLD, 3)
    for (first, weights), (_, wanted) in zip(run_ranks(survive, WORLD, 5), right, strict=True):
        assert first == 3
        assert all(map(torch.equal, weights, wanted))
