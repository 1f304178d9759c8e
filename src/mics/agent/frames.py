"""What agents say to each other: frames of JSON, each with a length, a place in a row and a seal.

[Note: seals]
Both ends of a connection give a nonce, and the key of each direction is made of the job's token and
both. A frame is sealed (HMAC-SHA256) together with its number in its direction, so one that was
forged, changed, repeated, left out, or taken from another connection or direction does not open. A
frame that does not open ends its connection and has no other effect.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import struct
from pathlib import Path
from typing import Any

from mics.errors import MicsError

NONCE_BYTES = 32
MOST_BYTES = 1 << 20
"""The longest text of a frame."""

FIRST_BYTES = 1 << 14
"""The longest text of a frame from somebody who has not shown that it knows the token."""

_LENGTH = struct.Struct("!I")
_SEAL_BYTES = hashlib.sha256().digest_size
_LEAST_TOKEN_BYTES, _MOST_TOKEN_BYTES = 16, 4096


class BadFrame(Exception):
    """Bytes that are no frame of this connection."""


def read_token(path: Path) -> bytes:
    """Read the token that the agents of a job share.

    Raises:
        MicsError: it cannot be read, others may read it, or it is too short to be a secret.
    """
    make = f"umask 077; head -c 32 /dev/urandom | base64 > {path}, and a copy on every node"
    try:
        with path.open("rb") as file:
            of_file = os.fstat(file.fileno())
            token = file.read(_MOST_TOKEN_BYTES).strip()
    except OSError as error:
        raise MicsError(
            f"The token of the job cannot be read: {error.strerror}.",
            numbers=f"--token-file {path}.",
            write=make,
        ) from None
    if of_file.st_mode & 0o077 or of_file.st_uid not in (os.geteuid(), 0):
        raise MicsError(
            "The token of the job is no secret: others than its owner may read or write it.",
            numbers=f"--token-file {path}: mode {stat.S_IMODE(of_file.st_mode):04o}, owner "
            f"{of_file.st_uid}, and this process is of {os.geteuid()}.",
            write=f"chmod 600 {path}",
        )
    if len(token) < _LEAST_TOKEN_BYTES:
        raise MicsError(
            "The token of the job is too short to be a secret.",
            numbers=f"--token-file {path} has {len(token)} bytes, at least "
            f"{_LEAST_TOKEN_BYTES} are needed.",
            write=make,
        )
    return token


def new_nonce() -> bytes:
    """Bytes that no connection had before."""
    return secrets.token_bytes(NONCE_BYTES)


class Seals:
    """The seals of one connection, see [Note: seals].

    Args:
        token: of the job.
        caller: the nonce of the end that connected.
        called: the nonce of the end that listened.
        calls: whether this end is the one that connected.
    """

    def __init__(self, token: bytes, caller: bytes, called: bytes, *, calls: bool) -> None:
        keys = [
            hmac.digest(token, b"mics agent 1 " + way + caller + called, "sha256")
            for way in (b"from caller ", b"to caller ")
        ]
        self._own, self._theirs = keys if calls else keys[::-1]
        self._sent = self._opened = 0

    def close(self, message: dict[str, Any]) -> bytes:
        """Make the next frame of this end."""
        text = json.dumps(message, separators=(",", ":")).encode()
        assert len(text) <= MOST_BYTES, len(text)
        seal = _seal(self._own, self._sent, text)
        self._sent += 1
        return _LENGTH.pack(len(text)) + seal + text

    def open(self, seal: bytes, text: bytes) -> dict[str, Any]:
        """Read the next frame of the other end.

        Raises:
            BadFrame: it is not that.
        """
        if not hmac.compare_digest(seal, _seal(self._theirs, self._opened, text)):
            raise BadFrame("a seal that is not of this job, connection and place")
        self._opened += 1
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            raise BadFrame("no JSON under a good seal") from None
        if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            raise BadFrame("no message under a good seal")
        return message

    @property
    def trusted(self) -> bool:
        """Whether the other end has shown that it knows the token."""
        return self._opened > 0


def _seal(key: bytes, number: int, text: bytes) -> bytes:
    return hmac.digest(key, struct.pack("!Q", number) + text, "sha256")


class Reader:
    """Cuts what comes through a connection into nonce and frames; holds one frame at most."""

    def __init__(self) -> None:
        self._held = bytearray()

    def add(self, data: bytes) -> None:
        """Take what has come, which is not more than was asked of the socket."""
        self._held += data

    def nonce(self) -> bytes | None:
        """The nonce that a connection begins with; ``None`` until all of it is there."""
        return self._take(NONCE_BYTES)

    def frame(self, seals: Seals) -> dict[str, Any] | None:
        """The next message; ``None`` until all of it is there.

        Raises:
            BadFrame: it is too long, or does not open.
        """
        if len(self._held) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._held)
        most = MOST_BYTES if seals.trusted else FIRST_BYTES
        if length > most:
            raise BadFrame(f"a frame of {length:,} bytes, where {most:,} are the most")
        whole = self._take(_LENGTH.size + _SEAL_BYTES + length)
        if whole is None:
            return None
        start = _LENGTH.size + _SEAL_BYTES
        return seals.open(whole[_LENGTH.size : start], whole[start:])

    def _take(self, size: int) -> bytes | None:
        if len(self._held) < size:
            return None
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken
