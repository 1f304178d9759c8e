"""Sizes of a model's units: parameters as FSDP2 pads and splits them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class Parameter:
    """One parameter's shape, as FSDP2 splits it: along its first dim.

    Args:
        rows: length of the first dim.
        row: elements of one row.
        trained: whether the parameter has a gradient.
    """

    rows: int
    row: int
    trained: bool

    @property
    def numel(self) -> int:
        """Number of elements before padding."""
        return self.rows * self.row

    def padded(self, partition: int) -> int:
        """Count the elements of all shards, each as long as the longest."""
        return -(-self.rows // partition) * partition * self.row


@dataclass(frozen=True)
class UnitSize:
    """Parameters of what is gathered at once: a block, or the root."""

    parameters: tuple[Parameter, ...]
    _padded: dict[int, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    def numel(self, partition: int = 1) -> int:
        """Count the elements, padded for a partition of that many ranks."""
        return self._sizes(partition)[0]

    def trained(self, partition: int = 1) -> int:
        """Count those of parameters that have a gradient."""
        return self._sizes(partition)[1]

    def _sizes(self, partition: int) -> tuple[int, int]:
        """Work out both once per partition."""
        sizes = self._padded.get(partition)
        if sizes is None:
            padded = [(p.padded(partition), p.trained) for p in self.parameters]
            trained = sum(numel for numel, has_gradient in padded if has_gradient)
            sizes = self._padded[partition] = sum(numel for numel, _ in padded), trained
        return sizes


def units_of_model(
    model: nn.Module, blocks: Sequence[nn.Module]
) -> tuple[tuple[UnitSize, ...], UnitSize]:
    """Size up a model's blocks and its root; equal units are one object, so work is done once."""
    of_blocks = {id(p) for block in blocks for p in block.parameters()}
    alike: dict[UnitSize, UnitSize] = {}
    units = [_unit(block.parameters()) for block in blocks]
    root = _unit(p for p in model.parameters() if id(p) not in of_blocks)
    return tuple(alike.setdefault(unit, unit) for unit in units), root


def _unit(parameters: Iterable[torch.Tensor]) -> UnitSize:
    return UnitSize(tuple(_parameter(p) for p in parameters))


def _parameter(param: torch.Tensor) -> Parameter:
    rows = param.shape[0] if param.dim() else 1
    return Parameter(rows, param.numel() // max(rows, 1), param.requires_grad)
