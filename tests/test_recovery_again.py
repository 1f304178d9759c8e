"""Restarts that are followed by others: nodes lost in turn, ranks that change places."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import errors_of_ranks, run_ranks
from torch import nn

import mics
from mics import compat
from mics.recovery import job as jobs

WIDTH, STEPS, CUT = 16, 6, 3
HOME = (0, 0, 1, 1)  # the nodes of four ranks


@pytest.fixture(autouse=True)
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders that stand for the memory of two nodes."""
    monkeypatch.setenv("MICS_JOB", "test")
    monkeypatch.setattr(jobs, "_SECONDS", 1.0)
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    yield tmp_path


def _attempt(
    root: Path,
    places: Sequence[int],
    until: int,
    spoil: Callable[[nn.Module, int], None] | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[int, list[torch.Tensor]]:
    """Train until a step and end as a process does that is killed: nothing is closed."""
    rank = dist.get_rank()
    os.environ["MICS_MEMORY"] = str(root / str(places[rank]))
    torch.manual_seed(0)
    model = mics.shard(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), partition=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(100 + rank)
    snapshots = mics.Snapshots(model, optimizer, **options or {})
    first = step = snapshots.restore()
    while step < until:
        for x in mics.micro_steps(model, [torch.rand(2, WIDTH)]):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if spoil is not None:
            spoil(model, step)
        step = snapshots.keep(step + 1)
    if snapshots._writing is not None:
        snapshots._writing.end()
    tensors = [compat.local_of(param.detach()).clone() for param in model.parameters()]
    return first, [*tensors, torch.rand(3)]


@functools.cache
def _wanted(root: Path) -> list[Any]:
    run_ranks(_attempt, 4, root, HOME, STEPS)
    found = run_ranks(_attempt, 4, root, HOME, STEPS)
    for number in range(2):
        _lose(root, number)
    return found


def _lose(root: Path, number: int) -> None:
    shutil.rmtree(root / str(number))
    (root / str(number)).mkdir()


def _check(got: list[Any], wanted: list[Any]) -> None:
    for (first, tensors), (_, others) in zip(got, wanted, strict=True):
        assert first == CUT
        assert all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def test_what_was_taken_from_a_replica_is_a_source_at_once(nodes: Path) -> None:
    """One node is lost and brought back; before a step is done everybody dies, and the other is."""
    wanted = _wanted(nodes)
    run_ranks(_attempt, 4, nodes, HOME, CUT)
    _lose(nodes, 1)
    for _ in range(2):
        assert [first for first, _ in run_ranks(_attempt, 4, nodes, HOME, 0)] == [CUT] * 4
    _lose(nodes, 0)
    _check(run_ranks(_attempt, 4, nodes, HOME, STEPS), wanted)


def test_ranks_may_change_nodes_and_change_back(nodes: Path) -> None:
    wanted = _wanted(nodes)
    run_ranks(_attempt, 4, nodes, HOME, CUT)
    for places in ((1, 1, 0, 0), HOME, (1, 0, 0, 1)):
        assert [first for first, _ in run_ranks(_attempt, 4, nodes, places, 0)] == [CUT] * 4
    _check(run_ranks(_attempt, 4, nodes, (1, 1, 0, 0), STEPS), wanted)


def _drift(model: nn.Module, step: int) -> None:
    if dist.get_rank() == 3:
        with torch.no_grad():
            compat.local_of(next(model.parameters()).detach()).add_(1e-6)


def test_without_comparing_everybody_goes_on_from_the_own_state(nodes: Path) -> None:
    run_ranks(_attempt, 4, nodes, HOME, CUT, _drift, {"compare": False})
    got = run_ranks(_attempt, 4, nodes, HOME, 0, None, {"compare": False})
    assert [first for first, _ in got] == [CUT] * 4
    assert not torch.equal(got[1][1][0], got[3][1][0])


def _small(root: Path, until: int) -> tuple[int, list[torch.Tensor]]:
    """Node 1 has no room."""
    if HOME[dist.get_rank()] == 1:

        def full(*_: int) -> None:
            raise OSError(28, "No space left on device")

        os.posix_fallocate = full
    return _attempt(root, HOME, until)


def test_a_node_without_room_for_what_it_needs_is_refused_by_all(nodes: Path) -> None:
    wanted = _wanted(nodes)
    run_ranks(_attempt, 4, nodes, HOME, CUT)
    _lose(nodes, 1)
    for error in errors_of_ranks(_small, 4, nodes, STEPS):
        assert "Rank 2 has no room for its state" in error
    _check(run_ranks(_attempt, 4, nodes, HOME, STEPS), wanted)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_file_where_a_slot_should_be_is_no_state(kind: str, nodes: Path) -> None:
    wanted = _wanted(nodes)
    run_ranks(_attempt, 4, nodes, HOME, CUT)
    for path in (nodes / "1").glob("*/*.3.*"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
    _check(run_ranks(_attempt, 4, nodes, HOME, STEPS), wanted)
