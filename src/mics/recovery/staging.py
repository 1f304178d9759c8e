"""Tensors on their way to the host, beside the next step.

On the host they are where they are. From an accelerator they are copied on a stream of their own
into pinned memory, which is made once; until that is done no optimizer may write them, and it waits
on its own stream, not the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mics.ranks.device import default_device_type, on_accelerator


class Staging:
    """Pinned copies of a rank's tensors; none for tensors on the host."""

    def __init__(self) -> None:
        self._pinned: dict[str, torch.Tensor] = {}
        self._stream: Any = None
        self._copied: Any = None

    def begin(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Begin to copy; returns tensors on the host, whole after ``wait``."""
        there = {name: t for name, t in tensors.items() if on_accelerator(t.device)}
        if not there:
            self._copied = None
            return dict(tensors)
        device = next(iter(there.values())).device
        module = torch.get_device_module(device.type)
        if self._stream is None:
            self._stream = module.Stream(device)
        self._stream.wait_stream(module.current_stream(device))
        with module.stream(self._stream):
            for name, tensor in there.items():
                self._place(name, tensor).copy_(tensor, non_blocking=True)
            self._copied = module.Event()
            self._copied.record(self._stream)
        return {name: self._pinned.get(name, tensor) for name, tensor in tensors.items()}

    @property
    def under_way(self) -> bool:
        """Whether the last copies come from an accelerator."""
        return self._copied is not None

    def wait(self) -> None:
        """Let this thread wait until everything is on the host."""
        if self._copied is not None:
            self._copied.synchronize()

    def hold_stream(self) -> None:
        """Let the current stream of the accelerator wait for the copies."""
        if self._copied is not None:
            module = torch.get_device_module(default_device_type())
            module.current_stream().wait_event(self._copied)

    def _place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        pinned = self._pinned.get(name)
        if pinned is None or (pinned.shape, pinned.dtype) != (tensor.shape, tensor.dtype):
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._pinned[name] = pinned
        return pinned
