"""Run a rank's script or module in a fork, as ``python`` would run it from the command line."""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
import types
from collections.abc import Sequence
from pathlib import Path

_MOST_WORDS = 16_000  # characters: a pipe takes them at once


def run_as_main(words: Sequence[str]) -> None:
    """Run ``script.py ...`` or ``-m module ...`` in this process.

    Raises:
        BaseException: whatever it raises.
    """
    if words[0] == "-m":
        sys.argv = ["-m", *words[2:]]
        sys.path[0] = str(Path.cwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(words)
    path = Path(words[0])
    sys.path[0] = str(path.resolve().parent)
    main = types.ModuleType("__main__")
    main.__file__ = str(path)
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    exec(compile(path.read_bytes(), str(path), "exec"), main.__dict__)


def exit_code_of(error: BaseException, pipe: int) -> int:
    """End a rank's program with what it raised, as the interpreter would.

    The words of an exception nobody caught go to the agent, which says those of the rank that
    failed first; the program's own hook for them is called.

    Args:
        error: what it raised.
        pipe: on which the agent reads.
    """
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        _tell(pipe, "", f"{error.code}\n")
        return 1
    kept, sys.stderr = sys.stderr, io.StringIO()
    try:
        error.__traceback__ = _from_the_program(error.__traceback__)  # what is printed is its own
        sys.excepthook(type(error), error, error.__traceback__)
        words = sys.stderr.getvalue()
    finally:
        sys.stderr = kept
    _tell(pipe, type(error).__name__, words)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _from_the_program(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Leave out what stands around the program, as it does not where ``python`` runs it."""
    around = (str(Path(__file__).parent), "<frozen runpy>")
    inside = trace
    while inside is not None and inside.tb_frame.f_code.co_filename.startswith(around):
        inside = inside.tb_next
    return inside or trace


def _tell(pipe: int, name: str, words: str) -> None:
    short = words if len(words) <= _MOST_WORDS else f"... {words[-_MOST_WORDS:]}"
    os.write(pipe, json.dumps({"raised": name, "words": short}).encode() + b"\n")
