"""The table of contents of a checkpoint: JSON, checked before a byte of memory is taken for it.

::

    {"format": 1, "mics": "0.1.0", "torch": "2.13.0", "world": 8, "partition": 4,
     "tensors": {"model/NAME": {"dtype": "float32", "shape": [6, 4], "chunks":
         [{"offset": [0, 0], "shape": [3, 4], "file": "rank-00000.safetensors", "key": "..."}]}},
     "aliases": {"model/SECOND_NAME": "model/NAME"},       # tied parameters
     "frozen": {"model/NAME": "bfloat16 [6, 4] 9e37..."},  # left out: what its values were
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mics.errors import CheckpointError
from mics.quantities import dtype_name
from mics.ranks.files import read_small
from mics.version import __version__

FORMAT = 1
MANIFEST = "manifest.json"
CHECKSUM = "manifest.json.sha256"

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

PLAIN, REPLICATED, SHARDED = "plain", "replicated", "sharded"
"""What a tensor of an optimizer is beside a sharded parameter (``Entry.form``)."""

MOST_BYTES = 1 << 29
"""Bytes that a manifest may have; one of 512 ranks and 2,000 tensors has 0.2e9."""

_MOST_CHECKSUM_BYTES = 1 << 10
_MOST_DIMS = 16
_MOST_SPLIT_DIMS = 4  # of a tensor that is in chunks
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
    """One tensor, as a whole, and its chunks.

    ``form`` is PLAIN, REPLICATED or SHARDED for the state of a sharded parameter, "" for others.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk]
    form: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype as torch's object."""
        return dtype_of(self.dtype)

    @property
    def num_bytes(self) -> int:
        """The size of the whole tensor."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name in a manifest.

    Raises:
        KeyError: there is none of this name.
    """
    return _DTYPES[name]


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
    frozen: dict[str, str] = field(default_factory=dict)
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
        data = read_small(path, MOST_BYTES)
        checksum = read_small(folder / CHECKSUM, _MOST_CHECKSUM_BYTES)
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
        for name, facts in _object(table["files"]).items()
    }
    stored = sum(facts.bytes for facts in files.values())
    tensors = {
        name: _entry(name, entry, files, stored)
        for name, entry in _object(table["tensors"]).items()
    }
    # Many entries of one chunk would take memory that no file has.
    needed = sum(entry.num_bytes for entry in tensors.values())
    if needed > stored:
        raise ValueError(f"the tensors have {needed} bytes, all files together {stored}")
    aliases = {str(name): str(first) for name, first in _object(table["aliases"]).items()}
    frozen = {str(name): str(value) for name, value in _object(table.get("frozen", {})).items()}
    if twice := tensors.keys() & frozen.keys():
        raise ValueError(f"{min(twice)} is there and left out")
    for name, first in aliases.items():
        if (first not in tensors and first not in frozen) or name in tensors or name in frozen:
            raise ValueError(f"{name} is the same as {first}, which is not there")
    return Manifest(
        mics=str(table["mics"]),
        torch=str(table["torch"]),
        world=_natural(table["world"]),
        partition=_natural(table["partition"]),
        tensors=tensors,
        aliases=aliases,
        values=_object(table["values"]),
        extra=_object(table["extra"]),
        files=files,
        frozen=frozen,
    )


def _entry(name: str, table: dict[str, Any], files: Mapping[str, FileFacts], stored: int) -> Entry:
    if table["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has dtype {table['dtype']!r}")
    shape = _box(table["shape"])
    form = table.get("form", "")
    if form not in ("", PLAIN, REPLICATED, SHARDED):
        raise ValueError(f"{name} has form {form!r}")
    # A rank writes one chunk of a tensor at most, and one file.
    if len(table["chunks"]) > len(files):
        raise ValueError(f"{name} is in {len(table['chunks'])} chunks, of {len(files)} files")
    chunks = [
        Chunk(_box(c["offset"]), _box(c["shape"]), str(c["file"]), str(c["key"]))
        for c in table["chunks"]
    ]
    entry = Entry(table["dtype"], shape, chunks, form)
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
    filled = [chunk for chunk in chunks if math.prod(chunk.shape)]
    covered = sum(math.prod(chunk.shape) for chunk in filled)
    split = [
        dim for dim, whole in enumerate(shape) if any(chunk.shape[dim] < whole for chunk in filled)
    ]
    if len(split) > _MOST_SPLIT_DIMS:
        raise ValueError(f"{name} is split over {len(split)} of its dims")
    if covered != math.prod(shape) or not _apart(filled, split):
        raise ValueError(f"the chunks of {name} do not make up the tensor")


def _apart(boxes: list[Chunk], dims: Sequence[int]) -> bool:
    """Whether cuts through all of the boxes, one dim after the other, take them apart.

    Shards of any mesh do come apart so. Each dim is cut once, so the work grows with n log n.
    """
    if len(boxes) < 2:
        return True
    for dim in dims:
        parts = _cut(boxes, dim)
        if len(parts) > 1:
            rest = [other for other in dims if other != dim]
            return all(_apart(part, rest) for part in parts)
    return False


def _cut(boxes: list[Chunk], dim: int) -> list[list[Chunk]]:
    """Boxes in groups that have no row of a dim in common."""
    parts: list[list[Chunk]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box.offset[dim]):
        if box.offset[dim] >= end:
            parts.append([])
        parts[-1].append(box)
        end = max(end, box.offset[dim] + box.shape[dim])
    return parts


def _box(values: list[Any]) -> tuple[int, ...]:
    if len(values) > _MOST_DIMS:
        raise ValueError(f"{len(values)} dims")
    return tuple(_natural(value) for value in values)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where a table should be")
    return value


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
