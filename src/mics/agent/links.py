"""The connections between agents: found, sealed, watched, and lost.

Every agent listens at one address and is joined to every other one. The one with the higher index
calls; the other does so too when it has not been called for a while. Nothing that comes before a
good seal has any effect, costs more than a few kilobytes, or lasts longer than some seconds.
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import time
from dataclasses import dataclass
from typing import Any, Protocol

from mics.agent.frames import NONCE_BYTES, BadFrame, Reader, Seals, new_nonce
from mics.agent.loop import Loop
from mics.agent.names import Address, Names
from mics.errors import MicsError

BEAT_SECONDS = 0.5
"""Agents say this often that they live."""

DEAD_SECONDS = 2.5
"""Who has said nothing for so long is taken to be dead."""

_STRANGER_SECONDS = 3.0  # to show the token
_MOST_STRANGERS = 64
_MOST_UNSENT_BYTES = 1 << 22
_CALL_SECONDS = 0.3  # between two calls of one address
_SECOND_CALLER_SECONDS = 1.5  # before the lower index calls too
_CHUNK_BYTES = 1 << 16

Message = dict[str, Any]


@dataclass(frozen=True)
class Refusal:
    """Why an agent that knows the token is not linked.

    Args:
        why: in words.
        final: whether it is of no use to call again.
    """

    why: str
    final: bool = False


class Owner(Protocol):
    """Who is told what happens on the links."""

    def hello(self) -> Message:
        """What this agent says first; ``index`` and ``incarnation`` are in it."""

    def admit(self, hello: Message) -> Refusal | None:
        """Why an agent may not be linked; ``None`` if it may."""

    def linked(self, index: int, hello: Message) -> None:
        """An agent has been linked."""

    def heard(self, index: int, message: Message) -> None:
        """A linked agent has said something."""

    def lost(self, index: int, why: str) -> None:
        """A link has ended."""

    def refused(self, index: int, refusal: Refusal) -> None:
        """Another agent has refused this one."""


@dataclass(eq=False)
class _End:
    """This end of a connection."""

    socket: socket.socket
    calls: bool
    began: float
    index: int | None = None  # of the other one: known, or whom we call
    reader: Reader | None = None
    nonce: bytes = b""
    seals: Seals | None = None
    unsent: bytearray | None = None
    linked: bool = False
    heard: float = 0.0


class Links:
    """All connections of one agent.

    Args:
        loop: where it waits.
        token: of the job.
        index: of this agent.
        addresses: of all agents, by index; they may change while it runs.
        owner: is told.
    """

    def __init__(
        self, loop: Loop, token: bytes, index: int, addresses: list[Address], owner: Owner
    ) -> None:
        self._loop = loop
        self._token = token
        self._index = index
        self._addresses = addresses
        self._owner = owner
        self._listener: socket.socket | None = None
        self._strangers: list[_End] = []
        self._links: dict[int, _End] = {}
        self._called: dict[int, float] = {}
        self._unlinked = dict.fromkeys(range(len(addresses)), time.monotonic())
        self._names = Names()
        self.turned_away = 0
        """Connections that were closed because nobody showed the token."""

    def listen(self, address: Address) -> Address:
        """Listen at one address, and at no other; returns it with the port.

        Raises:
            MicsError: it cannot be listened at.
        """
        host, port = address
        try:
            (family, *_, place), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            listener = socket.create_server(place[:2], family=family, backlog=_MOST_STRANGERS)
        except OSError as error:
            raise MicsError(
                f"This agent cannot listen at {host}:{port}: {error.strerror or error}.",
                numbers="Another process listens there."
                if error.errno == errno.EADDRINUSE
                else "The address has to be one of this machine.",
                write="--listen <address of this node>:<free port>, and the same in --nodes",
            ) from None
        listener.setblocking(False)
        self._listener = listener
        self._loop.watch(listener, self._accept)
        bound = listener.getsockname()
        return bound[0], bound[1]

    def send(self, index: int, message: Message) -> None:
        """Say something to one agent, if it is linked."""
        end = self._links.get(index)
        if end is not None:
            assert end.seals is not None
            self._write(end, end.seals.close(message))

    def say(self, message: Message) -> None:
        """Say something to all agents that are linked."""
        for index in list(self._links):
            self.send(index, message)

    @property
    def linked(self) -> list[int]:
        """The indices of the agents that are linked, in order."""
        return sorted(self._links)

    def part(self, index: int, why: str) -> None:
        """End a link."""
        end = self._links.get(index)
        if end is not None:
            self._end(end, why)

    def look(self) -> None:
        """Call those who are not linked, and part from those who are silent; to be called often."""
        now = time.monotonic()
        for end in [*self._strangers]:
            if now - end.began > _STRANGER_SECONDS:
                self._end(end, "did not answer" if end.calls else "showed no token")
        for end in [*self._links.values()]:
            if now - end.heard > DEAD_SECONDS:
                self._end(end, f"has said nothing for {now - end.heard:.1f} s")
        for index in range(len(self._addresses)):
            if index != self._index and index not in self._links:
                self._call_if_due(index, now)

    def forgive(self, seconds: float) -> None:
        """Add to the time in which others may be silent: this process itself was held up."""
        for end in self._links.values():
            end.heard += seconds

    def close(self) -> None:
        """End all of them; what was said is sent first, if that takes no time."""
        for end in [*self._links.values(), *self._strangers]:
            with contextlib.suppress(OSError):
                self._flush(end)
            self._drop(end)
        if self._listener is not None:
            self._loop.forget(self._listener)
            self._listener.close()

    # -- a connection's life ---------------------------------------------------------------------

    def _call_if_due(self, index: int, now: float) -> None:
        if any(end.calls and end.index == index for end in self._strangers):
            return
        if index > self._index and now - self._unlinked[index] < _SECOND_CALLER_SECONDS:
            return
        if now - self._called.get(index, 0.0) < _CALL_SECONDS * random.uniform(1, 1.5):
            return
        self._called[index] = now
        place = self._names.place(self._addresses[index])
        if place is None:
            return
        family, address = place
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        end = _End(sock, True, now, index)
        with contextlib.suppress(BlockingIOError):
            try:
                sock.connect(address)
            except BlockingIOError:
                raise
            except OSError:
                sock.close()
                return
        self._begin(end)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # it has gone again, or there is no room for it
            sock, _ = self._listener.accept()
            if sum(not end.calls for end in self._strangers) >= _MOST_STRANGERS:
                sock.close()
                self.turned_away += 1
                return
            sock.setblocking(False)
            self._begin(_End(sock, False, time.monotonic()))

    def _begin(self, end: _End) -> None:
        with contextlib.suppress(OSError):
            end.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.reader, end.nonce, end.unsent = Reader(), new_nonce(), bytearray()
        self._strangers.append(end)
        self._write(end, end.nonce)

    def _write(self, end: _End, data: bytes) -> None:
        assert end.unsent is not None
        end.unsent += data
        if len(end.unsent) > _MOST_UNSENT_BYTES:
            self._end(end, "takes nothing that is sent")
            return
        self._writable(end)

    def _writable(self, end: _End) -> None:
        try:
            self._flush(end)
        except OSError as error:
            self._end(end, str(error.strerror or error).lower())
            return
        wants = (lambda: self._writable(end)) if end.unsent else None
        self._loop.watch(end.socket, lambda: self._readable(end), wants)

    @staticmethod
    def _flush(end: _End) -> None:
        assert end.unsent is not None
        # Before a call is answered there is nothing to write to: ENOTCONN, or EAGAIN.
        with contextlib.suppress(BlockingIOError):
            while end.unsent:
                try:
                    sent = end.socket.send(end.unsent)
                except OSError as error:
                    if error.errno == errno.ENOTCONN:
                        return
                    raise
                del end.unsent[:sent]

    def _readable(self, end: _End) -> None:
        try:
            data = end.socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(end, str(error.strerror or error).lower())
            return
        if not data:
            self._end(end, "has closed the connection")
            return
        assert end.reader is not None
        end.reader.add(data)
        try:
            self._read(end)
        except BadFrame as error:
            self._end(end, f"sent {error}")

    def _read(self, end: _End) -> None:
        assert end.reader is not None
        if end.seals is None:
            theirs = end.reader.nonce()
            if theirs is None:
                return
            assert len(theirs) == NONCE_BYTES
            caller, called = (end.nonce, theirs) if end.calls else (theirs, end.nonce)
            end.seals = Seals(self._token, caller, called, calls=end.calls)
            if end.calls:  # who is called waits until the caller has shown the token
                self._write(end, end.seals.close({"kind": "hello"} | self._owner.hello()))
        while end.socket.fileno() >= 0:
            message = end.reader.frame(end.seals)
            if message is None:
                return
            end.heard = time.monotonic()
            if end.linked:
                assert end.index is not None
                self._owner.heard(end.index, message)
            else:
                self._meet(end, message)

    def _meet(self, end: _End, message: Message) -> None:
        """Take the first message of somebody who knows the token."""
        assert end.seals is not None
        if message["kind"] == "refused" and end.calls:
            assert end.index is not None
            self._end(end, "refused")
            final = message.get("final") is True
            self._owner.refused(end.index, Refusal(str(message.get("why")), final))
            return
        index = message.get("index")
        if message["kind"] != "hello" or not isinstance(index, int) or isinstance(index, bool):
            raise BadFrame("something else than a hello")
        refusal = self._refusal_of(end, index, message)
        if refusal is not None:
            if not end.calls:
                words = {"kind": "refused", "why": refusal.why, "final": refusal.final}
                self._write(end, end.seals.close(words))
            self._end(end, refusal.why)
            return
        end.index, end.linked = index, True
        self._strangers.remove(end)
        self._links[index] = end
        if not end.calls:
            self._write(end, end.seals.close({"kind": "hello"} | self._owner.hello()))
        self._owner.linked(index, message)

    def _refusal_of(self, end: _End, index: int, hello: Message) -> Refusal | None:
        if not 0 <= index < len(self._addresses) or index == self._index:
            others = f"another one of {len(self._addresses)} than {self._index}"
            return Refusal(f"--node-index {index} is not {others}", final=True)
        if end.calls and index != end.index:
            return Refusal(f"node {index} answers where node {end.index} should", final=True)
        refusal = self._owner.admit(hello)  # first: an agent that was replaced is told so
        if refusal is None and index in self._links:
            return Refusal(f"node {index} is there already")
        return refusal

    def _end(self, end: _End, why: str) -> None:
        was_linked = end.linked and self._links.get(end.index or 0) is end
        if end not in self._strangers and not was_linked:
            return  # it has ended already
        if not end.calls and not was_linked:
            self.turned_away += 1
        with contextlib.suppress(OSError):
            self._flush(end)
        self._drop(end)
        if was_linked:
            assert end.index is not None
            self._unlinked[end.index] = time.monotonic()
            self._owner.lost(end.index, why)

    def _drop(self, end: _End) -> None:
        self._loop.forget(end.socket)
        end.socket.close()
        if end in self._strangers:
            self._strangers.remove(end)
        if end.index is not None and self._links.get(end.index) is end:
            del self._links[end.index]
