"""A checkpoint as a folder that transformers loads, written one tensor at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mics.checkpoint.disk import write_bytes
from mics.checkpoint.folder import newest_intact
from mics.checkpoint.layout import ASSETS, MODEL, MODEL_CONFIG, TOKENIZER, of_kind
from mics.checkpoint.manifest import MANIFEST, Entry, Manifest
from mics.checkpoint.verifying import verified_manifest
from mics.errors import CheckpointError
from mics.interchange.new_folder import check_new, new_folder
from mics.interchange.stream import TensorReader, write_stream
from mics.quantities import dtype_name
from mics.ranks.console import ShowBytes


@dataclass(frozen=True)
class Exported:
    """What was written, and where from."""

    checkpoint: Path
    folder: Path
    num_tensors: int
    num_bytes: int
    files: list[str]


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
    """Write ``config.json``, the tokenizer and the weights of a checkpoint to a new folder.

    Every file of the checkpoint is verified first. No more than one tensor is in memory. The
    folder appears under its name when it is complete.

    Args:
        path: a checkpoint, or a run's folder.
        out: the folder to be made.
        dtype: the dtype of floating-point tensors; ``None`` keeps theirs.
        shard_bytes: most bytes per file, where a tensor is not larger by itself.
        told: is called as the work goes on.

    Raises:
        CheckpointError: no checkpoint, a damaged one, one without a model configuration, or ``out``
            exists or cannot be written.
    """
    checkpoint = find_checkpoint(path)
    manifest = verified_manifest(checkpoint)
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
) -> tuple[int, int, list[str]]:
    entries = of_kind(MODEL, manifest.tensors)
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
    for file, names in zip(files, shards, strict=True):
        write_stream(out / file, [(n, dtypes[n], entries[n].shape) for n in names], value_of)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_bytes(out / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
    config: dict[str, Any] = json.loads((checkpoint / MODEL_CONFIG).read_text())
    # transformers loads weights in the dtype that it reads here, whatever they are stored in.
    config.pop("torch_dtype", None)  # its name before transformers 5
    floats = [each for each in dtypes.values() if each.is_floating_point]
    config["dtype"] = dtype_name(floats[0])
    write_bytes(out / "config.json", json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    for name in manifest.files:
        if name.startswith(TOKENIZER):
            target = out / name.removeprefix(TOKENIZER)
            write_bytes(target, (checkpoint / name).read_bytes())
    return len(entries), total, sorted(file.name for file in out.iterdir())


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
