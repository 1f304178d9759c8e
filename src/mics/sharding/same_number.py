"""Do all ranks deal the same number of micro-batches?

With another number on one rank it would run other collectives than the rest, or other samples would
be in the step. So each step's number travels while its first forward computes, which is the same
whatever the number, and is compared before the backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from mics.errors import MicroStepError
from mics.ranks.agreement import check_agreement
from mics.ranks.issuing import all_reduce, host_group


class SameNumber:
    """The question of one step, under way.

    Args:
        micro_batches: of the step.
        ranks: that they are dealt to.
    """

    def __init__(self, micro_batches: int, ranks: Sequence[int]) -> None:
        self._micro_batches, self._ranks, self._work = micro_batches, ranks, None
        if len(ranks) > 1:
            self._largest = torch.tensor([micro_batches, -micro_batches])
            self._work = all_reduce(
                self._largest,
                dist.ReduceOp.MAX,
                host_group(ranks, "mics_deal"),
                async_op=True,
                name="question whether all deal the same number of micro-batches",
            )

    def check(self) -> None:
        """Wait for the answer, if this has not been done.

        Raises:
            DisagreementError: on every rank: ranks deal other numbers.
        """
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        most, minus_least = self._largest.tolist()
        if most != -minus_least:
            compare_numbers(self._micro_batches, self._ranks)


def compare_numbers(micro_batches: object, ranks: Sequence[int]) -> None:
    """Refuse what is not the same number on every one of some ranks. Collective over them.

    Raises:
        DisagreementError: it is not the same.
    """
    if len(ranks) > 1:
        facts = {"micro-batches of a step": [repr(micro_batches)]}
        check_agreement(facts, [host_group(ranks, "mics_deal")], torch.device("cpu"))


def check_number(micro_batches: object) -> None:
    """Refuse what is no number of micro-batches.

    Raises:
        MicroStepError: it is none.
    """
    if not isinstance(micro_batches, int) or micro_batches < 1:
        raise MicroStepError(
            "deal takes the number of micro-batches of a step, over all ranks.",
            numbers=f"It is {micro_batches!r}.",
            write="mics.deal(model, 16)",
        )
