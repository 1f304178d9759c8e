"""Start a program in a fork of this process, which has imported torch already.

A new interpreter takes some seconds for that, and most programs of tests take less for the rest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

import torch.multiprocessing.spawn  # noqa: F401  here once, not in each that hatches

import mics.ranks.starting  # noqa: F401


def hatch(
    program: str, environment: dict[str, str], terminal: int | None = None
) -> subprocess.Popen[str]:
    """Start a program as ``subprocess.Popen([sys.executable, "-c", program])`` would.

    Args:
        program: its text.
        environment: all of its variables.
        terminal: its standard streams; by default its input is this process's, and the rest pipes.
    """
    code = compile(program, "<program>", "exec")

    def be_the_program() -> NoReturn:
        """Run in the fork, which has its streams, instead of another interpreter; never return."""
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # with the pipe on which Popen waits
        os.environ.clear()
        os.environ.update(environment)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", 1), open(2, "w", 1)  # noqa: SIM115
        sys.argv = ["-c"]
        warnings.resetwarnings()  # pytest makes errors of them
        warnings.simplefilter("ignore", DeprecationWarning)
        os._exit(_run(code))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads (3.12)
        return subprocess.Popen(
            [sys.executable],  # named where it cannot be found; never run
            stdin=terminal,
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
            restore_signals=False,  # a new interpreter would ignore SIGPIPE again
            preexec_fn=be_the_program,
        )


def start(
    program: str, environment: dict[str, str], terminal: int | None = None
) -> subprocess.Popen[str]:
    """As ``hatch``, in an interpreter of its own.

    For programs that read tables or tokenize: what they use has threads, which a fork does not.
    """
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=terminal,
        stdout=subprocess.PIPE if terminal is None else terminal,
        stderr=subprocess.PIPE if terminal is None else terminal,
        text=True,
        env=environment,
    )


def start_verb(
    words: Sequence[str], environment: dict[str, str], terminal: int | None = None
) -> subprocess.Popen[str]:
    """Start ``mics`` with these words; on a terminal, it is the one that controls it."""
    owns = "os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)" if terminal is not None else ""
    program = f"import fcntl, os, sys, termios; {owns}\nfrom mics.__main__ import main\n"
    return start(f"{program}sys.exit(main({[*words]!r}))", environment, terminal)


def _run(code: object) -> int:
    """Run to the end, say what is uncaught, and return the exit code; as the interpreter does."""
    try:
        exec(code, {"__name__": "__main__"})  # type: ignore[arg-type]
        ended: object = 0
    except SystemExit as exited:
        ended = exited.code
    except BaseException:
        traceback.print_exc()
        ended = 1
    if ended is not None and not isinstance(ended, int):
        print(ended, file=sys.stderr)
        ended = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return ended or 0
