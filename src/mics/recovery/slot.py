"""One state of one rank in shared memory: a file that is valid or not, whenever its writer died.

A slot is a plain file, because a file outlives every process::

    0       magic, length of the head, its checksum
    16      the head, JSON: who wrote it, of which job, which step, where the table is
    4096    the values of tensors, each at a multiple of 64 bytes
    ...     the table, JSON: names, dtypes, shapes and places of tensors, checksums of pieces

[Note: written last]
The head is wiped before anything else is written and comes last, so a file whose head is whole has
been written to its end. Checksums tell what has changed afterwards. Room is asked of the kernel
beforehand (``posix_fallocate``): a file in memory that is only made long would end its writer with
SIGBUS where there is no room.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, get_type_hints

import torch

from mics import compat
from mics.checkpoint.manifest import dtype_of
from mics.quantities import dtype_name

_MAGIC = b"micskept"
_FIXED = struct.Struct("<8sII")  # magic, bytes of the head, crc32 of the head
_FIRST = 4096  # where values begin
_ALIGNED = 64
_PIECE = 1 << 26  # bytes that have a checksum of their own
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which mmap does not name
_PRIME = 0x100000001B3
_TABLE_ROOM = 1 << 12  # bytes beside them, so that a number may be longer next time


@dataclass(frozen=True)
class Head:
    """What a slot says of itself; ``digest`` is that of the tensors that replicas share.

    ``world`` is how many ranks its generation had.
    """

    job: str
    generation: int
    model: str
    key: str
    rank: int
    world: int
    step: int
    digest: int
    table_at: int
    table_bytes: int
    table_crc: int


HEAD = ("job", "generation", "model", "key", "rank", "world", "step")
"""What a writer says of a state; the rest of ``Head`` follows from it."""


class Layout:
    """Where tensors of these names, dtypes and shapes are in a slot; made once for many steps.

    Args:
        tensors: plain ones, which replicas share.
        apart: plain ones that are this rank's own; they stand behind the others.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], apart: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.places: dict[str, tuple[int, str, tuple[int, ...]]] = {}
        self.shared_end = self._place(_FIRST, tensors)
        self.end = self._place(self.shared_end, apart or {})
        self.text = json.dumps(self.places).encode()

    def _place(self, at: int, tensors: Mapping[str, torch.Tensor]) -> int:
        for name, tensor in tensors.items():
            self.places[name] = at, dtype_name(tensor.dtype), tuple(tensor.shape)
            at += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        return at


