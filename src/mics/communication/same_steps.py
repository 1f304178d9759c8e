"""Do all ranks run the same number of micro-steps? If not, their collectives pair up wrongly.

Replicas that run another number would end with different weights, and a partition group would mix
the gather of one micro-step with that of the next, both without a word. So every rank says of each
micro-step, by its number, whether it comes; the answers travel while it computes, over a Gloo group
of their own, and are compared before anybody waits for a hop 2 that others do not run.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from mics.errors import MicroStepError
from mics.ranks.mesh import Groups, PerMesh


class SameSteps:
    """The questions of one mesh to all its ranks: does another micro-step come?

    Args:
        groups: of the mesh. The first question makes a group, collectively.
    """

    def __init__(self, groups: Groups) -> None:
        self._ranks = groups.whole.mesh.flatten().tolist()  # not groups, which would keep itself
        self._group: dist.ProcessGroup | None = None
        self._open: _Question | None = None

    def ask(self, ran: int, *, more: bool) -> None:
        """Say whether a micro-step follows the first ``ran`` of a step.

        The answer to the question before is compared first.

        Raises:
            MicroStepError: as ``check``.
        """
        self.check()
        if self._group is None:
            self._group = dist.new_group(
                self._ranks,
                backend="gloo",
                use_local_synchronization=True,
                group_desc="mics_control",
            )
            assert self._group is not None
        self._open = _Question(ran, more, self._group)

    def check(self) -> None:
        """Compare the answers to the question that is open, if one is.

        Raises:
            MicroStepError: on every rank, when they differ.
        """
        question, self._open = self._open, None
        if question is not None:
            question.check()

    def forget(self) -> None:
        """Drop the open question of a step that was left."""
        self._open = None


same_steps_of = PerMesh(SameSteps)
"""The questions of a mesh."""


class _Question:
    """One question, under way."""

    def __init__(self, ran: int, more: bool, group: dist.ProcessGroup) -> None:
        self._ran = ran
        self._more = more
        self._most = torch.tensor([more, not more, ran, -ran], dtype=torch.int32)
        work = dist.all_reduce(self._most, dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None
        self._work = work

    def check(self) -> None:
        self._work.wait()
        some_go_on, some_end, most, minus_least = self._most.tolist()
        if most == -minus_least and not (some_go_on and some_end):
            return
        ran = f"{self._ran} micro-step(s)"
        if most != -minus_least:
            raise MicroStepError(
                "Ranks are in different micro-steps of one step.",
                numbers=f"Rank {dist.get_rank()} has run {ran}; the ranks have run {-minus_least} "
                f"to {most}.",
                write="the same number of batches on every rank; pad the last one, or drop it",
            )
        raise MicroStepError(
            "Ranks were given different numbers of micro-batches for one step.",
            numbers=f"After {ran} some ranks have more and others have not; rank "
            f"{dist.get_rank()} has {'more' if self._more else 'no more'}.",
            write="the same number of batches on every rank; pad the last one, or drop it",
        )
