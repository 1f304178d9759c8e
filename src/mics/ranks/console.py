"""What mics says: one voice, rank 0's, but where a rank alone can know.

What a command was asked for goes to standard output (``show``), so that it can be piped into a file
or another program. Whatever else is said goes to standard error: where long work has got to
(``progress``), what a person should know (``say``), and what nobody may miss (``alarm``).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from mics.ranks.launcher import is_first_rank

ShowBytes = Callable[[str, int, int], None]
"""Shows what is being done, how many bytes of it are, and of how many (0: unknown)."""

Told = Callable[[str], None]
"""What long work calls as it goes on, with a line for people; ``progress`` is one."""


def speaks() -> bool:
    """Tell whether this process speaks for its job: as rank 0, or as no rank at all."""
    # A process that has not loaded torch is in no group, and need not wait for it to be loaded.
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return bool(dist.get_rank() == 0)
    return is_first_rank()


def show(text: str) -> None:
    """Print a result on standard output, once for the whole job."""
    if speaks():
        write(text, sys.stdout)


def write(text: str, stream: TextIO) -> None:
    """Print a line, for as long as somebody reads."""
    with outliving(stream):
        print(f"{text}\n", end="", file=stream, flush=True)  # one write: others write there too


@contextmanager
def outliving(stream: TextIO) -> Iterator[None]:
    """Go on where nobody reads any more: ``mics doctor | head``, a terminal that was closed.

    What is left, and what is still written, must not raise again, not at exit either.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress(text: str) -> None:
    """Print where the work has got to, once for the whole job."""
    if speaks():
        write(text, sys.stderr)


def say(text: str) -> None:
    """Print what a person should know, once for the whole job."""
    progress(f"mics: {text}")


def say_of_this_rank(text: str) -> None:
    """Print what only this rank knows, such as for whom it waits; every rank has this voice."""
    dist: Any = sys.modules["torch.distributed"]
    print(f"mics: rank {dist.get_rank()} {text}", file=sys.stderr, flush=True)


def alarm(text: str) -> None:
    """Print ``text`` once for the whole job, so that nobody misses it."""
    line = "!" * 80
    say(f"{line}\n{text}\n{line}")
