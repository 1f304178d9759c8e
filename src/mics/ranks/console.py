"""What mics says while it works: one voice, rank 0's, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch.distributed as dist

ShowBytes = Callable[[str, int, int], None]
"""Shows what is being done, how many bytes of it are, and of how many (0: unknown)."""


def say(text: str) -> None:
    """Print ``text`` once for the whole job."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"mics: {text}", file=sys.stderr, flush=True)


def alarm(text: str) -> None:
    """Print ``text`` once for the whole job, so that nobody misses it."""
    line = "!" * 80
    say(f"{line}\n{text}\n{line}")
