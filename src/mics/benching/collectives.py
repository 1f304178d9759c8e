"""All-gather, reduce-scatter and all-reduce on the links at hand, beside what physics allows.

Bandwidths are those of nccl-tests (its PERFORMANCE.md): algbw is message bytes over time, busbw is
algbw times (n - 1) / n for all-gather and reduce-scatter and 2 (n - 1) / n for all-reduce. The
floor is the bytes that must leave a node over the slow link (``traffic.py``) over its rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mics import compat
from mics.benching.spread import Spread
from mics.communication.backend import backend_of_mesh
from mics.communication.collectives import AllGather
from mics.communication.forms import choice_of, keep
from mics.communication.in_a_row import IN_A_ROW
from mics.communication.ledger import Ledger
from mics.communication.timing import time_in_turn
from mics.communication.two_stages import (
    all_reduces_in_a_row,
    hierarchical_all_gather,
    hierarchical_reduce_scatter,
)
from mics.ranks.issuing import Handle
from mics.ranks.mesh import Groups, StageGroups, ranks_of, stage_groups
from mics.traffic import Collective, Form, StageMessage, all_reduce_stages, stage_flow, stages

_BLOCKS = 8  # consecutive blocks, where gathers are pipelined


@dataclass(frozen=True)
class Measured:
    """One collective of one size: seconds per call, and what physics allows.

    ``form`` is "flat", "hierarchical", or "pipelined": hierarchical gathers of consecutive blocks,
    the next one's inter stage under way while this one's intra stage runs; seconds per block. Of
    all-reduces several are under way together in both forms, as in hop 2; seconds per message.
    ``between_nodes`` is what leaves the busiest node per call, in bytes; ``floor`` those bytes over
    the link's rate, in seconds; ``None`` where the rate is not known.
    """

    collective: Collective
    form: str
    message_bytes: int
    ranks: int
    seconds: Spread
    between_nodes: int
    floor: float | None

    @property
    def algbw(self) -> float:
        """Message bytes per second."""
        return self.message_bytes / self.seconds.median

    @property
    def busbw(self) -> float:
        """What nccl-tests calls bus bandwidth, bytes per second."""
        rounds = 2 if self.collective == "all_reduce" else 1
        return self.algbw * rounds * (self.ranks - 1) / self.ranks

    @property
    def over_floor(self) -> float | None:
        """How far from the physical limit: 1 is on it."""
        return self.seconds.median / self.floor if self.floor else None


def measure_collectives(
    groups: Groups,
    sizes: Sequence[int],
    *,
    repeats: int,
    link_bits: float | None,
    told: Callable[[Measured], None],
) -> list[Measured]:
    """Time every collective, form and size over the partition group of a mesh. Collective.

    Forms are interleaved, call by call, so that whatever else happens on the machine falls on all
    of them alike. A call counts as long as the slowest rank's.

    Args:
        groups: the groups of a mesh; where its partition group spans nodes both forms are measured.
        sizes: sizes of the gathered message, in bytes.
        repeats: how many calls of each count.
        link_bits: bits per second of a node's slow link, if known.
        told: is called after each one, on every rank.
    """
    found = []
    ranks = ranks_of(groups.shard)
    pair = stage_groups(groups, ranks)
    for size in sizes:
        for collective, calls in _calls(groups, pair, size).items():
            timed = {form: call for form, (call, _) in calls.items()}
            for form, seconds in time_in_turn(timed, repeats, groups.device).items():
                spent = [each / calls[form][1] for each in seconds]
                k = groups.gpus_per_node
                gloo = backend_of_mesh(groups).reduces_by_all_reduce
                sent = _leaves_a_node(collective, ranks, size, k, form, gloo=gloo)
                least = _leaves_a_node(collective, ranks, size, k, form, gloo=False)
                floor = least * 8 / link_bits if link_bits and least else None
                one = Measured(collective, form, size, len(ranks), Spread.of(spent), sent, floor)
                found.append(one)
                told(one)
    return found


def keep_choices(groups: Groups, found: Sequence[Measured]) -> None:
    """Let the runs that follow choose by what was measured, and write it into the profile.

    The times are the slowest rank's, so all ranks choose alike.
    """
    ranks = ranks_of(groups.shard)
    seconds = {(m.collective, m.message_bytes, m.form): m.seconds.median for m in found}
    for (collective, size, form), flat in seconds.items():
        two_stages = seconds.get((collective, size, "hierarchical"))
        if form == "flat" and two_stages is not None:
            keep(
                groups, choice_of(groups, collective, ranks, size, torch.float32), flat, two_stages
            )


def _calls(
    groups: Groups, pair: StageGroups | None, size: int
) -> dict[Collective, dict[str, tuple[Callable[[], None], int]]]:
    """What to call for each form of each collective, and for how many blocks that counts."""
    shard, device = groups.shard, groups.device
    p = shard.size()
    numel = size // 4 // p
    whole = torch.ones(numel * p, device=device)
    part = torch.ones(numel, device=device)
    mine = whole[shard.rank() * numel : (shard.rank() + 1) * numel]
    average = dist.ReduceOp.AVG

    gathers: dict[str, tuple[Callable[[], None], int]] = {
        "flat": (lambda: _done(compat.all_gather(whole, mine, shard)), 1)
    }
    reduces: dict[str, tuple[Callable[[], None], int]] = {
        "flat": (lambda: _done(compat.reduce_scatter(part, whole, average, shard)), 1)
    }
    total, messages = dist.ReduceOp.SUM, [torch.zeros_like(whole) for _ in range(IN_A_ROW)]
    sums: dict[str, tuple[Callable[[], None], int]] = {
        "flat": (lambda: all_reduces_in_a_row(messages, total, shard), IN_A_ROW)
    }
    if pair is not None:
        gathers["hierarchical"] = (lambda: hierarchical_all_gather(whole, mine, pair), 1)
        gathers["pipelined"] = (_pipelined(groups, whole, mine), _BLOCKS)
        reduces["hierarchical"] = (
            lambda: hierarchical_reduce_scatter(part, whole, average, pair),
            1,
        )
        sums["hierarchical"] = (
            lambda: all_reduces_in_a_row(messages, total, shard, pair),
            IN_A_ROW,
        )
    return {"all_gather": gathers, "reduce_scatter": reduces, "all_reduce": sums}


def _pipelined(groups: Groups, whole: torch.Tensor, mine: torch.Tensor) -> Callable[[], None]:
    ledger = Ledger(rank=dist.get_rank(), gpus_per_node=groups.gpus_per_node)
    gather = AllGather(groups, ledger, lambda *_: "hierarchical")

    def call() -> None:
        under_way: list[Handle] = []
        for _ in range(_BLOCKS):
            work = gather(whole, mine, groups.shard, async_op=True)
            assert work is not None
            under_way.append(work)
            if len(under_way) == 2:
                under_way.pop(0).wait()
        under_way.pop().wait()

    return call


def _done(_: object) -> None:
    pass


def _leaves_a_node(
    collective: Collective,
    ranks: Sequence[int],
    size: int,
    gpus_per_node: int,
    form: str,
    *,
    gloo: bool,
) -> int:
    """Bytes that leave the busiest node over the slow link, per call.

    ``gloo``: its flat reduce-scatter is an all-reduce; without it, what a reduce-scatter needs.
    """
    by_all_reduce = gloo and collective == "reduce_scatter"
    two_stages: Form = "flat" if form == "flat" else "hierarchical"
    per_node: dict[int, float] = {}
    for rank in ranks:
        issued: list[tuple[Collective, StageMessage]]
        if collective == "all_reduce":
            issued = all_reduce_stages(ranks, rank, size, gpus_per_node, two_stages)
        else:
            issued = [
                (collective, message)
                for message in stages(
                    ranks, rank, size, gpus_per_node, two_stages, by_all_reduce=by_all_reduce
                )
            ]
        node = rank // gpus_per_node
        for one, message in issued:
            sent = stage_flow(one, message, rank, gpus_per_node).inter_bytes
            per_node[node] = per_node.get(node, 0) + float(sent)
    return int(max(per_node.values()))
