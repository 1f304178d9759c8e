"""What one backend does that another does not: a small class each, chosen in one place.

[Note: programs]
A collective that may be under way is written once, as a generator: every ``next`` waits for what
was issued before and issues what follows. A backend that blocks yields inside of it, so that the
caller computes meanwhile; on a backend with streams it runs to its end at once, on a stream of
ours, and the device does the waiting.

To add a backend, write a class and its line in ``BACKENDS`` (CONTRIBUTING shows one).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.all_to_all import Exchange
from mics.communication.ledger import Timed
from mics.errors import TopologyError
from mics.ranks import issuing
from mics.ranks.device import on_accelerator
from mics.ranks.issuing import Handle
from mics.ranks.mesh import Groups

Program = Iterator[None]
"""A collective that yields whenever it would have to wait, see [Note: programs]."""

Call = Callable[[bool], Handle | None]
"""Issues one collective of torch; with True it is asynchronous and returns its handle."""

Issue = Callable[[Timed, Call], Program]
"""Runs one call inside the span that times it."""

Lane = Literal["gathers", "hop 2"]

Piece = tuple[torch.Tensor, torch.Tensor]
"""The output [n] and the input [ranks * n] of one reduce-scatter."""


class Backend(Protocol):
    """What a unit asks of its backend.

    Attributes:
        blocks: whether waiting holds up the program. Then a unit overlaps by handles: it gathers
            ahead and lets reductions land later; else the device's streams overlap by themselves.
        reduces_by_all_reduce: whether a reduce-scatter is an all-reduce of which all but one row is
            thrown away, which sends twice the bytes.
    """

    blocks: bool
    reduces_by_all_reduce: bool

    def beside(
        self, program: Callable[[Issue], Program], device: torch.device, lane: Lane
    ) -> Flight:
        """Begin a program that runs beside the caller's computation.

        Programs of one lane run one after the other, lanes run beside each other.

        Returns:
            A handle; after ``wait`` what the caller computes next sees the results.
        """

    def gather(self, output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup) -> None:
        """All-gather several rows as one stage: complete, or ordered on the current stream.

        Args:
            output: [rows, ranks, n].
            input: [rows, n], this rank's part of each row.
            group: its ranks share a node.
        """

    def reduce(
        self,
        pieces: Sequence[Piece],
        op: compat.ReduceOp,
        group: dist.ProcessGroup,
        span: Timed,
        issue: Issue,
    ) -> Program:
        """Reduce-scatter several pieces as one stage.

        Args:
            pieces: outputs and inputs.
            op: AVG, SUM or PREMUL_SUM.
            group: its ranks share a node, or sit on a node each.
            span: times the stage.
            issue: how it is waited for, where it need not run on a stream.
        """


def at_once(span: Timed, call: Call) -> Program:
    """Run a call and wait for it: complete on the host, or ordered on the current stream."""
    with span:
        call(False)
    yield from ()


def with_handle(span: Timed, call: Call) -> Program:
    """Issue a call, yield, then wait for it."""
    work = call(True)
    assert work is not None
    span.follow(work)
    yield
    span.wait(work)


def run(program: Program) -> None:
    """Take a program to its end."""
    for _ in program:
        pass


# -- the backends --------------------------------------------------------------------------------


class Gloo:
    """torch's backend of the host: a wait blocks the program, and nothing runs ahead of it."""

    blocks = True
    reduces_by_all_reduce = True

    def beside(
        self, program: Callable[[Issue], Program], device: torch.device, lane: Lane
    ) -> Flight:
        """Issue the first call now; waiting runs the rest."""
        return _Handle(program(with_handle))

    def gather(self, output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Issue the rows one by one and wait for all: Gloo's coalesced call is not safe.

        Why is said at ``compat.coalesced``.
        """
        works = [
            issuing.all_gather(row.view(-1), part, group, async_op=True)
            for row, part in zip(output, input, strict=True)
        ]
        for work in works:
            assert work is not None
            work.wait()

    def reduce(
        self,
        pieces: Sequence[Piece],
        op: compat.ReduceOp,
        group: dist.ProcessGroup,
        span: Timed,
        issue: Issue,
    ) -> Program:
        """Exchange and sum, which sends half of what Gloo's own reduce-scatter does."""
        if op not in Exchange.OPS:
            with span:
                for output, input in pieces:
                    issuing.reduce_scatter(output, input, op, group)
            return
        under_way: list[Exchange] = []

        def call(async_op: bool) -> Handle | None:
            for output, input in pieces:
                exchange = Exchange(output, input, op, group)
                if async_op:
                    under_way.append(exchange)
                else:
                    exchange.finish()  # before the next, which needs a buffer too
            return under_way[-1].work if async_op else None

        yield from issue(span, call)
        for exchange in under_way:
            exchange.finish()


class Streams:
    """A backend of an accelerator: calls are ordered on streams, and the host never waits."""

    blocks = False
    reduces_by_all_reduce = False

    def beside(
        self, program: Callable[[Issue], Program], device: torch.device, lane: Lane
    ) -> Flight:
        """Run the program on a stream of ours that starts behind the caller's."""
        stream = _side_stream(device, lane)
        stream.wait_stream(torch.accelerator.current_stream(device))
        with stream:
            begun = program(at_once)
            next(begun, None)
            event = stream.record_event()
        return _StreamHandle(begun, event, device)

    def gather(self, output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Issue the rows as one coalesced call, which writes all to their places."""
        with compat.coalesced(group):
            for row, part in zip(output, input, strict=True):
                compat.all_gather(row.view(-1), part, group)

    def reduce(
        self,
        pieces: Sequence[Piece],
        op: compat.ReduceOp,
        group: dist.ProcessGroup,
        span: Timed,
        issue: Issue,
    ) -> Program:
        """Issue the pieces as one coalesced call."""
        together = compat.coalesced(group) if len(pieces) > 1 else contextlib.nullcontext()
        with span, together:
            for output, input in pieces:
                compat.reduce_scatter(output, input, op, group)
        yield from ()


_STREAMS = Streams()

BACKENDS: dict[str, Backend] = {
    "gloo": Gloo(),
    "nccl": _STREAMS,
    "xccl": _STREAMS,
    "hccl": _STREAMS,
    "fake": Gloo(),  # torch's stand-in for tests, whose collectives move nothing
}
"""By the name that torch.distributed gives it. The one place where a backend is told."""


def backend_of(group: dist.ProcessGroup, device: torch.device) -> Backend:
    """The backend that serves a group's collectives on a device.

    torch asks every backend of an accelerator to order its work on streams, so an unknown one is
    taken for such; Gloo too, when it serves an accelerator's tensors.

    Raises:
        TopologyError: mics does not know how a backend of the host behaves.
    """
    served = dist.get_backend_config(group)
    by_device = dict(entry.split(":") for entry in served.split(",") if ":" in entry)
    name = by_device.get(device.type, served)
    known = BACKENDS.get(name)
    if on_accelerator(device):
        return _STREAMS if known is None or known.blocks else known
    if known is None:
        raise TopologyError(
            f"mics does not know how the backend {name!r} behaves.",
            numbers=f"The process group serves {served}; known are {', '.join(BACKENDS)}.",
            write="a class and a line in communication/backend.py, or one of the known backends",
        )
    return known


def backend_of_mesh(groups: Groups) -> Backend:
    """The backend of a mesh's partition group.

    Raises:
        TopologyError: mics does not know how it behaves.
    """
    return backend_of(groups.shard, groups.device)


# -- handles -------------------------------------------------------------------------------------


class _Handle(dist.Work):
    """A program under way on a backend that blocks; a second wait does nothing."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program
        next(program, None)

    def go_on(self) -> None:
        """Wait for what was issued last, and issue what follows."""
        next(self._program, None)

    def wait(self, timeout: Any = None) -> bool:
        run(self._program)
        return True


class _StreamHandle(dist.Work):
    """A program on a stream of ours; waiting orders the caller's stream behind it."""

    def __init__(self, program: Program, event: torch.Event, device: torch.device) -> None:
        super().__init__()
        self._program = program
        self._event = event
        self._device = device

    def go_on(self) -> None:
        """Do nothing: all of it is on the stream already."""

    def wait(self, timeout: Any = None) -> bool:
        torch.accelerator.current_stream(self._device).wait_event(self._event)
        run(self._program)  # what only the host can do, if anything is left
        return True


Flight = _Handle | _StreamHandle
"""A program that was begun beside the caller's computation."""


@functools.cache
def _side_stream(device: torch.device, lane: Lane) -> torch.Stream:
    return torch.Stream(device)
