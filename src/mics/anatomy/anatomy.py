"""A model as the planner sees it: the sizes of its units, and traces of a micro-step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from mics.anatomy.blocks import Blocks, find_blocks
from mics.anatomy.trace import Trace, between, trace
from mics.errors import PlanError

Loss = Callable[[Any, int, int], torch.Tensor]
"""A forward of a model on the meta device, for a micro-batch and a sequence, up to the loss."""


_SEQUENCE = 4096


class Kept(Protocol):
    """Where traces are kept for another time."""

    def get(self, micro_batch: int, sequence: int) -> Trace | None:
        """One that was kept."""

    def put(self, micro_batch: int, sequence: int, made: Trace) -> None:
        """Keep one."""


@dataclass(frozen=True)
class Parameter:
    """One parameter's shape, as FSDP2 splits it: along its first dim.

    Args:
        rows: of the first dim.
        row: elements of one of them.
        trained: whether it has a gradient.
    """

    rows: int
    row: int
    trained: bool

    @property
    def numel(self) -> int:
        """Elements, not split."""
        return self.rows * self.row

    def padded(self, partition: int) -> int:
        """Elements of all shards, each as long as the longest."""
        return -(-self.rows // partition) * partition * self.row


@dataclass(frozen=True)
class Unit:
    """What is gathered at once: a block, or the root."""

    parameters: tuple[Parameter, ...]
    _padded: dict[int, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    def numel(self, partition: int = 1) -> int:
        """Elements after padding."""
        return self._sizes(partition)[0]

    def trained(self, partition: int = 1) -> int:
        """Those of parameters with a gradient."""
        return self._sizes(partition)[1]

    def _sizes(self, partition: int) -> tuple[int, int]:
        """Both, worked out once per partition."""
        found = self._padded.get(partition)
        if found is None:
            padded = [(p.padded(partition), p.trained) for p in self.parameters]
            found = sum(size for size, _ in padded), sum(size for size, with_ in padded if with_)
            self._padded[partition] = found
        return found


class Anatomy:
    """Sizes and traces of one model.

    Args:
        model: on the meta device, its parameters in the dtype that is computed in (``cast``).
        loss: runs it.
        blocks: as in ``mics.shard``.
        kept: traces of another time.
        positions: of its longest sequence, if it has any.

    Raises:
        ShardError: it has no blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        blocks: Blocks = None,
        kept: Kept | None = None,
        positions: int | None = None,
    ) -> None:
        self.positions = positions
        self._model, self._loss, self._kept = model, loss, kept
        self._modules = list(find_blocks(model, blocks).values())
        self.blocks, self.root = units_of_model(model, self._modules)
        self._traces: dict[tuple[int, int], Trace] = {}

    @cached_property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return next(p.dtype for p in self._model.parameters() if p.is_floating_point())

    @cached_property
    def num_parameters(self) -> int:
        """Tied ones counted once."""
        return sum(unit.numel() for unit in (*self.blocks, self.root))

    def sequence_or(self, asked: int | None) -> int:
        """The sequence to plan for; the model's positions, at most 4096, where none was asked for.

        Raises:
            PlanError: it is longer than the model has positions.
        """
        if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool)):
            raise PlanError(f"A sequence is a whole number of tokens, got {asked!r}.")
        if asked is None:
            return min(self.positions or _SEQUENCE, _SEQUENCE)
        if (self.positions is not None and asked > self.positions) or asked < 1:
            raise PlanError(
                f"The model does not take a sequence of {asked}.",
                numbers=f"It has {self.positions or 'no limit of'} positions.",
                write=f"--sequence {self.positions or _SEQUENCE}",
            )
        return asked

    def trace(self, micro_batch: int, sequence: int) -> Trace:
        """Of one micro-step; made once.

        From 5 on a micro-batch is extrapolated from those of 2 and 4: all sizes and FLOPs are a
        part that grows with it and one that does not. Unless their kernels differ, as those of a
        model do that runs sequences one by one.

        Raises:
            PlanError: the model cannot be traced.
        """
        key = (micro_batch, sequence)
        if key not in self._traces:
            self._traces[key] = self._extrapolated(*key) or self._made(*key)
        return self._traces[key]

    def _extrapolated(self, micro_batch: int, sequence: int) -> Trace | None:
        if micro_batch <= 4:
            return None
        two, four = self.trace(2, sequence), self.trace(4, sequence)
        try:
            return between(two, four, (micro_batch - 2) / 2)
        except ValueError:
            return None

    def _made(self, micro_batch: int, sequence: int) -> Trace:
        found = self._kept.get(micro_batch, sequence) if self._kept else None
        if found is None:
            try:
                found = trace(
                    self._model,
                    self._modules,
                    lambda: self._loss(self._model, micro_batch, sequence),
                )
            except PlanError:
                raise
            except Exception as error:  # whatever the model's own code raises
                raise self._untraced(micro_batch, sequence, error) from error
            if self._kept:
                self._kept.put(micro_batch, sequence, found)
        return found

    def _untraced(self, micro_batch: int, sequence: int, error: Exception) -> PlanError:
        said = str(error).splitlines()[0] if str(error) else ""
        where = f"Micro-batch {micro_batch}, sequence {sequence}"
        name = type(self._model).__name__
        return PlanError(
            f"{name} does not run on the meta device, where tensors have no values.",
            numbers=f"{where}: {type(error).__name__}: {said}",
            write="a model whose path does not depend on values, or another loss",
        )


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters in the dtype that is computed in, as a unit has them when it is gathered."""
    for param in model.parameters():
        if param.is_floating_point():
            param.data = param.data.to(dtype)
    return model


def units_of_model(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[tuple[Unit, ...], Unit]:
    """Its blocks and its root; equal units are one object, so that work is done once."""
    of_blocks = {id(p) for block in blocks for p in block.parameters()}
    alike: dict[Unit, Unit] = {}
    units = [_unit(block.parameters()) for block in blocks]
    root = _unit(p for p in model.parameters() if id(p) not in of_blocks)
    return tuple(alike.setdefault(unit, unit) for unit in units), root


def _unit(parameters: Iterable[torch.Tensor]) -> Unit:
    return Unit(tuple(_parameter(p) for p in parameters))


def _parameter(param: torch.Tensor) -> Parameter:
    rows = param.shape[0] if param.dim() else 1
    return Parameter(rows, param.numel() // max(rows, 1), param.requires_grad)
