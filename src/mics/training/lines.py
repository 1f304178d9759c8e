"""A step and an evaluation as one line each, as much of it as the terminal is wide.

Everything is in ``metrics.jsonl``; a line has what a person looks for first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    while sum(part.wide + len(_GAP) for part in shown) - len(_GAP) > width():
        least = max(shown, key=lambda part: part.rank)
        if least.rank == 0:
            break
        shown.remove(least)
    line = _GAP.join(part.text for part in shown)
    return line + (f"\n{fitted(f'  SLOW: {record.slow}')}" if record.slow else "")


@dataclass(frozen=True)
class _Part:
    """A part of a line.

    Args:
        rank: 0 is always shown; of the others the largest is left out first.
        text: what is shown.
        usual: columns that it takes as a rule, so that all lines of a run have the same parts.
    """

    rank: int
    text: str
    usual: int = 0

    @property
    def wide(self) -> int:
        """Columns to be reckoned with."""
        return max(len(self.text), self.usual)


def _parts(record: StepRecord, steps: int) -> Iterator[_Part]:
    """Give every part of a line; of equal use, what is not known is left out first."""
    skipped = "" if record.taken else f"  SKIPPED ({record.skipped})"
    yield _Part(0, f"step {record.step:>{len(str(steps))}}/{steps}{skipped}")
    yield _Part(0, f"loss {loss_of(record)}")
    if record.bits_per_byte is not None:
        yield _Part(4, f"{record.bits_per_byte:.3f} bits/byte")
    if record.router_loss is not None:
        yield _Part(5, f"router loss {record.router_loss:.4f}")
    yield _Part(7, f"lr {record.learning_rate:.1e}")
    yield _Part(6, f"norm {record.norm:.2f}", 9)
    yield _Part(1, f"{record.tokens_per_second:,.0f} tok/s", 12)
    yield _Part(9, f"({record.tokens_per_second_per_gpu:,.0f}/GPU)", 12)
    yield _Part(20 if record.mfu is None else 3, f"MFU {percent(record.mfu)}")
    yield _Part(8, f"mem {size(record.memory_bytes)}", 14)
    between, inside = size(record.bytes_between_nodes), size(record.bytes_inside_nodes)
    yield _Part(12, f"sent between nodes {between}, inside {inside}")
    if record.bytes_on_wire is not None:
        yield _Part(13, f"on node 0's wire {size(record.bytes_on_wire)}", 27)
    for hop, spent, exposed in (
        (1, record.hop_1_seconds, record.hop_1_exposed),
        (2, record.hop_2_seconds, record.hop_2_exposed),
    ):
        yield _Part(9 + hop, f"hop {hop} {seconds(spent)} ({seconds(exposed)} exposed)", 28)
    yield _Part(2, f"ETA {clock(record.seconds_left)}", 11)


def evaluation_line(record: EvaluationRecord) -> str:
    """Write an evaluation."""
    bits = f"  {record.bits_per_byte:.3f} bits/byte" if record.bits_per_byte is not None else ""
    return f"{record.name.replace('_', ' ')} after step {record.step}: loss {loss_of(record)}{bits}"


def loss_of(record: StepRecord | EvaluationRecord) -> str:
    """Write nats per predicted token; nobody can say where no token was to be predicted."""
    return "n/a" if record.loss is None else f"{record.loss:.4f}"
