"""The edge of the command line: what an error costs, who says it, and how often."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mics.__main__ import main
from mics.ranks import console

ROOT = Path(__file__).parents[1]
NO_SIZE = ["bench", "collectives", "--sizes", "0KiB"]


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that this process would have slept."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def as_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.slow
@pytest.mark.extra
def test_under_torchrun_bench_says_an_error_once() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m", "mics", *NO_SIZE]
    done = subprocess.run(
        launch,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("'0KiB' is no size") == 1, done.stderr


def test_rank_0_says_an_error_at_once(
    waited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(0, monkeypatch)
    assert main(NO_SIZE) == 1
    assert capsys.readouterr().err.startswith("mics bench: '0KiB' is no size.\n  Write: --sizes")
    assert waited == []


def test_another_rank_says_its_own_error_if_nobody_has_ended_it_meanwhile(
    waited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(1, monkeypatch)
    assert main(NO_SIZE) == 1
    assert capsys.readouterr().err.startswith("mics bench: rank 1: '0KiB' is no size.")
    assert waited == [10.0]


def test_a_usage_error_is_rank_0s_alone(
    waited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, words in ((0, "there is no verb 'benhc'"), (1, "")):
        as_rank(rank, monkeypatch)
        assert main(["benhc"]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert bool(err) == bool(words)
    assert waited == []


# -- the console -----------------------------------------------------------------------------------


def test_results_go_to_standard_output_and_all_else_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.show("a result")
    console.progress("half way")
    console.say("a word")
    console.alarm("fire")
    printed = capsys.readouterr()
    assert printed.out == "a result\n"
    assert printed.err.startswith("half way\nmics: a word\nmics: !!!!")
    assert printed.err.endswith("\nfire\n" + 80 * "!" + "\n")


def test_only_rank_0_speaks_even_before_there_is_a_process_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(1, monkeypatch)
    for speak in (console.show, console.progress, console.say, console.alarm):
        speak("a word")
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_has_left_is_no_error() -> None:
    program = "from mics.ranks.console import show\nfor _ in range(9999): show('a line')"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "a line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


def test_a_lab_needs_no_torch() -> None:
    program = "import sys, mics.__main__, mics.commands.lab\nsys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["plan", "simulate"])
def test_a_file_that_cannot_be_written_is_an_error_of_the_verb(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "gpt2-tiny", "--nodes", "1", "--sequence", "64", "--micro-batch", "1"]
    assert main([verb, *words, "--json", "/proc/not-there.json"]) == 1
    assert f"mics {verb}: /proc/not-there.json cannot be written" in capsys.readouterr().err
