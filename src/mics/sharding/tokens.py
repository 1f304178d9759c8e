"""The tokens of a step, over all ranks, where some ranks may count the same ones.

[Note: counts that are alike]
Ranks of context parallelism that are said to count the same tokens, and count their own parts,
would make every gradient too large, without a word. So each rank's count travels beside the sum, in
the same message. On the host it is looked at before gradients are divided by it. A device would
have to be waited for: there it is looked at in the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mics.errors import MicroStepError
from mics.ranks.device import on_accelerator
from mics.ranks.drawing import ranks_text
from mics.ranks.issuing import all_reduce
from mics.ranks.mesh import Groups, PerMesh


class Counted(NamedTuple):
    """The tokens of one micro-step of this rank, and the ranks that count the same ones."""

    tokens: float | torch.Tensor
    shared_over: DeviceMesh | None
    kinds: torch.Tensor | None = None
    """Where ranks choose whether they give tokens: shape (2,), 1 for this rank's choice."""


class _Looked:
    """Numbers under way to the host, to be looked at there.

    Args:
        table: of them, the same on every rank.
        look: refuses what is wrong, given the numbers as lists.
    """

    def __init__(self, table: torch.Tensor, look: Callable[[list[Any]], None]) -> None:
        self._table, self._look = table, look
        self._event: torch.Event | None = None
        if on_accelerator(table.device):
            self._table = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._table.copy_(table, non_blocking=True)
            self._event = torch.accelerator.current_stream().record_event()

    @property
    def is_here(self) -> bool:
        return self._event is None

    def check(self) -> None:
        """Look at them.

        Raises:
            MicroStepError: on every rank of the mesh.
        """
        if self._event is not None:
            self._event.synchronize()
        self._look(self._table.tolist())


def _refuse_other_counts(ranks: list[int], numbers: list[Any]) -> None:
    """Refuse counts of ranks that count the same tokens, and are not alike."""
    counts, firsts = numbers
    for first in dict.fromkeys(firsts):
        alike = {
            rank: count
            for rank, count, its_first in zip(ranks, counts, firsts, strict=True)
            if its_first == first
        }
        if max(alike.values()) > min(alike.values()):
            raise _not_alike(alike)


def _refuse_both_kinds(numbers: list[Any]) -> None:
    """Refuse a step of which some micro-batches were given tokens, and some none."""
    with_tokens, without = numbers
    if with_tokens and without:
        raise MicroStepError(
            "Some micro-batches of one step were given tokens, and some were not, on other ranks.",
            numbers=f"{with_tokens:.0f} with tokens, {without:.0f} without.",
            write="micro.backward(loss, tokens=...) for all of them on every rank, or for none",
        )


def _nothing_yet(_: Groups) -> list[_Looked]:
    return []


_under_way_of = PerMesh(_nothing_yet)


def total_of(counted: Sequence[Counted], groups: Groups) -> torch.Tensor:
    """Tokens of all micro-steps of all ranks, or 1 if there are none; no host synchronisation.

    Args:
        counted: of this rank, in every micro-step of a step.
        groups: of the mesh whose ranks are added up; collective over it.

    Raises:
        MicroStepError: ranks that count the same tokens have other counts, or only some were
            given tokens (in the step before, on an accelerator).
    """
    under_way = _under_way_of(groups)
    while under_way:
        under_way.pop().check()
    device, shared_over = groups.device, counted[-1].shared_over
    counts = [
        torch.as_tensor(each.tokens, dtype=torch.float64, device=device).reshape(())
        for each in counted
    ]
    mine = torch.stack(counts).sum()
    if shared_over is None:
        kinds = [each.kinds for each in counted if each.kinds is not None]
        message = torch.cat([mine.view(1), *([torch.stack(kinds).sum(dim=0)] if kinds else [])])
    else:  # see [Note: counts that are alike]
        ranks = sorted(groups.whole.mesh.flatten().tolist())
        table = torch.zeros(2, len(ranks), dtype=torch.float64, device=device)
        here = ranks.index(dist.get_rank())
        table[0, here], table[1, here] = mine, int(shared_over.mesh.min())
        message = torch.cat([mine.view(1) / shared_over.size(), table.flatten()])
    for group in groups.axes:
        all_reduce(message, group=group)
    found: list[_Looked] = []
    if shared_over is not None:
        found = [_Looked(message[1:].view(2, -1), partial(_refuse_other_counts, ranks))]
    elif kinds:
        found = [_Looked(message[1:], _refuse_both_kinds)]
    for looked in found:
        if looked.is_here:
            looked.check()
        else:
            under_way.append(looked)
    return torch.where(message[0] > 0, message[0], 1.0)


def _not_alike(counts: dict[int, float]) -> MicroStepError:
    by_count: dict[float, list[int]] = {}
    for rank, count in counts.items():
        by_count.setdefault(count, []).append(rank)
    told = "; ".join(f"rank(s) {ranks_text(some)}: {n:.0f}" for n, some in sorted(by_count.items()))
    return MicroStepError(
        "Ranks of tokens_shared_over were said to count the same tokens, and their counts differ: "
        "gradients would be divided by a number that is wrong.",
        numbers=f"Tokens of a step: {told}.",
        write="the tokens of whole sequences on each of them; or no tokens_shared_over, where each "
        "counts its own part",
    )
