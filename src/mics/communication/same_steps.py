"""Do all ranks run the same number of micro-steps? If not, their collectives pair up wrongly.

Replicas that run another number would end with different weights, and a partition group would mix
the gather of one micro-step with that of the next, both without a word. So every rank says of each
micro-step, by its number, whether it comes; the answers travel while it computes, over a Gloo group
of their own, and are compared before anybody waits for a hop 2 that others do not run.

[Note: what else a question carries]
Numbers that are equal on all ranks unless one of them does what the others do not:

    optimizer steps    taken so far by optimizers of the model: one that was left out on a rank, or
                       taken once more, leaves its shard behind the others
    optimizers         a checksum of what they stepped, and with which options: of two, one may
                       have stepped twice, or with another learning rate
    trained            a checksum of every parameter's ``requires_grad``: a parameter frozen on one
                       rank alone leaves its reduce-scatter another size
    hops               a checksum of the units whose hop 2 has started since a step ended: of two
                       models a rank may leave one out, and the other's messages would come in its
                       place
    collectives        issued so far in this rank's partition group, which have to be equal inside
                       of it alone: a forward that was left out on one rank pairs the others'
                       gathers with those of its next one

One all-reduce takes the largest of each number and of its negative, so that it stays one small
message. Only when they differ a second one brings every rank's numbers, to name the ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from mics.communication.issued import issued_of
from mics.communication.optimizer_options import Optimizers
from mics.communication.step_facts import (
    NAMES,
    Facts,
    Normalise,
    Said,
    disagreement,
    facts,
    first_difference,
    in_words,
)
from mics.communication.used import Used
from mics.errors import MicroStepError
from mics.ranks.agreement import check_agreement, where_they_differ
from mics.ranks.issuing import all_gather, all_reduce, make_group
from mics.ranks.mesh import Groups, PerMesh
from mics.ranks.whereabouts import counted, in_step, leave_step, out_of_step

NOBODY = -(2**31)  # what a rank says of what it does not know: another partition group


class Asker(Protocol):
    """A step, which asks whether the others run it too."""

    @property
    def params(self) -> Sequence[nn.Parameter]:
        """What the step makes gradients of, in an order that is the same on every rank."""

    @property
    def used(self) -> Used:
        """The first unit's, which lasts as long as the parameters."""


