"""Text that spells the special tokens of its tokenizer, as chat rendered to text does."""

from __future__ import annotations

import re
from collections.abc import Sequence


class Spelled:
    """How often a text spells a special token of its tokenizer, and where it first does."""

    def __init__(self, specials: Sequence[str]) -> None:
        names = sorted((name.encode() for name in specials if len(name) > 1), reverse=True)
        self._names = re.compile(b"|".join(map(re.escape, names))) if names else None
        self._longest = max(map(len, names), default=1)
        self._tail = b""
        self._place = ""
        self.count = 0
        self.first = ""

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
                self.first = self.first or f"{match[0].decode()} in {self._place}"
        self._tail = window[max(0, len(window) - self._longest + 1) :]

    def words(self) -> str:
        """Say so, if there are any."""
        return spelled_words(self.count, self.first)


def spelled_words(count: int, first: str) -> str:
    """How often, and where first; nothing where never."""
    return f"{count:,} time(s), first {first}" if count else ""


def note_on(spelled: str, as_tokens: bool, option: str) -> str:
    """What a person should know of a text that spells special tokens.

    Args:
        spelled: how often and where, as ``Spelled`` says it.
        as_tokens: whether they are read as those tokens.
        option: that chooses.
    """
    letters = f"they are read as letters; {option} ids reads them as tokens"
    tokens = f"they are read as those tokens ({option.removeprefix('--')} = ids)"
    how = tokens if as_tokens else letters
    return f"the text spells special tokens of its tokenizer, {spelled}: {how}"
