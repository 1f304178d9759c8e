"""The adapters of a checkpoint as folders of peft, without model and without peft."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mics.checkpoint.adapters import CONFIG
from mics.checkpoint.disk import write_bytes
from mics.checkpoint.layout import ADAPTERS, ASSETS, MODEL, of_kind
from mics.checkpoint.manifest import Entry, Manifest, file_name
from mics.checkpoint.verifying import verified_manifest
from mics.errors import CheckpointError
from mics.models.interchange.adapters import WEIGHTS
from mics.models.interchange.exporting import Exported, dtype_of, find_checkpoint
from mics.models.interchange.new_folder import check_new, new_folder
from mics.models.interchange.stream import TensorReader, write_stream
from mics.models.small_files import read_table
from mics.quantities import first_of
from mics.ranks.console import ShowBytes, alarm

_FIRST = "default"  # whose files peft puts into the folder itself

_Adapter = tuple[dict[str, Any], dict[str, str]]
"""peft's configuration, and the checkpoint's names of tensors by peft's."""


def export_adapters(
    path: Path, out: Path, *, dtype: torch.dtype | None, told: ShowBytes
) -> Exported:
    """Write every adapter of a checkpoint as ``PeftModel.save_pretrained`` would.

    The adapter named "default" lies in the folder itself, any other in a folder of its name
    inside. An adapter that was left out of the checkpoint, because it did not train, is said.

    Args:
        path: a checkpoint, or a run's folder.
        out: the folder to be made.
        dtype: the dtype of floating-point tensors; ``None`` keeps theirs.
        told: is called as the work goes on.

    Raises:
        CheckpointError: no checkpoint, a damaged one, one without adapters, or ``out`` exists or
            cannot be written.
    """
    checkpoint = find_checkpoint(path)
    manifest = verified_manifest(checkpoint)
    adapters = _adapters_in(checkpoint, manifest)
    check_new(out)
    entries = of_kind(MODEL, manifest.tensors)
    names = [name for _, tensors in adapters.values() for name in tensors.values()]
    sizes = {name: entries[name].num_bytes for name in names}
    value_of = TensorReader(checkpoint, entries, sizes, told)
    not_finite: list[str] = []
    num_bytes = 0
    with new_folder(out) as making:
        for adapter, (config, tensors) in adapters.items():
            folder = making if adapter == _FIRST else making / adapter
            folder.mkdir(exist_ok=True)
            rows = [_row(peft, entries[name], dtype) for peft, name in tensors.items()]
            facts, bad = write_stream(folder / WEIGHTS, rows, _reading(value_of, tensors))
            text = json.dumps(config, indent=2, sort_keys=True)
            write_bytes(folder / CONFIG, text.encode())
            not_finite += sorted(bad)
            num_bytes += facts.bytes
        files = sorted(str(f.relative_to(making)) for f in making.rglob("*") if f.is_file())
    return Exported(checkpoint, out, len(names), num_bytes, files, not_finite)


def _reading(value_of: TensorReader, names: Mapping[str, str]) -> Callable[[str], torch.Tensor]:
    return lambda peft: value_of(names[peft])


def _row(
    name: str, entry: Entry, dtype: torch.dtype | None
) -> tuple[str, torch.dtype, tuple[int, ...]]:
    return name, dtype_of(entry, dtype), entry.shape


def _adapters_in(checkpoint: Path, manifest: Manifest) -> dict[str, _Adapter]:
    """The adapters that a checkpoint has all tensors of, by their names.

    Raises:
        CheckpointError: it has none, or its table of them is not as ``mics.save`` writes it.
    """
    if ADAPTERS not in manifest.files:
        raise CheckpointError(
            f"{checkpoint} does not say which of its tensors are an adapter's.",
            numbers="mics.save keeps that, as an asset, for a model with adapters of peft: "
            f"{ADAPTERS.removeprefix(ASSETS)}.",
            write="mics.load into the model with its adapters, and mics.save_adapters(path, "
            "model=model)",
        )
    table = read_table(checkpoint / ADAPTERS)
    try:
        adapters = {file_name(n): _adapter(one) for n, one in table["adapters"].items()}
        others = [str(name) for name in table["others"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint / ADAPTERS} is no table of adapters.",
            numbers=f"{type(error).__name__}: {error}.",
            write="an older checkpoint of the same run, or names of adapters that folders can have",
        ) from None
    there = of_kind(MODEL, manifest.tensors)
    lacking = [n for n, (_, tensors) in adapters.items() if not set(tensors.values()) <= set(there)]
    whole = {name: one for name, one in adapters.items() if name not in lacking}
    if not whole:
        raise CheckpointError(
            f"{checkpoint} has no adapter whose tensors are all there.",
            numbers=f"It is of a model with {first_of(lacking) or 'none that can be exported'}.",
            write="a checkpoint that was saved while the adapter trained, or with frozen=True",
        )
    if lacking:
        alarm(f"Adapters that did not train were left out of the checkpoint: {first_of(lacking)}.")
    if others:
        alarm(
            f"{len(others)} trained parameter(s) are not of an adapter, and not in the folder: "
            f"{first_of(others)}."
        )
    return whole


def _adapter(table: Mapping[str, Any]) -> _Adapter:
    tensors = table["tensors"]
    return dict(table["config"]), {str(peft): str(name) for peft, name in tensors.items()}