class SameSteps:
    """The questions of one mesh to all its ranks: does another micro-step come?

    Args:
        groups: of the mesh.
    """

    def __init__(self, groups: Groups) -> None:
        self._ranks = groups.whole.mesh.flatten().tolist()  # not groups, which would keep itself
        replica = 0 if groups.replicas is None else groups.replicas.rank()
        self._place = replica, groups.num_replicas
        self._partition, self._layout = counted(groups.shard), groups.layout
        self._issued = issued_of(groups)
        self._group: dist.ProcessGroup | None = None
        self._open: dict[int, _Question] = {}  # of every step that is open, by its owner
        # The number of every step that is open, and what it trains, by its owner.
        self._steps: dict[int, tuple[int, int]] = {}
        self._begun = 0
        self._optimizers = Optimizers()
        self._trained: dict[int, int] = {}  # a checksum, by the first parameter of a model

    @property
    def group(self) -> dist.ProcessGroup:
        """The Gloo group of all ranks of the mesh; made by all of them when first asked for."""
        if self._group is None:
            self._group = make_group(self._ranks, "mics_control", backend="gloo")
        return self._group

    def ask(self, owner: Asker, ran: int, *, more: bool, said: Said, normalise: Normalise) -> None:
        """Say whether a micro-step follows the first ``ran`` of a step; ``check`` has the answer.

        Args:
            owner: the step that asks; it has one question at a time.
            ran: micro-steps of the step that have ended by then.
            more: whether another one comes.
            said: when this is said.
            normalise: what the step's gradients are divided by.

        Raises:
            MicroStepError: other parameters are trained than in the step before, but not on every
                rank. It is said before anything is gathered.
        """
        is_first = id(owner) not in self._steps
        if is_first:
            self._begun += 1
            self._steps[id(owner)] = self._begun, _trained(owner.params)
            self._optimizers.watch(owner.params, owner.used)
        step, trained = self._steps[id(owner)]
        in_step(step, ran + (said == "on arrival"))
        mine = facts(
            ran,
            more=more,
            said=said,
            normalise=normalise,
            optimizer_steps=self._optimizers.steps,
            optimizers=self._optimizers.digest,
            trained=trained,
            issued=(self._issued.started, self._collectives()),
        )
        question = _Question(mine, self.group, self._ranks, self._place, self._optimizers)
        self._open[id(owner)] = question
        if is_first:
            model = id(owner.params[0])
            before, self._trained[model] = self._trained.get(model), trained
            if before is None:
                self.check()
            elif trained != before:
                question.check_change()

    def check(self) -> None:
        """Compare the answers to all questions that are open.

        Raises:
            MicroStepError: on every rank, when they differ; it names the ranks.
        """
        while self._open:
            owner = next(iter(self._open))
            self._open.pop(owner).check()

    def at_the_end(
        self, params: Sequence[nn.Parameter], used: Used, *, collectives: int = 0
    ) -> Facts:
        """What this rank says of a step that nobody may have asked about; see ``Asker``."""
        self._optimizers.watch(params, used)
        return facts(
            1,
            more=False,
            said="afterwards",
            normalise=None,
            optimizer_steps=self._optimizers.steps,
            optimizers=self._optimizers.digest,
            trained=_trained(params),
            issued=(self._issued.started, collectives),
        )

    def compare_steps(self, used: Used) -> None:
        """Compare what optimizers have stepped, before ranks wait for what the others have.

        Collective over the mesh, but where a question is open, whose answer says so too.

        Args:
            used: the first unit's, see ``Asker``.

        Raises:
            MicroStepError: on every rank, when it differs; it names the ranks.
        """
        if self._open:
            self.check()
            return
        mine = self.at_the_end(used.params, used)
        said = torch.tensor([mine, [-number for number in mine]])
        all_reduce(said, dist.ReduceOp.MAX, self.group, name="comparison of optimizer steps")
        if not torch.equal(said[0], -said[1]):
            raise self.refuse(mine)

    def options_to_come(self) -> tuple[int, int]:
        """A checksum of the options that optimizers step with next, and its negative.

        Ranks compare the largest of each; one that does not know them has no say.
        """
        options = self._optimizers.to_come()
        return (NOBODY, NOBODY) if options is None else (options, -options)

    def refuse_options(self) -> MicroStepError:
        """The error of ranks that would step with other options; collective over all of them."""
        lines = self._optimizers.lines_to_come()
        return MicroStepError(
            "Optimizers of the ranks have other options, and would step their shards unlike.",
            numbers=where_they_differ(lines, self._ranks, self.group) or "",
            write="the same options on every rank; a schedule by what all ranks know, such as an "
            "all-reduced loss",
        )

    def note(self, lines: Sequence[str]) -> None:
        """Remember what is done to gradients and weights, which ranks compare with all the rest."""
        self._optimizers.note(lines)

    def meet_to_step(
        self, params: Sequence[nn.Parameter], used: Used, subject: str, stepped: Sequence[str]
    ) -> None:
        """Compare what optimizers have done before one sends what it steps. Collective.

        Args:
            params: see ``Asker``.
            used: the first unit's.
            subject: what ``stepped`` is, for messages.
            stepped: what is about to be stepped, line by line.

        Raises:
            DisagreementError: on every rank, when that differs; it names the ranks and the line.
            MicroStepError: on every rank, when what was done before differs; it names the ranks.
        """
        self.check()
        self.note(stepped)
        mine = self.at_the_end(params, used, collectives=self._collectives())
        question = _Question(mine, self.group, self._ranks, self._place, self._optimizers)
        if question.different() == ["optimizers"]:
            check_agreement({subject: stepped}, [self.group], torch.device("cpu"))
        question.check()

    def spelled_optimizers(self) -> str:
        """What optimizers of the mesh's models have done on this rank, to be compared in words."""
        return f"{self._optimizers.steps} optimizer step(s), checksum {self._optimizers.digest:08x}"

    def refuse(self, mine: Facts) -> MicroStepError:
        """The error of ranks that have said different things; collective over all of them."""
        what = "ends of the step"
        return _disagreement(mine, self.group, self._ranks, self._place[1], what, self._optimizers)

    def end(self, owner: Asker) -> None:
        """Forget a step that has ended."""
        if self._steps.pop(id(owner), None) is not None:
            out_of_step()

    def forget(self, owner: Asker) -> None:
        """Drop the open question of a step that was left, and tell those who may wait for it."""
        self._open.pop(id(owner), None)
        if self._steps.pop(id(owner), None) is not None:
            leave_step()

    def _collectives(self) -> int:
        pairs = [pair for pair in self._layout.stages.values() if pair is not None]
        stages = [counted(group) for pair in pairs for group in (pair.inter, pair.intra)]
        return sum(one.issued for one in [self._partition, *stages])


