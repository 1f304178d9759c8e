"""The end of a step: what did the ranks use, and did they all do the same?

One small message over all ranks of a mesh, on the host, when the last reduction of a step has been
issued. It says which parameters each rank has used (see [Note: used and unused] in ``used.py``),
a digest of the collectives each partition group was given (``issued.py``), what optimizers have
done and what is trained (``step_facts.py``), which options they step with next
(``optimizer_options.py``), and whose gradients are no numbers (``finite.py``).
Ranks along other axes tell each other beforehand what they have of the same parameters
(``beside.py``).
Nothing has been changed by then but gradients, so a step that went wrong is refused before an
optimizer sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from mics.communication.beside import drift_error, tell_others
from mics.communication.finite import finite_of
from mics.communication.issued import ENDED, issued_of
from mics.communication.pace import pace_of
from mics.communication.same_steps import NOBODY, same_steps_of
from mics.communication.used import Used
from mics.errors import MicroStepError
from mics.ranks.issuing import all_reduce
from mics.ranks.mesh import Groups


@torch.no_grad()
def settle(groups: Groups, used: Sequence[Used]) -> None:
    """Tell the ranks of a mesh what this one has done, and drop the gradients that nobody has made.

    Args:
        groups: of the mesh.
        used: of all units of the step on that mesh, in one order.

    Raises:
        MicroStepError: on every rank, when the ranks of a partition group issued other collectives,
            when ranks have taken other optimizer steps, would step with other options or train
            other parameters, or when copies of a parameter along an axis beside the data are not
            alike.
    """
    flags = [unit.flags() for unit in used]
    params = [param for unit in used for param in unit.params]
    finite = finite_of(groups)
    here, bad = dist.get_rank(), not finite.take()
    ranks = (here, here) if bad else None
    flags, drift = tell_others(groups, used, flags)
    apart, control = drift is not None, None
    if groups.whole.size() > 1:
        flags, ranks, apart = _by_anybody(groups, used[0], flags, params, bad=bad, apart=apart)
        control = same_steps_of(groups).group
        pace_of(groups).end_step()
    issued_of(groups).clear()
    if apart:
        raise drift_error(groups, used, drift, control)
    finite.blame(ranks, params)
    for unit, by_anybody in zip(used, flags, strict=True):
        unit.settle(by_anybody)


def _by_anybody(
    groups: Groups,
    first: Used,
    flags: list[list[bool]],
    params: Sequence[nn.Parameter],
    *,
    bad: bool,
    apart: bool,
) -> tuple[list[list[bool]], tuple[int, int] | None, bool]:
    """What any rank of the mesh says.

    Returns:
        What it has used; the first and the last whose gradients are no numbers; whether copies are
        apart (of parameters along axes beside the mesh).
    """
    replica = groups.replicas.rank() if groups.replicas is not None else 0
    # The largest and, negated, the smallest digest of each partition group.
    digests = torch.full((2, groups.num_replicas), -(2**31), dtype=torch.int64)
    digest = issued_of(groups).digest()
    digests[:, replica] = torch.tensor([digest, -digest])
    # As long on a rank that trains fewer parameters than the others, which is refused.
    one_list = torch.zeros(len(params), dtype=torch.int64)
    together = [flag for unit in flags for flag in unit]
    one_list[: len(together)] = torch.tensor(together, dtype=torch.int64)
    # The last bad rank and, counted from the end, the first; 0 if there is none. Copies apart.
    here, end = dist.get_rank(), dist.get_world_size()
    whose = torch.tensor([*([here + 1, end - here] if bad else [0, 0]), int(apart)])
    questions = same_steps_of(groups)
    mine = questions.at_the_end(params, first)
    said = torch.tensor([mine, [-number for number in mine]]).flatten()
    to_come = torch.tensor(questions.options_to_come())
    message = torch.cat([digests.flatten(), said, to_come, whose, one_list])
    control = questions.group
    all_reduce(message, dist.ReduceOp.MAX, control, name="end of the step")
    sizes = [digests.numel(), said.numel(), len(to_come), len(whose), len(one_list)]
    first_part, said, to_come, whose, last_part = torch.split(message, sizes)
    if not torch.equal(said[: len(mine)], -said[len(mine) :]):
        issued_of(groups).clear()
        raise questions.refuse(mine)
    if to_come[0] not in (NOBODY, -to_come[1]):
        issued_of(groups).clear()
        raise questions.refuse_options()
    largest, smallest = first_part.view(2, -1)
    if not torch.equal(largest, -smallest):
        raise _other_collectives(groups, control)
    last, first_from_end, apart_anywhere = (int(number) for number in whose)
    ranks = (end - first_from_end, last - 1) if last else None
    anybody = iter(last_part.bool().tolist())
    flags = [[next(anybody) for _ in unit] for unit in flags]
    return flags, ranks, bool(apart_anywhere)


def _other_collectives(groups: Groups, control: dist.ProcessGroup) -> MicroStepError:
    """Collect what every rank has issued and say where they part; collective."""
    issued = issued_of(groups)
    calls = torch.tensor(issued.calls(), dtype=torch.int64)
    lengths = torch.zeros(control.size(), dtype=torch.int64)
    lengths[control.rank()] = len(calls)
    all_reduce(lengths, group=control)
    rows = torch.full((control.size(), int(lengths.max())), ENDED, dtype=torch.int64)
    rows[control.rank(), : len(calls)] = calls
    all_reduce(rows, dist.ReduceOp.MAX, control)
    issued.clear()
    ranks = dist.get_process_group_ranks(control)
    by_rank = dict(zip(ranks, rows.tolist(), strict=True))
    for first, *others in groups.whole.mesh.view(-1, groups.shard.size()).tolist():
        for other in others:
            pairs = zip(by_rank[first], by_rank[other], strict=True)
            for position, (did, did_other) in enumerate(pairs, 1):
                if did != did_other:
                    return MicroStepError(
                        "Ranks of one partition group used other blocks, or the same in another "
                        "order: what they gathered and reduced was mixed up, and the gradients of "
                        "this step are wrong.",
                        numbers=f"Collective {position} of the step: rank {first} "
                        f"{issued.spell(did)}, rank {other} {issued.spell(did_other)}.",
                        write="blocks that each run at most once in a forward, in one order, of "
                        "which a rank may skip any",
                    )
    raise AssertionError("digests differ and calls do not")
