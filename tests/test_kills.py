"""Processes killed at every call to the file system, and while a state is written to memory."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mics
from mics.checkpoint import newest_intact, step_folder
from mics.recovery.slot import Layout, Slot

CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir")


def forked(work: Callable[[], object]) -> int:
    """Run in a child; returns what it was ended by, as ``os.waitstatus_to_exitcode``."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # those of the parent are not here
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Counted:
    """Counts calls to the file system below a folder, and kills at one of them."""

    def __init__(self, root: Path, kill_at: int) -> None:
        self._root, self._kill_at, self.calls = str(root), kill_at, 0
        sys.addaudithook(self._on_event)
        for name in ("fsync", "close"):  # these have no event
            setattr(os, name, self._before(getattr(os, name)))

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS and self._root in str(arguments[0]):
            self._count()

    def _before(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def counted(descriptor: int) -> None:
            self._count()
            call(descriptor)

        return counted

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(step)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(5)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(root: Path, step: int) -> None:
    model, optimizer = trained(step)
    mics.save(step_folder(root, step), model=model, optimizer=optimizer, extra={"step": step})


def test_a_kill_at_any_file_system_call_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    counts = tmp_path / "counts"

    def count() -> None:
        counted = Counted(tmp_path / "counting", -1)
        save(tmp_path / "counting", 2)
        counts.write_text(str(counted.calls))

    forked(count)
    calls = int(counts.read_text())
    assert calls > 20
    found: list[int] = []
    ended = None
    while ended != 0:  # until there were fewer calls; what the first save left alone is one more
        kill_at = len(found) + 1
        root = tmp_path / str(kill_at)
        save(root, 1)

        def killed(root: Path = root, kill_at: int = kill_at) -> None:
            Counted(root, kill_at)
            save(root, 2)

        ended = forked(killed)
        assert ended in (-signal.SIGKILL, 0)
        newest = newest_intact(root)
        assert newest is not None
        model, optimizer = trained(9)
        step = mics.load(newest, model=model, optimizer=optimizer).extra["step"]
        assert isinstance(step, int)
        wanted, its_optimizer = trained(step)
        for one, other in zip(model.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(one, other)
            moments = optimizer.state[one]["exp_avg"], its_optimizer.state[other]["exp_avg"]
            assert torch.equal(*moments)
        found.append(step)
    assert found == sorted(found) and set(found) == {
        1,
        2,
    }  # the old one, and from one call on the new


@pytest.mark.extra
def test_of_200_flipped_bits_in_a_checkpoint_200_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    files = [path for path in step_folder(tmp_path, 2).rglob("*") if path.is_file()]
    generator = random.Random(0)
    for _ in range(200):
        path = generator.choice(files)
        data = path.read_bytes()
        spoilt = bytearray(data)
        spoilt[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(spoilt)
        model, optimizer = trained(9)
        with pytest.raises(mics.CheckpointError) as error:
            mics.load(step_folder(tmp_path, 2), model=model, optimizer=optimizer)
        assert path.name in str(error.value)
        assert newest_intact(tmp_path) == step_folder(tmp_path, 1)
        path.write_bytes(data)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {f"t{at}": torch.arange(120_000).view(300, 400) * at + step for at in range(4)}


def write_on(folder: Path, said: int) -> None:
    """Write states one after the other, and say of each when it is whole."""
    slots = [Slot(folder / str(number)) for number in range(2)]
    layout = Layout(tensors_of(0))
    step = max((slot.head().step for slot in slots if slot.head()), default=0)  # type: ignore[union-attr]
    while True:
        step += 1
        head = {"job": "j", "generation": 1, "model": "m", "key": "k", "rank": 0, "world": 1}
        head["step"] = step
        slots[step % 2].write(head, layout, tensors_of(step), [])
        os.write(said, b"%d\n" % step)


@pytest.mark.extra
def test_150_kills_inside_the_writer_leave_no_wrong_state_and_lose_no_step(tmp_path: Path) -> None:
    generator = random.Random(0)
    newest, torn, kills = 0, 0, 0
    while kills < 150 or torn < 5:  # where a kill falls is up to the machine: go on until some tear
        kills += 1
        assert kills < 2000, f"of {kills} kills {torn} fell into a write"
        reading, said = os.pipe()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # those of the parent are not here
            write_on(tmp_path, said)
        os.close(said)
        told = os.read(reading, 1 << 16)  # of the first state at least
        time.sleep(0.003 * generator.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told += os.read(reading, 1 << 16)
        os.close(reading)
        newest = int(told.split()[-1])
        whole = []
        for number in range(2):
            found = Slot(tmp_path / str(number)).read()
            torn += found is None
            if found is not None:
                wanted = tensors_of(found.head.step)
                assert all(torch.equal(found.tensors[name], wanted[name]) for name in wanted)
                whole.append(found.head.step)
        assert max(whole, default=0) >= newest
    assert newest >= kills
