"""Scripts that are checked and come to no end, or to a bad one: which rank, where, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mics.errors import CheckError
from mics.lab.checking.outcome import Job, Outcome, check
from mics.lab.checking.ranks import observe
from mics.lab.checking.report import RankReport, Step
from mics.lab.checking.standing import Standing, culprits, in_words

HEAD = """
import os, sys, time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
weight = torch.zeros(32, requires_grad=True)
optimizer = torch.optim.SGD([weight])
"""

STEP = """
def step(number):
    weight.sum().backward()
    dist.all_reduce(weight.grad)
    optimizer.step()
"""


def error_of(tmp_path: Path, body: str, *, seconds: float = 60.0, ranks: int = 2) -> CheckError:
    """What a check says of a script."""
    script = tmp_path / "train.py"
    script.write_text(HEAD + STEP + body)
    with pytest.raises(CheckError) as caught:
        observe(Job((str(script),), 1, ranks, 3, seconds))
    return caught.value


def line_of(tmp_path: Path, words: str) -> int:
    lines = (tmp_path / "train.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if words in line)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_the_line_where_it_stands(tmp_path: Path) -> None:
    error = error_of(
        tmp_path,
        "def load():\n    time.sleep(600)\nstep(0)\nif rank == 1:\n    load()\nstep(1)\n",
        seconds=25.0,
    )
    assert "Rank 1 holds up the others." in error.what
    first, second = error.numbers.splitlines()
    sleeps = line_of(tmp_path, "time.sleep")
    assert f"rank 1: line {sleeps} of train.py in load, behind the backward" in first
    waits = line_of(tmp_path, "dist.all_reduce")
    assert f"rank 0: line {waits} of train.py in step, inside all_reduce of" in second
    assert "it waits for rank(s) 1 in the all-reduce no. 2 among ranks 0-1" in second


@pytest.mark.extra
@pytest.mark.slow
def test_ranks_that_wait_for_each_other_are_said_to(tmp_path: Path) -> None:
    error = error_of(
        tmp_path,
        "group = dist.new_group([0, 1])\ndist.barrier(group if rank else None)\nstep(0)\n",
        seconds=25.0,
    )
    assert "Ranks wait for each other" in error.what
    assert "same collectives in the same order" in error.write


@pytest.mark.extra
@pytest.mark.slow
def test_a_loop_without_a_step_is_told_from_a_rank_that_hangs(tmp_path: Path) -> None:
    error = error_of(tmp_path, "while True:\n    weight.sum().backward()\n", seconds=20.0)
    assert "No rank waits for another one" in error.what
    assert "no optimizer of torch.optim has stepped" in error.what


@pytest.mark.extra
@pytest.mark.parametrize("code", [0, 3])
def test_a_process_that_is_ended_without_a_word_is_named(tmp_path: Path, code: int) -> None:
    error = error_of(tmp_path, f"step(0)\nif rank == 1:\n    os._exit({code})\ntime.sleep(600)\n")
    assert "rank 1 ended its process without a word, as os._exit does" in error.what
    assert f"exit code is {code}; it had taken 1 of 3 optimizer steps" in error.numbers
    assert "sys.exit" in error.write


def test_the_rank_that_was_killed_is_named_not_those_that_lost_it(tmp_path: Path) -> None:
    error = error_of(
        tmp_path, "step(0)\nif rank == 1:\n    os.kill(os.getpid(), 9)\nstep(1)\nstep(2)\n"
    )
    assert "rank 1 was killed by SIGKILL" in error.what


def test_a_rank_that_ends_early_is_named_not_those_that_lost_it(tmp_path: Path) -> None:
    error = error_of(tmp_path, "step(0)\nif rank == 1:\n    sys.exit(0)\nstep(1)\nstep(2)\n")
    assert "rank 1 ended its program, and other ranks went on" in error.what
    assert "It had taken 1 optimizer steps" in error.numbers


def test_an_exit_with_words_is_shown_with_its_line(tmp_path: Path) -> None:
    error = error_of(tmp_path, "sys.exit('no more data')\n")
    assert "SystemExit: no more data" in error.what
    assert f"line {line_of(tmp_path, 'no more data')}" in error.what


def test_a_rank_of_a_comparison_that_hangs_ends_and_says_where(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import time\nwhile True:\n    time.sleep(60)\n")
    words = ["-m", "mics.lab.checking.stepping", str(tmp_path), "3", "1", "0", str(script)]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "rank 0 has taken 0 of 3 steps in 1 s; it stands in line 3 of" in done.stderr
    assert f"mics check {script}" in done.stderr


# -- without processes -----------------------------------------------------------------------------


def standing(rank: int, **issued: int) -> Standing:
    last = dict.fromkeys(issued, "all_reduce")
    ranks = {"ab": [0, 1], "bc": [1, 2]}
    return Standing(rank, issued=issued, last=last, ranks=ranks, frames=[("x.py", 3, "f")])


def test_a_rank_that_waits_for_the_culprit_is_none() -> None:
    # Rank 0 waits for 1, which waits for 2, which is at work.
    chain = [standing(0, ab=2), standing(1, ab=1, bc=2), standing(2, bc=1)]
    assert culprits(chain) == [2]
    assert in_words(chain, Path("x.py"))[1][0].startswith("rank 2: ")


def test_a_rank_that_has_ended_is_the_culprit() -> None:
    ended = Standing(1, issued={"ab": 1}, ended=True, steps=1)
    ranks = [standing(0, ab=2), ended]
    assert culprits(ranks) == [1]
    assert "rank 1 has ended after 1 step" in in_words(ranks, Path("x.py"))[1]


def test_a_failure_of_its_own_goes_before_a_lost_connection() -> None:
    lost = RankReport(0, failed="...\nRuntimeError: [gloo/transport] Connection reset", time=1.0)
    own = RankReport(1, failed="...\nValueError: bad sample", time=2.0)
    job = Job(("x.py",), 1, 2, 3, 60.0)
    with pytest.raises(CheckError, match=r"(?s)fails on rank 1.*bad sample"):
        check(job, Outcome([lost, own], [1, 1], [0, 0], [], True))
    ended = RankReport(1, steps=[Step()])
    with pytest.raises(CheckError, match="rank 1 ended its program"):
        check(job, Outcome([lost, ended], [1, 0], [1, 1], [], True))
