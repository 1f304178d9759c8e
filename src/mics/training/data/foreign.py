"""Token files of other programs, read only: llm.c's (nanochat's kin) and Megatron's.

They hold ids and no tokenizer, which is named beside them. What they are is seen by their first
bytes; what their headers say is bounded, and must agree with the sizes of the files.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mics.errors import DataError
from mics.ranks.files import open_regular
from mics.training.data.finding import HUB, LIBRARY, check_name, find_files
from mics.training.data.shards import Stretch

# llm.c, dev/data/data_common.py: 256 int32, of which the first three are magic, version, ids.
_LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
_LLM_C_HEADER = 1024
# Megatron-LM, megatron/core/datasets/indexed_dataset.py: magic, version, dtype, two counts.
_MEGATRON = b"MMIDIDX\0\0"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
# Words in the names of files: llm.c writes train and val, others spell it out.
_HELD_OUT, _TEST = {"val", "valid", "validation"}, {"test"}
_AT_ONCE = 1 << 22  # sequences of an index that are looked at in memory
_SAMPLES, _SAMPLE = 16, 4 << 10


def find_token_files(source: str) -> list[Stretch] | None:
    """The ids of a source that is token files of other programs; ``None`` for any other source.

    Args:
        source: a file, a folder or a glob of them; of Megatron's also what both files are called
            without ``.bin`` and ``.idx``.

    Raises:
        DataError: a header contradicts the size of its file, or there is something else beside.
    """
    if source.startswith(HUB) or source == LIBRARY:
        return None
    check_name(source)
    path = Path(source).expanduser()
    index = path.with_name(path.name + ".idx")
    if not path.exists() and path.name and index.is_file():
        return _megatron(index)
    files = find_files(source)
    kinds = [_kind(file) for file in files[:1]]
    if kinds == [""]:
        return None
    kinds += [_kind(file) for file in files[1:]]
    if "" in kinds:
        raise DataError(
            "data.source has token files and others, which cannot be read as one.",
            numbers=f"{files[0]} is a token file, {files[kinds.index('')]} is none.",
            write="--data.source <a glob of the token files alone>",
        )
    found: list[Stretch] = []
    for file, kind in zip(files, kinds, strict=True):
        if kind == "llm.c":
            found.append(_llm_c(file))
        elif kind == "megatron index":
            found += _megatron(file)
        elif file.with_suffix(".idx") not in files:  # else its index is read, which leads to it
            found += _megatron(file.with_suffix(".idx"))
    return found


def held_out_files(stretches: Sequence[Stretch]) -> tuple[list[Stretch], list[Stretch]]:
    """Part files to train on from those that their names hold out, as llm.c's val files are.

    Where all of them or none have such a name, all are to train on.

    Raises:
        DataError: some are for a test, which nobody trains on beside others.
    """
    names = [set(re.findall(r"[a-z]+", one.path.stem.lower())) for one in stretches]
    apart = [bool(words & _HELD_OUT) for words in names]
    tests = [bool(words & _TEST) for words in names]
    if any(tests) and not all(tests):
        raise DataError(
            "data.source has files for a test beside others, which would be trained on.",
            numbers=f"{sum(tests)} of {len(tests)} are, first {stretches[tests.index(True)].path}.",
            write="--data.source <a glob of the others>",
        )
    if all(apart):
        return list(stretches), []
    pairs = list(zip(stretches, apart, strict=True))
    return [one for one, out in pairs if not out], [one for one, out in pairs if out]


def fingerprint_of(stretches: Sequence[Stretch]) -> list[str]:
    """What tells ids from others without reading all: sizes, and samples of every file."""
    out = []
    for stretch in stretches:
        itemsize = np.dtype(stretch.dtype).itemsize
        size = stretch.tokens * itemsize
        digest = hashlib.sha256(f"{stretch.dtype} {size}".encode())
        places = sorted({(size - _SAMPLE) * k // (_SAMPLES - 1) for k in range(_SAMPLES)})
        with os.fdopen(open_regular(stretch.path), "rb") as file:
            for place in places:
                file.seek(stretch.offset + max(0, place))
                digest.update(file.read(min(_SAMPLE, size)))
        out.append(digest.hexdigest())
    return out


def _kind(file: Path) -> str:
    head = _head(file, len(_MEGATRON))
    if head == _MEGATRON:
        return "megatron index"
    if len(head) >= 4 and int.from_bytes(head[:4], "little") in _LLM_C:
        return "llm.c"
    index = file.with_suffix(".idx")
    if index != file and index.is_file() and _head(index, len(_MEGATRON)) == _MEGATRON:
        return "megatron data"
    return ""


def _head(file: Path, size: int) -> bytes:
    try:
        with os.fdopen(open_regular(file), "rb") as stream:
            return stream.read(size)
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}.", write="--data.source <readable files>"
        ) from None


def _llm_c(file: Path) -> Stretch:
    head = np.frombuffer(_head(file, _LLM_C_HEADER).ljust(_LLM_C_HEADER, b"\0"), "<i4")
    magic, version, tokens = (int(value) for value in head[:3])
    wanted, dtype = _LLM_C[magic]
    if version != wanted:
        raise _wrong(file, "llm.c", f"Its version is {version}, and {wanted} is known.")
    size, itemsize = file.stat().st_size, np.dtype(dtype).itemsize
    if tokens < 0 or size != _LLM_C_HEADER + tokens * itemsize:
        raise _wrong(file, "llm.c", f"Its header says {tokens:,} ids, and it has {size:,} bytes.")
    return Stretch(file, _LLM_C_HEADER, tokens, dtype)


def _megatron(index: Path) -> list[Stretch]:
    """The ids of one index and its data: they must stand one behind the other."""
    data = index.with_suffix(".bin") if index.suffix == ".idx" else index.with_suffix("")
    head = _head(index, _MEGATRON_HEADER.size)
    if len(head) < _MEGATRON_HEADER.size or not data.is_file():
        raise _wrong(index, "Megatron", f"It has {len(head)} bytes, or there is no {data.name}.")
    magic, version, code, sequences, documents = _MEGATRON_HEADER.unpack(head)
    if magic != _MEGATRON or version != 1 or code not in _MEGATRON_DTYPES:
        raise _wrong(index, "Megatron", f"Its version is {version}, its dtype of number {code}.")
    dtype = _MEGATRON_DTYPES[code]
    itemsize, size = np.dtype(dtype).itemsize, data.stat().st_size
    lengths_at = _MEGATRON_HEADER.size
    pointers_at = lengths_at + 4 * sequences
    wanted, found = pointers_at + 8 * (sequences + documents), index.stat().st_size
    if found not in (wanted, wanted + sequences):  # of several modes a byte for each sequence
        raise _wrong(
            index,
            "Megatron",
            f"It says {sequences:,} sequences, {documents:,} documents, and has {found:,} bytes.",
        )
    place = 0
    for first in range(0, sequences, _AT_ONCE):
        count = min(_AT_ONCE, sequences - first)
        lengths = np.fromfile(index, "<i4", count, offset=lengths_at + 4 * first).astype(np.int64)
        pointers = np.fromfile(index, "<i8", count, offset=pointers_at + 8 * first)
        ends = place + np.cumsum(lengths) * itemsize
        if (lengths < 0).any() or (pointers != ends - lengths * itemsize).any():
            at = first + int(np.argmax((lengths < 0) | (pointers != ends - lengths * itemsize)))
            raise _wrong(index, "Megatron", f"Sequence {at:,} is not where the one before it ends.")
        place = int(ends[-1])
    if place != size:
        raise _wrong(index, "Megatron", f"It says {place:,} bytes, and {data.name} has {size:,}.")
    return [Stretch(data, 0, place // itemsize, dtype)]


def _wrong(file: Path, whose: str, numbers: str) -> DataError:
    return DataError(
        f"{file} begins as a token file of {whose}, but it is none that can be read.",
        numbers=numbers,
        write="--data.source <a whole copy of it>",
    )
