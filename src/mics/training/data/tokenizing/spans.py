"""The documents of a span: those that begin in it, or the stretch of a long one that lies in it."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mics.training.data.corpus import FIELD, opened, texts
from mics.training.data.cutting import PIECE, boundary
from mics.training.data.kinds import text_of
from mics.training.data.tables import rows_of
from mics.training.data.tokenizing.plan import Span

_BEFORE = 256  # bytes in front of a stretch, to see whether the tokenizer sees the cut


@dataclass(frozen=True)
class Passage:
    """A document, or a stretch of one.

    Args:
        place: where it stands, for people.
        pieces: its bytes.
        head: the first mebibyte of the document, where this is a stretch of it.
        before: the last bytes in front of it, of the same document.
        ends: whether the document ends with it.
    """

    place: str
    pieces: Iterable[bytes]
    head: bytes = b""
    before: bytes = b""
    ends: bool = True


def passages(span: Span, field: str | None) -> Iterator[Passage]:
    """Read a span. What one passage has is read before the next.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    file = Path(span.file)
    with opened(file) as stream:
        if span.kind == "text":
            yield _stretch(stream, file, span)
            return
        if span.start == 0:
            _skip_mark(stream)
        column = field or FIELD
        rows = rows_of(stream, file, span.kind, column, span.start, span.stop)
        for document in texts(rows, column, str(file)):
            yield Passage(document.place, document.pieces)


def _stretch(stream: BinaryIO, file: Path, span: Span) -> Passage:
    begin = _skip_mark(stream)
    size = stream.seek(0, 2)
    start, stop = (_cut(stream, at, begin, size) for at in (span.start, span.stop))
    head = before = b""
    if stop < size or start > begin:  # each stretch of a document goes where its head says
        stream.seek(begin)
        head = stream.read(PIECE)
    if start > begin:
        stream.seek(max(begin, start - _BEFORE))
        before = stream.read(start - stream.tell())
    stream.seek(start)
    place = str(file) if start == begin else f"{file}, from byte {start:,} on"
    return Passage(place, text_of(stream, file, stop), head, before, ends=stop == size)


def _cut(stream: BinaryIO, at: int, begin: int, size: int) -> int:
    """Where a text is cut, near a byte: a function of the file alone."""
    if at <= begin or at >= size:
        return max(begin, min(at, size))
    first = max(begin, at - PIECE)
    stream.seek(first)
    window = np.frombuffer(stream.read(at + 1 - first), np.uint8)
    return first + boundary(window, 0, at - first)


def _skip_mark(stream: BinaryIO) -> int:
    """Go behind a byte order mark, and say where that is."""
    stream.seek(0)
    begin = len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0
    return stream.seek(begin)
