"""A row's model and optimizer, saved in one layout and read in another, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import mics
from kinds.rows import Layout, Row, by_mics, place_of
from kinds.training import Schedule, muon_of_torch, optimizers, own_part, sum_of

SCHEDULE = Schedule("AdamW", 1, False, False)

Run = tuple[nn.Module, torch.optim.Optimizer]


def kept_by_mics(row: Row, folder: Path) -> list[str]:
    """Return what differs after `mics.save` in the first layout and `mics.load` in the last."""

    def save(run: Run) -> None:
        # An NF4 base is the model's own; the checkpoint knows its fingerprint.
        frozen = row.shape.weights != "nf4"
        mics.save(folder / "kept", model=run[0], optimizer=run[1], frozen=frozen)

    def load(run: Run) -> None:
        mics.load(folder / "kept", model=run[0], optimizer=run[1])

    return _differences(row, save, load)


def kept_by_torch(row: Row, folder: Path) -> list[str]:
    """Return what differs after a round by torch's own functions."""

    def parts(run: Run) -> dict[str, Any]:
        return {"model": get_model_state_dict(run[0]), "optimizer": get_optimizer_state_dict(*run)}

    def save(run: Run) -> None:
        state_dict_saver.save(parts(run), checkpoint_id=folder / "kept")

    def load(run: Run) -> None:
        into = parts(run)
        state_dict_loader.load(into, checkpoint_id=folder / "kept")
        set_model_state_dict(run[0], into["model"])
        set_optimizer_state_dict(*run, into["optimizer"])

    return _differences(row, save, load)


def _differences(row: Row, save: Callable[[Run], None], load: Callable[[Run], None]) -> list[str]:
    first, other = _started(row, row.layouts[0], seed=1), _started(row, row.layouts[-1], seed=2)
    _step(row, row.layouts[0], first)
    save(first)
    load(other)
    saved, loaded = _values(first), _values(other)
    if saved.keys() != loaded.keys():
        return sorted(saved.keys() ^ loaded.keys())
    return [name for name, value in saved.items() if not torch.equal(value, loaded[name])]


def _started(row: Row, layout: Layout, seed: int) -> Run:
    """A model that starts from values of its own."""
    model = by_mics(row, place_of(layout))
    (optimizer,) = optimizers(SCHEDULE.optimizer, model, muon_of_torch)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.mul_(seed)
    return model, optimizer


def _step(row: Row, layout: Layout, run: Run) -> None:
    model, optimizer = run
    place = place_of(layout)
    for data, counted in mics.micro_steps(model, [own_part(row, place, 0, 0)]):
        (sum_of(model, data) * layout.cp / counted).backward()
    optimizer.step()
    optimizer.zero_grad()


def _values(run: Run) -> dict[str, torch.Tensor]:
    """Every parameter and every tensor of optimizer state, whole, but an NF4 base."""
    model, optimizer = run
    found = {}
    for name, param in model.named_parameters():
        local = param.to_local() if isinstance(param, DTensor) else param
        if hasattr(local, "get_original_weight"):  # the model's own, told by its fingerprint
            continue
        found[name] = _whole(param)
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name}: {key}"] = _whole(value)
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
