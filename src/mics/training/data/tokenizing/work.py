"""One part made: its documents read, tokenised and written, and what became of it kept.

[Note: a part is there or not]
A shard is written under a name of its process and renamed when it is on the disk; the record of the
part comes last. Whatever is killed when, a part without its record is done again, to the same
bytes, and two processes that make the same part do no harm.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mics.ranks.files import read_small, write_whole
from mics.training.data.cutting import PIECE, cut_up
from mics.training.data.spelling import Spelled
from mics.training.data.splitting import OF_ALL, number_of
from mics.training.data.token_folder import SPLITS
from mics.training.data.tokenizing.plan import Job, Part
from mics.training.data.tokenizing.spans import Passage, passages
from mics.training.data.tokens import Tokenizer

PROGRESS = ".progress"
"""The folder, inside of the one that is made, of what is not finished."""

_BATCH = 1 << 20  # bytes that are tokenised at once: a core's caches, and little memory
_AROUND = 128  # bytes on both sides of a cut that tell whether the tokenizer sees it

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Made:
    """What a split of a part has become."""

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Record:
    """What a part has become, and of which files.

    ``looks`` tells whether its files have been written to since. ``spelled`` counts special tokens
    that the text spells, ``first`` says where; ``seen_cuts`` counts the cuts in long documents that
    have other ids than the whole.
    """

    looks: str
    splits: dict[str, Made]
    spelled: int
    first: str
    seen_cuts: int


def shard_name(split: str, number: int) -> str:
    """What the shard of a part is called: train-00012.bin."""
    return f"{split}-{number:05}.bin"


def looks_of(part: Part) -> str:
    """Equal as long as nobody has written to the files of a part, or replaced them.

    Size and time of a file can be kept when its content changes; the time at which the kernel saw
    the last change (ctime) can not.
    """
    seen = [(name, os.stat(name)) for name in sorted({span.file for span in part})]  # noqa: PTH116
    looks = [[name, at.st_size, at.st_mtime_ns, at.st_ctime_ns] for name, at in seen]
    return hashlib.sha256(json.dumps(looks).encode()).hexdigest()


def read_record(folder: Path, number: int) -> Record | None:
    """What is known of a part; ``None`` if it is not made."""
    try:
        told = json.loads(read_small(_record(folder, number), 1 << 20))
        splits = {split: Made(**told["splits"][split]) for split in SPLITS}
        return Record(**{**told, "splits": splits})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def make_part(
    folder: Path, number: int, part: Part, job: Job, share: float, tokenizer: Tokenizer, tell: Tell
) -> None:
    """Tokenise a part into its shards, and write down what it has become.

    Args:
        folder: the folder that is made.
        number: of the part.
        part: what is read.
        job: the options.
        share: of the documents, to be held out.
        tokenizer: of all parts.
        tell: is told how many bytes of the part's weight are done.

    Raises:
        DataError: a file cannot be read, or is no text.
        OSError: the shards cannot be written.
    """
    looks = looks_of(part)
    spelled = Spelled(tokenizer.specials)
    with ExitStack() as files:
        writers = {split: _Writer(folder, split, number, tokenizer, files) for split in SPLITS}
        weight = 0
        for span in part:
            done = 0
            for passage in passages(span, job.field):
                head, pieces = _with_head(passage)
                if not head:
                    continue  # a document without a letter
                writer = writers[SPLITS[number_of(head, job.seed) < share * OF_ALL]]
                writer.begin(passage.before)
                spelled.begin(passage.place)
                for text, last in cut_up(pieces):
                    spelled.look(text)
                    writer.add(text, ends=last and passage.ends)
                    done += len(text)
                    tell(weight + min(done, span.weight))
            weight += span.weight
        splits = {split: writer.finish() for split, writer in writers.items()}
    cuts = sum(writer.seen_cuts for writer in writers.values())
    record = Record(looks, splits, spelled.count, spelled.first, cuts)
    write_whole(_record(folder, number), json.dumps(asdict(record)))
    tell(weight)


def _with_head(passage: Passage) -> tuple[bytes, Iterator[bytes]]:
    """The first mebibyte of a passage's document, and the pieces of the passage."""
    pieces = iter(passage.pieces)
    begun = b""
    for piece in pieces:
        begun += piece
        if passage.head or len(begun) >= PIECE:
            break
    return passage.head or begun[:PIECE], chain([begun], pieces)


def _record(folder: Path, number: int) -> Path:
    return folder / PROGRESS / f"{number:05}.json"


class _Writer:
    """Writes the shard of a part in one split; there is none where nothing was added."""

    def __init__(
        self, folder: Path, split: str, number: int, tokenizer: Tokenizer, files: ExitStack
    ) -> None:
        self._target = folder / shard_name(split, number)
        self._unfinished = folder / PROGRESS / f"{self._target.name}.{os.getpid()}.tmp"
        self._tokenizer = tokenizer
        self._dtype = tokenizer.dtype
        self._separator = np.array([tokenizer.separator], self._dtype).tobytes()
        self._files = files
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._batch: list[tuple[bytes, bool]] = []
        self._size = self._tokens = self._documents = self._text_bytes = 0
        self._before = b""
        self.seen_cuts = 0

    def begin(self, before: bytes) -> None:
        """Another document begins, or goes on behind some bytes that are written elsewhere."""
        self._before = before

    def add(self, text: bytes, *, ends: bool) -> None:
        """Add a piece of a document, and a separator where it ends."""
        if self._before and text:
            self.seen_cuts += self._sees(self._before[-_AROUND:], text[:_AROUND])
        self._before = b"" if ends else text[-_AROUND:]
        self._batch.append((text, ends))
        self._size += len(text)
        if self._size >= _BATCH:
            self._write()

    def finish(self) -> Made:
        """Bring the shard to the disk under its name."""
        self._write()
        if self._file is None:
            self._target.unlink(missing_ok=True)  # of a source that was another one then
            return Made()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unfinished.replace(self._target)
        made = (self._tokens, self._documents, self._text_bytes, self._digest.hexdigest())
        return Made(*made)

    def _write(self) -> None:
        if not self._batch:
            return
        if self._file is None:
            self._file = self._files.enter_context(self._unfinished.open("wb"))
            self._files.callback(self._unfinished.unlink, missing_ok=True)
        encoded = self._tokenizer.encode_all([text for text, _ in self._batch])
        for (text, ends), ids in zip(self._batch, encoded, strict=True):
            data = ids.astype(self._dtype).tobytes() + (self._separator if ends else b"")
            self._digest.update(data)
            self._file.write(data)
            self._tokens += len(ids) + ends
            self._documents += ends
            self._text_bytes += len(text)
        self._batch, self._size = [], 0

    def _sees(self, left: bytes, right: bytes) -> bool:
        """Whether a cut changes ids; characters at the far ends may be cut too, alike."""
        apart_left, apart_right, whole = self._tokenizer.encode_all([left, right, left + right])
        return not np.array_equal(np.concatenate([apart_left, apart_right]), whole)