same_steps_of = PerMesh(SameSteps)
"""The questions of a mesh."""


def _trained(params: Sequence[nn.Parameter]) -> int:
    return zlib.crc32(bytes([param.requires_grad for param in params])) & 2**31 - 1


class _Question:
    """One question, under way.

    Args:
        mine: what this rank says.
        group: all ranks of the mesh.
        ranks: they, by their numbers in the job.
        replica: which of how many this rank belongs to.
        optimizers: what they have done, in case that ranks differ in it.
    """

    def __init__(
        self,
        mine: Facts,
        group: dist.ProcessGroup,
        ranks: Sequence[int],
        replica: tuple[int, int],
        optimizers: Optimizers,
    ) -> None:
        self._optimizers = optimizers
        self._mine, self._group, self._ranks, self._replicas = mine, group, ranks, replica[1]
        *numbers, collectives = mine
        upper, lower = [NOBODY] * self._replicas, [NOBODY] * self._replicas
        upper[replica[0]], lower[replica[0]] = collectives, -collectives
        largest = [*numbers, *upper, *(-number for number in numbers), *lower]
        self._largest = torch.tensor(largest, dtype=torch.int32)
        work = all_reduce(
            self._largest,
            dist.ReduceOp.MAX,
            group,
            async_op=True,
            name="question whether all run the same micro-steps",
        )
        assert work is not None
        self._work = work

    def check_change(self) -> None:
        """Wait for the answer, and refuse to train what not every rank does.

        Ranks that have changed nothing do not wait here, so they can not be asked who they are.
        """
        if "trained" in self.different():
            raise MicroStepError(
                f"Rank {dist.get_rank()} trains other parameters since its last step, and not "
                "every rank does.",
                numbers="requires_grad was changed on some ranks only.",
                write="param.requires_grad_(...) on every rank",
            )

    def check(self) -> None:
        different = self.different()
        if not different:
            return
        what, told = in_words(different[0]), self._optimizers
        raise _disagreement(self._mine, self._group, self._ranks, self._replicas, what, told)

    def different(self) -> list[str]:
        """Names of the facts that are not the same on all ranks that have to agree; it waits."""
        self._work.wait()
        largest, minus_least = self._largest.view(2, -1).tolist()
        names = [*NAMES, *NAMES[-1:] * (self._replicas - 1)]
        pairs = zip(names, largest, minus_least, strict=True)
        return [name for name, most, minus in pairs if most != -minus and most != NOBODY]


def _disagreement(
    mine: Facts,
    group: dist.ProcessGroup,
    ranks: Sequence[int],
    replicas: int,
    what: str,
    optimizers: Optimizers,
) -> MicroStepError:
    """Bring every rank's facts together and say where they differ; collective."""
    rows = torch.empty(len(ranks) * len(mine), dtype=torch.int32)
    all_gather(
        rows,
        torch.tensor(mine, dtype=torch.int32),
        group,
        name=f"comparison of the ranks' {what}, which differ",
    )
    table = rows.view(-1, len(mine)).tolist()
    in_order = dist.get_process_group_ranks(group)  # which need not be the mesh's
    said = {rank: Facts(*row) for rank, row in zip(in_order, table, strict=True)}
    where = None
    if first_difference(list(said.values())) == "optimizers":
        where = where_they_differ(optimizers.lines(), ranks, group)
    return disagreement({rank: said[rank] for rank in ranks}, len(ranks) // replicas, where)
