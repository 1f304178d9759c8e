"""Loops that do other things than the plain one: teachers, checkpoints, calls out of turn."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import errors_of_ranks, run_ranks
from test_training import settings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import mics
from mics import compat
from mics.checkpoint.writing import let_save_end
from mics.recovery import job as jobs
from mics.recovery.own import Own, own_of
from mics.training import loop
from mics.training.config import TrainConfig

WIDTH, STEPS, CUT = 8, 6, 4


pytestmark = pytest.mark.usefixtures("memory")


class Pair(nn.Module):
    """A student, and a teacher without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.teacher.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x) + self.teacher(x)


class Loop:
    def __init__(self) -> None:
        torch.manual_seed(0)
        policy = MixedPrecisionPolicy()
        self.model = mics.shard(Pair(), partition=2, blocks=[nn.Linear], mp_policy=policy)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        torch.manual_seed(100 + dist.get_rank())

    def snapshots(self, **options: Any) -> mics.Snapshots:
        return mics.Snapshots(self.model, self.optimizer, **options)

    def step(self) -> None:
        for x in mics.micro_steps(self.model, [torch.rand(2, WIDTH)]):
            self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> list[torch.Tensor]:
        return [compat.local_of(p.detach()).clone() for p in self.model.parameters()]


def _same(got: list[Any], wanted: list[Any], first: int) -> None:
    for (begun, tensors), (_, others) in zip(got, wanted, strict=True):
        assert begun == first
        assert all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


# -- what does not train ---------------------------------------------------------------------------


def _thaw(model: Any, step: int) -> None:
    model.teacher.requires_grad_(step >= 2)


def _follow(model: Any, step: int) -> None:
    with torch.no_grad():
        for one, other in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            one.lerp_(other.detach(), 0.1)


def _follow_at_once(model: Any, step: int) -> None:
    with torch.no_grad():
        students = [param.detach() for param in model.student.parameters()]
        torch._foreach_lerp_(list(model.teacher.parameters()), students, 0.1)


def _with(change: Callable[[Any, int], None], until: int) -> tuple[int, list[torch.Tensor]]:
    loop = Loop()
    snapshots = loop.snapshots()
    first = step = snapshots.restore()
    while step < until:
        change(loop.model, step)
        loop.step()
        step = snapshots.keep(step + 1)
    if until == STEPS:
        snapshots.close()
    else:
        assert snapshots._writing is not None
        snapshots._writing.end()
    return first, loop.state()


@pytest.mark.parametrize("change", [_thaw, _follow, _follow_at_once])
def test_what_does_not_train_is_kept_once_it_changes(change: Callable[[Any, int], None]) -> None:
    wanted = run_ranks(_with, 4, change, STEPS)
    run_ranks(_with, 4, change, CUT)
    _same(run_ranks(_with, 4, change, STEPS), wanted, CUT)


# -- checkpoints beside it -------------------------------------------------------------------------


def _saving(
    folder: Path, until: int, flip_at: int = -1, every: int = 1
) -> tuple[int, list[torch.Tensor]]:
    loop = Loop()
    snapshots = loop.snapshots(every=every)
    first = step = snapshots.restore(folder)
    flipped = False
    while step < until:
        loop.step()
        if step == flip_at and not flipped:
            flipped = True
            if dist.get_rank() == 0:
                weight = compat.local_of(next(loop.model.parameters()).detach())
                weight.view(torch.int32).view(-1)[0] ^= 1
        step = snapshots.keep(step + 1)
        if step == CUT:
            snapshots.save(folder, step, asynchronous=True)
    if snapshots._writing is not None:
        snapshots._writing.end()
    let_save_end()  # this process ends by force
    return first, loop.state()


