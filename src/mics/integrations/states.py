"""The states of sharded models inside a checkpoint folder of another tool.

[Note: a folder that is written again]
Tools write over what is there, and mics never touches a folder that exists. So a state is written
beside the old one and takes its name at the end, and one that was cut off in between is found
under either name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mics.checkpoint import load, save
from mics.checkpoint.peers import Peers
from mics.errors import CheckpointError

FOLDER = "mics"
_NEW = ".new"


def save_states(
    folder: str | os.PathLike[str],
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Write the shards of models and optimizers into ``folder``, over those that are there.

    Collective over all ranks; see [Note: a folder that is written again].

    Args:
        folder: the tool's, on a disk that all ranks see.
        models: sharded by mics.
        optimizers: of their parameters.

    Raises:
        CheckpointError: on every rank, see ``mics.save``.
    """
    peers = Peers()
    for index, model in enumerate(models):
        place, new = _places(folder, index)
        peers.together(partial(_make_room, new), only=0)
        stepping = optimizers_of(model, optimizers) or None
        # Whoever trains adapters has their base already.
        save(new, model=model, optimizer=stepping, frozen=not _has_adapters(model))
        peers.together(partial(_replace, place, new), only=0)


def load_states(
    folder: str | os.PathLike[str],
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Load what ``save_states`` wrote, in place, at any world and partition size.

    Collective over all ranks.

    Args:
        folder: the tool's.
        models: as they were saved, in their order.
        optimizers: of their parameters.

    Raises:
        CheckpointError: on every rank: there are no such states, or see ``mics.load``.
    """
    peers = Peers()
    for index, model in enumerate(models):
        place, new = _places(folder, index)
        found = peers.together(partial(_find, place, new), only=0)[0]
        load(found, model=model, optimizer=optimizers_of(model, optimizers) or None)


def has_states(folder: str | os.PathLike[str]) -> bool:
    """Whether a tool's checkpoint folder has states of ``save_states``."""
    return any(place.is_dir() for place in _places(folder, 0))


def optimizers_of(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> list[torch.optim.Optimizer]:
    """Those that step parameters of a model."""
    of_model = {id(param) for param in model.parameters()}
    return [
        optimizer
        for optimizer in optimizers
        if any(id(p) in of_model for group in optimizer.param_groups for p in group["params"])
    ]


def _has_adapters(model: nn.Module) -> bool:
    return any(hasattr(module, "peft_config") for module in model.modules())


def _places(folder: str | os.PathLike[str], index: int) -> tuple[Path, Path]:
    place = Path(folder, f"{FOLDER}_{index}" if index else FOLDER)
    return place, place.with_name(place.name + _NEW)


def _make_room(new: Path) -> None:
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(parents=True, exist_ok=True)


def _replace(place: Path, new: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    new.rename(place)


def _find(place: Path, new: Path) -> str:
    for path in (place, new):
        if path.is_dir():
            return str(path)
    raise no_states(place.parent)


def no_states(folder: str | os.PathLike[str]) -> CheckpointError:
    """What is wrong with a tool's checkpoint that has none."""
    return CheckpointError(
        "This checkpoint has no states of mics: it was saved without it, and its optimizer's state "
        "is of whole tensors.",
        numbers=f"There is no {Path(folder, FOLDER)}.",
        write="load its weights into the model before it is sharded (from_pretrained(folder), or "
        "accelerate's load_checkpoint_in_model(model, folder)), and begin anew",
    )
