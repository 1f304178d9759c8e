"""save: a checkpoint that is whole or not there, written once, beside training if wished."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mics.checkpoint.adapters import adapters_of
from mics.checkpoint.appearing import AppearingFolder
from mics.checkpoint.configuration import config_of
from mics.checkpoint.contents import Contents, contents_of, facts_of_contents, partition_of
from mics.checkpoint.disk import write_bytes, write_manifest, write_tensors
from mics.checkpoint.frozen import prints_of
from mics.checkpoint.held_back import mean_held_back
from mics.checkpoint.layout import ASSETS, chunk_key, file_of
from mics.checkpoint.manifest import (
    Chunk,
    Entry,
    FileFacts,
    Json,
    Manifest,
    file_name,
    whole_entry,
)
from mics.checkpoint.names import frozen_names
from mics.checkpoint.optimizers import Optimizers, shard_states
from mics.checkpoint.peers import Peers
from mics.checkpoint.pieces import Piece, pieces_of_this_rank
from mics.checkpoint.randomness import random_state
from mics.communication.same_steps import same_steps_of
from mics.errors import CheckpointError, ShardError
from mics.quantities import dtype_name
from mics.ranks.whereabouts import during
from mics.sharding.average import EMA
from mics.sharding.units import units_of


@during("mics.save")
def save(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizers | None = None,
    ema: EMA | None = None,
    extra: Mapping[str, Json] | None = None,
    assets: Mapping[str, bytes] | None = None,
    frozen: bool = True,
    asynchronous: bool = False,
) -> PendingSave:
    """Write a checkpoint of a sharded model: a folder that loads at any world and partition size.

    Collective over all ranks. Every tensor is written once, by one replica, the work shared out
    over the replicas. The folder appears under its name only when every byte of it is on the disk;
    an existing one is never touched. The folder must be one that every rank sees. Of what hop 2 in
    few bits has not sent yet, the mean over the replicas is kept.

    Args:
        path: the folder to be made.
        model: sharded by mics or by FSDP2, or a plain module.
        optimizer: its optimizer, or a list or dict of several.
        ema: its moving average.
        extra: whatever else JSON can hold: step, position of the data, configuration.
        assets: small files to keep with it, by their names; the same on every rank. The
            configuration of a transformers model is kept without being asked for.
        frozen: keep parameters that do not train. False leaves them out: the model that loads such
            a checkpoint brings its own, and is refused if their values or types are others.
        asynchronous: return when the tensors are copied to the CPU and write beside training. At
            most one save is under way: the next one waits for it.

    Returns:
        ``wait()`` on it raises what went wrong. Without ``asynchronous`` it has ended, well.

    Raises:
        CheckpointError: on every rank: the path exists, a rank cannot write (it is named), a value
            or an asset cannot be kept, or left out because its type does not say where its values
            are, or state of the optimizer has other precisions on other ranks. Nothing is left
            behind.
    """
    _end_of_last_save()
    shard_states(optimizer)
    peers = Peers()
    given = dict(extra or {}), dict(assets or {})
    plan = _plan_of(Path(path), model, optimizer, ema, *given, frozen, peers)
    pending = PendingSave(plan.target, plan, peers)
    if asynchronous:
        pending._start()
    else:
        pending._run()
        pending.wait()
    return pending


class PendingSave:
    """A save that may still be under way. ``path`` is where the checkpoint will be."""

    def __init__(self, path: Path, plan: _Plan, peers: Peers) -> None:
        self.path = path
        self._plan: _Plan | None = plan
        self._peers = peers
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._told = False

    def done(self) -> bool:
        """Whether it has ended, well or not, on this rank."""
        return self._plan is None

    def wait(self) -> None:
        """Wait for the end. To be called before ``destroy_process_group``.

        Raises:
            CheckpointError: the same on every rank.
        """
        if self._thread is not None:
            self._thread.join()
        self._told = True
        if self._error is not None:
            raise self._error

    def _start(self) -> None:
        global _last
        _tell_at_exit_once()
        _last = self
        self._thread = threading.Thread(target=self._run, name="mics-save")
        self._thread.start()

    def _run(self) -> None:
        assert self._plan is not None
        try:
            _write(self._plan, self._peers)
        except CheckpointError as error:
            self._error = error
        except Exception as error:  # a lost peer; anything else is a bug, and must be told as well
            self._error = CheckpointError(
                f"The checkpoint {self.path} could not be completed.",
                numbers=f"{type(error).__name__}: {error}",
            )
        finally:
            self._plan = None


_last: PendingSave | None = None


def _end_of_last_save() -> None:
    """A save that nobody waited for must not fail in silence."""
    global _last
    last, _last = _last, None
    if last is not None and not last._told:
        last.wait()


def let_save_end() -> None:
    """Wait for a save that is under way, whose ranks talk to each other; its error stays untold."""
    if _last is not None and _last._thread is not None:
        _last._thread.join()


@cache
def _tell_at_exit_once() -> None:
    """Let an asynchronous save that nobody waited for say at exit what failed."""
    atexit.register(_tell_at_exit)


def _tell_at_exit() -> None:
    if _last is not None and not _last._told:
        try:
            _last.wait()
        except CheckpointError as error:
            print(f"mics: {error}", file=sys.stderr, flush=True)


# -- the work --------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """What is to be written: this rank's part, and what rank 0 writes beside all parts.

    ``path`` is the folder to write into, which rank 0 has made and holds as ``making``.
    """

    target: Path
    making: AppearingFolder | None
    path: Path
    pieces: list[Piece]
    random: dict[str, torch.Tensor]
    outline: dict[str, Entry]
    partition: int
    aliases: dict[str, str]
    values: dict[str, Json]
    extra: dict[str, Json]
    assets: dict[str, bytes]
    frozen: dict[str, str]


def _plan_of(
    target: Path,
    model: nn.Module,
    optimizer: Optimizers | None,
    ema: EMA | None,
    extra: dict[str, Json],
    assets: dict[str, bytes],
    frozen: bool,
    peers: Peers,
) -> _Plan:
    """Everything a save needs, copied from the model, when all ranks have seen its folder."""
    found: list[Contents] = []
    of_model: list[dict[str, bytes]] = []

    def look() -> None:
        without = set() if frozen else frozen_names(model)
        found.append(contents_of(model, optimizer, ema, without=without))
        of_model.append(config_of(model) | adapters_of(model))
        if peers.rank == 0:
            # What nobody could read back must not be found out at the end.
            _check_kept(extra, assets)

    peers.together(look)
    contents = found[0]
    # Every rank writes its part of one list, and what is not sharded is rank 0's.
    peers.agree(facts_of_contents(contents) | {"optimizer steps taken": _steps_of(model)})
    contents.tensors.update(mean_held_back(model))
    pieces = pieces_of_this_rank(contents, model, peers)
    prints = prints_of(contents.left_out, peers)
    making, path = _make_folder(target, peers)
    return _Plan(
        target=target,
        making=making,
        path=path,
        pieces=[dataclasses.replace(piece, values=_copy(piece.values)) for piece in pieces],
        random={name: _copy(state) for name, state in random_state(peers.rank).items()},
        outline=_outline(contents, peers),
        partition=partition_of(model),
        aliases=contents.aliases,
        values=contents.values,
        extra=extra,
        assets=of_model[0] | assets,
        frozen=prints,
    )


def _steps_of(model: nn.Module) -> list[str]:
    """What optimizers of a model have done on this rank, a line for each of its meshes.

    A rank that has left out its last step would add a shard of the step before.
    """
    try:
        units = units_of(model)
    except ShardError:  # plain, or FSDP2's
        return []
    meshes = dict.fromkeys(same_steps_of(unit.groups) for unit in units)
    return [mesh.spelled_optimizers() for mesh in meshes]


def _check_kept(extra: Mapping[str, Any], assets: Mapping[str, Any]) -> None:
    """Raise where ``extra`` is no JSON, or an asset has no bytes or a name that cannot be read."""
    try:
        json.dumps(extra, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "extra cannot be kept: it is not JSON.",
            numbers=f"{type(error).__name__}: {error}.",
            write="numbers, text, lists, and dicts whose keys are text",
        ) from None
    for name, data in assets.items():
        try:
            file_name(ASSETS + name)
        except ValueError:
            raise CheckpointError(
                f"The asset {name!r} cannot be kept under this name.",
                write='letters, digits, "_", "-" and ".", in folders with "/"',
            ) from None
        if not isinstance(data, bytes):
            raise CheckpointError(
                f"The asset {name!r} cannot be kept: it is not bytes.",
                numbers=f"It is a {type(data).__name__}.",
                write="text.encode()",
            )


def _make_folder(target: Path, peers: Peers) -> tuple[AppearingFolder | None, Path]:
    """The folder to write into, made by rank 0, which gets it as such, and seen by all."""
    made: list[AppearingFolder] = []

    def make() -> str:
        if target.exists():
            raise CheckpointError(
                f"{target} exists; a checkpoint is never written over.",
                write="another path, or remove it yourself",
            )
        made.append(AppearingFolder(target))
        return str(made[0].path)

    path = Path(peers.together(make, only=0)[0])

    def see() -> None:
        if not path.is_dir():
            raise CheckpointError(
                f"Rank {peers.rank} does not see the folder that rank 0 made for the checkpoint: "
                f"{path}.",
                write="a folder that all nodes share",
            )

    try:
        peers.together(see)
    except CheckpointError:
        for folder in made:
            folder.discard()
        raise
    return (made[0] if made else None), path


def _outline(contents: Contents, peers: Peers) -> dict[str, Entry]:
    """Every tensor without its chunks; only rank 0, which writes the manifest, needs it."""
    if peers.rank != 0:
        return {}
    return {
        name: Entry(dtype_name(tensor.dtype), tuple(tensor.shape), [], contents.forms.get(name, ""))
        for name, tensor in contents.tensors.items()
    }


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the CPU, because training may change the original."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(plan: _Plan, peers: Peers) -> None:
    try:
        reports = peers.together(lambda: _write_pieces(plan, peers.rank))
        peers.together(lambda: _complete(plan, reports, peers.world), only=0)
    finally:
        if plan.making is not None:
            plan.making.discard()


def _write_pieces(plan: _Plan, rank: int) -> dict[str, Any]:
    """Write this rank's file and report, as JSON, what is in it."""
    name = file_of(rank)
    tensors = {chunk_key(piece.name, piece.offset): piece.values for piece in plan.pieces}
    chunks = [
        (piece.name, piece.offset, tuple(piece.values.shape), key)
        for piece, key in zip(plan.pieces, tensors, strict=True)
    ]
    facts = write_tensors(plan.path / name, tensors | plan.random)
    random = {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in plan.random.items()}
    plan.pieces.clear()
    return {"file": name, "facts": dataclasses.asdict(facts), "chunks": chunks, "random": random}


