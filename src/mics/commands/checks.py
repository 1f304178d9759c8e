"""Checks of a command line: files that are to be written, and options that exclude others."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from mics.errors import MicsError


def check_folders(*files: Path | None) -> None:
    """Check before anything is computed that every file has a folder to go to.

    Raises:
        MicsError: a file has none, or is a folder.
    """
    for file in files:
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise MicsError(
                f"{file} cannot be written.",
                numbers="It is a folder." if file.is_dir() else f"There is no {file.parent}.",
                write="a file in a folder that exists",
            )


def write_text(file: Path, text: str) -> None:
    """Write a file that an option names.

    Raises:
        MicsError: it cannot be written; names it.
    """
    try:
        file.write_text(text)
    except OSError as error:
        raise MicsError(f"{file} cannot be written.", numbers=f"{error.strerror}.") from None


def refuse_others(config: Any, switch: str, *with_it: str) -> None:
    """Refuse options beside one that makes the command do something else.

    Args:
        config: dataclass of options.
        switch: that one.
        with_it: those that belong to it.

    Raises:
        MicsError: an option was given beside the switch.
    """
    changed = [name for name in _changed(config) if name not in (switch, *with_it)]
    if changed:
        options = [f"--{name.replace('_', '-')}" for name in changed]
        raise MicsError(f"{' and '.join(options)} would have no effect beside --{switch}.")


def _changed(config: Any) -> list[str]:
    """Name the options that are not what they are by default, those of nested tables too."""
    names: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            names += _changed(value)
        elif value != field.default:
            names.append(field.name)
    return names
