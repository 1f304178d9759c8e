"""Snapshots and the deal of micro-batches with other numbers of ranks: 8, 6 of them, 8 again."""

from __future__ import annotations

import functools
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import errors_of_ranks, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import mics
from mics import compat
from mics.ranks.heartbeat import (
    PAUSE,
    VARIABLE,
    ask_for_pause,
    begin_as_another_rank,
    make_file,
    read_beat,
)
from mics.recovery import job as jobs

WIDTH, SAMPLES, MICRO_BATCHES = 16, 2, 16
HOME = (0, 0, 1, 1, 2, 2, 3, 3)  # the nodes of eight ranks
WITHOUT_1 = (0, 0, 2, 2, 3, 3)


@pytest.fixture(autouse=True)
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders that stand for the memory of four nodes."""
    monkeypatch.setenv("MICS_JOB", "test")
    monkeypatch.setattr(jobs, "_SECONDS", 1.0)
    for number in range(4):
        (tmp_path / str(number)).mkdir()
    yield tmp_path


def lose(root: Path, number: int) -> None:
    shutil.rmtree(root / str(number))
    (root / str(number)).mkdir()


@dataclass
class Told:
    """What one rank has to tell of an attempt."""

    first: int
    losses: dict[int, float] = field(default_factory=dict)
    indices: dict[int, list[int]] = field(default_factory=dict)  # those that count, by step
    drawn: float = 0.0  # from the generator of this rank, behind the last step
    extras: dict[str, Any] = field(default_factory=dict)
    weights: list[torch.Tensor] = field(default_factory=list)


class Block(nn.Module):
    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def build(kind: str, partition: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(Block(), Block())
    if kind == "fsdp2":
        mesh = mics.init_mesh(partition=partition)
        for block in model:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return mics.shard(model, partition=partition, mp_policy=MixedPrecisionPolicy())


def batch(step: int, index: int) -> torch.Tensor:
    """A micro-batch: the same for everybody who asks for it."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(SAMPLES, WIDTH, generator=generator)


Spoil = Callable[[nn.Module, int], None]


