"""A transformers folder with safetensors, read slice by slice."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mics.checkpoint.manifest import Entry, whole_entry
from mics.errors import CheckpointError
from mics.interchange.stream import DTYPES
from mics.quantities import dtype_name

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_entries(folder: Path) -> dict[str, Entry]:
    """Name, dtype, shape and place of every tensor of a folder, from the headers alone.

    Raises:
        CheckpointError: there are no safetensors (pickled weights are named, not read), or a file
            is damaged.
    """
    entries: dict[str, Entry] = {}
    for file in _files(folder):
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    part = opened.get_slice(name)
                    shape = tuple(part.get_shape())
                    dtype = dtype_name(DTYPES[part.get_dtype()])
                    entries[name] = whole_entry(dtype, shape, file, name)
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(
                f"{folder / file} cannot be read as safetensors.",
                numbers=f"{type(error).__name__}: {error}",
                write="a folder that transformers' save_pretrained wrote",
            ) from None
    return entries


def _files(folder: Path) -> list[str]:
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    index = folder / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{index} is no index of safetensors.",
                numbers=f"{type(error).__name__}: {error}",
                write="a folder that transformers' save_pretrained wrote",
            ) from None
        if any(Path(str(name)).name != name for name in names):
            raise CheckpointError(
                f"{index} names files outside of its folder.",
                write="a folder that transformers' save_pretrained wrote",
            )
        return sorted(names)
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt") for file in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} has pickled weights only, which can execute code when they are read.",
            numbers=f"It has {', '.join(pickled[:4])}.",
            write="save_pretrained of a model that was loaded from there, where you trust it",
        )
    raise CheckpointError(
        f"{folder} has neither {_SINGLE} nor {_INDEX}.",
        numbers="It does not exist." if not folder.exists() else "",
        write="a folder that transformers' save_pretrained wrote",
    )
