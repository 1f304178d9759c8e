"""A checkpoint of Lightning: a folder with the shards of mics and one file with all else.

[Note: one name for both]
The file says where in the data a run was, the shards what it had learnt by then. Both are written
into a folder beside, which then takes the name, so that neither is ever found with an older other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mics.checkpoint.peers import Peers
from mics.integrations.states import save_states

REST = "lightning.ckpt"
"""The file with all else."""


def write_folder(
    path: str | os.PathLike[str],
    models: Mapping[str, nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    write_rest: Callable[[Path], None],
) -> None:
    """Write the shards of models and optimizers, and one file, under one name, over what is there.

    Collective over all ranks; see [Note: one name for both].

    Args:
        path: the folder to be made, on a disk that all ranks see.
        models: sharded by mics, by the names of the folders that their shards go to.
        optimizers: of their parameters.
        write_rest: writes the file; called on rank 0 only.

    Raises:
        CheckpointError: on every rank, see ``mics.save``.
    """
    peers = Peers()
    place = Path(path)
    new = place.with_name(place.name + ".new")
    peers.together(partial(shutil.rmtree, new, ignore_errors=True), only=0)
    for name, model in models.items():
        save_states(new / name, [model], optimizers)
    peers.together(partial(write_rest, new / REST), only=0)
    peers.together(partial(_replace, place, new), only=0)


def write_file(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Write a file on rank 0, over a folder of ``write_folder`` too. Collective.

    Raises:
        CheckpointError: on every rank: rank 0 could not.
    """
    place = Path(path)
    peers = Peers()
    if is_folder(place):
        peers.together(partial(shutil.rmtree, place), only=0)
    peers.together(partial(write, place), only=0)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether it is a folder of ``write_folder``, as rank 0 sees it. Collective."""
    return bool(Peers().together(Path(path, REST).is_file, only=0)[0])


def spread(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Whole weights as the shards of a model, to be loaded by ``load_state_dict``.

    Args:
        model: sharded by mics, or not.
        state: tensors by name, the same on every rank.
    """
    own = model.state_dict()
    return {name: _as(own.get(name), value) for name, value in state.items()}


def _as(own: Any, value: Any) -> Any:
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or own.shape != value.shape:
        return value  # load_state_dict says what does not fit
    mesh, placements = own.device_mesh, own.placements
    return distribute_tensor(value.to(own.device), mesh, placements, src_data_rank=None)


def _replace(place: Path, new: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    new.rename(place)
