"""What a script is given in the place of GPUs, when it asks for them by name.

Called by the code that ``script.py`` has read; nothing of torch is changed.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch

from mics.ranks.device import HOST, on_accelerator

read_as: list[str] = []
"""What was read otherwise than it stands in the script, for people."""


def tell(where: str, what: str) -> None:
    """Note what was read otherwise."""
    words = f"{where}: {what}"
    if words not in read_as:
        read_as.append(words)


def backend(wanted: Any, where: str) -> Any:
    """Gloo, where a backend needs GPUs."""
    if not isinstance(wanted, str) or "nccl" not in wanted.lower():
        return wanted
    tell(where, f'"{wanted}" as "gloo"')
    return "gloo"


def device(wanted: Any) -> Any:
    """The host, where a number or a name means a GPU; anything else as it is."""
    if isinstance(wanted, bool):
        return wanted
    if isinstance(wanted, int):
        return HOST
    if isinstance(wanted, torch.device | str) and str(wanted).partition(":")[0] in ("cuda", HOST):
        return HOST if isinstance(wanted, str) else torch.device(HOST)
    return wanted


class Processors:
    """The host with the names of ``torch.cuda``: what counts, seeds, waits or measures."""

    def is_available(self) -> bool:
        """Scripts that are read like this take it for granted."""
        return True

    def device_count(self) -> int:
        """One for every rank of the node."""
        return int(os.environ["LOCAL_WORLD_SIZE"])

    def current_device(self) -> int:
        """The rank's own."""
        return int(os.environ["LOCAL_RANK"])

    def is_bf16_supported(self, *_: Any, **__: Any) -> bool:
        """The host computes with it."""
        return True

    def manual_seed(self, seed: int) -> None:
        """The generator of a GPU is the host's."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_name(self, *_: Any) -> str:
        """What the device is called."""
        return HOST

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        """That of a GPU of today."""
        return 9, 0

    @property
    def amp(self) -> Any:
        """Old names of autocast and loss scaler."""
        return _Amp()

    def __getattr__(self, name: str) -> Any:
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        if name.startswith(("memory", "max_memory")):
            return lambda *_, **__: 0
        if name.startswith(("empty", "reset", "set_", "synchronize", "init", "ipc")):
            return lambda *_, **__: None
        if name == "nvtx":
            return _Nvtx()
        return getattr(torch.cuda, name)


class _Amp:
    def autocast(self, *args: Any, **kwargs: Any) -> Any:
        return torch.autocast(HOST, *args, **kwargs)

    def GradScaler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.amp.GradScaler(HOST, *args, **kwargs)


class _Nvtx:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: nullcontext()


processors = Processors()


def is_gpu(name: str) -> bool:
    """Whether a text is the name of a GPU: cuda, cuda:0."""
    kind, _, index = name.partition(":")
    return kind == "cuda" and on_accelerator(kind) and (not index or index.isdigit())