def test_what_was_saved_of_a_step_in_which_replicas_differ_is_set_aside(
    memory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = run_ranks(_saving, 4, tmp_path / "wanted", STEPS)
    os.environ["MICS_JOB"] = "another"
    got = run_ranks(_saving, 4, tmp_path / "got", STEPS, CUT - 1)
    _same(got, wanted, 0)
    assert "It was rank 0" in capfd.readouterr().err
    names = sorted(path.name for path in (tmp_path / "got").iterdir())
    assert names == ["step-00000004", "step-00000004.damaged"]


def test_a_checkpoint_that_is_newer_than_memory_is_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every third step is kept, the fourth is saved."""
    run_ranks(_saving, 4, tmp_path / "got", CUT + 1, -1, 3)
    assert run_ranks(_saving, 4, tmp_path / "got", STEPS, -1, 3)[0][0] == CUT
    said = capfd.readouterr().err
    assert "step-00000004 is newer" in said, said


# -- out of turn -----------------------------------------------------------------------------------


def _out_of_turn(how: str) -> list[int]:
    loop = Loop()
    snapshots = loop.snapshots()
    step = snapshots.restore()
    for _ in range(3):
        loop.step()
        step = snapshots.keep(step + 1)
    if how == "inside a step":
        with mics.micro_step(loop.model, last=False):
            loop.model(torch.rand(2, WIDTH)).mean().backward()
        snapshots.keep(4)
    if how == "after close":
        snapshots.close()
        snapshots.close()
        snapshots.keep(4)
    if how == "no number":
        snapshots.keep("4")  # type: ignore[arg-type]
    loop.step()
    snapshots.keep(torch.tensor(4))  # type: ignore[arg-type]
    back = snapshots.restore()
    loop.step()
    snapshots.keep(back + 1)
    snapshots.close()
    return [back, snapshots.finished]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("inside a step", "called between micro-steps"),
        ("after close", "have been closed"),
        ("no number", "It is a str"),
    ],
)
def test_keep_is_refused_where_it_would_be_wrong(how: str, words: str) -> None:
    for error in errors_of_ranks(_out_of_turn, 2, how):
        assert words in error


def test_restore_may_be_called_again() -> None:
    assert run_ranks(_out_of_turn, 2, "well") == [[4, 4], [4, 4]]


def _few_rows(until: int) -> tuple[int, list[torch.Tensor]]:
    """Two rows on four ranks: two ranks hold nothing, the same nothing."""
    torch.manual_seed(0)
    model = mics.shard(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), partition=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(100 + dist.get_rank())
    snapshots = mics.Snapshots(model, optimizer)
    first = step = snapshots.restore()
    while step < until:
        for x in mics.micro_steps(model, [torch.rand(2, 2)]):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step = snapshots.keep(step + 1)
    if snapshots._writing is not None:
        snapshots._writing.end()
    return first, [compat.local_of(p.detach()).clone() for p in model.parameters()]


def test_ranks_without_a_row_are_kept_beside_those_with_some(memory: Path) -> None:
    wanted = run_ranks(_few_rows, 4, STEPS)
    for path in memory.glob("*/*"):
        path.unlink()
    run_ranks(_few_rows, 4, CUT)
    _same(run_ranks(_few_rows, 4, STEPS), wanted, CUT)


# -- jobs and bytes --------------------------------------------------------------------------------


def test_jobs_of_other_names_have_other_folders(memory: Path) -> None:
    names = ["a/b", "a_b", "x" * 100 + "1", "x" * 100 + "2"]
    assert len({jobs.open_job(name).folder for name in names}) == len(names)


def test_tensors_of_a_ranks_own_come_back_bit_for_bit() -> None:
    kinds = [torch.complex64, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.int64]
    tensors = {str(kind): torch.ones(3, 2).to(kind).t() for kind in kinds}
    tensors["number"], tensors["none"] = torch.tensor(-0.0), torch.empty(0, 3)
    found = own_of(json.loads(Own(tensors, {}, {}, {}).to_bytes())).tensors
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        assert repr(found[name]) == repr(tensor.contiguous())


# -- tensor parallelism ----------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def _spread(until: int) -> tuple[int, list[torch.Tensor]]:
    """FSDP2's HSDP over tensor parallelism, whose norms have buffers that are DTensors."""
    torch.manual_seed(0)
    shape = (dist.get_world_size() // 4, 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
    model = nn.Sequential(Normed(), Normed())
    for block in model:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)
        distribute_module(block.norm, mesh["tp"])
        fully_shard(block, mesh=mesh["replicate", "shard"])
    fully_shard(model, mesh=mesh["replicate", "shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(100 + dist.get_rank() // 2)
    snapshots = mics.Snapshots(model, optimizer)
    first = step = snapshots.restore()
    while step < until:
        model(torch.rand(2, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            compat.local_of(model[0].norm.running_mean).add_(1 + dist.get_rank())
        step = snapshots.keep(step + 1)
    if snapshots._writing is not None:
        snapshots._writing.end()
    return first, [compat.local_of(t).clone() for t in model.state_dict().values()]


def test_three_axes_and_buffers_that_are_spread(memory: Path) -> None:
    wanted = run_ranks(_spread, 8, STEPS)
    for path in memory.glob("*/*"):
        path.unlink()
    run_ranks(_spread, 8, CUT)
    for path in memory.glob("*/*.[0235].*"):
        path.unlink()
    _same(run_ranks(_spread, 8, STEPS), wanted, CUT)


@pytest.mark.extra
def test_one_replica_of_three_axes_goes_on_for_two_and_is_joined_by_another(memory: Path) -> None:
    kept = run_ranks(_spread, 8, CUT)
    one = run_ranks(_spread, 4, CUT)
    _same(one, kept[:4], CUT)
    two = run_ranks(_spread, 8, CUT)
    _same(two, kept, CUT)  # no step was done without the others, so they have all that was theirs


# -- mics train ------------------------------------------------------------------------------------


def _dies_after(config: TrainConfig, steps: int) -> int:
    plain = loop.take_step

    def dying(*args: Any, **keywords: Any) -> Any:
        if keywords["step"] > steps:
            raise KeyboardInterrupt
        return plain(*args, **keywords)

    loop.take_step = dying
    try:
        return loop.train(config)
    finally:
        loop.take_step = plain


@pytest.mark.parametrize(("resume", "begins"), [("auto", 3), ("never", 0)])
def test_mics_train_goes_on_from_memory_unless_it_is_told_where_to_begin(
    resume: str, begins: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{at} and {at * at}." for at in range(900)))
    config = settings(tmp_path, text, run={"steps": 5})
    errors_of_ranks(_dies_after, 2, config, 3)
    capfd.readouterr()
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=resume))
    assert run_ranks(loop.train, 2, again) == [0, 0]
    said = capfd.readouterr().err
    assert ("goes on from memory, step 3" in said) == (begins == 3), said
