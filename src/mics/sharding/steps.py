"""steps: the micro-batches of a loader step by step, with an end that all ranks share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from mics.errors import MicroStepError
from mics.ranks.console import say
from mics.ranks.drawing import ranks_text
from mics.ranks.issuing import all_reduce, host_group
from mics.ranks.together import gather_json
from mics.ranks.whereabouts import during, world_group
from mics.sharding.units import units_of

Batch = TypeVar("Batch")


def steps(
    loader: Iterable[Batch], *, micro_steps: int = 1, model: nn.Module | None = None
) -> Iterator[list[Batch]]:
    """Iterate over the steps of an epoch, until a rank has no whole step left.

    ::

        for batches in mics.steps(loader, micro_steps=4):
            for batch in mics.micro_steps(model, batches):
                loss(model(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

    Loaders of different lengths end together: with one batch more on a rank, it would wait for the
    others in a step that they do not run. What is over is dropped, and said. Nothing is read ahead:
    inside the loop a loader has given exactly the batches of the steps so far.

    A message of a few bytes goes round before every step, and the host waits for it.

    Args:
        loader: any iterable of micro-batches, a different one on every rank.
        micro_steps: micro-batches of a step.
        model: sharded by mics: its ranks end together. By default all ranks of the job do, and a
            process alone needs no others.

    Raises:
        MicroStepError: ``micro_steps`` is not a number of micro-batches.
        RankError: another rank does not come to the next step, nor to the end.
    """
    if type(micro_steps) is not int or micro_steps < 1:
        raise MicroStepError(
            f"micro_steps = {micro_steps!r} is not a number of micro-batches.",
            write="micro_steps=4, or any whole number from 1 on",
        )
    return _loop(iter(loader), micro_steps, _group_of(model))


def _loop(
    batches: Iterator[Batch], micro_steps: int, group: dist.ProcessGroup | None
) -> Iterator[list[Batch]]:
    for number in itertools.count():
        step = list(itertools.islice(batches, micro_steps))
        with during("mics.steps"):
            if not _all_have(len(step) == micro_steps, group):
                _say_end(number, micro_steps, len(step), group)
                return
        yield step


def _all_have(whole: bool, group: dist.ProcessGroup | None) -> bool:
    if group is None:
        return whole
    flag = torch.tensor(int(whole), dtype=torch.int32)
    all_reduce(flag, dist.ReduceOp.MIN, group, name="question whether all have another step")
    return bool(flag)


def _say_end(
    number: int, micro_steps: int, left: int, group: dist.ProcessGroup | None
) -> None:  # fmt: skip
    """Say what is dropped, if anything is."""
    ranks = [0] if group is None else dist.get_process_group_ranks(group)
    by_count: dict[int, list[int]] = {}
    for rank, count in zip(ranks, gather_json(left, group), strict=True):
        by_count.setdefault(count, []).append(rank)
    if set(by_count) == {0}:
        return
    told = "; ".join(
        f"rank(s) {ranks_text(some)}: {'a whole step or more' if n == micro_steps else n}"
        for n, some in sorted(by_count.items())
    )
    say(
        f"the loaders have ended after {number} step(s) of {micro_steps} micro-batch(es); "
        f"micro-batches that are left over: {told}"
    )


def _group_of(model: nn.Module | None) -> dist.ProcessGroup | None:
    """A Gloo group of a model's ranks, or of all; made once. ``None`` for a process alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    world = world_group()
    ranks = dist.get_process_group_ranks(world)
    if model is not None:
        ranks = sorted(units_of(model)[0].groups.whole.mesh.flatten().tolist())
    return host_group(ranks, "mics_steps")
