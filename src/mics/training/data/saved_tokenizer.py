"""A tokenizer in a folder beside its tokens, and whether it is the one that made them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mics.checkpoint.disk import facts_of, sync
from mics.training.data.tokens import Tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    """Write a tokenizer's files, to the disk, and return their checksums by name."""
    tokenizer.save(folder)
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    return checksums(folder)


def checksums(folder: Path) -> dict[str, str]:
    """The checksum of every file in a folder, by its name there."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): facts_of(file).sha256 for file in files}


def checksums_of(tokenizer: Tokenizer) -> dict[str, str]:
    """The checksums that a tokenizer has when it is saved."""
    with tempfile.TemporaryDirectory() as scratch:
        return save_tokenizer(tokenizer, Path(scratch))
