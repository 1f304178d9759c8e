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

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.backend import Program
from mics.communication.gradients import flat_buffer
from mics.ranks.mesh import Groups, PerMesh

Begin = Callable[[torch.Tensor], Program]
"""Makes the program of a reduce-scatter into a tensor."""


@dataclass
class _Reduction:
    owner: Landing
    program: Program
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
            if next(reduction.program, "over") == "over":
                self._under_way.remove(reduction)  # always the oldest
                reduction.owner.end(reduction, lands=not reduction.abandoned)

    def finish(self) -> None:
        """Wait until none is under way."""
        if not self._under_way:  # nearly always
            return
        with torch.no_grad():
            while self._under_way:
                self.advance()

    def before_forward(self) -> None:
        """Abandon what is under way when a forward begins outside of every backward pass.

        A pass that ends waits for everything, so it is a failed one's. A forward inside a pass is a
        recomputed block's.
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
        next(reduction.program, None)
        self._under_way.append(reduction)


reductions_of = PerMesh(lambda _: Reductions())
"""The reduce-scatters under way over the partition group of a mesh."""


class Landing:
    """Lets the reduce-scatters of one unit land after FSDP2 has gone on.

    Args:
        group: the FSDP2 parameter group.
        groups: of the unit; all units of a mesh share one queue.
        landed: called when a result is in the gradients, to start hop 2; ``None`` without replicas.
    """

    def __init__(self, group: Any, groups: Groups, landed: Callable[[], None] | None) -> None:
        self._group = group
        self.reductions = reductions_of(groups)
        self._landed = landed
        self.in_node = groups.shard.size() <= groups.gpus_per_node
        self._pending = False

    @property
    def pending(self) -> bool:
        """Whether a result is still to come."""
        return self._pending

    def reduce(self, output: torch.Tensor, op: compat.ReduceOp, begin: Begin) -> bool:
        """Start a reduce-scatter that lands later.

        Returns:
            False if it must be complete at once; then everything before it is.
        """
        self.reductions.advance()
        if self._pending:  # the unit was used twice
            self.reductions.finish()
        hop_two_follows = self._landed is not None and compat.wants_all_reduce(self._group)
        accumulator = self._accumulator(output, op)
        if accumulator is None or (hop_two_follows and self.in_node):
            self.reductions.finish()
            return False
        result = output
        if accumulator is not output:
            output.zero_()
            result = torch.empty_like(output)
        self._pending = True
        self.reductions.start(_Reduction(self, begin(result), result, accumulator))
        return True

    def end(self, reduction: _Reduction, *, lands: bool) -> None:
        """The result is there: add it to the gradients."""
        self._pending = False
        if lands and reduction.accumulator is not reduction.result:
            reduction.accumulator.add_(reduction.result)
        if lands and self._landed is not None:
            self._landed()

    def _accumulator(self, output: torch.Tensor, op: compat.ReduceOp) -> torch.Tensor | None:
        """Where the result belongs, or ``None`` if FSDP2 reads more than it adds.

        That is ``output`` while there are no gradients, else the flat buffer behind them.
        """
        if op != dist.ReduceOp.AVG or compat.reads_gradients_at_once(self._group):
            return None
        trainable = compat.trainable_params(self._group)
        numels = compat.trainable_shard_numels(self._group)
        if self._landed is None and any(compat.nums_of_gradient_hooks(trainable)):
            return None
        if {one.dtype for one in trainable} != {output.dtype}:
            return None  # it is cast
        if output.numel() != sum(numels):
            return None  # some have no gradient this time
        gradients = compat.locals_of([one.grad for one in trainable])
        if all(one is None for one in gradients):
            return output
        return flat_buffer(gradients, numels)
