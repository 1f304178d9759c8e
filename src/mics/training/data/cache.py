"""Tokens of a corpus on disk: written once, checked, then memory-mapped.

A finished cache is a folder with ``train.bin``, ``held_out.bin``, the tokenizer, and ``meta.json``
that says what is in it; it appears under its name only when all of that is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mics.checkpoint.disk import facts_of, sync, write_bytes
from mics.errors import DataError
from mics.ranks.console import ShowBytes
from mics.ranks.files import read_small
from mics.training.data.tokens import Tokenizer

_BATCH_BYTES = 4 << 20
_PIECE = 1 << 20  # a longer document is tokenised piece by piece, in memory of one piece


@dataclass(frozen=True)
class Meta:
    """What ``meta.json`` says: of the two splits, and of the tokenizer's files their checksums."""

    dtype: str
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    sha256: dict[str, str]
    documents: dict[str, int]
    tokenizer: dict[str, str]


@dataclass(frozen=True)
class Spool:
    """The text of all documents in one file, and which of them are held out."""

    text: NDArray[np.uint8]
    ends: list[int]
    held_out: list[bool]

    def pieces(self, *, held_out: bool) -> Iterator[tuple[bytes, bool]]:
        """One split in order, a mebibyte at most at a time, and whether a document ends with it."""
        start = 0
        for end, kept in zip(self.ends, self.held_out, strict=True):
            if kept == held_out:
                while end - start > _PIECE:
                    cut = _boundary(self.text, start, start + _PIECE)
                    yield self.text[start:cut].tobytes(), False
                    start = cut
                yield self.text[start:end].tobytes(), True
            start = end


def spool(
    documents: Iterable[bytes],
    file: BinaryIO,
    *,
    share: float,
    limit: int,
    seed: int,
    progress: ShowBytes,
) -> Spool:
    """Copy the documents into an open file and choose which are held out, by their content alone.

    The same documents give the same split whatever kind of file they came from. A document is held
    out when a hash of the seed and its text falls below ``share``; where that leaves a split
    empty, the nearest one is moved, and a single document is cut in two.

    Raises:
        DataError: there is no text.
    """
    ends: list[int] = []
    ranks: list[int] = []
    size = 0
    for document in documents:
        kept = document[: limit - size] if limit else document
        if kept:
            file.write(kept)
            size += len(kept)
            ends.append(size)
            ranks.append(_hash(seed, kept))
            progress("reading", size, limit)
        if limit and size >= limit:
            break
    if not ends:
        raise DataError("The corpus is empty.", numbers="0 bytes of text.", write="--data.source")
    file.flush()
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


def write(folder: Path, spooled: Spool, tokenizer: Tokenizer, progress: ShowBytes) -> None:
    """Tokenise both splits into ``folder``, which gets its name when it is complete."""
    dtype = "uint16" if tokenizer.size <= 2**16 else "uint32"
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    meta = Meta(dtype, {}, {}, {}, {}, _save(tokenizer, making / "tokenizer"))
    separator = np.array([tokenizer.separator], dtype).tobytes()
    done = 0
    for split, held_out in (("train", False), ("held_out", True)):
        digest = hashlib.sha256()
        tokens = text_bytes = count = 0
        with (making / f"{split}.bin").open("wb") as out:
            for batch in _batches(spooled.pieces(held_out=held_out)):
                encoded = tokenizer.encode_all([text for text, _ in batch])
                for (text, ends), ids in zip(batch, encoded, strict=True):
                    data = ids.astype(dtype).tobytes() + (separator if ends else b"")
                    digest.update(data)
                    out.write(data)
                    tokens += len(ids) + ends
                    text_bytes += len(text)
                    count += ends
                progress("tokenising", done + text_bytes, len(spooled.text))
            out.flush()
            os.fsync(out.fileno())
        done += text_bytes
        meta.tokens[split], meta.text_bytes[split] = tokens, text_bytes
        meta.sha256[split], meta.documents[split] = digest.hexdigest(), count
    told = {"facts": asdict(meta), "sha256": _digest(asdict(meta))}
    write_bytes(making / "meta.json", json.dumps(told, indent=1).encode())
    sync(making)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    sync(folder.parent)


def read_meta(folder: Path) -> Meta | None:
    """What a finished cache holds; ``None`` when it is missing, unfinished or of another size."""
    try:
        told = json.loads(read_small(folder / "meta.json"))
        if told["sha256"] != _digest(told["facts"]):
            return None
        meta = Meta(**told["facts"])
        sizes = {split: (folder / f"{split}.bin").stat().st_size for split in meta.tokens}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    itemsize = np.dtype(meta.dtype).itemsize
    return meta if sizes == {s: n * itemsize for s, n in meta.tokens.items()} else None


def is_intact(folder: Path, progress: ShowBytes) -> bool:
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
    return _checksums(folder / "tokenizer") == meta.tokenizer


def open_tokens(folder: Path, meta: Meta, split: str) -> NDArray[np.unsignedinteger]:
    """Memory-map the ids of a split."""
    if meta.tokens[split] == 0:
        return np.zeros(0, dtype=meta.dtype)
    return np.memmap(folder / f"{split}.bin", dtype=meta.dtype, mode="r")


def _save(tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    tokenizer.save(folder)
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    return _checksums(folder)


def _checksums(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): facts_of(file).sha256 for file in files}


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _batches(pieces: Iterator[tuple[bytes, bool]]) -> Iterator[list[tuple[bytes, bool]]]:
    batch: list[tuple[bytes, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut(text: NDArray[np.uint8], share: float) -> int:
    """Where a single document is cut: its tail is held out, from the start of a line."""
    if len(text) == 1:
        return 1
    wanted = min(max(1, round(len(text) * (1 - share))), len(text) - 1)
    return _boundary(text, 0, wanted)


def _boundary(text: NDArray[np.uint8], start: int, end: int) -> int:
    """The last place up to ``end`` for a cut: after a line, else between characters (UTF-8)."""
    start = max(start, end - _PIECE)
    window = text[start : end + 1].tobytes()
    line = window.rfind(b"\n", 0, end - start) + 1
    places = range(end - start, max(end - start - 4, 0), -1)
    character = next((at for at in places if window[at] & 0xC0 != 0x80), end - start)
    return start + (line or character)


def _hash(seed: int, text: bytes) -> int:
    digest = hashlib.sha256(seed.to_bytes(8, "little"))
    digest.update(text)
    return int.from_bytes(digest.digest()[:8], "little")
