"""The program that every rank runs, as people write it after ``--``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def as_command(words: Sequence[str]) -> list[str]:
    """Return the command line of a script, ``-m module``, ``mics <verb>`` or any program.

    What is Python's runs in this interpreter.
    """
    first = words[0]
    if first == "-m" or first.endswith(".py"):
        return [sys.executable, *words]
    if first == "mics":
        return [sys.executable, "-m", *words]
    if first in ("python", "python3") and len(words) > 1:
        return [sys.executable, *words[1:]]
    return list(words)


def for_this_interpreter(command: Sequence[str]) -> list[str] | None:
    """Return script or module and its arguments, where a fork could run them; else ``None``.

    Args:
        command: as ``as_command`` returns it.
    """
    if command[0] != sys.executable:
        return None
    words = list(command[1:])
    if words[0] == "-m":
        return words if len(words) > 1 else None
    return words if not words[0].startswith("-") else None
