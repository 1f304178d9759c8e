"""What a command is to write, and options beside which others mean nothing."""

from __future__ import annotations

from dataclasses import fields
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


def refuse_others(config: Any, switch: str, *with_it: str) -> None:
    """Refuse options beside one that makes the command do something else.

    Args:
        config: dataclass of options.
        switch: that one.
        with_it: those that belong to it.

    Raises:
        MicsError: an option was given beside the switch.
    """
    changed = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(config)
        if field.name not in (switch, *with_it) and getattr(config, field.name) != field.default
    ]
    if changed:
        raise MicsError(f"{' and '.join(changed)} would have no effect beside --{switch}.")
