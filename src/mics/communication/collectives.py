"""Flat and hierarchical all-gather / reduce-scatter, as FSDP2 communication objects.

[Note: two stages without a copy]
A partition group of N nodes with k ranks each holds shards in node-major order: shard ``j k + l``
is on local rank l of node j. With n elements per shard, the hierarchical all-gather is

    inter   the k columns gather at once, each over its N ranks:  tmp[j] = shard (j k + l)
    intra   N coalesced all-gathers over the k ranks of the node:
            out[j k n : (j + 1) k n] = tmp[j] of local ranks 0 .. k-1

Every intra gather writes its final place, so the reorder copy of the paper's stage 2 is not needed;
the price is ``tmp``, 1/k of the output. The reduce-scatter runs the same picture backwards.

FSDP2 calls these objects on its own streams (``_fsdp_collectives.py``): whatever is issued here is
ordered on the current stream when the call returns, unless a ``Work`` is returned.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.all_to_all import Exchange, reduce_scatter
from mics.communication.landing import Later
from mics.communication.ledger import Ledger, Span
from mics.ranks.mesh import Groups, StageGroups, ranks_of, stage_groups
from mics.topology import Ranks
from mics.traffic import Collective, Form, Stage, StageMessage, stages

Decide = Callable[[Collective, Ranks, int, torch.dtype], Form]
"""Flat or hierarchical, for (collective, ranks of the group, message bytes, dtype)."""

Timed = contextlib.AbstractContextManager[object]
_UNTIMED: Timed = contextlib.nullcontext()


class AllGather:
    """The all-gather of one communication unit (``torch``'s ``AllGather`` interface).

    Pure byte moves: any dtype, uint8 included. Works for every group FSDP2 passes it, also the
    smaller one of ``reshard_after_forward=int``.
    """

    def __init__(self, groups: Groups, ledger: Ledger, decide: Decide) -> None:
        self._groups = groups
        self._ledger = ledger
        self._decide = decide

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Take the output buffer from the caching allocator."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [world * n], row r is rank r's shard
        input_tensor: torch.Tensor,  # [n], a view of this rank's row
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather; with ``async_op`` return a handle whose ``wait`` completes both stages."""
        spans, pair = _plan(
            "all_gather", self._groups, self._ledger, self._decide, output_tensor, group
        )
        on_cpu = output_tensor.device.type == "cpu"
        if pair is None:
            span = spans.issue("flat")
            if not async_op:
                with span:
                    compat.all_gather(output_tensor, input_tensor, group)
                return None
            work = compat.all_gather(output_tensor, input_tensor, group, async_op=True)
            assert work is not None
            return _FlatWork(work, span) if on_cpu else work
        inter, intra = spans.issue("inter"), spans.issue("intra")
        if not async_op:
            hierarchical_all_gather(output_tensor, input_tensor, pair, inter, intra)
            return None
        if on_cpu:
            return _StagedGather(output_tensor, input_tensor, pair, inter, intra)
        return _gather_on_side_stream(output_tensor, input_tensor, pair, inter, intra)


class ReduceScatter:
    """The reduce-scatter of one communication unit (``torch``'s ``ReduceScatter`` interface).

    ``op`` may be AVG, SUM or PREMUL_SUM. Equal stages make AVG of AVG exact; PREMUL_SUM scales in
    the first stage only. Each stage rounds once in the tensor's dtype.

    Args:
        before_reduce: called when FSDP2 asks for a buffer, that is before it touches ``.grad``.
        later: lets results land beside the backward pass; without it a call is complete on return.
    """

    def __init__(
        self,
        groups: Groups,
        ledger: Ledger,
        decide: Decide,
        before_reduce: Callable[[], None] | None = None,
        later: Later | None = None,
    ) -> None:
        self._groups = groups
        self._ledger = ledger
        self._decide = decide
        self._before_reduce = before_reduce
        self._later = later

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Take an input or output buffer from the caching allocator."""
        if self._before_reduce is not None:
            self._before_reduce()
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [n]
        input_tensor: torch.Tensor,  # [world * n]
        group: dist.ProcessGroup,
        op: compat.ReduceOp,
        async_op: bool = False,
    ) -> None:
        """Reduce-scatter; on return ordered on the current stream, on the CPU complete or later."""
        exchanged = self._later is not None and self._later.in_node
        by_all_reduce = input_tensor.device.type == "cpu" and not exchanged
        spans, pair = _plan(
            "reduce_scatter",
            self._groups,
            self._ledger,
            self._decide,
            input_tensor,
            group,
            by_all_reduce=by_all_reduce,
        )
        if self._later is not None:
            begin = functools.partial(
                _reduce_in_steps, input_tensor, op, group, pair, spans, exchanged
            )
            if self._later.reduce(output_tensor, op, begin):
                return
        if pair is None:
            flat = reduce_scatter if exchanged else compat.reduce_scatter
            with spans.issue("flat"):
                flat(output_tensor, input_tensor, op, group)
            return
        inter, intra = spans.issue("inter"), spans.issue("intra")
        hierarchical_reduce_scatter(output_tensor, input_tensor, op, pair, inter, intra)


# -- the two stages ------------------------------------------------------------------------------


def hierarchical_all_gather(
    output: torch.Tensor,  # [N k n]
    input: torch.Tensor,  # [n]
    pair: StageGroups,
    inter: Timed = _UNTIMED,
    intra: Timed = _UNTIMED,
) -> None:
    """All-gather in two stages, each inside the context that times it."""
    staged = _inter_buffer(input, pair)
    with inter:
        compat.all_gather(staged, input, pair.inter)
    with intra:
        _gather_inside_nodes(output, staged, pair)


def hierarchical_reduce_scatter(
    output: torch.Tensor,  # [n]
    input: torch.Tensor,  # [N k n]
    op: compat.ReduceOp,
    pair: StageGroups,
    inter: Timed = _UNTIMED,
    intra: Timed = _UNTIMED,
) -> None:
    """Reduce-scatter in two stages, each inside the context that times it."""
    staged = _inter_buffer(output, pair)
    with intra:
        _reduce_inside_nodes(staged, input, op, pair)
    with inter:
        second = dist.ReduceOp.SUM if compat.is_premul_sum(op) else op
        reduce_scatter(output, staged, second, pair.inter)


def _inter_buffer(input: torch.Tensor, pair: StageGroups) -> torch.Tensor:
    return input.new_empty(pair.inter.size() * input.numel())


def _gather_inside_nodes(output: torch.Tensor, staged: torch.Tensor, pair: StageGroups) -> None:
    nodes = pair.inter.size()
    with compat.coalesced(pair.intra):
        for rows, shard in zip(output.chunk(nodes), staged.chunk(nodes), strict=True):
            compat.all_gather(rows, shard, pair.intra)


def _reduce_inside_nodes(
    staged: torch.Tensor, input: torch.Tensor, op: compat.ReduceOp, pair: StageGroups
) -> None:
    nodes = pair.inter.size()
    together = compat.coalesced(pair.intra) if input.device.type != "cpu" else _UNTIMED
    with together:
        for shard, rows in zip(staged.chunk(nodes), input.chunk(nodes), strict=True):
            reduce_scatter(shard, rows, op, pair.intra)


# -- a step at a time --------------------------------------------------------------------------


def _reduce_in_steps(
    input: torch.Tensor,
    op: compat.ReduceOp,
    group: dist.ProcessGroup,
    pair: StageGroups | None,
    spans: _Spans,
    exchanged: bool,
    output: torch.Tensor,
) -> Iterator[None]:
    """A reduce-scatter on the CPU that yields whenever it would have to wait."""
    if pair is None and exchanged:
        span = spans.issue("flat")
        alone = Exchange(output, input, op, group)
        span.follow(alone.work)
        yield
        span.wait(alone.work)
        alone.add_up()
        return
    if pair is None:
        span = spans.issue("flat")
        work = compat.reduce_scatter(output, input, op, group, async_op=True)
        assert work is not None
        yield
        span.wait(work)  # Gloo's has no future to follow
        return
    inter, intra = spans.issue("inter"), spans.issue("intra")
    staged = _inter_buffer(output, pair)
    nodes = pair.inter.size()
    inside = [
        Exchange(shard, rows, op, pair.intra)
        for shard, rows in zip(staged.chunk(nodes), input.chunk(nodes), strict=True)
    ]
    intra.follow(inside[-1].work)
    yield
    for exchange in inside:
        intra.wait(exchange.work)
        exchange.add_up()
    inter.restart()
    between = Exchange(output, staged, op, pair.inter)
    inter.follow(between.work)
    yield
    inter.wait(between.work)
    between.add_up()


# -- handles -------------------------------------------------------------------------------------


class _FlatWork(dist.Work):
    """A flat all-gather under way on the CPU."""

    def __init__(self, work: dist.Work, span: Span) -> None:
        super().__init__()
        self._work = work
        self._span = span
        span.follow(work)

    def wait(self, timeout: Any = None) -> bool:
        self._span.wait(self._work)
        return True


class _StagedGather(dist.Work):
    """A hierarchical all-gather under way on the CPU: waiting runs the intra stage."""

    def __init__(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        pair: StageGroups,
        inter: Span,
        intra: Span,
    ) -> None:
        super().__init__()
        self._output = output
        self._pair = pair
        self._inter = inter
        self._intra = intra
        self._staged = _inter_buffer(input, pair)
        work = compat.all_gather(self._staged, input, pair.inter, async_op=True)
        assert work is not None
        self._work: dist.Work | None = work
        inter.follow(work)

    def wait(self, timeout: Any = None) -> bool:
        if self._work is not None:
            self._inter.wait(self._work)
            self._work = None
            with self._intra:
                _gather_inside_nodes(self._output, self._staged, self._pair)
        return True


class _StreamWork(dist.Work):
    """Work on a stream of ours: waiting orders the caller's stream behind it."""

    def __init__(self, event: torch.Event, device: torch.device) -> None:
        super().__init__()
        self._event = event
        self._device = device

    def wait(self, timeout: Any = None) -> bool:
        torch.accelerator.current_stream(self._device).wait_event(self._event)
        return True


def _gather_on_side_stream(
    output: torch.Tensor, input: torch.Tensor, pair: StageGroups, inter: Span, intra: Span
) -> dist.Work:
    """Both stages on a side stream, so that the caller's stream goes on computing."""
    stream = _side_stream(output.device)
    stream.wait_stream(torch.accelerator.current_stream(output.device))
    with stream:
        hierarchical_all_gather(output, input, pair, inter, intra)
        event = stream.record_event()
    return _StreamWork(event, output.device)


@functools.cache
def _side_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


# -- what one call does --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spans:
    """The ledger's spans for the stages of one collective."""

    ledger: Ledger
    collective: Collective
    messages: list[StageMessage]
    device: torch.device

    def issue(self, stage: Stage) -> Span:
        message = next(m for m in self.messages if m.stage == stage)
        return self.ledger.issue(1, self.collective, message, self.device)


def _plan(
    collective: Collective,
    groups: Groups,
    ledger: Ledger,
    decide: Decide,
    gathered: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    by_all_reduce: bool = False,
) -> tuple[_Spans, StageGroups | None]:
    """What to count and, if the collective is hierarchical, the groups of its stages."""
    ranks = ranks_of(group)
    message_bytes = gathered.numel() * gathered.element_size()
    pair = stage_groups(groups, ranks)
    form: Form = "flat"
    if pair is not None:
        form = decide(collective, ranks, message_bytes, gathered.dtype)
    messages = stages(
        ranks,
        dist.get_rank(),
        message_bytes,
        groups.gpus_per_node,
        form,
        by_all_reduce=by_all_reduce,
    )
    spans = _Spans(ledger, collective, messages, gathered.device)
    return spans, pair if form == "hierarchical" else None
