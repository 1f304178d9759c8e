"""The table of contents of a checkpoint: JSON, checked before a byte of memory is taken for it.

::

    {"format": 1, "mics": "0.1.0", "torch": "2.13.0", "world": 8, "partition": 4,
     "tensors": {"model/NAME": {"dtype": "float32", "shape": [6, 4], "chunks":
         [{"offset": [0, 0], "shape": [3, 4], "file": "rank-00000.safetensors", "key": "..."}]}},
     "aliases": {"model/SECOND_NAME": "model/NAME"},       # tied parameters
     "values": {"optimizer/param_groups.NAME.lr": 0.001},  # what is no tensor
     "extra": {...},                                       # the caller's
     "files": {"rank-00000.safetensors": {"bytes": 96, "sha256": "..."}}}

``manifest.json.sha256`` beside it holds its checksum as ``sha256sum`` writes it. Nothing here is
pickle, and nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mics.errors import CheckpointError
from mics.quantities import dtype_name
from mics.version import __version__

FORMAT = 1
MANIFEST = "manifest.json"
CHECKSUM = "manifest.json.sha256"

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_MOST_BYTES = 1 << 30  # of a manifest
_MOST_DIMS = 16
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


_DTYPES = {
    dtype_name(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and not str(value).startswith("torch.q")
}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and where its values are: tensor ``key`` of ``file``."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class Entry:
    """One tensor, as a whole, and its chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype as torch's object."""
        return _DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """The size of the whole tensor."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


def whole_entry(dtype: str, shape: tuple[int, ...], file: str, key: str) -> Entry:
    """A tensor that lies in one file, in one piece."""
    return Entry(dtype, shape, [Chunk((0,) * len(shape), shape, file, key)])


@dataclass(frozen=True)
class FileFacts:
    """The size and the checksum that a file must have."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but the values of its tensors."""

    world: int
    partition: int
    tensors: dict[str, Entry]
    aliases: dict[str, str]
    values: dict[str, Json]
    extra: dict[str, Json]
    files: dict[str, FileFacts]
    mics: str = __version__
    torch: str = str(torch.__version__)
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """The text of the manifest as it is written."""
        return json.dumps(asdict(self), sort_keys=True).encode() + b"\n"


def checksum_line(manifest: bytes) -> bytes:
    """What ``sha256sum manifest.json`` prints."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    Raises:
        CheckpointError: it is no checkpoint, or its manifest is damaged or not to be trusted.
    """
    path = folder / MANIFEST
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise _damaged(path, f"it has {size} bytes, more than any manifest")
        data = path.read_bytes()
        checksum = (folder / CHECKSUM).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: {Path(error.filename or path).name} cannot be "
            f"read ({error.strerror}).",
            write="the folder of one checkpoint, e.g. runs/default/step-00000500",
        ) from None
    if checksum != checksum_line(data):
        raise _damaged(path, f"it does not have the checksum in {CHECKSUM}")
    try:
        table = json.loads(data, object_pairs_hook=_unique)
        return _parse(table)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _parse(table: dict[str, Any]) -> Manifest:
    if table["format"] != FORMAT:
        raise ValueError(f"format {table['format']!r}, this version reads {FORMAT}")
    files = {
        file_name(name): FileFacts(_natural(facts["bytes"]), str(facts["sha256"]))
        for name, facts in table["files"].items()
    }
    tensors = {name: _entry(name, entry, files) for name, entry in table["tensors"].items()}
    aliases = {str(name): str(first) for name, first in table["aliases"].items()}
    for name, first in aliases.items():
        if first not in tensors or name in tensors:
            raise ValueError(f"{name} is the same as {first}, which is not there")
    return Manifest(
        mics=str(table["mics"]),
        torch=str(table["torch"]),
        world=_natural(table["world"]),
        partition=_natural(table["partition"]),
        tensors=tensors,
        aliases=aliases,
        values=dict(table["values"]),
        extra=dict(table["extra"]),
        files=files,
    )


def _entry(name: str, table: dict[str, Any], files: Mapping[str, FileFacts]) -> Entry:
    if table["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has dtype {table['dtype']!r}")
    shape = _box(table["shape"])
    chunks = [
        Chunk(_box(c["offset"]), _box(c["shape"]), str(c["file"]), str(c["key"]))
        for c in table["chunks"]
    ]
    entry = Entry(table["dtype"], shape, chunks)
    stored = sum(facts.bytes for facts in files.values())
    if entry.num_bytes > stored:
        raise ValueError(f"{name} has {entry.num_bytes} bytes, all files together {stored}")
    for chunk in chunks:
        if chunk.file not in files:
            raise ValueError(f"{name} is in {chunk.file}, which is not listed")
    _check_cover(name, shape, chunks)
    return entry


def _check_cover(name: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Chunks lie inside the tensor, do not overlap, and leave nothing out."""
    for chunk in chunks:
        sides = zip(chunk.offset, chunk.shape, shape, strict=True)
        if any(start + size > whole for start, size, whole in sides):
            raise ValueError(f"a chunk of {name} lies outside of it")
    covered = sum(math.prod(chunk.shape) for chunk in chunks)
    if covered != math.prod(shape) or _overlap(chunks):
        raise ValueError(f"the chunks of {name} do not make up the tensor")


def _overlap(chunks: Iterable[Chunk]) -> bool:
    """Whether two boxes share a cell. Sorted by their first rows, so that few are compared."""
    open_boxes: list[Chunk] = []
    for chunk in sorted((c for c in chunks if math.prod(c.shape)), key=lambda c: c.offset[:1]):
        if not chunk.shape:
            if open_boxes:
                return True
            open_boxes.append(chunk)
            continue
        open_boxes = [b for b in open_boxes if b.offset[0] + b.shape[0] > chunk.offset[0]]
        for box in open_boxes:
            sides = zip(box.offset, box.shape, chunk.offset, chunk.shape, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in sides):
                return True
        open_boxes.append(chunk)
    return False


def _box(values: list[Any]) -> tuple[int, ...]:
    if len(values) > _MOST_DIMS:
        raise ValueError(f"{len(values)} dims")
    return tuple(_natural(value) for value in values)


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no size")
    return value


def file_name(name: str) -> str:
    """``name`` itself.

    Raises:
        ValueError: no file of a checkpoint can have it.
    """
    if not _FILE_NAME.fullmatch(name) or ".." in name.split("/"):
        raise ValueError(f"{name!r} is no file of a checkpoint")
    return name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {why}.", write="an older checkpoint of the same run"
    )
