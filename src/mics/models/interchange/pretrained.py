"""A transformers folder with safetensors, read slice by slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mics.checkpoint.manifest import Entry, whole_entry
from mics.errors import CheckpointError
from mics.models.interchange.stream import DTYPES
from mics.models.small_files import read_table
from mics.quantities import dtype_name

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WRITE = "a folder that transformers' save_pretrained wrote"


def read_entries(folder: Path) -> dict[str, Entry]:
    """Name, dtype, shape and place of every tensor of a folder, from the headers alone.

    Raises:
        CheckpointError: there are no safetensors (pickled weights are named, not read), a file is
            damaged, or files and their index contradict each other.
        ConfigError: the index is no table of JSON.
    """
    index = _index(folder)
    entries: dict[str, Entry] = {}
    for file in _files(folder, index):
        for name, entry in entries_of(folder, file).items():
            if name in entries:
                raise CheckpointError(
                    f"{name} stands in two files of {folder}.",
                    numbers=f"They are {entries[name].chunks[0].file} and {file}.",
                    write=_WRITE,
                )
            entries[name] = entry
    for name, file in (index or {}).items():
        if name not in entries or entries[name].chunks[0].file != file:
            raise CheckpointError(
                f"{name} is not in {folder / file}, where {_INDEX} says it is.", write=_WRITE
            )
    return entries


def entries_of(folder: Path, file: str) -> dict[str, Entry]:
    """Name, dtype, shape and place of every tensor of one file, from its header alone.

    Raises:
        CheckpointError: there is none, it is damaged, or holds what models do not train in.
    """
    if not (folder / file).is_file():  # opening a pipe would wait for its writer
        raise CheckpointError(f"{folder / file} is no file, or not there.", write=_WRITE)
    entries: dict[str, Entry] = {}
    try:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise CheckpointError(
                        f"{name} of {folder / file} has a dtype that models do not train in.",
                        numbers=f"It is {part.get_dtype()}.",
                        write="the model before it was quantised",
                    )
                shape, dtype = tuple(part.get_shape()), dtype_name(DTYPES[part.get_dtype()])
                entries[name] = whole_entry(dtype, shape, file, name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder / file} cannot be read as safetensors.",
            numbers=f"{type(error).__name__}: {error}",
            write=_WRITE,
        ) from None
    return entries


def _index(folder: Path) -> dict[str, str] | None:
    """Which file each tensor is in, where there are several."""
    index = folder / _INDEX
    if (folder / _SINGLE).is_file() or not index.exists():
        return None
    where: Any = read_table(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(
            f"{index} is no index of safetensors.",
            numbers=f"weight_map is {_kind(where)}, not the file of each tensor.",
            write=_WRITE,
        )
    if any(Path(name).name != name for name in where.values()):
        raise CheckpointError(f"{index} names files outside of its folder.", write=_WRITE)
    return where


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _files(folder: Path, index: dict[str, str] | None) -> list[str]:
    if index is not None:
        return sorted(set(index.values()))
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
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
        write=_WRITE,
    )
