"""Bytes that this node has sent over its network interface, as the kernel counts them."""

from __future__ import annotations

import os
from pathlib import Path


def bytes_sent() -> int | None:
    """Count bytes since the interface exists, headers included; ``None`` where it is not told.

    The interface is the one the backends are told to use (``GLOO_SOCKET_IFNAME``).
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    if not name:
        return None
    try:
        return int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text())
    except OSError:
        return None
