"""When a rank fails, leaves or waits elsewhere, every other one ends soon and names it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import UnevenMLP
from parity import quiet
from programs import End, run_programs
from ranks import run_ranks

import mics
from mics.ranks import issuing
from mics.ranks.board import patience
from mics.ranks.waiting import Place, wait_for_work
from mics.ranks.whereabouts import Counted

SOON = 15.0  # seconds; patience is 2 s, the rest is the start of 4 ranks on a loaded machine
Model = tuple[UnevenMLP, torch.optim.Optimizer]


def sharded(partition: int = 2) -> Model:
    torch.manual_seed(0)
    model = UnevenMLP()
    blocks = list(model.blocks)
    quiet(
        lambda: mics.shard(
            model, partition=partition, gpus_per_node=2, blocks=blocks, collectives="flat"
        )
    )
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def nothing(micro_step: int) -> None:
    pass


def train(
    parts: Model, steps: int, micro_steps: int = 2, first: Callable[[int], object] = nothing
) -> None:
    model, optimizer = parts
    for _ in range(steps):
        batches = [model.example(i) for i in range(micro_steps)]
        for i, (x, _) in enumerate(mics.micro_steps(model, batches)):
            first(i)
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def last_words(end: End) -> str:
    """The message of the exception that a rank ended with."""
    return end.text[end.text.rfind("mics.errors.") :]


def all_end_soon(ends: list[End], *words: str, but: tuple[int, ...] = ()) -> None:
    """Every rank but some has failed soon, with all of these words and none of Gloo's."""
    for rank, end in enumerate(ends):
        if rank in but:
            continue
        assert end.code == 1, f"rank {rank}: {end}"
        assert end.seconds < SOON
        for word in words:
            assert word in last_words(end), f"rank {rank}: {end.text}"
        assert "gloo" not in last_words(end)


# -- a rank that ends ----------------------------------------------------------------------------


def fails(rank: int) -> None:
    def bad_batch(micro_step: int) -> None:
        if rank == 3 and micro_step == 1:
            raise ValueError("bad batch")

    parts = sharded()
    train(parts, 1)
    train(parts, 1, first=bad_batch)


def ends_early(rank: int) -> None:
    train(sharded(), 1 if rank == 3 else 2)


def is_killed(rank: int) -> None:
    parts = sharded()
    train(parts, 1)
    train(parts, 1, first=lambda i: os.kill(os.getpid(), signal.SIGKILL) if rank == 3 else None)


def test_a_rank_that_raises_is_named_with_its_exception(tmp_path: Path) -> None:
    ends = run_programs(fails, tmp_path)
    failed = "Rank 3 has failed in micro-step 2 of step 2: ValueError: bad batch"
    all_end_soon(ends, f"RankError: {failed}", "waited for it in the ", but=(3,))
    assert ends[3].code == 1
    assert ends[3].text.rstrip().endswith("ValueError: bad batch")


@pytest.mark.slow
def test_a_rank_with_a_step_less_is_named(tmp_path: Path) -> None:
    ends = run_programs(ends_early, tmp_path)
    words = "Rank 3 has ended its program, and the others have not.", "mics.steps(loader, "
    all_end_soon(ends, *words, but=(3,))
    assert (ends[3].code, ends[3].text) == (0, "")


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    ends = run_programs(is_killed, tmp_path)
    all_end_soon(ends, "Rank 3 has died: its process ", "see the log of that rank", but=(3,))


@pytest.mark.slow
def test_ranks_that_send_different_sizes_are_named_where_the_backend_aborts(tmp_path: Path) -> None:
    def other_size(rank: int) -> None:
        issuing.all_reduce(torch.ones(3 if rank == 1 else 8))

    ends = run_programs(other_size, tmp_path, world=2)
    assert ends[1].code == -signal.SIGABRT  # Gloo takes the process with it
    all_end_soon(ends, "Rank 1 has died: its process ", but=(1,))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "ends", "is killed"])
def test_a_rank_that_keeps_the_store_is_named_too(tmp_path: Path, how: str) -> None:
    def first_rank_goes(rank: int) -> None:
        parts = sharded()
        train(parts, 1)
        if rank == 0 and how == "raises":
            raise ValueError("bad batch")
        if rank == 0 and how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank > 0:
            train(parts, 1)

    ends = run_programs(first_rank_goes, tmp_path, kept_by_first_rank=True)
    words = {
        "raises": "Rank 0 has failed",
        "ends": "Rank 0 has ended",  # the board is read, or gone, by the time that others look
        "is killed": "Rank 0 has ended, and the others have not: the job's store, which it kept, "
        "is gone.",
    }
    all_end_soon(ends, words[how], but=(0,))


def test_ranks_that_all_end_write_nothing(tmp_path: Path) -> None:
    ends = run_programs(
        lambda rank: train(sharded(), 2), tmp_path, kept_by_first_rank=True, patience=60.0
    )
    for end in ends:
        assert (end.code, end.text) == (0, "")


# -- a rank that waits elsewhere -----------------------------------------------------------------

CIRCLE = "Ranks wait for each other in different places, so none of them can go on."


def test_a_rank_that_saves_alone_is_named(tmp_path: Path) -> None:
    def saves(rank: int) -> None:
        model, optimizer = parts = sharded()
        train(parts, 1)
        if rank == 0:
            mics.save(tmp_path / "saved", model=model, optimizer=optimizer)
        train(parts, 1)

    words = "the making of a group (mics_checkpoint) among ranks 0-3, mics.save"
    all_end_soon(run_programs(saves, tmp_path), CIRCLE, "ank(s) 0 in ", words)


@pytest.mark.extra
def test_a_rank_that_saves_alone_after_a_first_save_of_all_is_named(tmp_path: Path) -> None:
    def saves(rank: int) -> None:
        model, optimizer = parts = sharded()
        mics.save(tmp_path / "first", model=model, optimizer=optimizer)
        train(parts, 1)
        if rank == 0:
            mics.save(tmp_path / "second", model=model, optimizer=optimizer)
        train(parts, 1)

    all_end_soon(run_programs(saves, tmp_path), CIRCLE, "among ranks 0-3, mics.save")


@pytest.mark.slow
def test_a_rank_that_skips_a_forward_is_named(tmp_path: Path) -> None:
    def skips(rank: int) -> None:
        model, _ = sharded()
        for i, (x, _) in enumerate(mics.micro_steps(model, [model.example(j) for j in range(3)])):
            if rank != 3 or i != 1:
                model(x).square().mean().backward()

    all_end_soon(run_programs(skips, tmp_path), CIRCLE, "for rank(s) 3")


@pytest.mark.extra
def test_a_rank_that_does_not_shard_with_the_others_is_named(tmp_path: Path) -> None:
    def some_shard(rank: int) -> None:
        parts = sharded(partition=4)
        if rank != 2:
            sharded(partition=4)
        train(parts, 1)

    # Two ranks are a circle: the others may not have said yet that they wait for rank 2 as well.
    words = "mics.shard, for rank(s) ", "ank(s) 2 in the making of a group (mics_control)"
    all_end_soon(run_programs(some_shard, tmp_path), CIRCLE, *words)


@pytest.mark.slow
def test_a_rank_that_leaves_its_step_and_goes_on_is_named(tmp_path: Path) -> None:
    def leaves(rank: int) -> None:
        model, _ = sharded()
        with contextlib.suppress(ZeroDivisionError), mics.micro_step(model, last=True):
            x, _ = model.example(0)
            1 / (rank - 1)
            model(x).square().mean().backward()
        if rank == 1:
            time.sleep(60)

    left = "Rank 1 alone has left micro-step 1 of step 1 by ZeroDivisionError: division by zero."
    ends = run_programs(leaves, tmp_path, of=(0, 2, 3))
    all_end_soon(ends, left, "on every rank or on", but=(1,))


# -- a rank that does not come -------------------------------------------------------------------


@pytest.mark.slow
def test_waiting_ranks_say_for_whom_and_end_at_the_timeout(tmp_path: Path) -> None:
    def one_stops(rank: int) -> None:
        parts = sharded()
        train(parts, 1)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank == 1:
            time.sleep(60)
        train(parts, 1)

    ends = run_programs(one_stops, tmp_path, patience=1.0, timeout=6.0, of=(0, 3))
    for rank in (0, 3):
        assert f"mics: rank {rank} has waited 1 s in the " in ends[rank].text
        assert "micro-step 1 of step 2; it waits for rank(s) " in ends[rank].text
        assert ends[rank].code == 1
        assert "has waited 6 s, the timeout, in " in last_words(ends[rank])
        assert "a longer timeout= for init_process_group" in last_words(ends[rank])
    text = ends[0].text + ends[3].text
    assert "rank(s) 1, which has not come: it computes, or is where mics does not see it" in text
    assert " is stopped" in text


@pytest.mark.slow
def test_a_stopped_rank_that_keeps_the_store_is_named(tmp_path: Path) -> None:
    def first_rank_stops(rank: int) -> None:
        parts = sharded()
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        train(parts, 1)

    words = "the job's store does not answer: rank 0, which keeps it, is stopped or gone"
    ends = run_programs(
        first_rank_stops, tmp_path, world=2, kept_by_first_rank=True, patience=1.0, until=words
    )
    assert words in ends[1].text


class _Breaks:
    """torch's handle of a collective whose peer goes away during the first wait of some length."""

    waits = 0

    def wait(self, timeout: object) -> None:
        self.waits += 1
        raise RuntimeError("Connection closed by peer" if self.waits > 2 else "timed out")

    def is_completed(self) -> bool:
        return True


def test_a_collective_that_breaks_while_it_is_waited_for_is_not_over() -> None:
    group = Counted("a group", [0, 1], on_gloo=True, longest=60.0)
    work: Any = _Breaks()
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        wait_for_work(work, Place(group, 1, "all-reduce"))


def test_a_job_without_other_ranks_has_no_board(tmp_path: Path) -> None:
    def alone(rank: int) -> None:
        model = mics.fully_shard(UnevenMLP())
        train((model, torch.optim.SGD(model.parameters(), lr=0.1)), 1)
        dist.destroy_process_group()

    (end,) = run_programs(alone, tmp_path, world=1)
    assert (end.code, end.text) == (0, "")


# -- messages from rank to rank ------------------------------------------------------------------


def _passes_late() -> list[float]:
    group = issuing.host_group([0, 1], "late")
    value = torch.full((3,), float(dist.get_rank()))
    if dist.get_rank() == 0:
        time.sleep(2.5 * patience().look)
        issuing.send(value, 1, group)
        issuing.receive(value, 1, group)
    else:
        issuing.receive(value, 0, group)
        issuing.send(value + 5, 0, group)
    return list(value.tolist())


def test_a_message_of_a_rank_that_comes_late_is_waited_for() -> None:
    assert run_ranks(_passes_late, 2) == [[5.0] * 3, [0.0] * 3]


# -- attempts ------------------------------------------------------------------------------------


def _counts_alone() -> int:
    """As two agents of torchrun tell it, of which one has not seen the failure of the other's."""
    os.environ |= {
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_RESTART_COUNT": os.environ["RANK"],
    }
    return issuing.make_group([0, 1], "after a restart").size()


def test_ranks_of_agents_that_count_other_restarts_meet() -> None:
    assert run_ranks(_counts_alone, 2) == [2, 2]
