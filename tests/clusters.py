"""What stands in for a cluster: programs of Slurm that start processes of this machine."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import mics

# Starts as many processes as the step has tasks and tells them who they are in the variables that
# Slurm 22.05 sets. One that fails ends the others, and SIGTERM goes to all of them.
SRUN = """
import os, signal, subprocess, sys, time
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
program = sys.argv[1 + next(i for i, word in enumerate(sys.argv[1:]) if word[:2] != "--"):]
tasks = int(options["ntasks"])
each = options["ntasks-per-node"]
of_step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(tasks),
           "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": each}
started = [
    subprocess.Popen(program, env=os.environ | of_step | {
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"})
    for rank in range(tasks)
]
def tell(number, frame):
    for process in started:
        process.send_signal(number)
signal.signal(signal.SIGTERM, tell)
worst = 0
while any(process.poll() is None for process in started):
    failed = [process.returncode for process in started if process.returncode]
    if failed:
        worst = worst or abs(failed[0])
        tell(signal.SIGKILL, None)
    time.sleep(0.05)
sys.exit(worst or max(abs(process.returncode) for process in started))
"""

PROGRAMS = {
    # An environment that nobody activated has no python of its own on the path.
    "python": 'exec {python} "$@"',
    "mics": 'exec {python} -m mics "$@"',
    "torchrun": 'exec {python} -m torch.distributed.run "$@"',
    "srun": 'echo "$$" >> "$STAND_IN/steps"; exec {python} "$STAND_IN/srun.py" "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$STAND_IN/told"; fi',
    "scancel": 'echo "$@" >> "$STAND_IN/told"; kill -TERM "$(tail -n 1 "$STAND_IN/steps")"',
}


def stand_in(folder: Path) -> dict[str, str]:
    """Put the programs into a folder; returns the environment in which they are found."""
    folder.mkdir()
    (folder / "srun.py").write_text(SRUN)
    for name, line in PROGRAMS.items():
        program = folder / name
        program.write_text("#!/bin/sh\n" + line.format(python=sys.executable) + "\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    told = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "MICS_JOB")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in told and not name.startswith(("SLURM_", "PET_", "PMI"))
    }
    return environment | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(mics.__file__).parents[1]),
        "STAND_IN": str(folder),
        "SLURM_JOB_ID": str(os.getpid()),  # from which the ranks' port follows
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
