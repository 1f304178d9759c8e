"""The store in which the ranks of one generation meet, in a process of its own.

It holds nothing that matters: it is new for every generation, and when it is gone the next
generation has another one, on whichever node leads then. It listens at one address only.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from datetime import timedelta

_SECONDS = 600.0


def keep_store(host: str, pipe: int) -> None:
    """Keep a store until this process is killed; its port is written to a pipe."""
    import torch.distributed as dist

    (family, *_, place), *_ = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    listener = socket.create_server(place[:2], family=family)
    port = listener.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        None,
        is_master=True,
        timeout=timedelta(seconds=_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    os.write(pipe, json.dumps({"port": store.port}).encode() + b"\n")
    while True:
        signal.pause()
