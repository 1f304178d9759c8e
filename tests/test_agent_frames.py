"""What agents say to each other, and what strangers say to them."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import struct
import time
from typing import Any

import pytest

from mics.agent.frames import FIRST_BYTES, MOST_BYTES, BadFrame, Reader, Seals, new_nonce
from mics.agent.links import Links, Message, Refusal
from mics.agent.loop import Loop

TOKEN = b"a token that nobody knows"


def ends(token: bytes = TOKEN) -> tuple[Seals, Seals]:
    caller, called = new_nonce(), new_nonce()
    return Seals(token, caller, called, calls=True), Seals(TOKEN, caller, called, calls=False)


def opened(data: bytes, seals: Seals) -> dict[str, Any] | None:
    reader = Reader()
    reader.add(data)
    return reader.frame(seals)


def test_a_frame_opens_once_in_its_place_and_direction() -> None:
    caller, called = ends()
    first, second = caller.close({"kind": "a"}), caller.close({"kind": "b"})
    assert opened(first[:-1], called) is None  # not all of it is there
    for wrong in (second, first[:40] + b"?" + first[41:], called.close({"kind": "a"})):
        with pytest.raises(BadFrame, match="a seal that is not"):
            opened(wrong, ends()[1] if wrong is first else called)
    assert opened(first, called) == {"kind": "a"}
    with pytest.raises(BadFrame):
        opened(first, called)  # again
    assert opened(second, called) == {"kind": "b"}


def test_a_frame_of_another_token_or_connection_does_not_open() -> None:
    frame = ends(b"another token of some length")[0].close({"kind": "a"})
    with pytest.raises(BadFrame):
        opened(frame, ends(b"another token of some length")[1])
    with pytest.raises(BadFrame):
        opened(ends()[0].close({"kind": "a"}), ends()[1])


def test_a_frame_is_refused_by_its_length_before_it_is_there() -> None:
    caller, called = ends()
    with pytest.raises(BadFrame, match="the most"):
        opened(struct.pack("!I", FIRST_BYTES + 1), called)
    opened(caller.close({"kind": "a"}), called)
    assert opened(struct.pack("!I", FIRST_BYTES + 1), called) is None
    with pytest.raises(BadFrame, match="the most"):
        opened(struct.pack("!I", MOST_BYTES + 1), called)


class Told:
    """Counts what an agent would be told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def hello(self) -> Message:
        return {"index": 0, "incarnation": "x"}

    def admit(self, hello: Message) -> Refusal | None:
        self.calls.append("admit")
        return None

    def linked(self, index: int, hello: Message) -> None:
        self.calls.append("linked")

    def heard(self, index: int, message: Message) -> None:
        self.calls.append("heard")

    def lost(self, index: int, why: str) -> None:
        self.calls.append("lost")

    def refused(self, index: int, refusal: Refusal) -> None:
        self.calls.append("refused")


def test_10_000_frames_of_strangers_have_no_effect_and_take_no_memory() -> None:
    loop, told, chance = Loop(), Told(), random.Random(0)
    links = Links(loop, TOKEN, 0, [("127.0.0.1", 0), ("127.0.0.1", 1)], told)
    address = links.listen(("127.0.0.1", 0))
    loop.every(0.001, links.look)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def frame() -> bytes:
        length = chance.choice([0, 2, 60, FIRST_BYTES, 1 << 31, chance.randrange(1 << 32)])
        text = chance.choice([b'{"kind": "hello", "index": 1}', b"[" * 5000, chance.randbytes(80)])
        stated = chance.choice([length, len(text)])
        return struct.pack("!I", stated % (1 << 32)) + chance.randbytes(32) + text

    sent = 0
    while sent < 10_000:
        with socket.create_connection(address) as stranger:
            stranger.setblocking(False)
            data = new_nonce() if chance.random() < 0.9 else chance.randbytes(7)
            for _ in range(chance.randrange(1, 20)):
                data += frame()
                sent += 1
            with contextlib.suppress(BlockingIOError, ConnectionError):
                stranger.sendall(data)
            for _ in range(4):
                loop.turn()
    silent, before_them = [], links.turned_away
    for _ in range(100):  # who say nothing at all
        silent.append(socket.create_connection(address))
        loop.turn()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        loop.turn()
    assert told.calls == []
    assert links.linked == []
    assert before_them > 500
    assert 30 < links.turned_away - before_them < 40  # 64 may be silent for a while
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10 * 1024  # KiB
    for sock in silent:
        sock.close()
    links.close()
    loop.close()


def test_an_agent_listens_at_its_address_only() -> None:
    loop, told = Loop(), Told()
    links = Links(loop, TOKEN, 0, [("127.0.0.1", 0), ("127.0.0.1", 1)], told)
    _, port = links.listen(("127.0.0.1", 0))
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=1)
    links.close()
    loop.close()
