"""Folders that appear whole: written beside their place, renamed when they are on the disk.

The folder that is being written is called ``NAME.<8 hex digits>.tmp``, and its writer holds a lock
on it. The lock is the kernel's, so it ends with the writer however that ends, and the next writer
of the same name removes what a dead one has left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mics.checkpoint.disk import sync

TEMPORARY = ".tmp"


class AppearingFolder:
    """A folder that is being written and will be called ``target``.

    Args:
        target: its name when it is complete; the folders above it are made.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, target: Path) -> None:
        if target.parent.is_dir():
            _sweep(target)
        self._target = target
        self._lock: int | None
        self.path, self._lock = _make(target)

    def complete(self) -> None:
        """Give it its name, when the names of all its files are on the disk.

        Raises:
            OSError: there is something of that name, or it cannot be renamed.
        """
        for folder in (*(f for f in self.path.rglob("*") if f.is_dir()), self.path):
            sync(folder)
        self.path.rename(self._target)
        sync(self._target.parent)
        self._let_go()

    def discard(self) -> None:
        """Remove it; nothing happens to one that is complete."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to write into that is called ``target`` at the end, and is gone after an error.

    Raises:
        OSError: it cannot be made, or there is something of its name at the end.
    """
    folder = AppearingFolder(target)
    try:
        yield folder.path
        folder.complete()
    finally:
        folder.discard()


def _make(target: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that locks it."""
    while True:
        path = target.with_name(f"{target.name}.{secrets.token_hex(4)}{TEMPORARY}")
        path.mkdir(parents=True)
        try:
            held = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # it was swept between the two lines
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # it is being swept
            os.close(held)
            continue
        except OSError:  # a disk without locks; nothing is swept from it either
            return path, held
        if path.is_dir():
            return path, held
        os.close(held)


def _sweep(target: Path) -> None:
    """Remove what dead writers of this name have left."""
    left_by_one = re.compile(rf"{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}")
    for left in target.parent.iterdir():
        if left_by_one.fullmatch(left.name) and left.is_dir():
            with contextlib.suppress(OSError):
                _remove_if_free(left)


def _remove_if_free(left: Path) -> None:
    held = os.open(left, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
        shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(held)
