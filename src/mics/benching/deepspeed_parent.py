"""DeepSpeed beside the other engines: every rank has a child in DeepSpeed's own environment.

Two of its releases cannot be imported together, so each engine runs in a process of its own, with a
process group of its own over the same links, and takes one step whenever its turn comes. A child
that waits blocks on a pipe and costs nothing.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from mics.benching.deepspeed_child import Order
from mics.errors import MicsError

RELEASES: dict[str, str] = {
    "zero2": "0.19.8",
    "zero3": "0.19.8",
    "hpz": "0.19.8",
    "deepspeed mics": "0.19.2",  # the last one that works with several partition groups
}


def find_python(name: str) -> Path:
    """The interpreter of the environment with the release that has this engine.

    ``MICS_BENCH_ENVIRONMENTS`` names the folder of the environments; by default the working one.

    Raises:
        MicsError: it is not there.
    """
    folder = Path(os.environ.get("MICS_BENCH_ENVIRONMENTS", "."))
    python = folder / f".venv-deepspeed-{RELEASES[name]}" / "bin" / "python"
    if not python.is_file():
        raise MicsError(
            f"The engine {name!r} needs DeepSpeed {RELEASES[name]} in an environment of its own.",
            numbers=f"There is no {python}.",
            write="make bench-environments, or other --engines",
        )
    return python.absolute()


class DeepSpeed:
    """One rank of a DeepSpeed engine. Making it is collective, and so is every step.

    Args:
        order: what it trains.

    Raises:
        MicsError: its environment is not there, or it ended.
    """

    def __init__(self, order: Order) -> None:
        self.name = order.name
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 lives with the child
        self._process = subprocess.Popen(
            [find_python(order.name), "-m", "mics.benching.deepspeed_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(),
        )
        self._ask(asdict(order))

    def step(self) -> float:
        """One optimizer step; returns the mean loss of all ranks and micro-steps."""
        return float(self._ask({"step": True})["loss"])

    def land(self) -> None:
        """Its step is complete when it returns."""

    def _ask(self, question: dict[str, object]) -> dict[str, float]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._errors.seek(0)
            words = self._errors.read().strip().splitlines()[-20:]
            raise MicsError(
                f"DeepSpeed's {self.name} ended on rank {dist.get_rank()} with exit code "
                f"{process.wait()}.",
                numbers="\n".join(words),
                write="other --engines",
            )
        read: dict[str, float] = json.loads(answer)
        return read


def _environment() -> dict[str, str]:
    """This rank's variables, for a process group of the children's own."""
    source = str(Path(__file__).parents[2])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    return kept | {
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
        "DS_ACCELERATOR": "cpu",
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK", str(dist.get_rank())),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": str(_agreed_port()),
    }


def _agreed_port() -> int:
    """A port that is free on rank 0, on every rank."""
    port = torch.zeros((), dtype=torch.int64)
    if dist.get_rank() == 0:
        with socket.socket() as free:
            free.bind((os.environ.get("MASTER_ADDR", "127.0.0.1"), 0))
            port.fill_(free.getsockname()[1])
    dist.broadcast(port, 0)
    return int(port)


def check_environments(names: Sequence[str]) -> None:
    """Check before anything starts that every engine has its environment.

    Raises:
        MicsError: an environment is not there.
    """
    for name in names:
        find_python(name)
    if names and sys.platform != "linux":
        raise MicsError("DeepSpeed's engines are measured on Linux only.", write="other --engines")
