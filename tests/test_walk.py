"""The walk of docs/walk.md: its own commands, in its order, on less data and for fewer steps."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clone import ended, environment_of_clone
from test_lab import needs_a_lab

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "walk.md").read_text()
INSTALLING = ["git clone <the repository> mics", "cd mics", "pip install '.[train]'"]
SMALLER = {"corpus 200": "corpus 2", "--tokens 250e3": "--tokens 40e3"}
STEPS = 10  # of 16 x 256 tokens
OF_LAB = re.compile(r"(--name|lab down|slurm_in_lab\.sh) walk")


def commands() -> list[str]:
    """Every command of the page's blocks; one that goes on in a second line is one."""
    found = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [line for block in found for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture
def around(tmp_path: Path) -> Iterator[dict[str, str]]:
    for path in ("examples", "docs"):
        (tmp_path / path).symlink_to(ROOT / path)
    with environment_of_clone(tmp_path) as environment:
        yield environment


def steps_of(folder: Path) -> list[int]:
    """Every step that the run has noted."""
    file = folder / "runs" / "walk" / "metrics.jsonl"
    rows = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [row["step"] for row in rows if row["kind"] == "step"]


def run(command: str, folder: Path, around: dict[str, str]) -> str:
    done = ended(command, folder, around, seconds=250)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@needs_a_lab
@pytest.mark.extra
@pytest.mark.timeout(900)
def test_the_walks_commands_run_as_printed(tmp_path: Path, around: dict[str, str]) -> None:
    name = around["LAB"]
    said: list[str] = []
    background: subprocess.Popen[bytes] | None = None
    first, lines = commands()[:3], commands()[3:]
    assert first == INSTALLING
    for line in lines:
        command = line
        for large, small in SMALLER.items():
            command = command.replace(large, small)
        command = OF_LAB.sub(rf"\1 {name}", command)
        if command.endswith(" &"):
            background = subprocess.Popen(
                ["bash", "-c", f"exec {command[:-2]}"], cwd=tmp_path, env=around
            )
        elif command == "wait":
            assert background is not None and background.wait(timeout=100) == 0
        else:
            if command.startswith("kill"):
                wait_for_steps(2, tmp_path, background)
            said.append(run(command, tmp_path, around))
    before, after = ((tmp_path / f"{name}.log").read_text() for name in ("first", "second"))
    assert "ok: all 4 ranks agree" in before and "4 on 2 hosts" in before
    assert "the job is queued again" in before and "begin job" in before
    (resumed,) = re.findall(r"goes on from runs/walk/step-0*(\d+)", after)
    assert 2 <= int(resumed) < STEPS
    assert steps_of(tmp_path) == list(range(1, STEPS + 1))
    assert "the job is queued again" not in after
    assert 'folder = "runs/llama-10m"' in (tmp_path / "job.toml").read_text()
    outputs = "\n".join(said)
    figures = "p = 2, micro-batch 2, micro-steps 2, sequence 256, 2.04 GiB"
    assert " ".join(outputs.split()).count(figures) == 2  # the plan's and the dry run's
    assert figures in " ".join(PAGE.split())
    assert "equal" in outputs and "generated_text" in outputs


def wait_for_steps(number: int, folder: Path, job: subprocess.Popen[bytes] | None) -> None:
    """Wait until the job has done so many steps."""
    assert job is not None
    while len(steps_of(folder)) < number:
        assert job.poll() is None, (folder / "first.log").read_text()
        time.sleep(0.2)
