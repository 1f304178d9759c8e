"""Small files: seen whole or not at all when they are written, read only if they are small."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file, and the folders it needs; readers see the file of before or the new one.

    Raises:
        OSError: it cannot be written; the file of before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


_SMALL_BYTES = 1 << 28


def read_small(path: Path, most: int = _SMALL_BYTES) -> bytes:
    """The bytes of a regular file that is said to be small, wherever links lead.

    A device, a pipe or a socket is refused before it is read, because it may never end.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
    if max(size, len(data)) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return data


def open_regular(path: Path) -> int:
    """The descriptor of a regular file, opened for reading.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    # A pipe without a writer would hold up a plain open.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor
