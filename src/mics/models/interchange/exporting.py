"""A checkpoint as a folder that transformers loads, written one tensor at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mics.checkpoint.disk import write_bytes
from mics.checkpoint.folder import newest_intact
from mics.checkpoint.layout import (
    ADAPTERS,
    ASSETS,
    MODEL,
    MODEL_CONFIG,
    MODEL_FILES,
    TOKENIZER,
    of_kind,
)
from mics.checkpoint.manifest import MANIFEST, Entry, Manifest
from mics.checkpoint.verifying import verified_manifest
from mics.errors import CheckpointError
from mics.models.interchange.new_folder import check_new, new_folder
from mics.models.interchange.stream import TensorReader, write_stream
from mics.models.small_files import (
    CONFIG,
    OF_MODELS,
    OF_TOKENIZERS,
    is_named,
    read_small,
    read_table,
    without_code,
)
from mics.quantities import dtype_name, first_of
from mics.ranks.console import ShowBytes


@dataclass(frozen=True)
class Exported:
    """What was written, and where from."""

    checkpoint: Path
    folder: Path
    num_tensors: int
    num_bytes: int
    files: list[str]
    not_finite: list[str]


def find_checkpoint(path: Path) -> Path:
    """A checkpoint itself, or the newest intact one of a run's folder.

    Raises:
        CheckpointError: neither.
    """
    if (path / MANIFEST).is_file():
        return path
    found = newest_intact(path) if path.is_dir() else None
    if found is None:
        raise CheckpointError(
            f"There is no checkpoint at {path}.",
            numbers="It is a folder without one." if path.is_dir() else "There is no such folder.",
            write="the folder of a run, or of one checkpoint, e.g. runs/default/step-00000500",
        )
    return found


def export(
    path: Path, out: Path, *, dtype: torch.dtype | None, shard_bytes: int, told: ShowBytes
) -> Exported:
    """Write weights, ``config.json`` and what else transformers loads to a new folder.

    Every file of the checkpoint is verified first. No more than one tensor is in memory. The
    folder appears under its name when it is complete.

    Args:
        path: a checkpoint, or a run's folder.
        out: the folder to be made.
        dtype: the dtype of floating-point tensors; ``None`` keeps theirs.
        shard_bytes: most bytes per file, where a tensor is not larger by itself.
        told: is called as the work goes on.

    Raises:
        CheckpointError: no checkpoint, a damaged one, one without a model configuration or with
            adapters, or ``out`` exists or cannot be written.
    """
    checkpoint = find_checkpoint(path)
    manifest = verified_manifest(checkpoint)
    if manifest.frozen:
        raise CheckpointError(
            f"{checkpoint} was saved without its frozen parameters.",
            numbers=f"{len(manifest.frozen)} are not there: {first_of(list(manifest.frozen))}.",
            write="mics export --adapters, or mics.load into the whole model and mics.save of that",
        )
    if ADAPTERS in manifest.files:
        raise CheckpointError(
            f"{checkpoint} has adapters of peft beside its weights, which no plain model has.",
            numbers=f"It is told of them by {ADAPTERS}.",
            write="mics export --adapters; peft's merge_and_unload puts them into the weights",
        )
    if MODEL_CONFIG not in manifest.files:
        raise CheckpointError(
            f"{checkpoint} does not say which transformers model it is of.",
            numbers=f"Its assets are {_assets(manifest) or 'none'}.",
            write='mics.save(..., assets={"model/config.json": config.to_json_string().encode()})',
        )
    check_new(out)
    with new_folder(out) as making:
        exported = _write(checkpoint, manifest, making, dtype, shard_bytes, told)
    return Exported(checkpoint, out, *exported)


def _write(
    checkpoint: Path,
    manifest: Manifest,
    out: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    told: ShowBytes,
) -> tuple[int, int, list[str], list[str]]:
    entries = of_kind(MODEL, manifest.tensors)
    floats = [each for each in entries.values() if each.torch_dtype.is_floating_point]
    if not floats:
        raise CheckpointError(
            f"{checkpoint} holds no floating-point weights.",
            numbers=f"Its {len(entries)} tensors are "
            f"{', '.join(sorted({each.dtype for each in entries.values()})) or 'none'}.",
            write="the checkpoint of a model before it was quantised",
        )
    dtypes = {name: dtype_of(entry, dtype) for name, entry in entries.items()}
    sizes = {
        name: e.num_bytes // e.torch_dtype.itemsize * dtypes[name].itemsize
        for name, e in entries.items()
    }
    shards = _shards(sizes, shard_bytes)
    total, value_of = sum(sizes.values()), TensorReader(checkpoint, entries, sizes, told)
    files = [
        "model.safetensors"
        if len(shards) == 1
        else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    not_finite: list[str] = []
    for file, names in zip(files, shards, strict=True):
        tensors = [(n, dtypes[n], entries[n].shape) for n in names]
        not_finite += sorted(write_stream(out / file, tensors, value_of)[1])
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_bytes(out / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
    config = exported_config(checkpoint, dtype_name(dtype_of(floats[0], dtype)))
    write_bytes(out / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    for name, data in exported_files(checkpoint, manifest).items():
        write_bytes(out / name, data)
    return len(entries), total, sorted(file.name for file in out.iterdir()), not_finite


def exported_config(checkpoint: Path, dtype: str) -> dict[str, Any]:
    """The configuration of a checkpoint as it is exported.

    transformers loads weights in the dtype that it reads there, whatever they are stored in.
    """
    config = read_table(checkpoint / MODEL_CONFIG)
    for name in ("torch_dtype", "auto_map"):  # the name before transformers 5; and code
        config.pop(name, None)
    return config | {"dtype": dtype}


def exported_files(checkpoint: Path, manifest: Manifest) -> dict[str, bytes]:
    """The small files of a checkpoint that transformers loads, by the names it knows them by."""
    found: dict[str, bytes] = {}
    for kind, known in ((MODEL_FILES, OF_MODELS), (TOKENIZER, OF_TOKENIZERS)):
        for name in of_kind(kind, manifest.files):
            if is_named(name, known):
                found[name] = without_code(name, read_small(checkpoint / (kind + name)))
    return found


def dtype_of(entry: Entry, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor is written in; ``wanted`` is for floating-point ones alone."""
    if wanted is None or not entry.torch_dtype.is_floating_point:
        return entry.torch_dtype
    return wanted


def _shards(sizes: dict[str, int], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _assets(manifest: Manifest) -> str:
    return ", ".join(name for name in manifest.files if name.startswith(ASSETS))
