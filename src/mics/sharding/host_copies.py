"""Copies of storages on the host, made beside computation and brought back before they are needed.

[Note: when a copy may be forgotten]
A copy on its way out reads memory that the allocator must not give away: its source is held until
the device has waited for it, which is one block later. A copy on its way back writes memory that a
graph may let go of at any time, so the device's part of it is held here until the device has waited
for it. Nothing relies on ``record_stream``, which frees memory at a moment that nobody can tell.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from mics import compat
from mics.errors import ShardError
from mics.ranks.device import on_accelerator


class Copy:
    """One storage that a backward pass needs: on the host, and on the device while it is used.

    Args:
        tensor: a view of the storage; on a mesh, this rank's part of it is.
        lanes: where the copy runs.
    """

    def __init__(self, tensor: torch.Tensor, lanes: Lanes) -> None:
        self._source: torch.Tensor | None = tensor.detach()
        self._written = compat.times_written(tensor)
        self._host = lanes.send(_whole(compat.local_of(tensor)))
        self.back: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """How much of the host's memory it takes."""
        return self._host.nbytes

    @property
    def host(self) -> torch.Tensor:
        """Its bytes on the host."""
        return self._host

    @property
    def is_away(self) -> bool:
        """Whether it is on the host alone."""
        return self._source is None and self.back is None

    def leave(self) -> None:
        """Let go of the source, for whose copy the device has waited.

        Raises:
            ShardError: it was written in place since it was saved, so that the copy may be of
                the new values.
        """
        self._check()
        self._source = None

    def view(self, like: View) -> torch.Tensor:
        """The tensor that was saved, on the device.

        Raises:
            ShardError: as ``leave``.
        """
        self._check()
        there = self._source if self._source is not None else self.back
        assert there is not None
        with torch.no_grad():
            storage = compat.local_of(there).untyped_storage()
            made = torch.empty(0, dtype=like.dtype, device=storage.device)
            made.set_(storage, like.offset, like.size, like.stride)
        return made

    def _check(self) -> None:
        if self._source is not None:
            refuse_written(self._source, self._written)


def refuse_written(tensor: torch.Tensor, times: int) -> None:
    """Refuse what was written in place since it was saved, when it had been so often.

    Raises:
        ShardError: it was.
    """
    if compat.times_written(tensor) != times:
        raise ShardError(
            "A tensor that backward needs was written in place after it was saved.",
            numbers=f"Shape {list(tensor.shape)}, {tensor.dtype}.",
            write="the operation that is not in place",
        )


class View:
    """How a tensor lies in its storage."""

    __slots__ = ("dtype", "offset", "size", "stride")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset()
        self.size, self.stride = tensor.size(), tensor.stride()


class Visit:
    """One forward of a block: the copies that its backward needs, and the visit before it."""

    def __init__(self, previous: Visit | None) -> None:
        self._previous = None if previous is None else weakref.ref(previous)
        self._copies: list[weakref.ref[Copy]] = []
        self.sent: Any = None
        self.begun = False

    @property
    def previous(self) -> Visit | None:
        """The visit before, as long as anything needs what it has saved."""
        return None if self._previous is None else self._previous()

    def add(self, copy: Copy) -> None:
        """Remember a copy, without keeping it alive."""
        self._copies.append(weakref.ref(copy))

    def copies(self) -> list[Copy]:
        """Those that are still needed."""
        return [copy for copy in (ref() for ref in self._copies) if copy is not None]


class Lanes:
    """Where copies run: on two streams beside computation, or at once if the device is the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: Any = None
        self._leaving: Visit | None = None
        self._arriving: tuple[Any, Sequence[torch.Tensor]] | None = None
        if on_accelerator(device):
            self._streams = torch.get_device_module(device)
            self._out, self._in = self._streams.Stream(device), self._streams.Stream(device)

    def send(self, source: torch.Tensor) -> torch.Tensor:
        """Copy to the host, behind what computes now."""
        if self._streams is None:
            return source.clone()
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._out.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._out):
            host.copy_(source, non_blocking=True)
        return host

    def end(self, visit: Visit) -> None:
        """Let a block's copies run beside the next block, and wait for those of the one before."""
        if self._streams is not None:
            visit.sent = self._out.record_event()
        self.settle()
        self._leaving = visit

    def settle(self) -> None:
        """Wait for what is on its way, and let go of what is held for it.

        Raises:
            ShardError: see ``Copy.leave``.
        """
        self._arrive()
        leaving, self._leaving = self._leaving, None
        if leaving is None or leaving.begun:  # its backward uses what has not left
            return
        if leaving.sent is not None:
            self._streams.current_stream(self._device).wait_event(leaving.sent)
        for copy in leaving.copies():
            copy.leave()

    def begin(self, visit: Visit) -> None:
        """Have what a block's backward needs, and fetch what the backward after it will."""
        if visit.begun:
            return
        visit.begun = True
        self._arrive()
        self._fetch(visit)
        self._arrive()
        if visit.previous is not None:
            self._fetch(visit.previous)

    def _fetch(self, visit: Visit) -> None:
        away = [copy for copy in visit.copies() if copy.is_away]
        if self._streams is None:
            for copy in away:
                copy.back = copy.host
            return
        if not away:
            return
        computing = self._streams.current_stream(self._device)
        for copy in away:
            copy.back = torch.empty(copy.host.shape, dtype=torch.uint8, device=self._device)
        self._in.wait_stream(self._out)
        self._in.wait_stream(computing)  # which may still use the memory that was just given
        with self._streams.stream(self._in):
            for copy in away:
                assert copy.back is not None
                copy.back.copy_(copy.host, non_blocking=True)
        held = [copy.back for copy in away if copy.back is not None]
        self._arriving = (self._in.record_event(), held)

    def _arrive(self) -> None:
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            self._streams.current_stream(self._device).wait_event(arriving[0])


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage."""
    with torch.no_grad():
        made = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return made.set_(tensor.untyped_storage())
