"""Tokens of a corpus on disk: written once, checked, then memory-mapped.

A finished cache is a folder with ``train.bin``, ``held_out.bin``, the tokenizer, and ``meta.json``
that says what is in it; it appears under its name only when all of that is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mics.errors import DataError
from mics.training.data.tokens import Tokenizer

_BATCH_BYTES = 4 << 20
_PIECE = 1 << 20  # a longer document is handed to the tokenizer piece by piece

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many bytes of it are, and of how many (0: unknown)."""


@dataclass(frozen=True)
class Meta:
    """What ``meta.json`` says: sizes and checksums of the two splits."""

    dtype: str
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    sha256: dict[str, str]
    documents: dict[str, int]


@dataclass(frozen=True)
class Spool:
    """The text of all documents in one file, and which of them are held out."""

    text: NDArray[np.uint8]
    ends: list[int]
    held_out: list[bool]

    def documents(self, *, held_out: bool) -> Iterator[bytes]:
        """The documents of one split, in order."""
        start = 0
        for end, kept in zip(self.ends, self.held_out, strict=True):
            if kept == held_out:
                yield self.text[start:end].tobytes()
            start = end


def spool(
    documents: Iterable[bytes],
    file: Path,
    *,
    share: float,
    limit: int,
    seed: int,
    progress: Progress,
) -> Spool:
    """Copy the documents into one file and choose which are held out, by their content alone.

    The same documents give the same split whatever kind of file they came from. A document is held
    out when a hash of the seed and its text falls below ``share``; where that leaves a split
    empty, the nearest one is moved, and a single document is cut in two.

    Raises:
        DataError: there is no text.
    """
    ends: list[int] = []
    ranks: list[int] = []
    size = 0
    with file.open("wb") as out:
        for document in documents:
            kept = document[: limit - size] if limit else document
            if kept:
                out.write(kept)
                size += len(kept)
                ends.append(size)
                ranks.append(_hash(seed, kept))
                progress("reading", size, limit)
            if limit and size >= limit:
                break
    if not ends:
        raise DataError("The corpus is empty.", numbers="0 bytes of text.", write="--data.source")
    text = np.memmap(file, dtype=np.uint8, mode="r")
    if share == 0:
        return Spool(text, ends, [False] * len(ends))
    if len(ends) == 1:
        return Spool(text, [_cut(text, share), size], [False, True])
    held_out = [rank < share * 2**64 for rank in ranks]
    if not any(held_out):
        held_out[ranks.index(min(ranks))] = True
    if all(held_out):
        held_out[ranks.index(max(ranks))] = False
    return Spool(text, ends, held_out)


def write(folder: Path, spooled: Spool, tokenizer: Tokenizer, progress: Progress) -> None:
    """Tokenise both splits into ``folder``, which gets its name when it is complete."""
    dtype = "uint16" if tokenizer.size <= 2**16 else "uint32"
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    tokenizer.save(making / "tokenizer")
    meta = Meta(dtype, {}, {}, {}, {})
    done = 0
    for split, held_out in (("train", False), ("held_out", True)):
        digest = hashlib.sha256()
        tokens = text_bytes = count = 0
        with (making / f"{split}.bin").open("wb") as out:
            for batch in _batches(spooled.documents(held_out=held_out)):
                for document, ids in zip(batch, _encode(tokenizer, batch), strict=True):
                    data = np.append(ids, tokenizer.separator).astype(dtype).tobytes()
                    digest.update(data)
                    out.write(data)
                    tokens += len(ids) + 1
                    text_bytes += len(document)
                    count += 1
                done += sum(map(len, batch))
                progress("tokenising", done, len(spooled.text))
            out.flush()
            os.fsync(out.fileno())
        meta.tokens[split], meta.text_bytes[split] = tokens, text_bytes
        meta.sha256[split], meta.documents[split] = digest.hexdigest(), count
    with (making / "meta.json").open("w") as out_text:
        json.dump(asdict(meta), out_text, indent=1)
        out_text.flush()
        os.fsync(out_text.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)


def read_meta(folder: Path) -> Meta | None:
    """What a finished cache holds; ``None`` when it is missing, unfinished or of another size."""
    try:
        meta = Meta(**json.loads((folder / "meta.json").read_text()))
        itemsize = np.dtype(meta.dtype).itemsize
        sizes = {s: (folder / f"{s}.bin").stat().st_size // itemsize for s in meta.tokens}
    except (OSError, ValueError, TypeError):
        return None
    return meta if sizes == meta.tokens else None


def is_intact(folder: Path, progress: Progress) -> bool:
    """Whether every byte of a cache is what was written."""
    meta = read_meta(folder)
    if meta is None:
        return False
    for split, wanted in meta.sha256.items():
        digest = hashlib.sha256()
        data: Any = open_tokens(folder, meta, split).view(np.uint8)
        for start in range(0, len(data), 64 << 20):
            digest.update(data[start : start + (64 << 20)].tobytes())
            progress("checking", start, len(data))
        if digest.hexdigest() != wanted:
            return False
    return True


def open_tokens(folder: Path, meta: Meta, split: str) -> NDArray[np.unsignedinteger]:
    """Memory-map the ids of a split."""
    if meta.tokens[split] == 0:
        return np.zeros(0, dtype=meta.dtype)
    return np.memmap(folder / f"{split}.bin", dtype=meta.dtype, mode="r")


def _batches(documents: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, documents: list[bytes]) -> Iterator[NDArray[np.uint32]]:
    """Long documents in pieces, so that no tokenizer sees hundreds of megabytes at once."""
    pieces = [_pieces(document) for document in documents]
    encoded = tokenizer.encode_all([piece for of_one in pieces for piece in of_one])
    for of_one in pieces:
        yield np.concatenate([next(encoded) for _ in of_one])


def _pieces(document: bytes) -> list[bytes]:
    """At most ``_PIECE`` bytes each, cut after a line where there is one."""
    pieces = []
    start = 0
    while len(document) - start > _PIECE:
        end = document.rfind(b"\n", start, start + _PIECE) + 1 or start + _PIECE
        pieces.append(document[start:end])
        start = end
    return [*pieces, document[start:]]


def _cut(text: NDArray[np.uint8], share: float) -> int:
    """Where a single document is cut: its tail is held out, from the start of a line."""
    wanted = min(max(1, round(len(text) * (1 - share))), len(text) - 1) if len(text) > 1 else 1
    line = text[:wanted].tobytes().rfind(b"\n") + 1
    return line or wanted


def _hash(seed: int, text: bytes) -> int:
    digest = hashlib.sha256(seed.to_bytes(8, "little") + text).digest()
    return int.from_bytes(digest[:8], "little")
