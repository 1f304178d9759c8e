"""Ranks that are killed for real, in every phase of a step; ``make faults`` runs all of it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from survivor import PHASES

SURVIVOR = Path(__file__).with_name("survivor.py")
RANKS, STEPS = 4, 12


AGENT = ["-m", "mics", "run", "--ranks-per-node", str(RANKS), "--restarts", "1000", "--"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--max-restarts", "3"]


def train(launcher: list[str], folder: Path, *options: str) -> str:
    """Train, with restarts; returns what was said."""
    folder.mkdir()
    command = [sys.executable, *launcher, str(SURVIVOR), str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MICS_MEMORY": str(folder)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def losses(folder: Path, rank: int) -> dict[int, str]:
    """The bits of the loss of every step; a step that was repeated has the same ones again."""
    found: dict[int, str] = {}
    for line in (folder / f"losses.{rank}").read_text().splitlines():
        step, bits, *_ = line.split()
        assert found.setdefault(int(step), bits) == bits, f"step {step} repeated with other bits"
    return found


def check_same(folder: Path, wanted: Path) -> None:
    """Compare the losses of every step and the final states with those of a run left alone."""
    for rank in range(RANKS):
        assert losses(folder, rank) == losses(wanted, rank)
        assert (folder / f"final.{rank}").read_text() == (wanted / f"final.{rank}").read_text()
    assert not list(folder.glob("mics-*")), "memory is left"


def finished_steps_lost(folder: Path) -> int:
    """How many steps that every rank had finished were repeated by the last restart."""
    resumed = [int(line.split()[0]) for line in (folder / "resumed.0").read_text().splitlines()]
    if len(resumed) < 2:
        return 0
    began = float((folder / "resumed.0").read_text().splitlines()[-1].split()[1])
    done = []
    for rank in range(RANKS):
        lines = [line.split() for line in (folder / f"losses.{rank}").read_text().splitlines()]
        done.append(max([int(step) for step, *_, at in lines if float(at) < began], default=0))
    # A step is finished when keep has returned on every rank: the next one's line may be there.
    return max(0, min(done) - 1 - resumed[-1])


def undisturbed(kind: str, folder: Path) -> Path:
    """A run that nothing happened to."""
    train(AGENT, folder / kind, *OPTIONS[kind])
    return folder / kind


OPTIONS = {"mics": [], "fsdp2": ["--plain"]}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The undisturbed run of each kind, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("wanted")
    return functools.cache(lambda kind: undisturbed(kind, folder))


def _kill(phase: str) -> list[str]:
    """Options that let a rank die there; in what a restart does after another kill."""
    step = -1 if phase in ("rendezvous", "building", "restoring") else 5
    fault = f"{phase}:{1 + len(phase) % 3}:{step}"
    if phase in ("rendezvous", "restoring"):
        return ["--fault", "norm:2:4", "--second-fault", fault]
    return ["--fault", fault]


def _extra(*phases: str) -> list[object]:
    return [pytest.param(phase, marks=pytest.mark.extra) for phase in phases]


def _check_kill(launcher: list[str], kind: str, phase: str, wanted: Path, folder: Path) -> None:
    said = train(launcher, folder, *_kill(phase), *OPTIONS[kind])
    assert (folder / f"struck.{phase}").exists()
    check_same(folder, wanted)
    assert finished_steps_lost(folder) == 0
    if phase != "building":
        assert "goes on from memory, step" in said


OFTEN = "mid-optimizer"


@pytest.mark.parametrize("phase", [OFTEN, *_extra(*(p for p in PHASES if p != OFTEN))])
def test_a_kill_in_any_phase_changes_no_bit(
    phase: str, wanted: Callable[[str], Path], tmp_path: Path
) -> None:
    _check_kill(AGENT, "mics", phase, wanted("mics"), tmp_path / "run")


@pytest.mark.extra
@pytest.mark.parametrize("phase", ["norm", "mid-optimizer", "mid-snapshot", "restoring"])
def test_a_kill_changes_no_bit_of_a_model_of_fsdp2(
    phase: str, wanted: Callable[[str], Path], tmp_path: Path
) -> None:
    _check_kill(AGENT, "fsdp2", phase, wanted("fsdp2"), tmp_path / "run")


@pytest.mark.extra
@pytest.mark.parametrize("phase", ["mid-snapshot", "restoring"])
def test_a_kill_under_torchrun_changes_no_bit(
    phase: str, wanted: Callable[[str], Path], tmp_path: Path
) -> None:
    _check_kill(TORCHRUN, "mics", phase, wanted("mics"), tmp_path / "run")
