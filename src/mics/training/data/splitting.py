"""Which documents are held out: drawn from a seed and what they say, not from where they stand."""

from __future__ import annotations

import hashlib

from mics.training.data.cutting import PIECE

OF_ALL = 2**64
"""A document is held out when its number is below this times the share to be held out."""


def number_of(head: bytes, seed: int) -> int:
    """Draw a number of 64 bits for a document.

    Args:
        head: its first mebibyte; of a longer one no more, so that whoever reads only its end can
            tell.
        seed: what it is drawn from.
    """
    digest = hashlib.sha256(seed.to_bytes(8, "little") + head[:PIECE]).digest()
    return int.from_bytes(digest[:8], "little")
