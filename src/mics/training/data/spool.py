"""The text of a corpus in one nameless file, split in what is trained on and what is held out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mics.errors import DataError
from mics.ranks.console import ShowBytes
from mics.training.data.corpus import Document

_PIECE = 1 << 20  # a longer document is tokenised piece by piece, in memory of one piece
BLOCK = 8 << 10  # so much text without a blank is cut: a word costs more than its length


@dataclass(frozen=True)
class Spool:
    """The text of all documents in one file, and which of them are held out.

    ``digest`` is equal for equal documents, ``spelled`` says which tokens they spell, and where.
    """

    text: NDArray[np.uint8]
    ends: list[int]
    held_out: list[bool]
    digest: str = ""
    spelled: str = ""

    def pieces(self, *, held_out: bool) -> Iterator[tuple[bytes, bool]]:
        """One split in order, a mebibyte at most at a time, and whether a document ends with it."""
        start = 0
        for end, kept in zip(self.ends, self.held_out, strict=True):
            if kept == held_out:
                while end - start > _PIECE:
                    cut = _boundary(self.text, start, start + _PIECE)
                    for piece in broken(self.text[start:cut].tobytes(), BLOCK):
                        yield piece, False
                    start = cut
                *before, last = broken(self.text[start:end].tobytes(), BLOCK)
                for piece in before:
                    yield piece, False
                yield last, True
            start = end


def broken(text: bytes, block: int) -> list[bytes]:
    """A text in parts, so that none has much more than two blocks of bytes without a blank.

    It is cut where a word ends for every tokenizer if there is such a place, else between
    characters; a text with a blank in every block is one part.
    """
    parts: list[bytes] = []
    start = 0
    for at in range(0, len(text) - block, block):
        window = text[at : at + block]
        if window.split(None, 1) in ([window], []):  # no blank, or nothing else
            cut = at + _word_end(text[at : at + block + 1])
            if start < cut < len(text):
                parts.append(text[start:cut])
                start = cut
    return [*parts, text[start:]]


def spool(
    documents: Iterable[Document],
    file: BinaryIO,
    *,
    share: float,
    limit: int,
    seed: int,
    specials: Sequence[str],
    progress: ShowBytes,
) -> Spool:
    """Copy the documents into an open file and choose which are held out, by their content alone.

    The same documents give the same split whatever kind of file they came from. A document is held
    out when a hash of the seed and its text falls below ``share``; where that leaves a split
    empty, the nearest one is moved, and a single document is cut in two.

    Args:
        share: of the documents, to be held out.
        limit: most bytes of text; 0 takes all.
        seed: what the split is drawn from.
        specials: tokens that are looked for in the text.
        progress: is shown how much has been read.

    Raises:
        DataError: there is no text.
    """
    ends: list[int] = []
    ranks: list[int] = []
    size = 0
    whole = hashlib.sha256()
    spelled = Spelled(specials)
    for document in documents:
        digest = hashlib.sha256(seed.to_bytes(8, "little"))
        start, cut = size, False
        spelled.begin(document.place)
        for piece in document.pieces:
            kept = _first(piece, limit - size) if limit else piece
            file.write(kept)
            digest.update(kept)
            spelled.look(kept)
            size += len(kept)
            progress("reading", size, limit)
            cut = len(kept) < len(piece)
            if cut:
                break
        if size > start:
            ends.append(size)
            ranks.append(int.from_bytes(digest.digest()[:8], "little"))
            whole.update(digest.digest())
        if cut or size == limit > 0:
            break
    if not ends:
        raise DataError("The corpus is empty.", numbers="0 bytes of text.", write="--data.source")
    file.flush()
    text = np.memmap(file, dtype=np.uint8, mode="r")
    held_out = _held_out(ranks, share)
    if share and len(ends) == 1:
        ends, held_out = [_cut(text, share), size], [False, True]
    return Spool(text, ends, held_out, whole.hexdigest(), spelled.words())


def _held_out(ranks: list[int], share: float) -> list[bool]:
    """Which documents are held out, by a number of 64 bits of each: some, but not all."""
    held_out = [rank < share * 2**64 for rank in ranks]
    if share and not any(held_out):
        held_out[ranks.index(min(ranks))] = True
    if all(held_out):
        held_out[ranks.index(max(ranks))] = False
    return held_out


class Spelled:
    """How often a text spells a special token of its tokenizer, and where it first does."""

    def __init__(self, specials: Sequence[str]) -> None:
        names = sorted((name.encode() for name in specials if len(name) > 1), reverse=True)
        self._names = re.compile(b"|".join(map(re.escape, names))) if names else None
        self._longest = max(map(len, names), default=1)
        self._tail = b""
        self._place = ""
        self.count = 0
        self._first = ""

    def begin(self, place: str) -> None:
        """Another document begins."""
        self._place, self._tail = place, b""

    def look(self, piece: bytes) -> None:
        """Look for them in the next piece of the document."""
        if self._names is None:
            return
        window = self._tail + piece
        for match in self._names.finditer(window):
            if match.end() > len(self._tail):
                self.count += 1
                self._first = self._first or f"{match[0].decode()} in {self._place}"
        self._tail = window[max(0, len(window) - self._longest + 1) :]

    def words(self) -> str:
        """Say so, if there are any."""
        return f"{self.count:,} time(s), first {self._first}" if self.count else ""


def _word_end(window: bytes) -> int:
    """Where a text without blanks is cut: at its last letter before a sign, or its last one."""
    ends = [match.end() for match in re.finditer(rb"[A-Za-z](?=[!-&(-/:-@\[-`{-~])", window)]
    return ends[-1] if ends else _character(window, len(window) - 1)


def _character(window: bytes, end: int) -> int:
    """The last place up to ``end`` that is between characters (UTF-8)."""
    places = range(end, max(end - 4, 0), -1)
    return next((at for at in places if window[at] & 0xC0 != 0x80), end)


def _first(piece: bytes, size: int) -> bytes:
    """The first bytes of a text, a whole character last."""
    if len(piece) <= size:
        return piece
    at = _character(piece, size) if size else 0
    return piece[:at]


def _cut(text: NDArray[np.uint8], share: float) -> int:
    """Where a single document is cut: its tail is held out, from the start of a line."""
    if len(text) == 1:
        return 1
    wanted = min(max(1, round(len(text) * (1 - share))), len(text) - 1)
    return _boundary(text, 0, wanted)


def _boundary(text: NDArray[np.uint8], start: int, end: int) -> int:
    """The last place up to ``end`` for a cut: after a line, else between characters (UTF-8).

    A line end between two letters is best: no tokenizer's word goes over it.
    """
    start = max(start, end - _PIECE)
    window = text[start : end + 1].tobytes()
    line = window.rfind(b"\n", 0, end - start) + 1
    apart = line
    while apart and (
        window[apart - 2 : apart - 1].isspace() or window[apart : apart + 1].isspace()
    ):
        apart = window.rfind(b"\n", 0, apart - 1) + 1
    return start + (apart or line or _character(window, end - start))
