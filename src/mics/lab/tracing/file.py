"""One file of all ranks' events; the first rank writes it, and holds a part of each at a time."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from mics.errors import TraceError
from mics.lab.tracing.events import Json
from mics.ranks.issuing import gather
from mics.ranks.together import gather_json, together

ENDINGS = (".json", ".json.gz")
_LEVEL = 6  # of gzip
_EVENTS = 10_000  # that a rank sends at once

Part = tuple[bytes, bool]
"""Packed events of a rank, and whether they are of mics."""


def check_file(file: Path) -> None:
    """Refuse a file that no trace can be written to.

    Raises:
        TraceError: of another kind, or without a folder.
    """
    if not file.name.endswith(ENDINGS):
        raise TraceError(
            f"A trace is a file of JSON, and {file} is not named as one.",
            write=f"a name that ends with {' or '.join(ENDINGS)}",
        )
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise TraceError(
            f"{file} cannot be written.",
            numbers="It is a folder." if file.is_dir() else f"{folder} is no folder to write to.",
            write="a file in a folder that exists",
        )


def write_file(
    file: Path,
    head: Json,
    own: Sequence[Json],
    others: Sequence[Json],
    group: dist.ProcessGroup | None,
) -> list[Json]:
    """Bring the events of all ranks into one file. Collective.

    Args:
        file: on the first rank of the group.
        head: what stands beside the events.
        own: this rank's, of mics.
        others: this rank's, of torch.
        group: a Gloo group of all ranks.

    Returns:
        The events of mics of all ranks, on the first rank; on others none.

    Raises:
        TraceError: it cannot be written; on every rank.
    """
    mine = [(part, True) for part in _packed(own)]
    mine += [(part, False) for part in _packed(others)]
    told = gather_json([[len(part), of_mics] for part, of_mics in mine], group)
    first = group is None or group.rank() == 0
    seen: list[Json] = []

    def work() -> None:
        parts = _parts_of_all(mine, told, group)
        if first:
            _write(file, head, parts, seen)
        else:
            assert not list(parts)

    together(work, group, kind=TraceError, explain=lambda error: _cannot(file, error))
    return seen


def _parts_of_all(
    mine: Sequence[Part], told: Sequence[Sequence[Any]], group: dist.ProcessGroup | None
) -> Iterator[Part]:
    """All ranks' parts, on the first rank; the others give theirs, and get none.

    Args:
        mine: this rank's.
        told: of every rank, the size of each part, and whether it is of mics.
        group: of the ranks.
    """
    if group is None:
        yield from mine
        return
    for number in range(max(map(len, told))):
        here = [parts[number] if number < len(parts) else (0, False) for parts in told]
        sent = torch.zeros(max(size for size, _ in here), dtype=torch.uint8)
        if number < len(mine):
            part = torch.frombuffer(bytearray(mine[number][0]), dtype=torch.uint8)
            sent[: len(part)] = part
        rows = [torch.empty_like(sent) for _ in here] if group.rank() == 0 else None
        gather(rows, sent, group)
        for row, (size, of_mics) in zip(rows or [], here, strict=bool(rows)):
            if size:
                yield bytes(row[:size].tolist()), of_mics


def _write(file: Path, head: Json, parts: Iterator[Part], seen: list[Json]) -> None:
    """Write the parts of all ranks, and remember those of mics.

    Raises:
        Exception: whatever has failed, when the others are rid of their parts.
    """
    failed: Exception | None = None
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with contextlib.ExitStack() as stack:
        stack.callback(unfinished.unlink, missing_ok=True)
        out: _Out | None = None
        for part, of_mics in parts:
            if failed is not None:
                continue
            try:
                if out is None:
                    out = stack.enter_context(_Out(unfinished, file.suffix == ".gz", head))
                events = gzip.decompress(part)
                out.add(events)
                if of_mics:
                    seen += json.loads(b"[" + events + b"]")
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed
        assert out is not None  # every rank has a part that names it
        out.close()
        unfinished.replace(file)


class _Out:
    """The file while it is written, as a context that closes it."""

    def __init__(self, path: Path, packed: bool, head: Json) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._out: Any = self._file
        if packed:
            self._out = gzip.GzipFile(
                filename="", mode="wb", compresslevel=_LEVEL, fileobj=self._file
            )
        self._first = True
        self._out.write(json.dumps(head)[:-1].encode() + b', "traceEvents": [\n')

    def __enter__(self) -> _Out:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what failed has been said
            self._file.close()

    def add(self, events: bytes) -> None:
        """Write events that are separated by commas."""
        self._out.write(events if self._first else b",\n" + events)
        self._first = False

    def close(self) -> None:
        """End the document."""
        self._out.write(b"\n]}\n")
        if self._out is not self._file:
            self._out.close()
        self._file.close()


def _packed(events: Sequence[Json]) -> list[bytes]:
    """Events as text, a few thousand at a time."""
    return [
        gzip.compress(",\n".join(map(json.dumps, events[i : i + _EVENTS])).encode(), _LEVEL)
        for i in range(0, len(events), _EVENTS)
    ]


def _cannot(file: Path, error: Exception) -> TraceError:
    return TraceError(
        f"{file} cannot be written.",
        numbers=f"{type(error).__name__}: {error}",
        write="a file in a folder with room for it",
    )


def read_file(file: Path) -> Json:
    """Read a trace that was written here; for whoever looks at its numbers."""
    data = file.read_bytes()
    document: Json = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
    return document
