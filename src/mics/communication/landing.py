"""Reduce-scatters beside the backward pass where the backend blocks (Gloo).

[Note: results that land later]
On a GPU FSDP2 reduces on a stream of its own while the backward computes. On the CPU its streams do
nothing, and it takes the output of a reduce-scatter for complete. So it is given one that may wait:

    first gradient    FSDP2 makes views of the output the gradients and reads nothing; the result
                      is written there when it comes
    accumulation      the output is zeros, which FSDP2 adds to the gradients; the result is added
                      to the flat buffer behind them when it comes

Whatever needs the bytes at once blocks as before. So does a partition group inside a node in the
last micro-step, since hop 2 waits for it: the fast link is soon done, the slow one wants to begin.

[Note: the same order on every rank]
A two-stage reduction issues its second stage when the next unit is reduced, not when the first
happens to be done: each communicator sees the same order on every rank, so nothing can cross. At
most one reduction holds its input, as with FSDP2 on a GPU.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.gradients import flat_buffer, gradients_of
from mics.ranks.mesh import Groups

Begin = Callable[[torch.Tensor], Iterator[None]]
"""Issues a reduce-scatter into a tensor; every ``next`` waits for a stage and issues the next."""


@dataclass
class _Reduction:
    owner: Later
    stages: Iterator[None]
    result: torch.Tensor
    accumulator: torch.Tensor  # what the result is added to, unless it is the result
    abandoned: bool = False  # its backward pass has raised


class Reductions:
    """The reduce-scatters under way over one mesh, oldest first."""

    def __init__(self) -> None:
        self._under_way: deque[_Reduction] = deque()
        self._backward = -1  # the backward pass they belong to

    def advance(self) -> None:
        """Wait for the stage that each one is in; what was in its last one lands.

        What a backward pass that raised has left behind is waited for, but lands nowhere: the
        gradients have been dropped meanwhile, or zeroed.
        """
        for reduction in list(self._under_way):
            if next(reduction.stages, "over") == "over":
                self._under_way.remove(reduction)  # always the oldest
                reduction.owner.end(reduction, lands=not reduction.abandoned)

    def finish(self) -> None:
        """Wait until none is under way."""
        with torch.no_grad():
            while self._under_way:
                self.advance()

    def before_forward(self) -> None:
        """A forward begins: if outside of every backward pass, what is under way is a failed one's.

        A pass that ends waits for everything. A forward inside one is a recomputed block's.
        """
        if self._under_way and not compat.in_backward():
            for reduction in self._under_way:
                reduction.abandoned = True

    def start(self, reduction: _Reduction) -> None:
        """Issue the first stage of one more, which the end of this backward will wait for."""
        if self._backward != compat.backward_id():
            # Also a backward pass inside another one (reentrant checkpoints): both wait in the end.
            self.finish()
            self._backward = compat.backward_id()
            compat.at_end_of_backward(self.finish)
        next(reduction.stages)
        self._under_way.append(reduction)


class Later:
    """Lets the reduce-scatters of one unit land after FSDP2 has gone on.

    Args:
        group: the FSDP2 parameter group.
        reductions: of the mesh.
        landed: called when one of its results is in the gradients, to start hop 2; ``None`` without
            replicas.
        in_node: whether the partition group is inside a node.
    """

    def __init__(
        self,
        group: Any,
        reductions: Reductions,
        landed: Callable[[], None] | None,
        *,
        in_node: bool,
    ) -> None:
        self._group = group
        self._reductions = reductions
        self._tell = landed
        self.in_node = in_node
        self._pending = False

    @property
    def pending(self) -> bool:
        """Whether a result is still to come."""
        return self._pending

    def before_forward(self) -> None:
        """The unit's forward begins."""
        self._reductions.before_forward()

    def finish(self) -> None:
        """Wait until everything over the mesh has landed."""
        self._reductions.finish()

    def reduce(self, output: torch.Tensor, op: compat.ReduceOp, begin: Begin) -> bool:
        """Start a reduce-scatter that lands later.

        Returns:
            False if it must be complete at once; then everything before it is.
        """
        self._reductions.advance()
        if self._pending:  # the unit was used twice
            self._reductions.finish()
        hop_two_follows = self._tell is not None and compat.wants_all_reduce(self._group)
        accumulator = self._accumulator(output, op)
        if accumulator is None or (hop_two_follows and self.in_node):
            self._reductions.finish()
            return False
        result = output
        if accumulator is not output:
            output.zero_()
            result = torch.empty_like(output)
        self._pending = True
        self._reductions.start(_Reduction(self, begin(result), result, accumulator))
        return True

    def end(self, reduction: _Reduction, *, lands: bool) -> None:
        """The result is there: add it to the gradients."""
        self._pending = False
        if lands and reduction.accumulator is not reduction.result:
            reduction.accumulator.add_(reduction.result)
        if lands and self._tell is not None:
            self._tell()

    def _accumulator(self, output: torch.Tensor, op: compat.ReduceOp) -> torch.Tensor | None:
        """Where the result belongs, or ``None`` if FSDP2 reads more than it adds.

        That is ``output`` while there are no gradients, else the flat buffer behind them.
        """
        trainable = [p for p in compat.sharded_params(self._group) if p.requires_grad]
        if op != dist.ReduceOp.AVG or compat.reads_gradients_at_once(self._group):
            return None
        if self._tell is None and any(compat.num_gradient_hooks(p) for p in trainable):
            return None
        whole = compat.trainable_shard_numel(self._group)
        if output.numel() != whole or any(p.dtype != output.dtype for p in trainable):
            return None  # some have no gradient this time, or it is cast
        there = gradients_of(self._group)
        if not there:
            return output
        flat = flat_buffer(there, whole) if len(there) == len(trainable) else None
        return flat if flat is not None and flat.numel() == whole else None


_reductions: weakref.WeakKeyDictionary[dist.ProcessGroup, Reductions] = weakref.WeakKeyDictionary()


def reductions_of(groups: Groups) -> Reductions:
    """The reduce-scatters under way over the partition group of a mesh."""
    return _reductions.setdefault(groups.shard, Reductions())
