"""The random state of a rank as tensors: the CPU's generator and the accelerator's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mics.checkpoint.differences import not_to_be
from mics.checkpoint.layout import random_state_of
from mics.checkpoint.manifest import Entry
from mics.ranks.device import HOST, default_device_type, on_accelerator


def random_state(rank: int) -> dict[str, torch.Tensor]:
    """The generators' states of this rank, uint8, by name."""
    state = {_name(rank, HOST): torch.get_rng_state()}
    kind = default_device_type()
    if on_accelerator(kind):
        state[_name(rank, kind)] = torch.get_device_module(kind).get_rng_state()
    return state


def random_state_to_read(
    folder: Path, entries: Mapping[str, Entry], rank: int
) -> dict[str, torch.Tensor]:
    """Tensors for the random state of this rank; none when what there is of it is not complete.

    Raises:
        CheckpointError: it is not of a generator of this kind.
    """
    own = random_state(rank)
    if not own.keys() <= entries.keys():
        return {}
    for name, state in own.items():
        entry = entries[name]
        if (entry.torch_dtype, entry.shape) != (state.dtype, tuple(state.shape)):
            why = f"It is {entry.dtype} {list(entry.shape)}, not uint8 {list(state.shape)}"
            raise not_to_be(folder, name, why)
    return {name: torch.empty_like(state) for name, state in own.items()}


def check_random_state(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raise where no generator can take a state that was read.

    Raises:
        CheckpointError: which one, and why.
    """
    for name, value in state.items():
        try:
            torch.Generator(name.rpartition("/")[2]).set_state(value)
        except RuntimeError as error:
            raise not_to_be(folder, name, str(error)) from None


def restore_random_state(rank: int, state: Mapping[str, torch.Tensor]) -> bool:
    """Set the generators of this rank; False, and nothing set, when there is no state for it."""
    if not state:
        return False
    torch.set_rng_state(state[_name(rank, HOST)])
    kind = default_device_type()
    if on_accelerator(kind):
        torch.get_device_module(kind).set_rng_state(state[_name(rank, kind)])
    return True


def _name(rank: int, device: str) -> str:
    return random_state_of(rank) + device
