"""load: a checkpoint into a model of any world and partition size, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

from mics.checkpoint.contents import FLAT, Contents, contents_of, decode_values
from mics.checkpoint.layout import MODEL, OPTIMIZER, of_kind, random_state_of
from mics.checkpoint.manifest import Entry, Json, Manifest, read_manifest
from mics.checkpoint.peers import Peers
from mics.checkpoint.randomness import restore_random_state
from mics.checkpoint.verifying import verified_manifest
from mics.checkpoint.writing import let_save_end
from mics.errors import CheckpointError
from mics.quantities import dtype_name
from mics.ranks.whereabouts import during

_MOST_NAMED = 3


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held besides the tensors that were loaded.

    ``random_restored`` is False where this rank had no random state in the checkpoint (another
    world size, another kind of device): its generators were left as they are.
    """

    extra: Mapping[str, Json]
    random_restored: bool


@during("mics.load")
def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    verify: bool = True,
) -> Loaded:
    """Load a checkpoint that ``save`` wrote, in place.

    Collective over all ranks. The world, the partition size and the kind of sharding need not be
    those it was saved with; every rank reads only its own parts. A save that is under way ends
    first.

    Args:
        path: the checkpoint's folder.
        model: one with the names, shapes and dtypes of parameters and buffers that were saved.
        optimizer: its optimizer; ``None`` leaves what was saved of one alone.
        verify: check every file's checksum first; the ranks share the work.

    Raises:
        CheckpointError: on every rank, before anything is changed: a file is damaged (it is named),
            the checkpoint is of another model or optimizer (the first differences are named).
    """
    let_save_end()
    folder = Path(path)
    peers = Peers()
    manifest = verified_manifest(folder, peers) if verify else read_manifest(folder)
    contents = contents_of(model, optimizer)
    _check_same(folder, manifest, contents)
    read_tensors(folder, manifest.tensors, contents.tensors)
    if optimizer is not None:
        _set_optimizer(model, optimizer, contents, manifest)
    return Loaded(manifest.extra, _restore_random(folder, manifest, peers.rank))


def read_tensors(
    folder: Path, entries: Mapping[str, Entry], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Fill tensors, sharded or whole, from the chunks of their entries; each rank its own part.

    Args:
        folder: where the chunks' files are.
        entries: the entry of every tensor in ``tensors``, perhaps more.
        tensors: what is to be filled in place, by name.

    Raises:
        CheckpointError: a file cannot be read.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), _metadata(entries, tensors), is_coordinator=True)
    by_file: dict[str, list[tuple[str, ReadItem]]] = {}
    for item in planner.create_local_plan().items:
        index = item.storage_index
        assert index.index is not None
        chunk = entries[index.fqn].chunks[index.index]
        by_file.setdefault(chunk.file, []).append((chunk.key, item))
    for name, items in by_file.items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key, item in items:
                    planner.resolve_tensor(item).detach().copy_(_slice(file, key, item))
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder / name} is damaged: {error}.",
                write="an older checkpoint of the same run",
            ) from None


def _metadata(entries: Mapping[str, Entry], names: Iterable[str]) -> Metadata:
    """The entries as torch's distributed checkpoint, which works out what to read, knows them."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=entries[name].torch_dtype),
                torch.Size(entries[name].shape),
                [
                    ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
                    for chunk in entries[name].chunks
                ],
            )
            for name in names
        }
    )


def _slice(file: Any, key: str, item: ReadItem) -> torch.Tensor:
    if not item.lengths:
        whole: torch.Tensor = file.get_tensor(key)
        return whole
    box = zip(item.storage_offsets, item.lengths, strict=True)
    part: torch.Tensor = file.get_slice(key)[tuple(slice(a, a + n) for a, n in box)]
    return part


# -- is it of this model ---------------------------------------------------------------------------


def _check_same(folder: Path, manifest: Manifest, contents: Contents) -> None:
    kinds = [MODEL, OPTIMIZER] if _names(OPTIMIZER, contents.tensors, contents.values) else [MODEL]
    for kind in kinds:
        _check_names(folder, kind, manifest, contents)
    differences = [
        f"{name} is {_shown(entry.dtype, entry.shape)} there, "
        f"{_shown(dtype_name(tensor.dtype), tuple(tensor.shape))} here"
        for name, tensor in contents.tensors.items()
        if (entry := manifest.tensors[name]).shape != tuple(tensor.shape)
        or entry.torch_dtype != tensor.dtype
    ]
    if differences:
        shapes_fit = all(
            manifest.tensors[name].shape == tuple(tensor.shape)
            for name, tensor in contents.tensors.items()
        )
        raise CheckpointError(
            f"{folder} is of another model: shapes or dtypes differ.",
            numbers=f"{len(differences)} of {len(contents.tensors)} tensors: "
            f"{'; '.join(differences[:_MOST_NAMED])}.",
            write="the model in the dtype it was saved in, or `mics import --dtype fp32` where it "
            "was imported"
            if shapes_fit
            else "the model it was saved from",
        )


def _check_names(folder: Path, kind: str, manifest: Manifest, contents: Contents) -> None:
    what = kind.removesuffix("/")
    there = _names(kind, manifest.tensors, manifest.aliases, manifest.values)
    here = _names(kind, contents.tensors, contents.aliases, contents.values)
    if there == here and _ties(kind, manifest.aliases) == _ties(kind, contents.aliases):
        return
    if not there:
        raise CheckpointError(
            f"{folder} holds no {what}.",
            numbers=f"This {what} has {len(here)} entries.",
            write="mics.load(path, model=model), without the optimizer",
        )
    only_there, only_here = sorted(there - here), sorted(here - there)
    if not only_there and not only_here:
        raise CheckpointError(
            f"{folder} is of another {what}: other parameters are tied.",
            numbers=f"There {_ties(kind, manifest.aliases)}, here {_ties(kind, contents.aliases)}.",
            write=f"the {what} it was saved from",
        )
    raise CheckpointError(
        f"{folder} is of another {what}: names differ.",
        numbers=f"{len(only_there)} only there{_first(only_there)}; {len(only_here)} only "
        f"here{_first(only_here)}; {len(there & here)} in both.",
        write=f"the {what} it was saved from",
    )


def _names(kind: str, *tables: Mapping[str, Any]) -> set[str]:
    return {name for table in tables for name in table if name.startswith(kind)}


def _ties(kind: str, aliases: Mapping[str, str]) -> dict[str, str]:
    return {name: first for name, first in aliases.items() if name.startswith(kind)}


def _first(names: list[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > _MOST_NAMED else ""
    return f" ({', '.join(names[:_MOST_NAMED])}{more})"


def _shown(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


# -- what is no tensor of the model ----------------------------------------------------------------


def _set_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, contents: Contents, manifest: Manifest
) -> None:
    names = [name for name in contents.values if name.startswith(OPTIMIZER)]
    values = decode_values(manifest.values, names)
    state = of_kind(OPTIMIZER, contents.tensors) | of_kind(OPTIMIZER, values)
    set_optimizer_state_dict(model, optimizer, state, options=FLAT)


def _restore_random(folder: Path, manifest: Manifest, rank: int) -> bool:
    prefix = random_state_of(rank)
    entries = {name: e for name, e in manifest.tensors.items() if name.startswith(prefix)}
    state = {name: torch.empty(e.shape, dtype=e.torch_dtype) for name, e in entries.items()}
    read_tensors(folder, entries, state)
    return restore_random_state(rank, state)
