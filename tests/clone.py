"""A clone in which mics is installed, on a machine without Slurm, for commands of the pages."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from clusters import stand_in

from mics.lab import lifetime, state


@contextlib.contextmanager
def environment_of_clone(folder: Path) -> Iterator[dict[str, str]]:
    """What commands run with; a lab of the name that ``LAB`` holds is ended with it."""
    programs = folder / "programs"
    environment = stand_in(programs)
    for name in ("srun", "scontrol", "scancel"):
        (programs / name).unlink()
    lab = state.new_name()
    here = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LAB": lab}
    yield {n: v for n, v in environment.items() if not n.startswith("SLURM_")} | here
    if lab in [noted.lab.name for noted in state.noted()]:
        lifetime.let_go(state.find(lab))


def ended(
    command: str, folder: Path, environment: dict[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run a line of the shell to its end, for at most so long."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
