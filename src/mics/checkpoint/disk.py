"""Files that are on the disk when we say so, and are what we say."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mics.checkpoint.manifest import (
    CHECKSUM,
    MANIFEST,
    MOST_BYTES,
    FileFacts,
    Manifest,
    checksum_line,
)
from mics.ranks.files import open_regular


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileFacts:
    """Write CPU tensors as safetensors, to the disk.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    sync(path)
    return facts_of(path)


def write_bytes(path: Path, data: bytes) -> FileFacts:
    """Write a small file, to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    sync(path)
    return FileFacts(len(data), hashlib.sha256(data).hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the table of contents of a checkpoint and its checksum, to the disk.

    Raises:
        OSError: it cannot be written, or is larger than what would be read.
    """
    data = manifest.to_bytes()
    if len(data) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"{MANIFEST} would have {len(data)} bytes", MANIFEST)
    write_bytes(folder / CHECKSUM, checksum_line(data))
    write_bytes(folder / MANIFEST, data)


def facts_of(path: Path) -> FileFacts:
    """Size and checksum, read from the file.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileFacts(os.fstat(file.fileno()).st_size, digest)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
