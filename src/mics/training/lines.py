"""A step and an evaluation as one line each, as much of it as the terminal is wide.

Everything is in ``metrics.jsonl``; a line has what a person looks for first.
"""

from __future__ import annotations

from collections.abc import Iterator

from mics.quantities import clock, percent, seconds, size
from mics.ranks.columns import fitted, width
from mics.training.record import EvaluationRecord, StepRecord

_GAP = "  "


def step_line(record: StepRecord, steps: int) -> str:
    """Write a step: what matters most, and the rest where there is room.

    Whoever is slow is named on a line of its own.

    Args:
        record: of the step.
        steps: of the whole run.
    """
    shown = list(_parts(record, steps))
    while len(_line(shown)) > width():
        least = max(shown, key=lambda part: part[0])
        if least[0] == 0:
            break
        shown.remove(least)
    return _line(shown) + (f"\n{fitted(f'  SLOW: {record.slow}')}" if record.slow else "")


def _line(parts: list[tuple[int, str]]) -> str:
    return _GAP.join(text for _, text in parts)


def _parts(record: StepRecord, steps: int) -> Iterator[tuple[int, str]]:
    """Give every part of the line with its rank: 0 is always shown, the largest is left out first.

    What is not known is left out before anything that is.
    """
    skipped = "" if record.taken else f"  SKIPPED ({record.skipped})"
    yield 0, f"step {record.step:>{len(str(steps))}}/{steps}{skipped}"
    yield 0, f"loss {loss_of(record)}"
    if record.bits_per_byte is not None:
        yield 4, f"{record.bits_per_byte:.3f} bits/byte"
    if record.router_loss is not None:
        yield 5, f"router loss {record.router_loss:.4f}"
    yield 7, f"lr {record.learning_rate:.1e}"
    yield 6, f"norm {record.norm:.2f}"
    yield 1, f"{record.tokens_per_second:,.0f} tok/s"
    yield 9, f"({record.tokens_per_second_per_gpu:,.0f}/GPU)"
    yield (20 if record.mfu is None else 3), f"MFU {percent(record.mfu)}"
    yield 8, f"mem {size(record.memory_bytes)}"
    between, inside = size(record.bytes_between_nodes), size(record.bytes_inside_nodes)
    yield 12, f"sent between nodes {between}, inside {inside}"
    if record.bytes_on_wire is not None:
        yield 13, f"on node 0's wire {size(record.bytes_on_wire)}"
    for hop, spent, exposed in (
        (1, record.hop_1_seconds, record.hop_1_exposed),
        (2, record.hop_2_seconds, record.hop_2_exposed),
    ):
        yield 9 + hop, f"hop {hop} {seconds(spent)} ({seconds(exposed)} exposed)"
    yield 2, f"ETA {clock(record.seconds_left)}"


def evaluation_line(record: EvaluationRecord) -> str:
    """Write an evaluation."""
    bits = f"  {record.bits_per_byte:.3f} bits/byte" if record.bits_per_byte is not None else ""
    return f"held out after step {record.step}: loss {loss_of(record)}{bits}"


def loss_of(record: StepRecord | EvaluationRecord) -> str:
    """Write nats per predicted token; nobody can say where no token was to be predicted."""
    return "n/a" if record.loss is None else f"{record.loss:.4f}"
