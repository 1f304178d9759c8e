"""A model as the planner sees it: the sizes of its units, and traces of a micro-step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from mics.anatomy.blocks import Blocks, find_blocks
from mics.anatomy.recipe import default_sequence
from mics.anatomy.sizes import units_of_model
from mics.anatomy.trace import Trace, between
from mics.anatomy.watch import trace
from mics.errors import PlanError

Loss = Callable[[Any, int, int], torch.Tensor]
"""A forward of a model on the meta device, for a micro-batch and a sequence, up to the loss."""


class TraceStore(Protocol):
    """A place where traces are kept for another time."""

    def get(self, micro_batch: int, sequence: int) -> Trace | None:
        """Return a trace that was kept, if there is one."""

    def put(self, micro_batch: int, sequence: int, trace: Trace) -> None:
        """Keep a trace."""


class Anatomy:
    """Sizes and traces of one model, which is built once: ``hand_on`` gives it to who trains it.

    Args:
        model: on the meta device, its parameters in the dtype that is computed in (``cast``).
        loss: runs the model.
        blocks: as in ``mics.shard``.
        store: keeps traces for another time.
        positions: tokens of the longest sequence the model takes; ``None`` where there is no limit.
        name: what the model is called; its class by default.
        hooked: elements of parameters that say themselves what is gathered of them
            (``fsdp_pre_all_gather``), which sizes and traces do not ask.

    Raises:
        ShardError: the model has no blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        blocks: Blocks = None,
        store: TraceStore | None = None,
        positions: int | None = None,
        name: str | None = None,
        hooked: int = 0,
    ) -> None:
        self.hooked = hooked
        self.name = name or type(model).__name__
        self.positions = positions
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        """The dtype that is computed in."""
        self._model: nn.Module | None = model
        self._loss, self._store = loss, store
        self._modules = list(find_blocks(model, blocks).values())
        self.blocks, self.root = units_of_model(model, self._modules)
        self._traces: dict[tuple[int, int], Trace] = {}

    @property
    def model(self) -> nn.Module:
        """The module on the meta device, as long as it has not been handed on."""
        assert self._model is not None, "the module was handed on"
        return self._model

    @cached_property
    def num_parameters(self) -> int:
        """How many parameters the model has, tied ones counted once."""
        return sum(unit.numel() for unit in (*self.blocks, self.root))

    def hand_on(self, dtype: torch.dtype) -> nn.Module:
        """Give the module away to be trained, so that nobody need build it again.

        What has been traced stays known; nothing more can be traced.

        Args:
            dtype: its parameters are given back in.
        """
        model, self._model, self._modules = cast(self.model, dtype), None, []
        return model

    def sequence_or(self, asked: int | None) -> int:
        """Choose the sequence to plan for: what is asked for, else the model's positions.

        ``default_sequence`` where none is asked for.

        Raises:
            PlanError: the sequence is longer than the model has positions.
        """
        if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool)):
            raise PlanError(f"A sequence is a whole number of tokens, got {asked!r}.")
        if asked is None:
            return default_sequence(self.positions)
        if (self.positions is not None and asked > self.positions) or asked < 1:
            raise PlanError(
                f"The model does not take a sequence of {asked}.",
                numbers=f"It has {self.positions or 'no limit of'} positions.",
                write=f"--sequence {self.positions or default_sequence(None)}",
            )
        return asked

    def trace(self, micro_batch: int, sequence: int) -> Trace:
        """Trace one micro-step, once.

        From 5 on a micro-batch is extrapolated from those of 2 and 4: all sizes and FLOPs are a
        part that grows with it and one that does not. Unless their kernels differ, as those of a
        model do that runs sequences one by one.

        Raises:
            PlanError: the model cannot be traced.
        """
        key = (micro_batch, sequence)
        if key not in self._traces:
            self._traces[key] = self._extrapolated(*key) or self._watched(*key)
        return self._traces[key]

    def _extrapolated(self, micro_batch: int, sequence: int) -> Trace | None:
        if micro_batch <= 4:
            return None
        two, four = self.trace(2, sequence), self.trace(4, sequence)
        try:
            return between(two, four, (micro_batch - 2) / 2)
        except ValueError:
            return None

    def _watched(self, micro_batch: int, sequence: int) -> Trace:
        """Return the trace that was kept, or run the model and keep its trace."""
        stored = self._store.get(micro_batch, sequence) if self._store else None
        if stored is not None:
            return stored
        model = self.model
        try:
            watched = trace(model, self._modules, lambda: self._loss(model, micro_batch, sequence))
        except PlanError:
            raise
        except Exception as error:  # whatever the model's own code raises
            raise self._untraced(micro_batch, sequence, error) from error
        if self._store:
            self._store.put(micro_batch, sequence, watched)
        return watched

    def _untraced(self, micro_batch: int, sequence: int, error: Exception) -> PlanError:
        first_line = str(error).splitlines()[0] if str(error) else ""
        where = f"Micro-batch {micro_batch}, sequence {sequence}"
        return PlanError(
            f"{type(self.model).__name__} does not run on the meta device, where tensors have no "
            "values.",
            numbers=f"{where}: {type(error).__name__}: {first_line}",
            write="a model whose path does not depend on values, or another loss",
        )


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Turn parameters into the dtype that is computed in, as a gathered unit has them."""
    for param in model.parameters():
        if param.is_floating_point():
            param.data = param.data.to(dtype)
    return model
