"""load: a checkpoint into a model of any world and partition size, bit for bit."""

from __future__ import annotations

import dataclasses
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

from mics.checkpoint.frozen import check_base
from mics.checkpoint.manifest import Entry, Json, Manifest, read_manifest
from mics.checkpoint.names import unwrapped
from mics.checkpoint.optimizers import Optimizers, shard_states
from mics.checkpoint.peers import Peers
from mics.checkpoint.randomness import (
    check_random_state,
    random_state_to_read,
    restore_random_state,
)
from mics.checkpoint.restoration import Restoration, plan_restoration
from mics.checkpoint.verifying import verify_files
from mics.checkpoint.writing import let_save_end
from mics.errors import CheckpointError
from mics.ranks.console import say
from mics.ranks.whereabouts import during
from mics.sharding.average import EMA


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
    optimizer: Optimizers | None = None,
    ema: EMA | None = None,
    verify: bool = True,
) -> Loaded:
    """Load a checkpoint that ``save`` wrote, in place.

    Collective over all ranks. The world, the partition size and the kind of sharding need not be
    those it was saved with; every rank reads only its own parts. A save that is under way ends
    first. Parameters are matched by their names, in the model and in optimizers: the order of
    optimizers, of groups and of their members need not be the one that was saved. A parameter whose
    state was not there yet has none afterwards.

    Args:
        path: the checkpoint's folder.
        model: one with the names, shapes and dtypes of parameters and buffers that were saved.
        optimizer: its optimizer, or a list or dict of several; ``None`` leaves what was saved of
            one alone.
        ema: its moving average, likewise.
        verify: check every file's checksum first; the ranks share the work.

    Raises:
        CheckpointError: on every rank, before anything is changed: a file is damaged (it is named),
            the checkpoint is of another model or optimizer (the first differences are named), or
            has optimizer state in few bits that would be of another precision or in other blocks.
            One that was saved with ``frozen=False``: the model's own values of a parameter that
            was left out are not those it was trained with, or it trains here.
    """
    let_save_end()
    shard_states(optimizer)
    folder = Path(path)
    peers = Peers()
    plans: list[tuple[Manifest, Restoration, dict[str, torch.Tensor]]] = []
    peers.together(lambda: plans.append(_plan(folder, model, optimizer, ema, peers.rank)))
    manifest, plan, random = plans[0]
    check_base(folder, manifest, plan.model.contents, peers)
    if verify:
        verify_files(folder, manifest, peers)
    files = _Files(folder, manifest.tensors)

    def read_random() -> None:
        check_headers(folder, manifest.tensors, random)
        read_tensors(folder, manifest.tensors, random)
        check_random_state(folder, random)

    plan.carry_out(files, peers, beside=read_random)
    if plan.held_back.words:
        say(plan.held_back.words)
    return Loaded(manifest.extra, restore_random_state(peers.rank, random))


def _plan(
    folder: Path, model: nn.Module, optimizer: Optimizers | None, ema: EMA | None, rank: int
) -> tuple[Manifest, Restoration, dict[str, torch.Tensor]]:
    """What is to be read into what; the last are tensors for the random state of this rank."""
    manifest = _under_plain_names(read_manifest(folder))
    plan = plan_restoration(folder, manifest, model, optimizer, ema)
    return manifest, plan, random_state_to_read(folder, manifest.tensors, rank)


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint as a ``Source``."""

    folder: Path
    entries: Mapping[str, Entry]

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        check_headers(self.folder, self.entries, tensors)

    def read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        read_tensors(self.folder, self.entries, tensors)


def _under_plain_names(manifest: Manifest) -> Manifest:
    """The manifest with the names of today: they once kept some of what wrappers add."""

    def plain(name: str) -> str:
        kind, slash, rest = name.partition("/")
        return kind + slash + unwrapped(rest)

    return dataclasses.replace(
        manifest,
        tensors={plain(name): entry for name, entry in manifest.tensors.items()},
        aliases={plain(name): plain(first) for name, first in manifest.aliases.items()},
        values={plain(name): value for name, value in manifest.values.items()},
        frozen={plain(name): value for name, value in manifest.frozen.items()},
    )


# -- tensors ---------------------------------------------------------------------------------------


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
    planner, by_file = _items(entries, tensors)
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


def check_headers(
    folder: Path, entries: Mapping[str, Entry], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Compare the headers of files with the chunks that this rank will read; arguments as above.

    Raises:
        CheckpointError: a file has another tensor than its manifest says.
    """
    _, by_file = _items(entries, tensors)
    for name, items in by_file.items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key, item in items:
                    _check_header(file, key, entries[item.storage_index.fqn], item)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder / name} is damaged: {error}.",
                write="an older checkpoint of the same run",
            ) from None


def _check_header(file: Any, key: str, entry: Entry, item: ReadItem) -> None:
    index = item.storage_index.index
    assert index is not None
    wanted = entry.chunks[index].shape
    part = file.get_slice(key)
    shape = tuple(part.get_shape())
    # A tensor's dtype as torch's object is that of an empty piece of it.
    dtype = (part[0:0] if shape else file.get_tensor(key)).dtype
    if (shape, dtype) != (wanted, entry.torch_dtype):
        raise ValueError(
            f"{key} is {dtype} {list(shape)}, not {entry.torch_dtype} {list(wanted)} as its "
            "manifest says"
        )


def _items(
    entries: Mapping[str, Entry], tensors: Mapping[str, torch.Tensor]
) -> tuple[DefaultLoadPlanner, dict[str, list[tuple[str, ReadItem]]]]:
    """What this rank reads: key and item, by file."""
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), _metadata(entries, tensors), is_coordinator=True)
    by_file: dict[str, list[tuple[str, ReadItem]]] = {}
    for item in planner.create_local_plan().items:
        index = item.storage_index
        assert index.index is not None
        chunk = entries[index.fqn].chunks[index.index]
        by_file.setdefault(chunk.file, []).append((chunk.key, item))
    return planner, by_file


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
