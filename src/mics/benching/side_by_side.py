"""Engines side by side, steps interleaved in one run: what else happens falls on all alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mics.benching.options import ROUNDED
from mics.benching.spread import Spread
from mics.communication.timing import slowest_seconds
from mics.communication.wire import bytes_sent
from mics.ranks.device import HOST


class Stepping(Protocol):
    """An engine that takes a step at a time, wherever it runs."""

    name: Any

    def step(self) -> float:
        """One optimizer step of this rank; returns the mean loss of all ranks and micro-steps."""

    def land(self) -> None:
        """Wait for what its last step has begun to send, which would travel in another's step."""


@dataclass(frozen=True)
class Compared:
    """One engine's steps.

    ``ratio`` is this engine's time over the first engine's in the same round: above 1 is slower.
    ``bytes_sent`` leave a node per step, the mean over nodes and steps, as the kernel counts them;
    ``None`` where it does not say. ``losses`` are those of every step.
    """

    engine: str
    seconds: Spread
    ratio: Spread
    bytes_sent: int | None
    losses: list[float]

    def limit(self, computation: float, link_bits: float | None) -> float | None:
        """What physics allows this engine's step, in seconds: max(computation, bytes / line rate).

        The bytes are those that a node has sent; ``None`` where they or the rate are not known.
        """
        if self.bytes_sent is None or link_bits is None:
            return None
        return max(computation, self.bytes_sent * 8 / link_bits)


def computation_of(compared: Sequence[Compared]) -> float | None:
    """Seconds that a step computes, if that was among what was timed."""
    return next((one.seconds.median for one in compared if one.engine == "computation"), None)


def compare(
    engines: Sequence[Stepping],
    steps: int,
    in_a_row: int = 1,
    *,
    told: Callable[[int, str, float], None],
) -> list[Compared]:
    """Time the steps of several engines. Collective.

    The order within a round turns, so that none always follows the same one. The first round warms
    up and counts for losses only.

    Args:
        engines: the first one is what the others are compared with.
        steps: rounds that count.
        in_a_row: steps of an engine's turn; times and bytes are a step's.
        told: called after every turn, on every rank: round, engine, seconds of a step.
    """
    seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    sent: dict[str, list[int | None]] = {engine.name: [] for engine in engines}
    losses: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for number in range(steps + 1):
        turn = number % len(engines)
        for engine in [*engines[turn:], *engines[:turn]]:
            spent, of_turn, counted = _turn_of(engine, in_a_row)
            told(number, engine.name, spent)
            losses[engine.name] += of_turn
            if number:
                seconds[engine.name].append(spent)
                sent[engine.name].append(counted)
    first = seconds[engines[0].name]
    return [
        Compared(
            engine.name,
            Spread.of(seconds[engine.name]),
            Spread.of([a / b for a, b in zip(seconds[engine.name], first, strict=True)]),
            _mean(sent[engine.name]),
            losses[engine.name],
        )
        for engine in engines
    ]


def agree(compared: Sequence[Compared], relative: float = 1e-4) -> bool:
    """Whether all engines have had the losses of the first one; computation alone is none.

    Those that round may be further from others, see ``ROUNDED``.
    """
    engines = [one for one in compared if one.engine != "computation"]
    first = ROUNDED.get(engines[0].engine, 0.0)
    return all(
        abs(mine - theirs) <= max(relative, first + ROUNDED.get(one.engine, 0.0)) * abs(theirs)
        for one in engines[1:]
        for mine, theirs in zip(one.losses, engines[0].losses, strict=True)
    )


def _turn_of(engine: Stepping, in_a_row: int) -> tuple[float, list[float], int | None]:
    """One turn: the slowest rank's seconds a step, losses, and the bytes a node has sent a step."""
    found: list[tuple[int | None, list[float]]] = []

    def turn() -> None:
        found.append((bytes_sent(), [engine.step() for _ in range(in_a_row)]))
        engine.land()

    spent = slowest_seconds(turn, torch.device(HOST))
    ((before, losses),) = found
    sent = _per_node(before)
    return spent / in_a_row, losses, None if sent is None else round(sent / in_a_row)


def _per_node(before: int | None) -> int | None:
    """The mean over nodes of what their interfaces have sent since ``before``."""
    now = bytes_sent()
    first_here = int(os.environ.get("LOCAL_RANK", "0")) == 0
    mine = [0.0, 0.0]
    if first_here and before is not None and now is not None:
        mine = [float(now - before), 1.0]
    total = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(total)
    sent, nodes = total.tolist()
    return int(sent / nodes) if nodes else None


def _mean(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known)) if known else None
