"""Pretrained weights into a sharded model."""

from pathlib import Path

from torch import nn


def load_weights(model: nn.Module, folder: Path) -> None:
    """Stub."""
