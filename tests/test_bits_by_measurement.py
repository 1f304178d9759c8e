"""``hop_two="auto"``: a measurement chooses, the same on every rank and every mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.communication import bits_by_measurement
from mics.communication.fewer_bits import FewerBits
from mics.sharding.units import units_of

WIDTH = 64
SECONDS = {"fp8": (1.0, 0.5), "exact": (1.0, 0.95), "tie": (1.0, 1.0)}
"""What a measurement is made to find, of the exact way and of fp8."""


def _found(monkeypatch: pytest.MonkeyPatch, exact: float, coded: float) -> list[set[str]]:
    """Let measurements find these times; returns the names of what each has timed."""
    timed: list[set[str]] = []

    def time_in_turn(calls: dict[str, Any], *_: Any) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        timed.append(set(calls))
        return {"exact": [exact], "fp8": [coded]}

    monkeypatch.setattr(bits_by_measurement, "time_in_turn", time_in_turn)
    return timed


def _blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))


def _sharded(mesh: Any, hop_two: Any) -> nn.Module:
    model = _blocks()
    policy = MixedPrecisionPolicy()
    for block in model:
        mics.fully_shard(block, mesh=mesh, mp_policy=policy, hop_two=hop_two)
    mics.fully_shard(model, mesh=mesh, mp_policy=policy, hop_two=hop_two)
    return model


def _bits(model: nn.Module) -> list[str]:
    hops = [unit.hop_two for unit in units_of(model) if unit.hop_two is not None]
    return ["fp8" if isinstance(hop.averaging, FewerBits) else "exact" for hop in hops]


def _step(model: nn.Module) -> None:
    for micro_step in mics.micro_steps(model, range(2)):
        seeded = torch.Generator().manual_seed(10 * micro_step + dist.get_rank())
        model(torch.randn(4, WIDTH, generator=seeded)).square().mean().backward()


def _train(found: str) -> tuple[list[str], int, list[Any], bool]:
    with pytest.MonkeyPatch.context() as patch:
        timed = _found(patch, *SECONDS[found])
        model = _sharded(mesh_of_rank(2), "auto")
    ledger = mics.ledger(model)
    ledger.reset()
    _step(model)
    same = ledger.traffic() == mics.predict_traffic(model, micro_steps=2)
    gradients = [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]
    told = _sharded(mesh_of_rank(2), "fp8" if found == "fp8" else None)
    _step(told)
    equal = all(
        torch.equal(mine, p.grad.full_tensor())  # type: ignore[union-attr]
        for mine, p in zip(gradients, told.parameters(), strict=True)
    )
    return _bits(model), len(timed), [same, equal], all(each == {"exact", "fp8"} for each in timed)


@pytest.mark.parametrize("found", SECONDS)
def test_a_unit_has_the_bits_that_were_faster(found: str) -> None:
    """Of each size one is measured: two blocks are alike, a norm is another one."""
    for bits, measured, right, both_ways in run_ranks(quiet, 4, lambda: _train(found)):
        assert set(bits) == {"fp8" if found == "fp8" else "exact"}
        assert measured == 2 and both_ways
        assert right == [True, True]


def _beside_each_other() -> list[str]:
    """Two meshes of a tensor-parallel job, whose measurements come out otherwise."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
    with pytest.MonkeyPatch.context() as patch:
        _found(patch, *((1.0, 0.5) if mesh.get_local_rank("tp") else (0.5, 1.0)))
        return _bits(_sharded(mesh["replicate", "shard"], "auto"))


def test_meshes_beside_each_other_choose_alike() -> None:
    first, *others = run_ranks(quiet, 4, _beside_each_other)
    assert len(first) == 3 and all(other == first for other in others)


def _in_earnest() -> tuple[list[str], bool]:
    model = _sharded(mesh_of_rank(2), "auto")
    _step(model)
    return _bits(model), all(p.grad is not None for p in model.parameters())


def test_it_measures_in_earnest_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    bits, others = zip(*run_ranks(_in_earnest, 4), strict=True)
    assert all(others) and len(set(map(tuple, bits))) == 1
    assert capfd.readouterr().err.count("over 2 replicas: ") == 2


def _of_two_forms() -> int:
    with pytest.MonkeyPatch.context() as patch:
        timed = _found(patch, 1.0, 0.5)
        mesh = mics.init_mesh(partition=1, gpus_per_node=2)
        for collectives in ("flat", "hierarchical", "flat"):
            block = nn.Linear(WIDTH, WIDTH)
            mics.fully_shard(block, mesh=mesh, hop_two="auto", collectives=collectives)
    return len(timed)


def test_what_is_exact_in_another_form_is_timed_again() -> None:
    assert run_ranks(_of_two_forms, 4, ranks_per_node=2) == [2] * 4
