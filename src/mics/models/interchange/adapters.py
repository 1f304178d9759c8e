"""Adapters of a sharded model, alone, in peft's format: to a folder, and back.

Which tensors belong to an adapter, and by which names, peft says itself. peft's own
``save_pretrained`` takes tensors for whole that are shards.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics.checkpoint.adapters import (
    CONFIG,
    adapter_config,
    adapter_tensors,
    write_adapter_config,
)
from mics.checkpoint.differences import differ
from mics.checkpoint.disk import write_tensors
from mics.checkpoint.manifest import Entry
from mics.checkpoint.peers import Peers
from mics.checkpoint.reading import read_tensors
from mics.errors import CheckpointError
from mics.models.interchange.new_folder import check_new, new_folder
from mics.models.interchange.pretrained import entries_of
from mics.models.small_files import CONFIG as BASE_CONFIG
from mics.models.small_files import read_table
from mics.quantities import first_of
from mics.ranks.console import alarm, say
from mics.ranks.whereabouts import during

WEIGHTS = "adapter_model.safetensors"
_MATTERS = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
)
"""Options that change what the same tensors do."""

_MOST_NAMED = 3


@during("mics.save_adapters")
def save_adapters(
    path: str | os.PathLike[str], *, model: nn.Module, adapter: str = "default"
) -> None:
    """Write one adapter of a sharded model as ``peft.PeftModel.from_pretrained`` reads it.

    Collective over all ranks. The folder appears under its name when it is complete, with
    ``adapter_model.safetensors`` and ``adapter_config.json``. The base is neither gathered nor
    written, but for embeddings that were resized, as peft has it: those of a base whose
    ``config.json`` (in its folder, or in the hub's cache) has another ``vocab_size``. Where there
    is none it is said that nobody can tell.

    Args:
        path: the folder to be made; rank 0 writes it.
        model: one that peft put adapters into, sharded or not.
        adapter: its name.

    Raises:
        CheckpointError: on every rank: no such adapter, or the folder exists or cannot be written.
    """
    peers, folder = Peers(), Path(path)
    found: list[dict[str, torch.Tensor]] = []
    rows = peers.together(lambda: _vocabulary_of(model, adapter), only=0)[0]
    peers.together(lambda: found.append(_to_keep(model, adapter, rows)))
    (tensors,) = found
    peers.agree({"the adapter to be saved": [f"{n} {list(t.shape)}" for n, t in tensors.items()]})
    peers.together(lambda: check_new(folder), only=0)
    _say_left_out(model, tensors)
    whole = {}
    for name, tensor in tensors.items():  # collective, in one order
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if peers.rank == 0:
            whole[name] = value.detach().to("cpu", copy=True).contiguous()
    config = adapter_config(model, adapter)
    peers.together(lambda: _write(folder, whole, config), only=0)


@during("mics.load_adapters")
def load_adapters(
    path: str | os.PathLike[str], *, model: nn.Module, adapter: str = "default"
) -> None:
    """Load an adapter that peft or ``save_adapters`` wrote, in place; each rank its own shards.

    Collective over all ranks. Values are converted to the parameters' dtypes.

    Args:
        path: the folder.
        model: one that has an adapter with the same tensors and options, sharded or not.
        adapter: its name.

    Raises:
        CheckpointError: on every rank, before anything is changed: there is no adapter in the
            folder, or it has other tensors, shapes or options than the model's.
    """
    peers, folder = Peers(), Path(path)
    plans: list[tuple[dict[str, Entry], dict[str, torch.Tensor]]] = []
    peers.together(lambda: plans.append(_plan(folder, model, adapter)))
    entries, tensors = plans[0]
    peers.together(lambda: read_tensors(folder, entries, tensors))


def _to_keep(model: nn.Module, adapter: str, there: int | None) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, and the embeddings if those of its base have another size.

    Args:
        model: one with adapters.
        adapter: the name of one.
        there: rows that the embeddings of its base have, if anybody knows.

    Raises:
        CheckpointError: the model has no such adapter.
    """
    tensors = adapter_tensors(model, adapter)
    here: Any = getattr(getattr(model, "config", None), "vocab_size", None)
    if here is None or _has_embeddings(model, tensors):
        return tensors
    base = adapter_config(model, adapter).base_model_name_or_path
    if there is None:
        say(
            f"whether the {here:,} rows of the embeddings are those of the base cannot be told: "
            f"{base or 'it'} has no config.json here. Resized ones are not in the folder of the "
            "adapter; modules_to_save=[...] of its configuration adds them"
        )
    elif there != here:
        say(
            f"the embeddings are kept with the adapter: they have {here:,} rows, and {there:,} in "
            f"{base}"
        )
        return adapter_tensors(model, adapter, embeddings=True)
    return tensors


def _has_embeddings(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether an adapter has each of the model's embeddings, or the model has none."""
    kept = {id(tensor) for tensor in tensors.values()}
    ways: list[Any] = [
        getattr(model, f"get_{which}_embeddings", lambda: None) for which in ("input", "output")
    ]
    layers = [layer for layer in (way() for way in ways) if layer is not None]
    return all(any(id(param) in kept for param in layer.parameters()) for layer in layers)


def _vocabulary_of(model: nn.Module, adapter: str) -> int | None:
    """``vocab_size`` of a base as it lies in a folder or in the hub's cache; nobody is asked.

    Raises:
        CheckpointError: the model has no such adapter.
    """
    base = adapter_config(model, adapter).base_model_name_or_path
    if not base:
        return None
    path = Path(base) / BASE_CONFIG
    if not path.is_file():
        hub = importlib.import_module("huggingface_hub")  # peft's own
        cached: Any = None
        with contextlib.suppress(ValueError):  # a path, which no name of the hub can be
            cached = hub.try_to_load_from_cache(base, BASE_CONFIG)
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    size = read_table(path).get("vocab_size")
    return size if isinstance(size, int) else None


def _say_left_out(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Say which parameters are trained and are no adapter's."""
    kept = {id(tensor) for tensor in tensors.values()}
    left = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if left:
        alarm(
            f"{len(left)} trained parameter(s) are not of the adapter, and not in its folder: "
            f"{first_of(left)}. modules_to_save=[...] of its configuration adds modules."
        )


def _write(folder: Path, tensors: Mapping[str, torch.Tensor], config: Any) -> None:
    with new_folder(folder) as making:
        write_tensors(making / WEIGHTS, tensors)
        write_adapter_config(making, config)


def _plan(
    folder: Path, model: nn.Module, adapter: str
) -> tuple[dict[str, Entry], dict[str, torch.Tensor]]:
    """Where the tensors of an adapter are, and those in use; both by peft's names.

    Raises:
        CheckpointError: they do not fit.
    """
    tensors = adapter_tensors(model, adapter)
    entries = entries_of(folder, WEIGHTS)
    if entries.keys() > tensors.keys():
        whole = adapter_tensors(model, adapter, embeddings=True)
        tensors = whole if entries.keys() == whole.keys() else tensors
    if entries.keys() != tensors.keys():
        raise CheckpointError(
            f"{folder} is of another adapter: names differ.",
            numbers=differ(set(entries), set(tensors)),
            write="peft.LoraConfig(...) with the target_modules that it was made with",
        )
    others = [
        f"{name} is {list(entries[name].shape)} there, {list(tensor.shape)} here"
        for name, tensor in tensors.items()
        if entries[name].shape != tuple(tensor.shape)
    ]
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"There is no {CONFIG} in {folder}.", write="a folder that mics.save_adapters wrote"
        )
    there = read_table(folder / CONFIG)
    here = adapter_config(model, adapter).to_dict()
    others += [
        f"{name} = {there[name]} there, {here[name]} here"
        for name in _MATTERS
        if name in there and name in here and there[name] != here[name]
    ]
    if others:
        raise CheckpointError(
            f"{folder} is of another adapter: shapes or options differ.",
            numbers=f"{len(others)}: {'; '.join(others[:_MOST_NAMED])}.",
            write=f"peft.PeftConfig.from_pretrained({str(folder)!r}) for the model's adapter",
        )
    return entries, tensors
