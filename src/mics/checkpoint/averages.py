"""The moving average of a model in a checkpoint: tensors by the names of weights, and a count."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mics.checkpoint.differences import differ, not_to_be
from mics.checkpoint.layout import AVERAGE, AVERAGE_UPDATES, of_kind
from mics.checkpoint.manifest import Manifest
from mics.checkpoint.names import plain_names
from mics.errors import CheckpointError
from mics.sharding.average import EMA


def averages_of(ema: EMA, model: nn.Module) -> dict[str, torch.Tensor]:
    """Averages by their names in the manifest; those in use, not copies.

    Raises:
        CheckpointError: it is the average of another model.
    """
    if ema.model is not model:
        raise CheckpointError(
            "This EMA is of another model.", write="ema=mics.EMA(model), of the model that is given"
        )
    plain = plain_names(model, ema.averages)
    return {AVERAGE + plain[name]: average for name, average in ema.averages.items()}


def plan_average(
    folder: Path, manifest: Manifest, model: nn.Module, ema: EMA | None
) -> Mapping[str, torch.Tensor]:
    """What is to be read of an average, in place, by the names in the manifest.

    Raises:
        CheckpointError: the checkpoint holds none, or one of other tensors.
    """
    if ema is None:
        return {}
    here, there = averages_of(ema, model), of_kind(AVERAGE, manifest.tensors)
    if AVERAGE_UPDATES not in manifest.values:
        raise CheckpointError(
            f"{folder} holds no average.",
            write="mics.load(path, model=model) without ema, and mics.EMA(model) behind it",
        )
    names = {name.removeprefix(AVERAGE) for name in here}
    if names != set(there):
        raise CheckpointError(
            f"{folder} has an average of other tensors.",
            numbers=differ(set(there), names),
            write="mics.EMA with the average_buffers it had, and the same weights frozen",
        )
    for name, average in here.items():
        entry = manifest.tensors[name]
        if (entry.shape, entry.torch_dtype) != (tuple(average.shape), average.dtype):
            why = f"It is {entry.dtype} {list(entry.shape)}"
            raise not_to_be(folder, name, f"{why}, and {list(average.shape)} here")
    updates = manifest.values[AVERAGE_UPDATES]
    if not isinstance(updates, int) or isinstance(updates, bool) or updates < 0:
        raise not_to_be(folder, AVERAGE_UPDATES, f"It is {updates!r}")
    return here


def restore_updates(manifest: Manifest, ema: EMA) -> None:
    """Let an average go on from the number of updates that it had."""
    updates = manifest.values[AVERAGE_UPDATES]
    assert isinstance(updates, int)
    ema.updates = updates
