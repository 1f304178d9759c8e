"""Several hop 2 under way together, as a step has them: what a choice between forms is timed by.

One alone waits for each of its stages. In a step the next one is on the slow link meanwhile, so a
single one makes stages look slower than they are (4 nodes x 2 on Gloo, 512 KiB at 200 Mbit/s: 35 ms
in either form alone, and 6/7 of the bytes in stages).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from mics.communication.backend import Flight, Issue, Program, backend_of

IN_A_ROW = 3
"""How many are timed together."""

ROUNDS = 3
"""How often they are, which takes as long as nine alone."""


def run_in_a_row(
    programs: Sequence[Callable[[Issue], Program]],
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    in_stages: bool,
) -> None:
    """Run programs of hop 2 in the order of ``hop_order.py``, and wait for all.

    Args:
        programs: one for each message.
        group: of the replicas; its backend runs them.
        device: of the messages.
        in_stages: whether a program has more to issue when its first call is over.
    """
    backend = backend_of(group, device)
    under_way: list[Flight] = []
    for program in programs:
        flight = backend.beside(program, device, "hop 2")
        if in_stages and under_way:
            under_way[-1].go_on()
        under_way.append(flight)
    if in_stages:
        for flight in [under_way[-1], *under_way]:
            flight.go_on()
    for flight in under_way:
        flight.wait()
