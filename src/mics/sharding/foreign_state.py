"""Optimizer state that is another rank's: one file, written by one rank and read by all.

Tools that do not know of shards let rank 0 pickle its optimizer. A DTensor in it brings its mesh
along, and with it the place that its writer has there, which is not this rank's.
"""

from __future__ import annotations

import weakref

import torch
from torch.distributed.tensor import DTensor

from mics.errors import CheckpointError

# Whether nothing was loaded since an optimizer was looked at.
_checked: weakref.WeakKeyDictionary[torch.optim.Optimizer, bool] = weakref.WeakKeyDictionary()


def refuse_foreign_state(optimizer: torch.optim.Optimizer, _: set[int]) -> None:
    """Refuse state that holds another rank's shards; see ``guard.Watcher``.

    Raises:
        CheckpointError: on every rank whose shards were not those in the file. Those that it was
            right for learn of it in their next step.
    """
    if _checked.get(optimizer):
        return
    for param, state in optimizer.state.items():
        if isinstance(param, DTensor) and state:
            for value in state.values():
                _refuse(param, value)
    if optimizer not in _checked:
        optimizer.register_load_state_dict_post_hook(_look_again)
    _checked[optimizer] = True


def _look_again(optimizer: torch.optim.Optimizer) -> None:
    _checked[optimizer] = False


def _refuse(param: DTensor, value: object) -> None:
    if not isinstance(value, DTensor):
        return
    here, there = param.device_mesh.get_coordinate(), value.device_mesh.get_coordinate()
    if here != there:
        raise CheckpointError(
            "The optimizer's state was loaded from a file of another rank: it holds the shards of "
            "that one.",
            numbers=f"This rank is at {tuple(here or ())} of the mesh, the file's at "
            f"{tuple(there or ())}.",
            write="mics.save and mics.load; with Accelerate and transformers "
            "mics.integrations.accelerate.Accelerator and "
            "mics.integrations.transformers.with_mics(Trainer)",
        )
