"""The device of a rank: the host's processor, or an accelerator.

The one place that tells the two apart. What their communication does differently is the backend's,
see ``communication/backend.py``.
"""

from __future__ import annotations

import os
import sys

import torch

HOST = "cpu"
"""torch's name of the device that every machine has."""

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def on_accelerator(device: torch.device | str) -> bool:
    """Whether a device, or a type of device, is an accelerator rather than the host."""
    kind = device.type if type(device) is torch.device else device  # asked for every collective
    return kind != HOST


def default_device_type() -> str:
    """The accelerator's type if this machine has one, else "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else HOST


def built_for_accelerator() -> bool:
    """Whether torch is built for an accelerator, be there one or not; asks no driver."""
    return torch.accelerator.current_accelerator() is not None


def communication_device(device_type: str) -> torch.device:
    """This rank's device of a type."""
    if not on_accelerator(device_type):
        return torch.device(HOST)
    return torch.device(device_type, torch.accelerator.current_device_index())


def use_local_device(local_rank: int, device_type: str) -> None:
    """Make this process use the accelerator of its local rank; do nothing on the host.

    Ranks that are more than the accelerators share them.
    """
    if on_accelerator(device_type):
        count = max(1, torch.accelerator.device_count())
        torch.accelerator.set_device_index(local_rank % count)


def expand_segments(device_type: str) -> None:
    """Let the allocator of this process's accelerator grow its segments; do nothing on the host.

    Gathered blocks of unequal sizes come and go all the time, and fragment what is not. To be
    called before the first allocation. What the user has set for the allocator stays.
    """
    if on_accelerator(device_type) and not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def is_capturing(device: torch.device) -> bool:
    """Whether what is issued now is recorded in a graph, to be replayed, and does not run."""
    if not on_accelerator(device):
        return False
    tell = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return tell is not None and bool(tell())


def num_devices(device_type: str) -> int:
    """The devices of a type on this machine; the host counts as none."""
    return torch.accelerator.device_count() if on_accelerator(device_type) else 0


def device_name(device_type: str) -> str:
    """What the device calls itself; "CPU" for the host."""
    if not on_accelerator(device_type):
        return "CPU"
    name: str = torch.get_device_module(device_type).get_device_name()
    return name


def synchronise(device: torch.device) -> None:
    """Wait for all work of an accelerator; the host's is over when a call returns."""
    if on_accelerator(device):
        torch.accelerator.synchronize(device)


def ranks_can_fork(device_type: str) -> bool:
    """Whether local ranks may be forked, which starts at once; else they import torch again.

    Accelerators do not survive a fork, nor do some of macOS' libraries.
    """
    return not on_accelerator(device_type) and sys.platform == "linux"
