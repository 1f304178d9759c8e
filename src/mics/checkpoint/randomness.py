"""The random state of a rank as tensors: the CPU's generator and the accelerator's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mics.checkpoint.differences import not_to_be
from mics.checkpoint.layout import random_state_of
from mics.checkpoint.manifest import Entry
from mics.ranks.device import HOST, default_device_type, on_accelerator


def random_state(rank: int) -> dict[str, torch.Tensor]:
    """The generators' states of this rank, uint8, by name."""
    return {_name(rank, device): state for device, state in generator_states().items()}


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
    devices = [HOST, default_device_type()]
    set_generator_states({d: state[_name(rank, d)] for d in devices if _name(rank, d) in state})
    return True


def generator_states() -> dict[str, torch.Tensor]:
    """The states of torch's generators in use, uint8, by the kind of their device."""
    states = {HOST: torch.get_rng_state()}
    kind = default_device_type()
    if on_accelerator(kind):
        states[kind] = torch.get_device_module(kind).get_rng_state()
    return states


def set_generator_states(states: Mapping[str, Any]) -> None:
    """Set torch's generators to what ``generator_states`` returned; others stay as they are."""
    torch.set_rng_state(states[HOST])
    kind = default_device_type()
    if on_accelerator(kind) and kind in states:
        torch.get_device_module(kind).set_rng_state(states[kind])


def _name(rank: int, device: str) -> str:
    return random_state_of(rank) + device
