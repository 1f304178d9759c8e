"""A file of ``torch.save`` (a zip archive, its tensors uncompressed), read by the slice."""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from mics.errors import CheckpointError
from mics.models.interchange.deepspeed.pickles import MOST_BYTES, TensorAt, read_pickle
from mics.ranks.files import open_regular

_LOCAL = struct.Struct("<4s22xHH")
_MOST_ENTRIES = 1_000_000
_CHUNK_BYTES = 4 << 20

_OF_ZIP = (RuntimeError, NotImplementedError, EOFError, OverflowError, LookupError, struct.error)
"""What ``zipfile`` raises of archives that are none, beside its own error."""

_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}


class TorchFile:
    """A file of ``torch.save`` whose pickle is read as data.

    ``value`` is what was saved, with tensors as places; ``read`` reads their values. The file has
    ``num_bytes``.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is no such file, is damaged, or names what no checkpoint needs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                self.num_bytes = os.fstat(file.fileno()).st_size
                with zipfile.ZipFile(file) as archive:
                    self._entries = _entries(archive)
                    data = self._small(archive, "data.pkl", MOST_BYTES)
                    order = self._small(archive, "byteorder", 16) if self._has("byteorder") else b""
            if order not in (b"", b"little"):
                raise ValueError(f"its byte order is {order!r}")
            self.value = read_pickle(data)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise self.damaged(str(error) or type(error).__name__) from None
        except _OF_ZIP as error:
            raise self.damaged(f"{type(error).__name__}: {error}") from None
        stored = [e.file_size for n, e in self._entries.items() if n.startswith("data/")]
        if sum(stored) > self.num_bytes:
            raise self.damaged("its entries have more bytes than it has")

    def damaged(self, why: str) -> CheckpointError:
        """The error for a file that cannot be what it should be."""
        return CheckpointError(
            f"{self.path} cannot be read: {why[:300]}.",
            write="a file that DeepSpeed's save_checkpoint wrote, without objects of other "
            "libraries in client_state",
        )

    def _has(self, name: str) -> bool:
        return name in self._entries

    def _small(self, archive: zipfile.ZipFile, name: str, most: int) -> bytes:
        if name not in self._entries:
            raise ValueError(f"it has no {name}: it is no file of torch.save")
        info = self._entries[name]
        if info.file_size > most:
            raise ValueError(f"its {name} has {info.file_size:,} bytes, {most:,} at most")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its {name} is compressed")
        return archive.read(info)

    def dtype(self, tensor: TensorAt) -> torch.dtype:
        """The dtype of a tensor of this file.

        Raises:
            CheckpointError: models do not train in it.
        """
        dtype = _STORAGES.get(tensor.storage.kind)
        if dtype is None:
            raise self.damaged(f"a tensor of {ascii(tensor.storage.kind)[:60]}")
        return dtype

    def check(self, tensor: Any, what: str) -> TensorAt:
        """A value that has to be a tensor in row-major order, wholly inside of its storage.

        Raises:
            CheckpointError: it is not, or its storage has other bytes than the file says.
        """
        if not isinstance(tensor, TensorAt):
            raise self.damaged(f"{what} is no tensor")
        itemsize, storage = self.dtype(tensor).itemsize, tensor.storage
        numel = math.prod(tensor.shape)
        expected = 1
        for size, step in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
            if numel and size > 1 and step != expected:
                raise self.damaged(f"{what} is not in row-major order")
            expected *= size
        if tensor.offset + numel > storage.numel:
            raise self.damaged(f"{what} lies outside of its storage")
        info = self._entries.get(f"data/{storage.key}")
        if info is None:
            raise self.damaged(f"the storage of {what} is not there")
        if info.file_size != storage.numel * itemsize:
            raise self.damaged(
                f"the storage of {what} has {info.file_size:,} bytes and says "
                f"{storage.numel:,} values of {itemsize}"
            )
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise self.damaged(f"the storage of {what} is compressed")
        return tensor

    def verify(self) -> None:
        """Compare the bytes of every tensor with their checksums, where the file has them.

        Raises:
            CheckpointError: they differ.
        """
        for name, info in self._entries.items():
            if not name.startswith("data/"):
                continue
            sum_, left = 0, info.file_size
            try:
                with os.fdopen(open_regular(self.path), "rb") as file:
                    file.seek(self._begin(file, info))
                    if not info.CRC:  # torch can be told to write none
                        continue
                    while left and (part := file.read(min(left, _CHUNK_BYTES))):
                        sum_, left = zlib.crc32(part, sum_), left - len(part)
            except (OSError, ValueError, OverflowError, struct.error) as error:
                raise self.damaged(str(error)) from None
            if left or sum_ != info.CRC:
                raise self.damaged(f"the bytes of {ascii(name)[:60]} are not those that were saved")

    def read(self, tensor: TensorAt, start: int, into: torch.Tensor) -> None:
        """Fill ``into`` (flat, of the tensor's dtype) with its values from the ``start``-th on.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if not into.numel():
            return
        info = self._entries[f"data/{tensor.storage.key}"]
        into_bytes: Any = into.view(torch.uint8).numpy()
        skipped = (tensor.offset + start) * into.dtype.itemsize
        try:
            with os.fdopen(open_regular(self.path), "rb") as file:
                file.seek(self._begin(file, info) + skipped)
                if file.readinto(into_bytes.data) != into_bytes.nbytes:
                    raise ValueError("it ends too early")
        except (OSError, ValueError, OverflowError, struct.error) as error:
            raise self.damaged(str(error)) from None

    def _begin(self, file: Any, info: zipfile.ZipInfo) -> int:
        """Where the bytes of an entry begin."""
        file.seek(info.header_offset)
        signature, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
        begin = info.header_offset + 30 + name + extra
        if signature != b"PK\x03\x04" or begin + info.file_size > self.num_bytes:
            raise ValueError("its entries are not where they should be")
        return int(begin)


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by their names behind the folder that all of them are in."""
    infos = archive.infolist()
    if len(infos) > _MOST_ENTRIES:
        raise ValueError(f"it has {len(infos):,} entries")
    folders = {info.filename.partition("/")[0] for info in infos}
    entries = {info.filename.partition("/")[2]: info for info in infos}
    if len(folders) != 1 or len(entries) != len(infos):
        raise ValueError("its entries are not those of torch.save: in one folder, each once")
    return entries
