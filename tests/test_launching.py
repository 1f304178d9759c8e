"""Ranks that mics train starts itself: exit codes, whose words come last, signals."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from hatching import hatch

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


def start(body: str, before: str = "", terminal: int | None = None) -> subprocess.Popen[str]:
    program = PROGRAM.format(before=before, body=body.strip().replace("\n", "\n    "))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return hatch(program, environment, terminal)


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
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.extra),
        signal.SIGQUIT,
    ],
)
def test_a_signal_reaches_every_rank_which_ends_in_its_own_way(number: int) -> None:
    process = start(
        f"stop = []\nsignal.signal({number:d}, lambda *_: stop.append(1))\n"
        'os.write(1, b"ready\\n")\nwhile not stop: time.sleep(0.05)\n'
        'os.write(1, b"ended\\n")'
    )
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(4)]
    assert seen.count("ready\n") == 3
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out) == (0, ["ended"] * 3), err


@pytest.mark.slow
def test_a_closed_terminal_lets_the_ranks_end_in_their_own_way(tmp_path: Path) -> None:
    """What they say is lost; what they do is done."""
    ended = tmp_path / "ended"
    ours, terminal = os.openpty()
    body = f"""
from mics.ranks.console import alarm, show
stop = []
signal.signal(signal.SIGHUP, lambda *_: stop.append(1))
os.write(1, b"ready\\n")
while not stop: time.sleep(0.05)
show("a result")
alarm("what nobody may miss")
Path({str(ended)!r}).with_suffix(f".{{rank}}").touch()
"""
    process = start(body, terminal=terminal)
    os.close(terminal)
    seen = b""
    while seen.count(b"ready") < 3:
        seen += os.read(ours, 1000)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=100) == 0
    assert len(list(tmp_path.glob("ended.*"))) == 3


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_reports_does_not_hide_the_first_ones_words() -> None:
    before = """
from pathlib import Path
write_text = Path.write_text
def killed(path, text, **more):
    if path.name.startswith("2.json"):
        write_text(path, text[:5])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_text(path, text, **more)
Path.write_text = killed
"""
    body = """
def late(*_): raise RuntimeError("a consequence")
signal.signal(signal.SIGTERM, late)
if rank == 1:
    time.sleep(1)
    raise MicsError("It broke.")
time.sleep(60)
"""
    code, _, err = finish(start(body, before))
    assert code == 1
    assert "JSONDecodeError" not in err
    assert err.endswith("mics: rank 1: It broke."), err


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
