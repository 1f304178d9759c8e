"""Adapters of a sharded model, alone, in peft's format: to a folder, and back.

Which tensors belong to an adapter, and by which names, peft says itself. peft's own
``save_pretrained`` takes tensors for whole that are shards.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics.checkpoint.differences import differ
from mics.checkpoint.disk import write_tensors
from mics.checkpoint.manifest import Entry
from mics.checkpoint.peers import Peers
from mics.checkpoint.reading import read_tensors
from mics.errors import CheckpointError
from mics.interchange.new_folder import check_new, new_folder
from mics.interchange.pretrained import entries_of
from mics.models.small_files import read_table
from mics.quantities import first_of
from mics.ranks.console import alarm
from mics.ranks.whereabouts import during

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_INSIDE = "base_model.model."  # what names have in front where a PeftModel is around the model
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
    written.

    Args:
        path: the folder to be made; rank 0 writes it.
        model: one that peft put adapters into, sharded or not.
        adapter: its name.

    Raises:
        CheckpointError: on every rank: no such adapter, or the folder exists or cannot be written.
    """
    peers, folder = Peers(), Path(path)
    found: list[dict[str, torch.Tensor]] = []
    peers.together(lambda: found.append(_tensors_of(model, adapter)))
    (tensors,) = found
    peers.agree({"the adapter to be saved": [f"{n} {list(t.shape)}" for n, t in tensors.items()]})
    peers.together(lambda: check_new(folder), only=0)
    _say_left_out(model, tensors)
    whole = {}
    for name, tensor in tensors.items():  # collective, in one order
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if peers.rank == 0:
            whole[name] = value.detach().to("cpu", copy=True).contiguous()
    config = _config_of(model, adapter)
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


def _config_of(model: nn.Module, adapter: str) -> Any:
    """peft's configuration of an adapter.

    Raises:
        CheckpointError: the model has no such adapter.
    """
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        raise CheckpointError(
            f"{type(model).__name__} has no adapters of peft.",
            write="the model that peft.get_peft_model returned; mics.save keeps any other",
        )
    if adapter not in configs:
        raise CheckpointError(
            f"The model has no adapter {adapter!r}.",
            numbers=f"It has {', '.join(map(repr, configs))}.",
            write=f"adapter={next(iter(configs), 'default')!r}",
        )
    return configs[adapter]


def _tensors_of(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The tensors in use of an adapter, sharded or whole, by peft's names for them."""
    _config_of(model, adapter)
    peft = importlib.import_module("peft")  # of no extra: who has such a model has it
    state = model.state_dict(keep_vars=True)
    # "auto" asks a server for the vocabulary of the base.
    tensors: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter, save_embedding_layers=False
    )
    inside = "" if isinstance(model, peft.PeftModel) else _INSIDE
    return {inside + name: tensor for name, tensor in tensors.items()}


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
    kept = copy.deepcopy(config)
    kept.inference_mode = True  # as peft keeps it
    with new_folder(folder) as making:
        write_tensors(making / _WEIGHTS, tensors)
        kept.save_pretrained(str(making))


def _plan(
    folder: Path, model: nn.Module, adapter: str
) -> tuple[dict[str, Entry], dict[str, torch.Tensor]]:
    """Where the tensors of an adapter are, and those in use; both by peft's names.

    Raises:
        CheckpointError: they do not fit.
    """
    tensors = _tensors_of(model, adapter)
    entries = entries_of(folder, _WEIGHTS)
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
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(
            f"There is no {_CONFIG} in {folder}.", write="a folder that mics.save_adapters wrote"
        )
    there = read_table(folder / _CONFIG)
    here = _config_of(model, adapter).to_dict()
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
