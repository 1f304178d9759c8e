"""The folder that an import or an export writes: new, whole, or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mics.checkpoint.appearing import appearing
from mics.errors import CheckpointError


def check_new(out: Path) -> None:
    """Check that a folder is not there yet.

    Raises:
        CheckpointError: it is.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; nothing is written over.", write="another folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which is called ``out`` when it is complete.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with appearing(out) as making:
            yield making
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error.strerror or error}.", write="a writable folder"
        ) from None
