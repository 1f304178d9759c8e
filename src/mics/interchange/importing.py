"""A transformers folder as a checkpoint, written one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mics.checkpoint.contents import contents_of
from mics.checkpoint.disk import write_bytes, write_manifest
from mics.checkpoint.layout import MODEL, MODEL_CONFIG, TOKENIZER, chunk_key, file_of
from mics.checkpoint.manifest import Entry, FileFacts, Manifest, whole_entry
from mics.interchange.exporting import dtype_of
from mics.interchange.new_folder import check_new, new_folder
from mics.interchange.pretrained import read_entries
from mics.interchange.stream import TensorReader, write_stream
from mics.interchange.weights import match_weights
from mics.models.building import build, load_config
from mics.quantities import dtype_name
from mics.ranks.console import ShowBytes

_CONFIG = "config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def import_folder(
    folder: Path, out: Path, *, dtype: torch.dtype | None, told: ShowBytes
) -> list[str]:
    """Write a checkpoint (weights only, step 0) from ``config.json`` and safetensors.

    Args:
        folder: what transformers' ``save_pretrained`` wrote.
        out: the checkpoint's folder, to be made.
        dtype: the dtype of floating-point tensors; ``None`` keeps theirs.
        told: is called as the work goes on.

    Returns:
        Names of tensors that the model has no place for, which were left out.

    Raises:
        CheckpointError: the folder lacks parameters, has pickled weights only, or ``out`` exists.
        ConfigError: its ``config.json`` cannot be read.
    """
    check_new(out)
    entries = read_entries(folder)
    model = build(load_config(str(folder), vocabulary=1, separator=0))
    contents = contents_of(model, None)
    found, unused = match_weights(folder, entries, model, contents)
    weights = {MODEL + name: entry for name, entry in found.items()}
    with new_folder(out) as making:
        tensors, facts = _write_tensors(folder, weights, making, dtype, told)
        files = {file_of(0): facts, MODEL_CONFIG: _copy(folder / _CONFIG, making / MODEL_CONFIG)}
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                files[TOKENIZER + name] = _copy(folder / name, making / TOKENIZER / name)
        manifest = Manifest(
            world=1,
            partition=1,
            tensors=tensors,
            aliases=contents.aliases,
            values={},
            extra={"step": 0, "position": 0, "tokens": 0, "data": f"imported from {folder.name}"},
            files=files,
        )
        write_manifest(making, manifest)
    return sorted(unused)


def _write_tensors(
    folder: Path,
    entries: Mapping[str, Entry],
    making: Path,
    dtype: torch.dtype | None,
    told: ShowBytes,
) -> tuple[dict[str, Entry], FileFacts]:
    """All of them into one file; their entries in the checkpoint, and what the file must be."""
    keys = {name: chunk_key(name, (0,) * len(entry.shape)) for name, entry in entries.items()}
    written = {
        name: whole_entry(dtype_name(dtype_of(entry, dtype)), entry.shape, file_of(0), keys[name])
        for name, entry in entries.items()
    }
    by_key = {keys[name]: entry for name, entry in entries.items()}
    sizes = {key: entry.num_bytes for key, entry in by_key.items()}
    facts = write_stream(
        making / file_of(0),
        [(keys[name], entry.torch_dtype, entry.shape) for name, entry in written.items()],
        TensorReader(folder, by_key, sizes, told),
    )
    return written, facts


def _copy(source: Path, target: Path) -> FileFacts:
    return write_bytes(target, source.read_bytes())
