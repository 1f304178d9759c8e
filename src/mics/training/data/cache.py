"""Tokens of a corpus on disk: written once, checked, then memory-mapped.

A finished cache is a folder with ``train.bin``, ``held_out.bin``, the tokenizer, and ``meta.json``
that says what is in it; it appears under its name only when all of that is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mics.checkpoint.disk import sync, write_bytes
from mics.ranks.console import ShowBytes
from mics.ranks.files import read_small, write_whole
from mics.training.data.cutting import BLOCK
from mics.training.data.saved_tokenizer import checksums, save_tokenizer
from mics.training.data.spelling import note_on
from mics.training.data.spool import Spool
from mics.training.data.tokens import Tokenizer

_BATCH_BYTES = 4 << 20


@dataclass(frozen=True)
class Meta:
    """What ``meta.json`` says: of the two splits, and of the tokenizer's files their checksums.

    ``sources`` names the files that the text came from as they looked then, ``text`` what was in
    them, and ``notes`` what a person should know about it.
    """

    dtype: str
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    sha256: dict[str, str]
    documents: dict[str, int]
    tokenizer: dict[str, str]
    sources: str
    text: str
    notes: list[str]


def write(
    folder: Path, spooled: Spool, tokenizer: Tokenizer, sources: str, progress: ShowBytes
) -> None:
    """Tokenise both splits into ``folder``, which gets its name when it is complete."""
    dtype = "uint16" if tokenizer.size <= 2**16 else "uint32"
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    saved = save_tokenizer(tokenizer, making / "tokenizer")
    meta = Meta(dtype, {}, {}, {}, {}, saved, sources, spooled.digest, _notes(spooled, tokenizer))
    separator = np.array([tokenizer.separator], dtype).tobytes()
    done = cuts = 0
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
                    cuts += not ends and not text[-1:].isspace()
                progress("tokenising", done + text_bytes, len(spooled.text))
            out.flush()
            os.fsync(out.fileno())
        done += text_bytes
        meta.tokens[split], meta.text_bytes[split] = tokens, text_bytes
        meta.sha256[split], meta.documents[split] = digest.hexdigest(), count
    if cuts and not tokenizer.is_bytes:
        meta.notes.append(
            f"{cuts:,} cut(s) in text without a blank for {BLOCK >> 10} KiB: tokens of a word that "
            "goes over a cut differ from those of the whole"
        )
    write_bytes(making / "meta.json", _told(meta).encode())
    sync(making)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    sync(folder.parent)


def renew(folder: Path, meta: Meta, sources: str) -> None:
    """Write down that the files look otherwise and hold the same text."""
    write_whole(folder / "meta.json", _told(replace(meta, sources=sources)))


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


def checksums_in(folder: Path) -> str:
    """The checksums that a folder's ``meta.json`` gives of what is in it; "none" without one."""
    try:
        told = json.loads(read_small(folder / "meta.json"))
        return json.dumps(told.get("facts", told)["sha256"])
    except (OSError, ValueError, KeyError, AttributeError):
        return "none"


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
    return checksums(folder / "tokenizer") == meta.tokenizer


def open_tokens(folder: Path, meta: Meta, split: str) -> NDArray[np.unsignedinteger]:
    """Memory-map the ids of a split."""
    if meta.tokens[split] == 0:
        return np.zeros(0, dtype=meta.dtype)
    return np.memmap(folder / f"{split}.bin", dtype=meta.dtype, mode="r")


def _notes(spooled: Spool, tokenizer: Tokenizer) -> list[str]:
    if not spooled.spelled:
        return []
    return [note_on(spooled.spelled, tokenizer.reads_specials, "--data.specials")]


def _told(meta: Meta) -> str:
    return json.dumps({"facts": asdict(meta), "sha256": _digest(asdict(meta))}, indent=1)


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
