"""mics.Snapshots in loops of one's own: every ``run_ranks`` is an attempt, of new processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
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
from mics.recovery import job as jobs
from mics.recovery.slot import Slot

STEPS = 8
WIDTH = 32


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A memory and a job of the test's own."""
    monkeypatch.setenv("MICS_MEMORY", str(tmp_path))
    monkeypatch.setenv("MICS_JOB", "test")
    monkeypatch.setattr(jobs, "_SECONDS", 1.0)
    yield tmp_path / f"mics-{os.geteuid()}-test"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)  # its buffers differ from rank to rank
        self.up = nn.Linear(WIDTH, 64)
        self.down = nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.dropout(self.up(self.norm(x)).relu(), 0.1, self.training)
        return x + self.down(y)


class Training:
    """A model of either kind, its optimizer, schedule, average and counter, and one step of it."""

    def __init__(self, kind: str, partition: int) -> None:
        self.kind = kind
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(Block(), Block())
        if kind == "fsdp2":
            mesh = mics.init_mesh(partition=partition)
            for block in self.model:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        else:
            if kind == "frozen":
                self.model[0].up.requires_grad_(False)
            policy = MixedPrecisionPolicy()
            self.model = mics.shard(self.model, partition=partition, mp_policy=policy)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        if kind == "sgd":
            self.optimizer = torch.optim.SGD(trained, lr=1e-2, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.ema = mics.EMA(self.model) if kind == "ema" else None
        self.seen: dict[str, Any] = {"samples": 0}
        torch.manual_seed(100 + dist.get_rank())

    def snapshots(self, **options: Any) -> mics.Snapshots:
        extras = {"scheduler": self.scheduler, "seen": self.seen}
        return mics.Snapshots(self.model, self.optimizer, ema=self.ema, extras=extras, **options)

    def step(self, number: int) -> float:
        data = torch.Generator().manual_seed(100 * number + dist.get_rank())
        batch = [torch.randn(8, WIDTH, generator=data) for _ in range(2)]
        total = 0.0
        for at, x in enumerate(
            batch if self.kind == "fsdp2" else mics.micro_steps(self.model, batch)
        ):
            if self.kind == "fsdp2":
                self.model.set_requires_all_reduce(at == 1)
            loss = self.model(x).square().mean()
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update()
        self.seen["samples"] += 16
        return total

    def state(self) -> list[torch.Tensor]:
        """All tensors of this rank, and what stands beside them."""
        tensors = [compat.local_of(t).clone() for t in self.model.state_dict().values()]
        for state in self.optimizer.state.values():
            tensors += [compat.local_of(v).clone() for v in state.values()]
        if self.ema is not None:
            tensors += [compat.local_of(t).clone() for t in self.ema.averages.values()]
        numbers = [self.optimizer.param_groups[0]["lr"], self.seen["samples"], torch.rand(())]
        return [*tensors, torch.tensor(numbers)]


def _attempt(
    kind: str,
    partition: int,
    until: int,
    spoil: Callable[[Training, int], None] | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[int, list[float], list[torch.Tensor]]:
    """Train until a step and end as a process does that is killed: nothing is closed."""
    training = Training(kind, partition)
    snapshots = training.snapshots(**options or {})
    first = step = snapshots.restore()
    losses = {}
    while step < until:
        losses[step] = training.step(step)
        if spoil is not None:
            spoil(training, step)
        step = snapshots.keep(step + 1)
    if until == STEPS:
        state = training.state()
        snapshots.close()
        return first, [losses[s] for s in sorted(losses)], state
    assert snapshots._writing is not None
    snapshots._writing.end()
    return first, [losses[s] for s in sorted(losses)], []


@functools.cache
def _undisturbed(kind: str, partition: int) -> list[Any]:
    """What ranks come to that nothing happens to."""
    return run_ranks(_attempt, 4, kind, partition, STEPS)


def _same(got: list[Any], wanted: list[Any], cut: int) -> None:
    for (first, losses, state), (_, all_losses, all_state) in zip(got, wanted, strict=True):
        assert first == cut
        assert losses == all_losses[cut:]
        assert len(state) == len(all_state)
        for one, other in zip(state, all_state, strict=True):
            assert torch.equal(one, other)


_OTHERS = ("fsdp2", "ema", "frozen", "sgd")
KINDS = ["mics", *(pytest.param(kind, marks=pytest.mark.extra) for kind in _OTHERS)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_goes_on_bit_for_bit(kind: str, memory: Path) -> None:
    wanted = _undisturbed(kind, 2)
    run_ranks(_attempt, 4, kind, 2, 5)
    assert memory.exists()
    _same(run_ranks(_attempt, 4, kind, 2, STEPS), wanted, 5)
    assert not memory.exists()  # what ended well leaves nothing


@pytest.mark.extra
@pytest.mark.parametrize("lost", [[3], [0, 1], [1, 2]])
def test_ranks_that_lost_their_memory_take_it_from_replicas(lost: list[int], memory: Path) -> None:
    wanted = _undisturbed("mics", 2)
    run_ranks(_attempt, 4, "mics", 2, 5)
    for path in memory.iterdir():
        if path.name.split(".")[1] in map(str, lost):
            path.unlink()
    _same(run_ranks(_attempt, 4, "mics", 2, STEPS), wanted, 5)


def test_all_but_one_of_four_replicas_may_be_lost(memory: Path) -> None:
    wanted = _undisturbed("mics", 1)
    run_ranks(_attempt, 4, "mics", 1, 5)
    for path in memory.iterdir():
        if path.name.split(".")[1] != "2":
            path.unlink()
    _same(run_ranks(_attempt, 4, "mics", 1, STEPS), wanted, 5)


@pytest.mark.extra
def test_a_slot_with_a_bit_that_flipped_is_no_source(memory: Path) -> None:
    wanted = _undisturbed("mics", 2)
    run_ranks(_attempt, 4, "mics", 2, 5)
    spoilt = 0
    for path in memory.glob("*.3.*"):
        if path.suffix != ".own" and (head := Slot(path).head()) is not None and head.step == 5:
            data = bytearray(path.read_bytes())
            data[5000] ^= 4
            path.write_bytes(data)
            spoilt += 1
    assert spoilt == 1
    _same(run_ranks(_attempt, 4, "mics", 2, STEPS), wanted, 5)


# -- checkpoints -----------------------------------------------------------------------------------


def _with_checkpoints(folder: Path, until: int) -> tuple[int, list[float], list[torch.Tensor]]:
    training = Training("ema", 2)
    snapshots = training.snapshots()
    first = step = snapshots.restore(folder)
    losses = []
    while step < until:
        losses.append(training.step(step))
        step = snapshots.keep(step + 1)
        if step == 3:
            snapshots.save(folder, step)
    return first, losses, training.state()


def test_without_any_holder_of_a_shard_the_newest_checkpoint_is_taken(
    memory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = run_ranks(_with_checkpoints, 4, tmp_path / "one", STEPS)
    for path in memory.iterdir():
        path.unlink()
    run_ranks(_with_checkpoints, 4, tmp_path / "two", 5)
    for path in memory.iterdir():
        if path.name.split(".")[1] in "13":
            path.unlink()
    capfd.readouterr()
    got = run_ranks(_with_checkpoints, 4, tmp_path / "two", STEPS)
    said = capfd.readouterr().err
    assert "nobody holds the shard of rank(s) 1, 3" in said, said
    assert "step-00000003, step 3" in said
    for one in got:  # BatchNorm's buffers in a checkpoint are rank 0's, as everywhere
        assert one[0] == 3
    assert got[0][1] == wanted[0][1][3:]


# -- silent corruption -----------------------------------------------------------------------------


def _flip(rank: int, at: int, what: str) -> Callable[[Training, int], None]:
    done: list[int] = []

    def flip(training: Training, step: int) -> None:
        if dist.get_rank() != rank or step != at or done:
            return
        done.append(step)
        weight = next(iter(training.optimizer.state))
        found = weight if what == "weight" else training.optimizer.state[weight]["exp_avg"]
        bits = compat.local_of(found.detach()).view(torch.int32)
        bits.view(-1)[3] ^= 1

    return flip


@pytest.mark.parametrize(
    ("what", "partition"),
    [
        ("weight", 2),
        pytest.param("moment", 2, marks=pytest.mark.extra),
        pytest.param("weight", 1, marks=pytest.mark.extra),
        pytest.param("moment", 1, marks=pytest.mark.extra),
    ],
)
def test_a_flipped_bit_is_seen_named_and_undone(
    what: str, partition: int, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = _undisturbed("mics", partition)
    capfd.readouterr()
    got = run_ranks(_attempt, 4, "mics", partition, STEPS, _flip(3, 4, what))
    said = capfd.readouterr().err
    assert "SILENT CORRUPTION in step 5" in said, said
    if partition == 1:  # four replicas
        assert "rank 3 has other bits than its replicas" in said
    else:
        assert "It was rank 3" in said
    _same(got, wanted, 0)


@pytest.mark.extra
def test_a_bit_that_flips_before_the_end_is_not_let_pass() -> None:
    errors = errors_of_ranks(_attempt, 4, "mics", 2, STEPS, _flip(3, STEPS - 1, "weight"))
    assert all("replicas differ in the last step" in error for error in errors)
    first, _, _ = run_ranks(_attempt, 4, "mics", 2, STEPS)[0]
    assert first == STEPS - 1


def _own_values() -> None:
    training = Training("mics", 2)
    with torch.no_grad():
        compat.local_of(next(training.model.parameters()).detach()).add_(dist.get_rank())
    snapshots = training.snapshots()
    snapshots.restore()
    snapshots.keep(1)
    snapshots.keep(2)


def test_replicas_that_never_were_alike_are_refused() -> None:
    for error in errors_of_ranks(_own_values, 4):
        assert "hold other values from the beginning" in error
        assert "compare=False" in error


# -- what cannot be --------------------------------------------------------------------------------


def _refused(options: dict[str, Any]) -> None:
    training = Training("mics", 2)
    made = {name: of_rank(dist.get_rank(), training) for name, of_rank in options.items()}
    mics.Snapshots(training.model, training.optimizer, **made)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": lambda rank, t: 0}, "every = 0"),
        ({"every": lambda rank, t: 1 + rank}, "disagree on what snapshots keep"),
        ({"extras": lambda rank, t: {"x": 3}}, "x cannot be kept"),
        ({"extras": lambda rank, t: {f"x{rank}": {}}}, "disagree on what snapshots keep"),
        ({"ema": lambda rank, t: mics.EMA(nn.Linear(2, 2))}, "of another model"),
    ],
)
def test_what_cannot_be_kept_is_refused_on_every_rank(options: dict[str, Any], words: str) -> None:
    for error in errors_of_ranks(_refused, 4, options):
        assert words in error


def _misused(how: str) -> None:
    training = Training("mics", 2)
    snapshots = training.snapshots()
    if how != "no restore":
        snapshots.restore()
    snapshots.keep(3 + (how == "other steps") * dist.get_rank())
    snapshots.keep(3 if how == "same step" else 7)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no restore", "keep was called before restore"),
        ("same step", "step = 3, after 3"),
        ("other steps", "others 3 to 6"),
    ],
)
def test_keep_out_of_turn_is_refused_on_every_rank(how: str, words: str) -> None:
    for error in errors_of_ranks(_misused, 4, how):
        assert words in error


def test_a_process_alone_is_kept_too(memory: Path) -> None:
    """Without a process group: what a notebook or a single GPU has."""
    states = []
    for until in (3, 5):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        snapshots = mics.Snapshots(model, optimizer)
        step = snapshots.restore()
        while step < until:
            model(torch.ones(3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            step = snapshots.keep(step + 1)
        states.append((step, model.weight.detach().clone()))
        assert snapshots._writing is not None
        snapshots._writing.end()
        os.close(snapshots._hold._file)
    assert states[1][0] == 5 and not torch.equal(states[0][1], states[1][1])


def test_what_nobody_can_find_again_is_collected(memory: Path) -> None:
    here = f"mics-{os.geteuid()}-process"
    gone = memory.with_name(f"{here}-999999999-1-{jobs._space()}")
    running = memory.with_name(f"{here}-{os.getpid()}-{jobs._began(os.getpid())}-{jobs._space()}")
    elsewhere = memory.with_name(f"{here}-999999999-1-1")  # in another container
    named = memory.with_name(f"mics-{os.geteuid()}-another")
    for folder in (gone, running, elsewhere, named):
        folder.mkdir(mode=0o700)
    jobs.open_job("test")
    assert not gone.exists()
    assert running.exists() and elsewhere.exists() and named.exists()


def _twice() -> None:
    training = Training("mics", 2)
    training.snapshots()
    training.snapshots()


def test_a_second_process_of_the_same_rank_is_refused() -> None:
    for error in errors_of_ranks(_twice, 2):
        assert "Another process is rank" in error and "MICS_JOB=<name>" in error


def test_no_room_is_said_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = _undisturbed("mics", 2)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    capfd.readouterr()
    got = run_ranks(_attempt, 4, "mics", 2, STEPS)
    said = capfd.readouterr().err
    assert said.count("rank 2 the state of step 1 is not in memory: No space left") == 1, said
    assert "MICS_MEMORY=" in said
    _same(got, wanted, 0)


@pytest.mark.extra
def test_memory_of_another_model_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(_attempt, 4, "mics", 2, 5)
    capfd.readouterr()
    assert run_ranks(_attempt, 4, "sgd", 2, STEPS)[0][0] == 0
    assert "of this job with another model, optimizer" in capfd.readouterr().err
    assert run_ranks(_attempt, 4, "mics", 2, 3)[0][0] == 0


@pytest.mark.extra
def test_every_third_step_may_be_kept() -> None:
    wanted = _undisturbed("mics", 2)
    run_ranks(_attempt, 4, "mics", 2, 7, None, {"every": 3})
    _same(run_ranks(_attempt, 4, "mics", 2, STEPS, None, {"every": 3}), wanted, 6)


def test_jobs_have_the_names_that_launchers_give_them() -> None:
    assert jobs.job_name({"MICS_JOB": "a", "SLURM_JOB_ID": "3"}) == "a"
    assert jobs.job_name({"TORCHELASTIC_RUN_ID": "b"}) == "torchrun-b"
    assert jobs.job_name({"TORCHELASTIC_RUN_ID": "none"}).startswith(f"process-{os.getppid()}-")
    assert jobs.job_name({"WORLD_SIZE": "4"}).startswith(f"process-{os.getppid()}-")
    assert jobs.job_name({}).startswith(f"process-{os.getpid()}-")  # not the shell's
    assert jobs.job_name({"SLURM_JOB_ID": "3"}).startswith("slurm-3-")


def test_a_folder_of_somebody_else_is_refused(memory: Path) -> None:
    memory.mkdir(mode=0o755)
    memory.chmod(0o755)
    with pytest.raises(mics.RecoveryError, match="not a folder of this user alone"):
        jobs.open_job("test")
    memory.rmdir()
    memory.symlink_to("/tmp")
    with pytest.raises(mics.RecoveryError, match="not a folder of this user alone"):
        jobs.open_job("test")
