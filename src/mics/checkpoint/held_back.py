"""What hop 2 in few bits has rounded away and not sent yet, by the names of parameters.

Each rank has errors of its own (``error_feedback.py``). A checkpoint has their mean over the
replicas, sharded as the parameter is, and every replica begins with that: as much is then still to
be sent, on average over any number of replicas, but not by the same ranks. So a run that was
resumed from a checkpoint is not the run that went on, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics.checkpoint.differences import not_to_be
from mics.checkpoint.layout import HELD_BACK, of_kind
from mics.checkpoint.manifest import Manifest
from mics.checkpoint.names import parameter_names
from mics.communication.error_feedback import ErrorFeedback
from mics.sharding.units import feedback_of


@dataclass(frozen=True)
class HeldBackRestoring:
    """What is to be read of errors, in place, and what else there is of them here.

    Args:
        tensors: by their names in the manifest.
        feedback: all that hold errors here.
        words: what is to be said of them, if anything.
    """

    tensors: Mapping[str, torch.Tensor]
    feedback: list[ErrorFeedback]
    words: str

    def clear(self) -> None:
        """Hold back nothing, until something is read."""
        for one in self.feedback:
            one.clear()


def held_back_here(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's own errors, in use, as parts of tensors that are sharded as parameters are."""
    return _named(model, {one: one.buffer() for one in feedback_of(model)})


def without_errors(names: Mapping[str, Any]) -> dict[str, Any]:
    """What another rank kept in memory, without what only its own hop 2 may send."""
    entries = {n: e for n, e in names["entries"].items() if not n.startswith(HELD_BACK)}
    return {**names, "entries": entries}


def mean_held_back(model: nn.Module) -> dict[str, torch.Tensor]:
    """The mean of the errors over the replicas, which changes none of them. Collective."""
    return _named(model, {one: one.mean() for one in feedback_of(model)})


def plan_held_back(folder: Path, manifest: Manifest, model: nn.Module) -> HeldBackRestoring:
    """What is to be read of errors; nothing is changed.

    Raises:
        CheckpointError: there are errors of a parameter of another shape.
    """
    here, there = held_back_here(model), of_kind(HELD_BACK, manifest.tensors)
    both = {name: t for name, t in here.items() if name.removeprefix(HELD_BACK) in there}
    for name, tensor in both.items():
        entry = manifest.tensors[name]
        if (entry.shape, entry.torch_dtype) != (tuple(tensor.shape), tensor.dtype):
            raise not_to_be(folder, name, f"It is {entry.dtype} {list(entry.shape)} there")
    words = ""
    if there and not here:
        words = (
            f"{folder} has what hop 2 had not sent yet of {len(there)} parameter(s), and here hop "
            "2 holds nothing back: it is left out"
        )
    elif len(both) < len(here):
        words = (
            f"{folder} has nothing that hop 2 held back of {len(here) - len(both)} of "
            f"{len(here)} parameter(s): theirs begins with zeros"
        )
    return HeldBackRestoring(both, feedback_of(model), words)


def _named(
    model: nn.Module, buffers: Mapping[ErrorFeedback, torch.Tensor]
) -> dict[str, torch.Tensor]:
    names = parameter_names(model)[1] if buffers else {}
    found: dict[str, torch.Tensor] = {}
    for feedback, buffer in buffers.items():
        for param, errors in feedback.of_params(buffer):
            assert isinstance(param, DTensor)
            found[HELD_BACK + names[id(param)]] = DTensor.from_local(
                errors,
                param.device_mesh,
                param.placements,
                shape=param.shape,
                stride=param.stride(),
            )
    return found
