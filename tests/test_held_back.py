"""What hop 2 in few bits holds back, in checkpoints and in the memory of nodes."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard

import mics
from mics import compat
from mics.checkpoint.held_back import held_back_here
from mics.sharding.units import feedback_of

STEPS = 6
WIDTH = 48


pytestmark = pytest.mark.usefixtures("memory")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 97), nn.Linear(97, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Training:
    """A model whose hop 2 has few bits, unless told otherwise, and its optimizer."""

    def __init__(self, partition: int, **arguments: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block())
        arguments = {"hop_two": "int8", **arguments}
        self.model = quiet(
            lambda: mics.shard(
                model, partition=partition, mp_policy=MixedPrecisionPolicy(), **arguments
            )
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self, number: int) -> None:
        data = torch.Generator().manual_seed(100 * number + dist.get_rank())
        batch = [torch.randn(8, WIDTH, generator=data) for _ in range(2)]
        for x in mics.micro_steps(self.model, batch):
            self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> list[torch.Tensor]:
        """The shards and the errors of this rank."""
        tensors = [*self.model.parameters(), *held_back_here(self.model).values()]
        return [compat.local_of(tensor.detach()).clone() for tensor in tensors]

    def mean_errors(self) -> dict[str, torch.Tensor]:
        """Whole errors, the mean of all ranks that hold them."""
        found = {}
        for name, tensor in held_back_here(self.model).items():
            whole = _whole(tensor)
            dist.all_reduce(whole)
            copies = dist.get_world_size() // tensor.device_mesh.size()  # type: ignore[attr-defined]
            found[name] = whole / copies
        return found


def _whole(tensor: Any) -> torch.Tensor:
    """This rank's part of a tensor in its place, zeros elsewhere."""
    assert isinstance(tensor, DTensor) and tensor.placements == (Shard(0),)
    offset, shape = compat.box_of(tensor)
    whole = torch.zeros(tensor.shape)
    whole[offset[0] : offset[0] + shape[0]] = tensor.to_local()
    return whole


# -- checkpoints -----------------------------------------------------------------------------------


def _saved(folder: Path, partition: int, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    training = Training(partition, **arguments)
    for number in range(3):
        training.step(number)
    mean, before = training.mean_errors(), training.state()
    mics.save(folder, model=training.model, optimizer=training.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, training.state(), strict=True))
    return mean


def _loaded(folder: Path, partition: int, arguments: dict[str, Any]) -> Any:
    training = Training(partition, **arguments)
    training.step(9)  # which holds back something else
    mics.load(folder, model=training.model, optimizer=training.optimizer)
    mean, mine = training.mean_errors(), training.state()
    training.step(3)
    return mean, [bool(tensor.isfinite().all()) for tensor in mine]


@pytest.mark.parametrize(("ranks", "partition"), [(4, 2), (2, 1), (4, 1)])
def test_errors_are_kept_as_a_mean_for_any_ranks(
    tmp_path: Path, ranks: int, partition: int
) -> None:
    saved = run_ranks(_saved, 4, tmp_path / "one", 2, {}, ranks_per_node=2)[0]
    assert len(saved) == 4 and all(mean.abs().max() > 0 for mean in saved.values())
    for loaded, finite in run_ranks(_loaded, ranks, tmp_path / "one", partition, {}):
        assert all(finite) and loaded.keys() == saved.keys()
        for name, mean in saved.items():
            assert torch.allclose(loaded[name], mean, rtol=1e-6, atol=1e-12), name


def test_a_checkpoint_has_four_bytes_more_for_each_value(tmp_path: Path) -> None:
    run_ranks(_saved, 4, tmp_path / "few", 2, {}, ranks_per_node=2)
    run_ranks(_saved, 4, tmp_path / "plain", 2, {"hop_two": None}, ranks_per_node=2)
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        for name in ("few", "plain")
    ]
    values = 2 * 2 * WIDTH * 97
    assert 4 * values <= sizes[0] - sizes[1] <= 4 * values + 4096  # and headers


OTHERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"hop_two": None}, {}, "has nothing that hop 2 held back of 4 of 4 parameter(s)"),
    ({}, {"hop_two": None}, "had not sent yet of 4 parameter(s)"),
    ({}, {"error_feedback": False}, "it is left out"),
    ({}, {}, ""),
]


@pytest.mark.parametrize(("then", "now", "words"), OTHERS)
def test_another_way_of_hop_two_loads_and_says_so(
    tmp_path: Path,
    then: dict[str, Any],
    now: dict[str, Any],
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_ranks(_saved, 2, tmp_path / "one", 1, then)
    capfd.readouterr()
    for mean, finite in run_ranks(_loaded, 2, tmp_path / "one", 1, now):
        assert all(finite)
        if "hop_two" in then:
            assert mean and not any(error.any() for error in mean.values())
    said = " ".join(capfd.readouterr().err.split())
    assert words in said
    assert words or "hop 2" not in said


# -- memory ----------------------------------------------------------------------------------------


def _attempt(partition: int, until: int) -> tuple[int, list[torch.Tensor]]:
    """Train until a step and end as a process does that is killed: nothing is closed."""
    training = Training(partition)
    snapshots = mics.Snapshots(training.model, training.optimizer)
    first = step = snapshots.restore()
    kept = training.state()
    while step < until:
        training.step(step)
        step = snapshots.keep(step + 1)
    if until == STEPS:
        state = training.state()
        snapshots.close()
        return first, state
    if first == until:
        return first, kept
    assert snapshots._writing is not None
    snapshots._writing.end()
    return first, training.state()


@functools.cache
def _undisturbed() -> list[Any]:
    return run_ranks(_attempt, 4, 2, STEPS)


def test_a_restart_from_memory_has_every_bit_of_the_errors() -> None:
    undisturbed = _undisturbed()
    run_ranks(_attempt, 4, 2, 3)
    for (first, ours), (_, wanted) in zip(
        run_ranks(_attempt, 4, 2, STEPS), undisturbed, strict=True
    ):
        assert first == 3
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    # What each rank holds back is its own.
    assert not torch.equal(undisturbed[0][1][-1], undisturbed[2][1][-1])


def test_errors_of_a_rank_whose_memory_is_lost_are_zeros_and_it_is_said(
    memory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = run_ranks(_attempt, 4, 2, 3)
    for path in memory.glob("*/*.2.*"):
        path.unlink()
    capfd.readouterr()
    after = run_ranks(_attempt, 4, 2, 3)
    said = " ".join(capfd.readouterr().err.split())
    assert "what hop 2 had held back on rank(s) 2 is lost with their memory" in said
    num_params = len(before[0][1]) - 4
    for rank, ((_, then), (first, now)) in enumerate(zip(before, after, strict=True)):
        assert first == 3
        assert all(
            torch.equal(a, b) for a, b in zip(then[:num_params], now[:num_params], strict=True)
        )
        for error, kept in zip(now[num_params:], then[num_params:], strict=True):
            assert kept.any()
            assert torch.equal(error, kept if rank != 2 else torch.zeros_like(kept))


def test_errors_are_no_difference_between_replicas(capfd: pytest.CaptureFixture[str]) -> None:
    _attempts = run_ranks(_attempt, 4, 2, STEPS)
    assert [first for first, _ in _attempts] == [0] * 4
    assert "SILENT CORRUPTION" not in capfd.readouterr().err


def _collected_once() -> int:
    training = Training(2)
    snapshots = mics.Snapshots(training.model, training.optimizer)
    snapshots.restore()
    known = []
    for step in range(4):
        training.step(step)
        snapshots.keep(step + 1)
        known.append(snapshots._state._collected)
    assert feedback_of(training.model)
    snapshots.close()
    return sum(a is b for a, b in itertools.pairwise(known))


def test_names_are_collected_once_with_errors_too() -> None:
    assert run_ranks(_collected_once, 4) == [3] * 4
