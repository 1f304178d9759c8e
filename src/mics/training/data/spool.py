"""The text of a corpus in one nameless file, split in what is trained on and what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mics.errors import DataError
from mics.ranks.console import ShowBytes
from mics.training.data.corpus import Document
from mics.training.data.cutting import PIECE, boundary, character, cut_up
from mics.training.data.spelling import Spelled
from mics.training.data.splitting import OF_ALL, number_of


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
                ranges = range(start, end, PIECE)
                yield from cut_up(self.text[at : min(at + PIECE, end)].tobytes() for at in ranges)
            start = end


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
    out when its number (``splitting.number_of``) falls below ``share``; where that leaves a split
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
        digest, head = hashlib.sha256(), b""
        start, cut = size, False
        spelled.begin(document.place)
        for piece in document.pieces:
            kept = _first(piece, limit - size) if limit else piece
            file.write(kept)
            digest.update(kept)
            head += kept[: PIECE - len(head)]
            spelled.look(kept)
            size += len(kept)
            progress("reading", size, limit)
            cut = len(kept) < len(piece)
            if cut:
                break
        if size > start:
            ends.append(size)
            ranks.append(number_of(head, seed))
            whole.update(digest.digest())
        if cut or size == limit > 0:
            break
    if not ends:
        raise DataError("The corpus is empty.", numbers="0 bytes of text.", write="--data.source")
    file.flush()
    text = np.memmap(file, dtype=np.uint8, mode="r")
    held_out = held_out_of(ranks, share)
    if share and len(ends) == 1:
        ends, held_out = [_cut(text, share), size], [False, True]
    return Spool(text, ends, held_out, whole.hexdigest(), spelled.words())


def held_out_of(ranks: list[int], share: float) -> list[bool]:
    """Which documents are held out, by a number of 64 bits of each: some, but not all."""
    held_out = [rank < share * OF_ALL for rank in ranks]
    if share and not any(held_out):
        held_out[ranks.index(min(ranks))] = True
    if all(held_out):
        held_out[ranks.index(max(ranks))] = False
    return held_out


def _first(piece: bytes, size: int) -> bytes:
    """The first bytes of a text, a whole character last."""
    if len(piece) <= size:
        return piece
    at = character(piece, size) if size else 0
    return piece[:at]


def _cut(text: NDArray[np.uint8], share: float) -> int:
    """Where a single document is cut: its tail is held out, from the start of a line."""
    if len(text) == 1:
        return 1
    wanted = min(max(1, round(len(text) * (1 - share))), len(text) - 1)
    return boundary(text, 0, wanted)
