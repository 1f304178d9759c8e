"""Do all ranks run the same number of micro-steps? If not, their collectives pair up wrongly.

Replicas that run another number would end with different weights, and a partition group would mix
the gather of one micro-step with that of the next, both without a word. So every rank says of each
micro-step, by its number, whether it comes; the answers travel while it computes, over a Gloo group
of their own, and are compared before anybody waits for a hop 2 that others do not run.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist

from mics.errors import MicroStepError
from mics.ranks.mesh import Groups, PerMesh

Said = Literal["beforehand", "on arrival", "afterwards"]
"""When ranks say so, see [Note: who knows the last micro-step, and when] in ``open_step.py``.

All ranks say it at the same moment, or their hop 2 would cross.
"""

Normalise = Literal["micro_steps", "tokens"] | None
"""What the gradients of a step are divided by: the number of micro-steps, of tokens, or nothing."""

_NORMALISE = (None, "micro_steps", "tokens")


class SameSteps:
    """The questions of one mesh to all its ranks: does another micro-step come?

    Args:
        groups: of the mesh.
    """

    def __init__(self, groups: Groups) -> None:
        self._ranks = groups.whole.mesh.flatten().tolist()  # not groups, which would keep itself
        self._group: dist.ProcessGroup | None = None
        self._open: dict[int, _Question] = {}  # of every step that is open, by its owner

    @property
    def group(self) -> dist.ProcessGroup:
        """The Gloo group of all ranks of the mesh; made by all of them when first asked for."""
        if self._group is None:
            self._group = dist.new_group(
                self._ranks,
                backend="gloo",
                use_local_synchronization=True,
                group_desc="mics_control",
            )
        assert self._group is not None
        return self._group

    def ask(self, owner: object, ran: int, *, more: bool, said: Said, normalise: Normalise) -> None:
        """Say whether a micro-step follows the first ``ran`` of a step; ``check`` has the answer.

        Args:
            owner: the step that asks; it has one question at a time.
            ran: micro-steps of the step that have ended by then.
            more: whether another one comes.
            said: when this is said.
            normalise: what the step's gradients are divided by.
        """
        self._open[id(owner)] = _Question(ran, more, said, normalise, self.group)

    def check(self) -> None:
        """Compare the answers to all questions that are open.

        Raises:
            MicroStepError: on every rank, when they differ.
        """
        while self._open:
            owner = next(iter(self._open))
            self._open.pop(owner).check()

    def forget(self, owner: object) -> None:
        """Drop the open question of a step that was left."""
        self._open.pop(id(owner), None)


same_steps_of = PerMesh(SameSteps)
"""The questions of a mesh."""


class _Question:
    """One question, under way."""

    def __init__(
        self, ran: int, more: bool, said: Said, normalise: Normalise, group: dist.ProcessGroup
    ) -> None:
        self._ran = ran
        self._more = more
        self._said = said
        self._normalise = normalise
        kind, divides = get_args(Said).index(said), _NORMALISE.index(normalise)
        facts = [more, not more, ran, -ran, kind, -kind, divides, -divides]
        self._most = torch.tensor(facts, dtype=torch.int32)
        work = dist.all_reduce(self._most, dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None
        self._work = work

    def check(self) -> None:
        self._work.wait()
        some_go_on, some_end, most, minus_least, *rest = self._most.tolist()
        same_moment, same_division = rest[0] == -rest[1], rest[2] == -rest[3]
        differ = some_go_on and some_end
        if most == -minus_least and not differ and same_moment and same_division:
            return
        ran = f"{self._ran} micro-step(s)"
        if most != -minus_least:
            raise MicroStepError(
                "Ranks are in different micro-steps of one step.",
                numbers=f"Rank {dist.get_rank()} has run {ran}; the ranks have run {-minus_least} "
                f"to {most}.",
                write="the same number of batches on every rank; pad the last one, or drop it",
            )
        if not differ and not same_division:
            raise MicroStepError(
                "Ranks normalise the gradients of one step in different ways.",
                numbers=f"Rank {dist.get_rank()} divides by {self._normalise or 'nothing'}.",
                write="the same normalise= on every rank, and tokens= on all of them or on none",
            )
        if not differ:
            raise MicroStepError(
                "Some ranks say beforehand which micro-step is the last, and others do not.",
                numbers=f"After {ran} rank {dist.get_rank()} said it {self._said}.",
                write="the same last= on every rank, and finish_step on all of them or on none",
            )
        raise MicroStepError(
            "Ranks were given different numbers of micro-batches for one step.",
            numbers=f"After {ran} some ranks have more and others have not; rank "
            f"{dist.get_rank()} has {'more' if self._more else 'no more'}.",
            write="the same number of batches on every rank; pad the last one, or drop it",
        )