def _complete(plan: _Plan, reports: list[dict[str, Any]], world: int) -> None:
    """Rank 0: assets, manifest, name."""
    files: dict[str, FileFacts] = {}
    tensors = plan.outline
    for report in reports:
        name = report["file"]
        files[name] = FileFacts(**report["facts"])
        if (plan.path / name).stat().st_size != files[name].bytes:
            raise CheckpointError(
                f"Rank 0 sees another {name} than the rank that wrote it.",
                write="a folder that all nodes share",
            )
        for tensor, offset, shape, key in report["chunks"]:
            tensors[tensor].chunks.append(Chunk(tuple(offset), tuple(shape), name, key))
        for key, (dtype, shape) in report["random"].items():
            tensors[key] = whole_entry(dtype, tuple(shape), name, key)
    for name, data in plan.assets.items():
        files[ASSETS + name] = write_bytes(plan.path / ASSETS / name, data)
    manifest = Manifest(
        world=world,
        partition=plan.partition,
        tensors=tensors,
        aliases=plan.aliases,
        values=plan.values,
        extra=plan.extra,
        files=files,
        frozen=plan.frozen,
    )
    write_manifest(plan.path, manifest)
    if plan.target.exists():
        raise CheckpointError(
            f"{plan.target} has appeared while its checkpoint was being written.",
            write="one job per folder",
        )
    assert plan.making is not None
    plan.making.complete()
