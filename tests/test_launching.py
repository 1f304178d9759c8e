"""Ranks that mics train starts itself: exit codes, whose words come last, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
{before}
from mics.errors import MicsError
from mics.training.config import ParallelConfig, TrainConfig
from mics.training.launching import run_on_ranks

def work(config):
    rank = int(os.environ["RANK"])
    {body}
    return 0

print("started", flush=True)
sys.exit(run_on_ranks(work, TrainConfig(parallel=ParallelConfig(ranks=3))))
"""


def start(body: str, before: str = "") -> subprocess.Popen[str]:
    program = PROGRAM.format(before=before, body=body.strip().replace("\n", "\n    "))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    out, err = process.communicate(timeout=100)
    return process.returncode, out.splitlines(), err.rstrip()


@pytest.mark.slow
def test_ranks_are_told_who_they_are_and_the_largest_code_is_returned() -> None:
    code, out, err = finish(
        start(
            # One write: three ranks share the pipe, and an unbuffered print writes each word.
            "e = os.environ\nprint(f\"{rank} {e['WORLD_SIZE']} {e['MASTER_ADDR']}\\n\", end=\"\")\n"
            "return rank"
        )
    )
    assert code == 2, err
    assert sorted(out[1:]) == ["0 3 127.0.0.1", "1 3 127.0.0.1", "2 3 127.0.0.1"]


@pytest.mark.slow
def test_the_first_failing_ranks_own_message_is_the_last_word() -> None:
    code, _, err = finish(
        start(
            'if rank == 1:\n    raise MicsError("It broke.", write="something else")\n'
            "time.sleep(1)\nraise RuntimeError('a consequence')"
        )
    )
    assert code == 1
    assert err.endswith("mics: rank 1: It broke.\n  Write: something else")
    assert "a consequence" not in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_bug_shows_the_traceback_of_the_rank_it_happened_on() -> None:
    code, _, err = finish(start("if rank == 2:\n    {}['missing']\ntime.sleep(60)"))
    assert code == 1
    assert "mics: rank 2: Traceback" in err
    assert err.endswith("KeyError: 'missing'")


@pytest.mark.slow
def test_a_rank_that_dies_in_silence_is_named() -> None:
    code, _, err = finish(start("if rank == 1:\n    os.kill(os.getpid(), 9)\ntime.sleep(60)"))
    assert code == 1
    assert err.endswith("mics: rank 1 ended with exit code -9 and said nothing")


@pytest.mark.slow
def test_a_killed_rank_is_named_beside_what_the_others_then_say() -> None:
    code, _, err = finish(
        start(
            "if rank == 1:\n    os.kill(os.getpid(), 9)\n"
            "stop = []\nsignal.signal(signal.SIGTERM, lambda *_: stop.append(1))\n"
            "while not stop: time.sleep(0.05)\n"
            "raise RuntimeError('a consequence')"
        )
    )
    assert code == 1
    assert "mics: rank 1 ended with exit code -9 and said nothing\n" in err
    assert err.endswith("RuntimeError: a consequence")


def listening(process: int) -> set[str]:
    """The addresses on which a process and its children listen, as the kernel writes them."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    inodes = {
        link.name
        for pid in (process, *map(int, children))
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if (link := entry.readlink()).name.startswith("socket:")
    }
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {
        row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes
    }


@pytest.mark.slow
def test_nothing_listens_beyond_the_loopback_interface() -> None:
    process = start('os.write(1, b"ready\\n")\ntime.sleep(60)')
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(4)].count("ready\n") == 3
    addresses = listening(process.pid)
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert addresses <= {"0100007F"}, addresses  # 127.0.0.1


@pytest.mark.slow
def test_a_signal_that_nobody_handles_yet_ends_the_job() -> None:
    process = start('os.write(1, b"ready\\n")\ntime.sleep(60)')
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(4)].count("ready\n") == 3
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 1
    assert err.endswith("mics: interrupted")


@pytest.mark.slow
def test_a_signal_reaches_every_rank_which_ends_in_its_own_way() -> None:
    process = start(
        "stop = []\nsignal.signal(signal.SIGTERM, lambda *_: stop.append(1))\n"
        'os.write(1, b"ready\\n")\nwhile not stop: time.sleep(0.05)\n'
        'print("ended", flush=True)'
    )
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(4)]
    assert seen.count("ready\n") == 3
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, out) == (0, ["ended"] * 3), err


@pytest.mark.slow
def test_what_goes_wrong_after_a_signal_is_said() -> None:
    """A last checkpoint that is refused must not look like a clean interruption."""
    process = start(
        "stop = []\nsignal.signal(signal.SIGTERM, lambda *_: stop.append(1))\n"
        'os.write(1, b"ready\\n")\nwhile not stop: time.sleep(0.05)\n'
        'raise MicsError("It broke.")'
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(4)].count("ready\n") == 3
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 1
    assert err.endswith(": It broke.")


PLANTING = """
import pickle, tempfile
import torch.multiprocessing.spawn as spawn
public = tempfile.gettempdir()
unlink = os.unlink
class Planted:
    def __reduce__(self): return (print, ("code of others",))
def plant(path, **more):
    unlink(path, **more)
    if "errorfile" in str(path) and Path(path).parent == Path(public):
        Path(path).write_bytes(pickle.dumps(Planted()))
os.unlink = plant
"""


@pytest.mark.slow
def test_what_others_put_into_the_public_temporary_folder_is_not_unpickled() -> None:
    body = "if rank == 1:\n    os.kill(os.getpid(), 9)\ntime.sleep(60)"
    code, out, err = finish(start(body, PLANTING))
    assert (code, out) == (1, ["started"]), err
    assert err.endswith("mics: rank 1 ended with exit code -9 and said nothing")


@pytest.mark.slow
def test_ranks_keep_the_public_temporary_folder() -> None:
    body = "if tempfile.gettempdir() != public: raise MicsError(tempfile.gettempdir())"
    code, _, err = finish(start(body, "import tempfile; public = tempfile.gettempdir()"))
    assert code == 0, err


FULL = """
import mics.ranks.starting as starting
def full(*_, **__): raise OSError("the disk is full")
starting._report = full
"""


@pytest.mark.slow
def test_a_rank_that_cannot_report_says_why_itself() -> None:
    code, _, err = finish(start("pass", FULL))
    assert code == 1
    assert "OSError: the disk is full" in err
    assert "ProcessRaisedException" not in err
    assert err.endswith("ended with exit code 1 and left no report")


@pytest.mark.slow
def test_a_rank_that_fails_before_it_has_a_group_says_why() -> None:
    before = """
import mics.ranks.starting as starting
def broken(): raise RuntimeError("no loopback")
starting.listen_on_loopback = broken
"""
    code, _, err = finish(start("pass", before))
    assert code == 1
    assert "ProcessRaisedException" not in err
    assert err.endswith("RuntimeError: no loopback")


@pytest.mark.slow
def test_a_rank_that_calls_exit_gives_its_code() -> None:
    code, _, err = finish(start("if rank == 1: sys.exit(2)\ntime.sleep(60)"))
    assert (code, err) == (2, "")


@pytest.mark.slow
def test_a_signal_of_before_the_first_rank_ends_the_job() -> None:
    before = """
import mics.ranks.starting as starting
start = starting.start_processes
def late(*args, **more):
    os.kill(os.getpid(), signal.SIGTERM)
    return start(*args, **more)
starting.start_processes = late
"""
    code, _, err = finish(start("time.sleep(5)", before))
    assert code == 1
    assert err.endswith("mics: interrupted")