def attempt(
    root: Path,
    places: Sequence[int],
    until: int,
    kind: str = "mics",
    spoil: Spoil | None = None,
    options: dict[str, Any] | None = None,
) -> Told:
    """Train until a step and end as a process does that is killed: nothing is closed."""
    rank = dist.get_rank()
    os.environ["MICS_MEMORY"] = str(root / str(places[rank]))
    given = dict(options or {})
    model = build(kind, given.pop("partition", 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
    counter = {"steps": 0}
    extras: dict[str, Any] = {"scheduler": scheduler, "counter": counter}
    if own := given.pop("own", False):
        extras["place"] = place = {"seen": 1000 * rank}
    torch.manual_seed(100 + rank)
    ema = mics.EMA(model) if kind == "mics" else None
    snapshots = mics.Snapshots(model, optimizer, ema=ema, extras=extras, **given)
    told = Told(snapshots.restore())
    step = told.first
    while step < until:
        loss, told.indices[step] = one_step(model, step, by_tokens=kind == "tokens")
        told.losses[step] = loss
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if ema is not None:
            ema.update()
        counter["steps"] += 1
        if own:
            place["seen"] += 1
        torch.rand(1)
        if spoil is not None:
            spoil(model, step)
        step = snapshots.keep(step + 1)
    if snapshots._writing is not None:
        snapshots._writing.end()
    told.drawn = torch.rand(1).item()
    told.extras = {"lr": scheduler.get_last_lr()[0], **counter, **(place if own else {})}
    averages = [] if ema is None else ema.averages.values()
    told.weights = [compat.local_of(p.detach()).clone() for p in (*model.parameters(), *averages)]
    return told


def one_step(model: nn.Module, step: int, *, by_tokens: bool = False) -> tuple[float, list[int]]:
    total, indices = torch.zeros(1), []
    for micro in mics.deal(model, MICRO_BATCHES):
        x = batch(step, micro.index)
        parts = model(x).square()
        if by_tokens:
            total += micro.backward(parts.sum(), tokens=parts.numel()) / parts.numel()
        else:
            total += micro.backward(parts.mean())
        indices += [micro.index] if micro.counts else []
    dist.all_reduce(total)
    return total.item() / MICRO_BATCHES, indices


def check_steps(parts: Sequence[list[Told]], wanted: Sequence[Told]) -> None:
    """Every step once, every sample of it once, and the loss of a run without interruption."""
    steps = [step for told in parts for step in told[0].losses]
    assert steps == list(range(len(wanted[0].losses)))
    for told in parts:
        for step, loss in told[0].losses.items():
            assert all(one.losses[step] == loss for one in told)
            assert abs(loss - wanted[0].losses[step]) < 1e-6
            assert sorted(i for one in told for i in one.indices[step]) == list(range(16))


@functools.cache
def undisturbed(root: Path, kind: str, steps: int) -> list[Told]:
    found: list[Told] = run_ranks(attempt, 8, root, HOME, steps, kind, ranks_per_node=2)
    for number in range(4):
        lose(root, number)
    return found


OTHERS = ("fsdp2", "ddp", "tokens")
KINDS = ["mics", *(pytest.param(kind, marks=pytest.mark.extra) for kind in OTHERS)]


@pytest.mark.parametrize("kind", KINDS)
def test_eight_ranks_become_six_and_eight_again(
    kind: str, nodes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = undisturbed(nodes, kind, 9)
    parts = [run_ranks(attempt, 8, nodes, HOME, 3, kind, ranks_per_node=2)]
    lose(nodes, 1)
    capfd.readouterr()
    parts.append(run_ranks(attempt, 6, nodes, WITHOUT_1, 6, kind, ranks_per_node=2))
    said = capfd.readouterr().err
    assert "6 ranks go on with what 8 have kept" in said, said
    assert "rank(s) 6-7 are away; what they have of their own is kept" in said
    assert "RANKS TRAIN" not in said
    parts.append(run_ranks(attempt, 8, nodes, HOME, 9, kind, ranks_per_node=2))
    said = capfd.readouterr().err
    assert "8 ranks go on with what 6 have kept" in said, said
    assert "rank(s) 6-7, back again, have their random state of step 3" in said
    check_steps(parts, wanted)
    for rank, (told, other) in enumerate(zip(parts[-1], wanted, strict=True)):
        assert told.extras == other.extras == {"lr": 1e-2 * 0.8**4, "steps": 9}
        for one, another in zip(told.weights, other.weights, strict=True):
            torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-6)
        if rank < 6:
            assert told.drawn == other.drawn
        else:  # three steps were done without them
            torch.manual_seed(100 + rank)
            assert told.drawn == torch.rand(7)[6].item()


def test_fewer_ranks_without_a_whole_copy_leave_what_the_others_have(nodes: Path) -> None:
    two = {"partition": 2}
    run_ranks(attempt, 4, nodes, range(4), 3, "mics", None, two, ranks_per_node=1)
    errors = errors_of_ranks(attempt, 2, nodes, (0, 2), 6, "mics", None, two, ranks_per_node=1)
    for error in errors:
        assert "nobody holds the shard of rank(s) 1. There were 4" in error, error
    got = run_ranks(attempt, 4, nodes, range(4), 4, "mics", None, two, ranks_per_node=1)
    assert [told.first for told in got] == [3] * 4


# -- what ranks have of their own ------------------------------------------------------------------

ALONE = {"partition": 1, "own": True}  # replicas of one rank each, with extras that differ


def test_extras_that_differ_are_said_aloud_and_the_others_are_those_of_now(
    nodes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(attempt, 4, nodes, range(4), 2, "mics", None, ALONE, ranks_per_node=1)
    lose(nodes, 0)
    capfd.readouterr()
    run_ranks(attempt, 3, nodes, (1, 2, 3), 5, "mics", None, ALONE, ranks_per_node=1)
    said = capfd.readouterr().err
    assert "EXTRAS DIFFER FROM RANK TO RANK (place)" in said, said
    assert "Those of rank(s) 3 stand still" in said
    lose(nodes, 2)  # one of those that hold what rank 3 has of its own
    got = run_ranks(attempt, 4, nodes, range(4), 6, "mics", None, ALONE, ranks_per_node=1)
    said = capfd.readouterr().err
    assert "Those of rank(s) 3 are of step 2." in said, said
    assert [told.first for told in got] == [5] * 4
    assert [told.extras["seen"] for told in got] == [6, 1006, 2006, 3003]
    assert {told.extras["steps"] for told in got} == {6}
    assert {round(told.extras["lr"], 9) for told in got} == {0.00512}


def test_ranks_that_never_were_there_begin_as_the_program_made_them(
    nodes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(attempt, 2, nodes, range(2), 3, "mics", None, ALONE, ranks_per_node=1)
    capfd.readouterr()
    got = run_ranks(attempt, 4, nodes, range(4), 4, "mics", None, ALONE, ranks_per_node=1)
    said = capfd.readouterr().err
    assert "rank(s) 2-3 are new, and their random state is as the program has set it" in said, said
    assert "Those of rank(s) 2-3 are as the program has made them." in said
    assert [told.extras["seen"] for told in got] == [4, 1004, 2001, 3001]
    assert {(told.extras["steps"], told.first) for told in got} == {(4, 3)}
    assert all(torch.equal(told.weights[0], got[0].weights[0]) for told in got)


def _by_rank(root: Path, places: Sequence[int], until: int) -> None:
    """A loop whose data are by rank."""
    os.environ["MICS_MEMORY"] = str(root / str(places[dist.get_rank()]))
    model = build("mics", 1)
    snapshots = mics.Snapshots(model, torch.optim.SGD(model.parameters()))
    step = snapshots.restore()
    while step < until:
        for x in mics.micro_steps(model, [batch(step, dist.get_rank())]):
            model(x).square().mean().backward()
        model.zero_grad()
        step = snapshots.keep(step + 1)
    if snapshots._writing is not None:
        snapshots._writing.end()


def test_a_loop_that_deals_nothing_is_told_that_a_step_has_other_samples(
    nodes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(_by_rank, 3, nodes, range(3), 2)
    assert "RANKS TRAIN" not in capfd.readouterr().err
    run_ranks(_by_rank, 2, nodes, range(2), 4)
    said = capfd.readouterr().err
    assert said.count("2 OF 3 RANKS TRAIN, and the loop does not deal its micro-batches") == 1, said


def _saves(root: Path, memory: str, until: int) -> tuple[int, int, int]:
    """From a checkpoint alone; one extra is of each rank's own, one is the same on all."""
    os.environ["MICS_MEMORY"] = str(root / memory)
    rank = dist.get_rank()
    model = build("mics", 1)
    place, counter = {"seen": 1000 * rank}, {"steps": 0}
    extras = {"place": place, "counter": counter}
    snapshots = mics.Snapshots(model, torch.optim.SGD(model.parameters()), extras=extras)
    step = first = snapshots.restore(root / "saved")
    while step < until:
        place["seen"] += 1
        counter["steps"] += 1
        step = snapshots.keep(step + 1)
    snapshots.save(root / "saved", step)
    snapshots.close()
    return first, place["seen"], counter["steps"]


def test_a_checkpoint_with_extras_that_differ_goes_to_other_ranks(
    nodes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(_saves, 4, nodes, "0", 2)
    assert "EXTRAS DIFFER" not in capfd.readouterr().err
    assert run_ranks(_saves, 3, nodes, "1", 3) == [(2, 1000 * r + 3, 3) for r in range(3)]
    said = capfd.readouterr().err
    assert said.count("EXTRAS DIFFER FROM RANK TO RANK (place)") == 1, said
    assert "Those of rank(s) 3 stand still" in said
    wanted = [(3, 1000 * rank + (4 if rank < 3 else 1), 4) for rank in range(4)]
    assert run_ranks(_saves, 4, nodes, "2", 4) == wanted
    said = capfd.readouterr().err
    assert "Those of rank(s) 3 are as the program has made them." in said, said


# -- what is in doubt ------------------------------------------------------------------------------


def _flip(model: nn.Module, step: int) -> None:
    if dist.get_rank() == 1 and step == 3 and not hasattr(model, "flipped"):
        model.flipped = True
        compat.local_of(next(model.parameters()).detach()).view(torch.int32).view(-1)[0] ^= 1


def test_three_replicas_that_are_left_tell_who_is_wrong(
    nodes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"partition": 1}
    run_ranks(attempt, 4, nodes, range(4), 2, "mics", None, options, ranks_per_node=1)
    lose(nodes, 0)
    wanted = run_ranks(attempt, 3, nodes, (1, 2, 3), 2, "mics", None, options, ranks_per_node=1)
    capfd.readouterr()
    got = run_ranks(attempt, 3, nodes, (1, 2, 3), 6, "mics", _flip, options, ranks_per_node=1)
    said = capfd.readouterr().err
    assert "SILENT CORRUPTION in step 4: rank 1 has other bits than its replicas" in said, said
    assert all(torch.equal(told.weights[0], got[0].weights[0]) for told in got)
    assert wanted[0].first == 2


def test_another_partition_size_is_refused_in_words(
    nodes: Path,
) -> None:
    run_ranks(attempt, 4, nodes, (0, 0, 1, 1), 2, "mics", None, {"partition": 2}, ranks_per_node=2)
    options = {"partition": 1}
    for said in errors_of_ranks(
        attempt, 2, nodes, (0, 0), 0, "mics", None, options, ranks_per_node=2
    ):
        assert "2 ranks cannot go on from memory, which has steps 1, 2" in said, said
        assert "sharded in another way, as with another partition size. There were 4" in said


# -- what an agent reads ---------------------------------------------------------------------------


def _beats(root: Path, kind: str) -> tuple[int, bool, bool]:
    path = root / f"heartbeat.{dist.get_rank()}"
    make_file(path)
    os.environ |= {VARIABLE: str(path), "MICS_MEMORY": str(root)}
    begin_as_another_rank()
    model = build(kind, 2)
    snapshots = mics.Snapshots(model, torch.optim.SGD(model.parameters()))
    snapshots.restore()
    before = read_beat(path.read_bytes())
    snapshots.close()
    after = read_beat(path.read_bytes())
    mics.Snapshots(model, torch.optim.SGD(model.parameters()), job="another").restore()
    assert not read_beat(path.read_bytes()).takes_long
    return before.partition, before.takes_long, after.takes_long


@pytest.mark.parametrize(("kind", "partition"), [("mics", 2), ("fsdp2", 2), ("ddp", 1)])
def test_ranks_tell_how_many_hold_a_copy_and_when_all_is_done(
    kind: str, partition: int, nodes: Path
) -> None:
    assert run_ranks(_beats, 4, nodes, kind) == [(partition, False, True)] * 4


def _pauses(root: Path, kind: str, every: int) -> tuple[int, int]:
    """Train until this rank has been let go on from a pause: the step it was in, and the last."""
    path = root / "heartbeat"
    make_file(path)
    os.environ |= {VARIABLE: str(path), "MICS_MEMORY": str(root)}
    begin_as_another_rank()
    model = build(kind, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snapshots = mics.Snapshots(model, optimizer, every=every)
    seen: list[int] = []
    step = snapshots.restore()
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as file:

        def agent() -> None:
            while (beat := read_beat(file)).during != PAUSE:
                pass
            seen.append(beat.step)
            ask_for_pause(file, wanted=False)

        watching = threading.Thread(target=agent, daemon=True)
        watching.start()
        while step < 8 and not seen:
            one_step(model, step, by_tokens=False)
            if step == 1:
                ask_for_pause(file, wanted=True)
            optimizer.step()
            optimizer.zero_grad()
            step = snapshots.keep(step + 1)
        watching.join(0.1)
        return (seen or [-1])[0], step


@pytest.mark.extra
@pytest.mark.parametrize("kind", ["mics", "fsdp2", "ddp"])
def test_every_loop_pauses_behind_a_step_that_was_kept(kind: str, nodes: Path) -> None:
    [(paused, _)] = run_ranks(_pauses, 1, nodes, kind, 1)
    assert paused == 2


@pytest.mark.extra
@pytest.mark.parametrize("kind", ["mics", "ddp"])
def test_no_step_that_is_not_kept_is_left_behind(kind: str, nodes: Path) -> None:
    [(paused, _)] = run_ranks(_pauses, 1, nodes, kind, 3)
    assert paused == 3
