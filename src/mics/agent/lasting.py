"""Processes that end with their parent, and descriptors of processes (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from mics.errors import MicsError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def check_system() -> None:
    """Check that this system can tell of the death of processes.

    Raises:
        MicsError: it cannot.
    """
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        raise MicsError(
            "mics run needs Linux: elsewhere no process ends with its parent.",
            numbers=f"This is {sys.platform}.",
            write="torchrun --nproc-per-node <GPUs> script.py",
        )


def end_with(parent: int) -> None:
    """Let this process be killed when its parent dies, whatever it does then.

    Args:
        parent: the parent's process id; if it has gone already, this process ends at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
