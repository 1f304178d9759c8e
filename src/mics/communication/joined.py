"""Which units' hop 2 travel as one message; sizes alone decide, so every rank decides alike.

Each message waits for as many latencies as its ring has rounds, whatever it carries. Units that
start one after the other are joined while they are small together:

at most 25 MiB      DDP's default, where its authors found the best of fast links (Li et al., 2020)
at most 1/16 of     a message starts when its last unit is ready: with 16 of them nearly all of
all of hop 2        hop 2 still runs beside the backward, on slow links too

So a model of 16 or fewer equal units has a message for each, as has one of large units.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

MOST_BYTES = 25 * 2**20
MOST_SHARE = 16


def joined(sizes: Sequence[int], kinds: Sequence[Hashable]) -> list[list[int]]:
    """Divide units into messages.

    Args:
        sizes: bytes of each unit's hop 2, in the order in which units start.
        kinds: how each unit's is sent; only units of one kind are joined, of ``None`` none are.

    Returns:
        The places of every message's units.
    """
    most = min(MOST_BYTES, sum(sizes) // MOST_SHARE)
    messages: list[list[int]] = []
    filled = 0
    for i, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        if i and kind is not None and kind == kinds[i - 1] and filled + size <= most:
            messages[-1].append(i)
            filled += size
        else:
            messages.append([i])
            filled = size
    return messages