class Slot:
    """A file that holds one state, or none.

    Args:
        path: the file; made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._memory: torch.Tensor | None = None  # uint8, all of the file
        self._views: list[torch.Tensor] = []  # of the tensors of a layout, in place
        self._views_of: Layout | None = None
        self._head = torch.empty(0, dtype=torch.uint8)  # of what is being taken

    def reserve(self, num_bytes: int) -> None:
        """Make room for at least so many bytes, and touch every page of it.

        Raises:
            OSError: there is not so much room, or the file cannot be made.
        """
        if self._memory is not None and self._memory.numel() >= num_bytes:
            return
        file = _open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            os.posix_fallocate(file, 0, num_bytes)
            self._take(file)
        finally:
            os.close(file)

    def write(
        self,
        head: Mapping[str, Any],
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        others: Sequence[bytes],
    ) -> int:
        """Write a state; what was there is gone from the first moment on.

        Args:
            head: what ``HEAD`` names.
            layout: of the tensors.
            tensors: plain ones on the host, in the order of the layout.
            others: JSON texts that stand in the table beside the places of tensors.

        Returns:
            The digest of the tensors that replicas share, equal where all their bits are.

        Raises:
            OSError: there is no room.
        """
        num_pieces = -(-(layout.end - _FIRST) // _PIECE) + 1
        length = len(layout.text) + sum(map(len, others)) + 12 * num_pieces + _TABLE_ROOM
        self.reserve(layout.end + length)
        self.wipe()
        if self._views_of is not layout:
            self._views = list(self._tensors(layout.places).values())
            self._views_of = layout
        compat.copy_all(self._views, list(tensors.values()))
        shared, apart = self._both_crcs(layout.shared_end, layout.end)
        crcs = json.dumps([layout.shared_end, shared, apart]).encode()
        table = b"[" + b",".join([layout.text, crcs, *others]) + b"]"
        assert self._map is not None
        self._map[layout.end : layout.end + len(table)] = table
        digest = digest_of(shared)
        at, crc = layout.end, zlib.crc32(table)
        whole = Head(**head, digest=digest, table_at=at, table_bytes=len(table), table_crc=crc)
        _write_head(self._map, whole)
        return digest

    def wipe(self) -> None:
        """Let what is there be no state any more."""
        if self._map is not None:
            self._map[: _FIXED.size] = bytes(_FIXED.size)

    def head(self) -> Head | None:
        """What the slot says of itself, ``None`` where it holds nothing whole.

        Only the head is checked, see ``read``.
        """
        try:
            file = _open(self.path, os.O_RDONLY)
        except OSError:
            return None
        try:
            return _parse(os.pread(file, _FIRST, 0), os.fstat(file).st_size)
        finally:
            os.close(file)

    def read(self) -> Reading | None:
        """What the slot holds, when all of it is what was written; else ``None``."""
        head = self.head()
        if head is None:
            return None
        try:
            file = _open(self.path, os.O_RDWR)
        except OSError:
            return None
        try:
            self._take(file)
        finally:
            os.close(file)
        try:
            return self._checked(head)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError):
            return None  # no table of this version

    def _checked(self, head: Head) -> Reading | None:
        table = bytes(self._bytes(head.table_at, head.table_at + head.table_bytes))
        if zlib.crc32(table) != head.table_crc:
            return None
        places, (shared_end, *crcs), *others = json.loads(table)
        found = self._both_crcs(shared_end, head.table_at)
        if crcs != list(found) or digest_of(found[0]) != head.digest:
            return None
        return Reading(head, self._tensors(places), others)

    def content(self) -> torch.Tensor:
        """All bytes of what was read, uint8, in place; ``take`` takes them elsewhere."""
        assert self._memory is not None
        return self._memory

    def begin(self, num_bytes: int) -> None:
        """Begin to take the content of another slot, of so many bytes.

        Raises:
            OSError: there is no room.
        """
        self.reserve(num_bytes)
        self.wipe()
        self._head = torch.empty(0, dtype=torch.uint8)

    def take(self, first: int, piece: torch.Tensor) -> None:
        """Take bytes that begin at ``first``; those of the head wait for the end."""
        assert self._memory is not None
        if first == 0:
            self._head, piece, first = piece[:_FIRST].clone(), piece[_FIRST:], _FIRST
        self._memory[first : first + piece.numel()].copy_(piece)

    def end(self) -> None:
        """Let what was taken be a state."""
        assert self._memory is not None
        self._memory[_FIXED.size : self._head.numel()].copy_(self._head[_FIXED.size :])
        self._memory[: _FIXED.size].copy_(self._head[: _FIXED.size])

    def _tensors(self, places: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a layout, in place."""
        assert self._memory is not None
        tensors = {}
        for name, (at, kind, shape) in places.items():
            dtype = dtype_of(kind)
            values = self._memory[at : at + prod(shape) * dtype.itemsize]
            whole = values.view(dtype) if values.numel() else torch.empty(0, dtype=dtype)
            tensors[name] = whole.view(shape)
        return tensors

    def _both_crcs(self, shared_end: int, end: int) -> tuple[list[int], list[int]]:
        """Checksums of values that replicas share, and of this rank's own, piece by piece."""
        return self._crcs(_FIRST, shared_end), self._crcs(shared_end, end)

    def _crcs(self, first: int, end: int) -> list[int]:
        pieces = range(first, end, _PIECE)
        return [zlib.crc32(self._bytes(at, min(at + _PIECE, end))) for at in pieces]

    def _bytes(self, first: int, last: int) -> memoryview:
        assert self._map is not None
        return memoryview(self._map)[first:last]

    def _take(self, file: int) -> None:
        self._map = mmap.mmap(file, os.fstat(file).st_size)
        with contextlib.suppress(OSError, ValueError):  # else pages are touched when written
            self._map.madvise(_POPULATE_WRITE)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._views, self._views_of = [], None


@dataclass(frozen=True)
class Reading:
    """What a slot holds. The tensors are its memory: the next write changes them."""

    head: Head
    tensors: dict[str, torch.Tensor]
    others: list[Any]


def digest_of(crcs: Sequence[int]) -> int:
    """One number of 63 bits for the checksums of pieces, in their order."""
    digest = 0
    for crc in crcs:
        digest = (digest * _PRIME + crc + 1) % (1 << 63)
    return digest


def _write_head(memory: mmap.mmap, head: Head) -> None:
    text = json.dumps(asdict(head)).encode()
    if _FIXED.size + len(text) > _FIRST:
        raise ValueError(f"a head of {len(text)} bytes")
    memory[_FIXED.size : _FIXED.size + len(text)] = text
    memory[: _FIXED.size] = _FIXED.pack(_MAGIC, len(text), zlib.crc32(text))


def _parse(data: bytes, size: int) -> Head | None:
    if len(data) < _FIRST:
        return None
    magic, length, crc = _FIXED.unpack_from(data)
    text = data[_FIXED.size : _FIXED.size + length]
    if magic != _MAGIC or zlib.crc32(text) != crc:
        return None
    try:
        head = Head(**json.loads(text))
    except (TypeError, ValueError):  # of another version
        return None
    kinds = get_type_hints(Head)
    if any(type(getattr(head, name)) is not kind for name, kind in kinds.items()):
        return None
    inside = _FIRST <= head.table_at <= head.table_at + head.table_bytes <= size
    return (
        head
        if inside and 0 <= max(head.step, head.generation, head.rank, head.world) < 1 << 62
        else None
    )


def _open(path: Path, flags: int) -> int:
    """Open a file that is ours alone.

    Raises:
        OSError: it cannot be opened, is a link or no file, or is somebody else's.
    """
    # Without waiting for whoever would write to a pipe of this name.
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    facts = os.fstat(file)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        os.close(file)
        raise PermissionError(f"{path} is no file of this user")
    return file
