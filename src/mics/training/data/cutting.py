"""Where long texts are cut, so that a piece of one fits in memory and no token goes over a cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 20
"""Bytes of a piece: a longer document is tokenised piece by piece, in memory of one."""

BLOCK = 8 << 10
"""Bytes without a blank behind which a text is cut: a word costs more than its length."""


def cut_up(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """One document, a mebibyte at most at a time, and whether it ends with that.

    Args:
        pieces: the document, however it is cut.
    """
    text = b""
    for piece in pieces:
        text += piece
        while len(text) > PIECE:
            cut = boundary(np.frombuffer(text, np.uint8), 0, PIECE)
            for part in broken(text[:cut], BLOCK):
                yield part, False
            text = text[cut:]
    *before, last = broken(text, BLOCK)
    for part in before:
        yield part, False
    yield last, True


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


def boundary(text: NDArray[np.uint8], start: int, end: int) -> int:
    """The last place up to ``end`` for a cut: after a line, else between characters (UTF-8).

    A line end between two letters is best: no tokenizer's word goes over it.
    """
    start = max(start, end - PIECE)
    window = text[start : end + 1].tobytes()
    line = window.rfind(b"\n", 0, end - start) + 1
    apart = line
    while apart and (
        window[apart - 2 : apart - 1].isspace() or window[apart : apart + 1].isspace()
    ):
        apart = window.rfind(b"\n", 0, apart - 1) + 1
    return start + (apart or line or character(window, end - start))


def character(window: bytes, end: int) -> int:
    """The last place up to ``end`` that is between characters (UTF-8)."""
    places = range(end, max(end - 4, 0), -1)
    return next((at for at in places if window[at] & 0xC0 != 0x80), end)


def _word_end(window: bytes) -> int:
    """Where a text without blanks is cut: at its last letter before a sign, or its last one."""
    ends = [match.end() for match in re.finditer(rb"[A-Za-z](?=[!-&(-/:-@\[-`{-~])", window)]
    return ends[-1] if ends else character(window, len(window) - 1)
