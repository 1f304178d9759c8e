"""The random state of a rank as tensors: the CPU's generator and the accelerator's."""

from __future__ import annotations

import torch

from mics.checkpoint.layout import random_state_of
from mics.ranks.device import HOST, default_device_type, on_accelerator


def random_state(rank: int) -> dict[str, torch.Tensor]:
    """The generators' states of this rank, uint8, by name."""
    state = {_name(rank, HOST): torch.get_rng_state()}
    kind = default_device_type()
    if on_accelerator(kind):
        state[_name(rank, kind)] = torch.get_device_module(kind).get_rng_state()
    return state


def restore_random_state(rank: int, state: dict[str, torch.Tensor]) -> bool:
    """Set the generators of this rank; False, and nothing set, when its state is not complete."""
    kind = default_device_type()
    wanted = {HOST, kind}
    if not all(_name(rank, device) in state for device in wanted):
        return False
    torch.set_rng_state(state[_name(rank, HOST)])
    if on_accelerator(kind):
        torch.get_device_module(kind).set_rng_state(state[_name(rank, kind)])
    return True


def _name(rank: int, device: str) -> str:
    return random_state_of(rank) + device
