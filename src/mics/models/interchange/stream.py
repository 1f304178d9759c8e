"""A safetensors file read and written by the tensor, so that one at most is in memory.

The format is eight bytes of header length, a JSON header, then the tensors back to back
(github.com/huggingface/safetensors, "Format"); the library itself writes whole dictionaries only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mics.checkpoint.disk import sync
from mics.checkpoint.manifest import Entry, FileFacts
from mics.checkpoint.reading import read_tensors
from mics.ranks.console import ShowBytes

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
"""torch's dtype by the format's name for it."""


class TensorReader:
    """Reads whole tensors of a folder, one after the other, and shows how far it has come.

    Args:
        folder: where the files of the entries are.
        entries: where the tensors are, by name.
        sizes: bytes that each of them counts for.
        show: is called after each.
    """

    def __init__(
        self,
        folder: Path,
        entries: Mapping[str, Entry],
        sizes: Mapping[str, int],
        show: ShowBytes,
    ) -> None:
        self._folder, self._entries, self._sizes, self._show = folder, entries, sizes, show
        self._done, self._total = 0, sum(sizes.values())

    def __call__(self, name: str) -> torch.Tensor:
        """The values of a tensor."""
        entry = self._entries[name]
        value = torch.empty(entry.shape, dtype=entry.torch_dtype)
        read_tensors(self._folder, {name: entry}, {name: value})
        self._done += self._sizes[name]
        self._show("writing", self._done, self._total)
        return value


def write_stream(
    path: Path,
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    value_of: Callable[[str], torch.Tensor],
) -> tuple[FileFacts, set[str]]:
    """Write ``tensors`` (name, dtype, shape); ``value_of`` gives them one after the other.

    Returns:
        Size and checksum of the file, and the names of tensors with NaN or infinity, as written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    digest = hashlib.sha256()
    not_finite: set[str] = set()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for name, dtype, shape in tensors:
            value = value_of(name).to(dtype).contiguous()
            assert tuple(value.shape) == shape
            if not value.isfinite().all():
                not_finite.add(name)
            data: Any = value.reshape(-1).view(torch.uint8).numpy()
            digest.update(data)
            file.write(data)
    sync(path)
    return FileFacts(8 + len(text) + end, digest.hexdigest()), not_finite
