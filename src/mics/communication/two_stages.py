"""All-gather, reduce-scatter and all-reduce in two stages, between nodes and inside them.

[Note: two stages without a copy]
A partition group of N nodes with k ranks each holds shards in node-major order: shard ``j k + l``
is on local rank l of node j. With n elements per shard, the hierarchical all-gather is

    inter   the k columns gather at once, each over its N ranks:  tmp[j] = shard (j k + l)
    intra   N all-gathers over the k ranks of the node, coalesced where that is safe:
            out[j k n : (j + 1) k n] = tmp[j] of local ranks 0 .. k-1

Every intra gather writes its final place, so the reorder copy of the paper's stage 2 is not needed;
the price is ``tmp``, 1/k of the output. The reduce-scatter runs the same picture backwards. The
all-reduce has no row for each rank of the group: its message is cut into k, a row for each local
rank, which is reduced inside the node, all-reduced between nodes and gathered inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.backend import Backend, Issue, Program, at_once, backend_of, run
from mics.communication.in_a_row import run_in_a_row
from mics.communication.ledger import Timed, Untimed
from mics.ranks import issuing
from mics.ranks.mesh import StageGroups
from mics.traffic import Collective


def all_gather(
    output: torch.Tensor,  # [N k n]
    input: torch.Tensor,  # [n]
    pair: StageGroups,
    spans: tuple[Timed, Timed],
    issue: Issue,
    backend: Backend,
) -> Program:
    """All-gather between nodes, then inside them.

    Args:
        output: row r becomes the shard of the group's rank r.
        input: this rank's shard.
        pair: the groups of the stages.
        spans: they time the inter and the intra stage.
        issue: how the inter stage is waited for.
        backend: how the intra stage is issued.
    """
    inter, intra = spans
    nodes, ranks, numel = pair.inter.size(), pair.intra.size(), input.numel()
    staged = input.new_empty(nodes * numel)
    yield from issue(
        inter, lambda async_op: issuing.all_gather(staged, input, pair.inter, async_op=async_op)
    )
    with intra:
        backend.gather(output.view(nodes, ranks, numel), staged.view(nodes, numel), pair.intra)


def reduce_scatter(
    output: torch.Tensor,  # [n]
    input: torch.Tensor,  # [N k n]
    op: compat.ReduceOp,
    pair: StageGroups,
    spans: tuple[Timed, Timed],
    issue: Issue,
    backend: Backend,
) -> Program:
    """Reduce-scatter inside nodes, then between them.

    Equal stages make AVG of AVG exact; PREMUL_SUM scales in the first stage only. Each stage rounds
    once in the tensor's dtype.

    Args:
        output: this rank's row of the result.
        input: not to be changed until the program is over.
        op: AVG, SUM or PREMUL_SUM.
        pair: the groups of the stages.
        spans: they time the inter and the intra stage.
        issue: how the stages are waited for.
        backend: how they reduce.
    """
    inter, intra = spans
    nodes = pair.inter.size()
    staged = output.new_empty(nodes * output.numel())
    inside = list(zip(staged.chunk(nodes), input.chunk(nodes), strict=True))
    yield from backend.reduce(inside, op, pair.intra, intra, issue)
    inter.restart()  # issued with the first stage, it starts after it
    second = dist.ReduceOp.SUM if compat.is_premul_sum(op) else op
    yield from backend.reduce([(output, staged)], second, pair.inter, inter, issue)


def all_reduce(
    message: torch.Tensor,  # [n]
    op: compat.ReduceOp,
    pair: StageGroups,
    span: Callable[[Collective], Timed],
    issue: Issue,
    backend: Backend,
) -> Program:
    """All-reduce in place: reduce inside nodes, all-reduce between them, gather inside.

    Equal stages make AVG of AVG exact. Both sums round in the tensor's dtype.

    Args:
        message: where its length is no multiple of a node's ranks, a copy with zeros is reduced.
        op: AVG or SUM.
        pair: the groups of the stages.
        span: begins to time a stage, of one collective each.
        issue: how the stages are waited for.
        backend: how the first reduces.
    """
    numel, ranks = message.numel(), pair.intra.size()
    rows = message
    if padded_numel(numel, pair) != numel:
        rows = message.new_zeros(padded_numel(numel, pair))
        rows[:numel] = message
    row = rows.new_empty(rows.numel() // ranks)
    yield from backend.reduce([(row, rows)], op, pair.intra, span("reduce_scatter"), issue)
    yield from issue(
        span("all_reduce"),
        lambda async_op: issuing.all_reduce(row, op, pair.inter, async_op=async_op),
    )
    yield from issue(
        span("all_gather"),
        lambda async_op: issuing.all_gather(rows, row, pair.intra, async_op=async_op),
    )
    if rows is not message:
        message.copy_(rows[:numel])


def padded_numel(numel: int, pair: StageGroups) -> int:
    """Elements of what ``all_reduce`` reduces: a row of one size for each rank of a node."""
    ranks = pair.intra.size()
    return -(-numel // ranks) * ranks


def hierarchical_all_gather(output: torch.Tensor, input: torch.Tensor, pair: StageGroups) -> None:
    """All-gather as ``all_gather`` does, at once and uncounted."""
    backend = backend_of(pair.intra, input.device)
    run(all_gather(output, input, pair, (Untimed(), Untimed()), at_once, backend))


def hierarchical_reduce_scatter(
    output: torch.Tensor, input: torch.Tensor, op: compat.ReduceOp, pair: StageGroups
) -> None:
    """Reduce-scatter as ``reduce_scatter`` does, at once and uncounted."""
    backend = backend_of(pair.intra, input.device)
    run(reduce_scatter(output, input, op, pair, (Untimed(), Untimed()), at_once, backend))


def all_reduces_in_a_row(
    messages: Sequence[torch.Tensor],
    op: compat.ReduceOp,
    group: dist.ProcessGroup,
    pair: StageGroups | None = None,
) -> None:
    """All-reduce several messages as hop 2 comes (``in_a_row.py``), at once and uncounted.

    Args:
        messages: each reduced in place.
        op: AVG or SUM.
        group: all ranks.
        pair: the groups of the stages; ``None`` reduces flat.
    """
    device = messages[0].device

    def program(message: torch.Tensor, issue: Issue) -> Program:
        if pair is not None:
            backend = backend_of(pair.intra, device)
            yield from all_reduce(message, op, pair, lambda _: Untimed(), issue, backend)
            return
        yield from issue(
            Untimed(), lambda async_op: issuing.all_reduce(message, op, group, async_op=async_op)
        )

    programs = [partial(program, message) for message in messages]
    run_in_a_row(programs, group, device, in_stages=pair is not None)
