"""A transformers folder as a checkpoint, written one tensor at a time."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import torch
from transformers import PretrainedConfig

from mics.checkpoint.contents import contents_of
from mics.checkpoint.disk import sync, write_bytes
from mics.checkpoint.manifest import (
    CHECKSUM,
    MANIFEST,
    Chunk,
    Entry,
    FileFacts,
    Manifest,
    checksum_line,
)
from mics.checkpoint.reading import read_tensors
from mics.errors import CheckpointError
from mics.interchange.exporting import CONFIG, Told
from mics.interchange.pretrained import read_entries
from mics.interchange.stream import write_stream
from mics.interchange.weights import check_complete, match_names
from mics.models.building import build, load_config
from mics.version import __version__

_FILE = "rank-00000.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def import_folder(folder: Path, out: Path, *, dtype: torch.dtype | None, told: Told) -> list[str]:
    """Write a checkpoint (weights only, step 0) from ``config.json`` and safetensors.

    Args:
        folder: that transformers' ``save_pretrained`` wrote.
        out: the checkpoint's folder, to be made.
        dtype: of floating-point tensors; ``None`` keeps theirs.
        told: called as the work goes on.

    Returns:
        Names of tensors that the model has no place for, which were left out.

    Raises:
        CheckpointError: the folder lacks parameters, has pickled weights only, or ``out`` exists.
        ConfigError: its ``config.json`` cannot be read.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; nothing is written over.", write="another folder")
    entries = read_entries(folder)
    config: PretrainedConfig = load_config(str(folder), vocabulary=1, separator=0)
    model = build(config)
    contents = contents_of(model, None)
    wanted = {name.removeprefix("model/"): tensor for name, tensor in contents.tensors.items()}
    ties = {
        name.removeprefix("model/"): first.removeprefix("model/")
        for name, first in contents.aliases.items()
    }
    found = match_names(entries, set(wanted), ties, str(model.base_model_prefix))
    check_complete(folder, wanted, found)
    kept = {
        name: (dtype if dtype is not None and e.torch_dtype.is_floating_point else e.torch_dtype)
        for name, e in found.items()
    }
    total, done = sum(entry.num_bytes for entry in found.values()), 0

    def value_of(key: str) -> torch.Tensor:
        nonlocal done
        name = key.removeprefix("model/").rpartition("@")[0]
        value = torch.empty(found[name].shape, dtype=found[name].torch_dtype)
        read_tensors(folder, {name: found[name]}, {name: value})
        done += found[name].num_bytes
        told("writing", done, total)
        return value

    making = out.with_name(f"{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        making.mkdir(parents=True)
        keys = {name: f"model/{name}@{','.join('0' * len(e.shape))}" for name, e in found.items()}
        facts = write_stream(
            making / _FILE,
            [(keys[name], kept[name], entry.shape) for name, entry in found.items()],
            value_of,
        )
        files = {_FILE: facts, CONFIG: _copy(folder / "config.json", making / CONFIG)}
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                asset = f"assets/tokenizer/{name}"
                files[asset] = _copy(folder / name, making / asset)
        manifest = Manifest(
            mics=__version__,
            torch=torch.__version__,
            world=1,
            partition=1,
            tensors={
                f"model/{name}": Entry(
                    str(kept[name]).removeprefix("torch."),
                    entry.shape,
                    [Chunk((0,) * len(entry.shape), entry.shape, _FILE, keys[name])],
                )
                for name, entry in found.items()
            },
            aliases=contents.aliases,
            values={},
            extra={"step": 0, "position": 0, "tokens": 0, "data": f"imported from {folder.name}"},
            files=files,
        ).to_bytes()
        write_bytes(making / CHECKSUM, checksum_line(manifest))
        write_bytes(making / MANIFEST, manifest)
        making.rename(out)
        sync(out.parent)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error.strerror or error}.", write="a writable folder"
        ) from None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return sorted(set(entries) - {e.chunks[0].key for e in found.values()} - set(ties))


def _copy(source: Path, target: Path) -> FileFacts:
    return write_bytes(target, source.read_bytes())
