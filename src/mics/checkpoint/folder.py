"""The folder of a run: its lock, its checkpoints by step, the newest intact one, the old ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mics.checkpoint.appearing import TEMPORARY
from mics.checkpoint.peers import Peers
from mics.checkpoint.verifying import verified_manifest
from mics.checkpoint.writing import let_save_end
from mics.errors import CheckpointError
from mics.ranks.console import say

_LOCK = ".lock"
_IDENTITY = ".identity"
_TRASH = ".trash"
_STEP = re.compile(r"step-(\d{8,})")


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder; ``None`` when it is called something else."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def steps_of(root: Path) -> list[int]:
    """The steps of the checkpoints of a run, intact or not, newest first."""
    return [step for step in map(step_of, _checkpoints(root)) if step is not None]


def newest_intact(root: Path, *, before: int | None = None) -> Path | None:
    """The newest checkpoint of a run whose every byte is what was written. Collective.

    A damaged one is said, with the file that is, and the next older one is tried.

    Args:
        root: the folder of the run.
        before: a step; only checkpoints of earlier ones count.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
    """
    let_save_end()
    peers = Peers()
    names: list[str] = peers.together(lambda: _names(root, before), only=0)[0]
    for name in names:
        try:
            verified_manifest(root / name, peers)
        except CheckpointError as error:
            say(f"skipping a checkpoint: {error.what} {error.numbers}")
        else:
            return root / name
    if names:
        raise CheckpointError(
            f"None of the checkpoints in {root} is intact.",
            numbers=f"{len(names)} tried, {names[-1]} to {names[0]}.",
            write="--run.folder <a new folder> to start anew",
        )
    return None


def _names(root: Path, before: int | None) -> list[str]:
    found = [(folder.name, step_of(folder)) for folder in _checkpoints(root)]
    return [name for name, step in found if before is None or (step is not None and step < before)]


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints of a run; 0 keeps all. Rank 0 calls it."""
    for old in _checkpoints(root)[keep:] if keep else []:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        trash = old.with_name(old.name + _TRASH)
        old.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def set_aside_newer(root: Path, than: Path) -> list[Path]:
    """Rename the checkpoints of a run that are newer than one of it: they are not to be trusted.

    The run will come to their steps again, and nothing is ever written over. Rank 0 calls it.

    Returns:
        Their new names, ``step-....damaged``.
    """
    aside = []
    for checkpoint in _checkpoints(root):
        if checkpoint.name > than.name:
            name = f"{checkpoint.name}.damaged"
            taken = len(list(root.glob(f"{name}*")))
            aside.append(checkpoint.rename(root / (f"{name}-{taken}" if taken else name)))
    return aside


class HeldFolder:
    """A run's folder and its lock, which rank 0 has; the other ranks rely on it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock: IO[str] | None = None

    def take(self) -> None:
        """Make the folder and hold it, also once more where somebody has deleted it.

        Raises:
            CheckpointError: another job holds it.
            OSError: it cannot be made.
        """
        self.leave()
        self._lock = _lock(self._root)

    def is_there(self) -> bool:
        """Whether the folder is still the one that is held."""
        if self._lock is None:
            return True
        try:
            found = (self._root / _LOCK).stat()
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._lock.fileno()))

    def identity(self) -> str:
        """A name of this folder that no other one has, not one made later in its place either.

        Raises:
            OSError: it cannot be written.
        """
        path = self._root / _IDENTITY
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            file.write(f"folder-{secrets.token_hex(8)}")
        return path.read_text()

    def leave(self) -> None:
        """Let another job hold it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@contextmanager
def hold_folder(root: Path) -> Iterator[HeldFolder]:
    """Make a run's folder and hold it for this job; remove what dead jobs left half-done.

    Collective. The lock is the kernel's, so it ends with the job however that ends.

    Raises:
        CheckpointError: on every rank; another job holds it (host and process are named), or it
            cannot be written.
    """
    peers = Peers()
    held = HeldFolder(root)
    peers.together(held.take, only=0)
    try:
        if peers.rank == 0:
            for pattern in (f"step-*{TEMPORARY}", f"step-*{_TRASH}"):
                for left in root.glob(pattern):
                    shutil.rmtree(left, ignore_errors=True)
        yield held
    finally:
        held.leave()


def _lock(root: Path) -> IO[str]:
    root.mkdir(parents=True, exist_ok=True)
    file = (root / _LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another job"
        file.close()
        raise CheckpointError(
            f"{root} is in use by another job.",
            numbers=f"It is {holder}.",
            write="--run.folder <another folder>, or end that job first",
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _checkpoints(root: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    if not root.is_dir():
        return []
    found = [(step, f) for f in root.iterdir() if (step := step_of(f)) is not None and f.is_dir()]
    return [folder for _, folder in sorted(found, reverse=True)]
