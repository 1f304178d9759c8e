"""A transformers folder as a checkpoint, written one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mics.checkpoint.contents import contents_of
from mics.checkpoint.disk import write_bytes, write_manifest
from mics.checkpoint.layout import (
    MODEL,
    MODEL_CONFIG,
    MODEL_FILES,
    TOKENIZER,
    chunk_key,
    file_of,
)
from mics.checkpoint.manifest import Entry, FileFacts, Manifest, whole_entry
from mics.models.building import build, load_config
from mics.models.interchange.exporting import dtype_of
from mics.models.interchange.new_folder import check_new, new_folder
from mics.models.interchange.pretrained import read_entries
from mics.models.interchange.stream import TensorReader, write_stream
from mics.models.interchange.weights import match_weights
from mics.models.small_files import (
    CONFIG,
    OF_MODELS,
    OF_TOKENIZERS,
    left_behind,
    read_small,
    small_files,
    usual_that_lack,
    without_code,
)
from mics.quantities import dtype_name
from mics.ranks.console import ShowBytes


@dataclass(frozen=True)
class Imported:
    """What was not taken as it is.

    ``unused`` are tensors that the model has no place for, ``not_finite`` those with NaN or
    infinity; ``code`` is what names or is code and stays behind, ``lacking`` are small files that
    most folders have.
    """

    unused: list[str]
    not_finite: list[str]
    code: list[str]
    lacking: list[str]


def import_folder(
    folder: Path, out: Path, *, dtype: torch.dtype | None, told: ShowBytes
) -> Imported:
    """Write a checkpoint (weights only, step 0) from ``config.json`` and safetensors.

    What transformers loads beside the weights comes along: tokenizer, chat templates, generation
    configuration, processors.

    Args:
        folder: what transformers' ``save_pretrained`` wrote.
        out: the checkpoint's folder, to be made.
        dtype: the dtype of floating-point tensors; ``None`` keeps theirs.
        told: is called as the work goes on.

    Raises:
        CheckpointError: the folder lacks parameters, has pickled weights only, or ``out`` exists.
        ConfigError: its ``config.json`` or another small file cannot be read, or is not of a
            language model.
    """
    check_new(out)
    entries = read_entries(folder)
    model = build(load_config(str(folder), vocabulary=1, separator=0))
    contents = contents_of(model, None)
    found, unused = match_weights(folder, entries, model, contents)
    weights = {MODEL + name: entry for name, entry in found.items()}
    code, files = left_behind(folder), files_to_keep(folder)
    with new_folder(out) as making:
        tensors, facts, not_finite = _write_tensors(folder, weights, making, dtype, told)
        written = {name: write_bytes(making / name, data) for name, data in files.items()}
        manifest = Manifest(
            world=1,
            partition=1,
            tensors=tensors,
            aliases=contents.aliases,
            values={},
            extra={"step": 0, "position": 0, "tokens": 0, "data": f"imported from {folder.name}"},
            files={file_of(0): facts, **written},
        )
        write_manifest(making, manifest)
    return Imported(sorted(unused), not_finite, code, usual_that_lack(plain_names_of(files)))


def files_to_keep(folder: Path) -> dict[str, bytes]:
    """The small files of a folder by the names that they get in the checkpoint."""
    config = without_code(CONFIG, read_small(folder / CONFIG))
    files = {MODEL_CONFIG: config}
    for kind, names in ((MODEL_FILES, OF_MODELS), (TOKENIZER, OF_TOKENIZERS)):
        files |= {kind + name: data for name, data in small_files(folder, names).items()}
    return files


def plain_names_of(files: Mapping[str, bytes]) -> list[str]:
    """The names that small files have in a folder of transformers."""
    return [name.removeprefix(MODEL_FILES).removeprefix(TOKENIZER) for name in files]


def _write_tensors(
    folder: Path,
    entries: Mapping[str, Entry],
    making: Path,
    dtype: torch.dtype | None,
    told: ShowBytes,
) -> tuple[dict[str, Entry], FileFacts, list[str]]:
    """All of them into one file.

    Returns:
        Their entries in the checkpoint, what the file must be, and who is not finite.
    """
    keys = {name: chunk_key(name, (0,) * len(entry.shape)) for name, entry in entries.items()}
    written = {
        name: whole_entry(dtype_name(dtype_of(entry, dtype)), entry.shape, file_of(0), keys[name])
        for name, entry in entries.items()
    }
    by_key = {keys[name]: entry for name, entry in entries.items()}
    sizes = {key: entry.num_bytes for key, entry in by_key.items()}
    facts, bad = write_stream(
        making / file_of(0),
        [(keys[name], entry.torch_dtype, entry.shape) for name, entry in written.items()],
        TensorReader(folder, by_key, sizes, told),
    )
    not_finite = [name.removeprefix(MODEL) for name in entries if keys[name] in bad]
    return written, facts, not_finite
