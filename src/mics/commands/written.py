"""Files that a command is to write."""

from __future__ import annotations

from pathlib import Path

from mics.errors import MicsError


def check_folders(*files: Path | None) -> None:
    """Before anything is computed: every file has a folder to go to.

    Raises:
        MicsError: it has none, or is one.
    """
    for file in files:
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise MicsError(
                f"{file} cannot be written.",
                numbers="It is a folder." if file.is_dir() else f"There is no {file.parent}.",
                write="a file in a folder that exists",
            )
