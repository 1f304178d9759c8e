"""Sizes of a model's units: parameters as FSDP2 pads and splits them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


def dim_to_split(shape: Sequence[int], partition: int) -> int:
    """The dimension along which ``mics.shard`` splits a parameter.

    The first, as FSDP2, which pads it: 8 experts over 64 ranks take the memory of 64. So tensors
    of three and more dimensions whose first is shorter than the partition are split along the next
    one that divides evenly, if there is one.
    """
    if len(shape) < 3 or shape[0] >= partition:
        return 0
    return next((dim for dim, n in enumerate(shape) if dim and n % partition == 0), 0)


@dataclass(frozen=True)
class Parameter:
    """One parameter's shape, as ``mics.shard`` splits it.

    Args:
        shape: of the whole; empty for a scalar.
        trained: whether the parameter has a gradient.
    """

    shape: tuple[int, ...]
    trained: bool

    @property
    def numel(self) -> int:
        """Number of elements before padding."""
        return math.prod(self.shape)

    def padded(self, partition: int) -> int:
        """Count the elements of all shards, each as long as the longest."""
        if dim_to_split(self.shape, partition) or not self.numel:
            return self.numel
        rows = self.shape[0] if self.shape else 1
        return -(-rows // partition) * partition * (self.numel // rows)


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

    def matrices(self, partition: int = 1) -> int:
        """Count those that are trained, of parameters of two or more dims."""
        several = [p for p in self.parameters if p.trained and len(p.shape) > 1]
        return sum(p.padded(partition) for p in several)

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
    return Parameter(tuple(param.shape), param.requires_grad)
