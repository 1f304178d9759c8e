"""What is known of one step: the numbers that go to the console, the files and the trackers."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """One step. ``None`` is "n/a": not measured, or unknown for this hardware."""

    step: int
    loss: float  # nats per predicted token
    bits_per_byte: float | None  # causal models only
    learning_rate: float
    norm: float  # of the whole gradient, before clipping
    taken: bool  # False: not finite, every rank left its weights alone
    seconds: float
    tokens: int  # predicted by all ranks so far
    tokens_per_second: float  # computed by all ranks, predicted or not
    tokens_per_second_per_gpu: float
    mfu: float | None  # model FLOPs (anatomy/flops.py) over the devices' peak
    memory_bytes: int | None  # peak of rank 0 so far
    bytes_between_nodes: int  # sent by all ranks in this step, counted
    bytes_inside_nodes: int
    bytes_on_wire: int | None  # sent by rank 0's node, as the kernel counts at its interface
    traffic_as_predicted: bool  # every rank, every stage and link
    hop_1_seconds: float  # rank 0's, issue to completion
    hop_1_exposed: float | None  # what its computation waited for
    hop_2_seconds: float
    hop_2_exposed: float | None
    seconds_left: float | None

    def as_json(self) -> str:
        """One line of ``metrics.jsonl``; numbers that are not finite become null."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return json.dumps({"kind": "step", **values})

    def as_scalars(self) -> dict[str, float]:
        """What a tracker takes: everything that is known."""
        return _known("train", dataclasses.asdict(self))


@dataclass(frozen=True)
class EvaluationRecord:
    """Loss on held-out text after a step."""

    step: int
    loss: float
    bits_per_byte: float | None

    def as_json(self) -> str:
        """One line of ``metrics.jsonl``."""
        return json.dumps({"kind": "evaluation", **dataclasses.asdict(self)})

    def as_scalars(self) -> dict[str, float]:
        """What a tracker takes: everything that is known."""
        return _known("held_out", dataclasses.asdict(self))


def _known(prefix: str, values: dict[str, float | None]) -> dict[str, float]:
    return {
        f"{prefix}/{name}": float(value)
        for name, value in values.items()
        if value is not None and name != "step"
    }


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Loss in a unit that does not depend on the tokenizer: nats / ln 2 / bytes per token."""
    return nats_per_token / math.log(2) / bytes_per_token


def step_line(record: StepRecord, steps: int) -> str:
    """One line for the console."""
    bits = f"  {record.bits_per_byte:.3f} bits/byte" if record.bits_per_byte is not None else ""
    skipped = "" if record.taken else "  SKIPPED (not finite)"
    wire = (
        "" if record.bytes_on_wire is None else f", on node 0's wire {size(record.bytes_on_wire)}"
    )
    return (
        f"step {record.step:>{len(str(steps))}}/{steps}{skipped}  loss {record.loss:.4f}{bits}"
        f"  lr {record.learning_rate:.1e}  norm {record.norm:.2f}"
        f"  {record.tokens_per_second:,.0f} tok/s ({record.tokens_per_second_per_gpu:,.0f}/GPU)"
        f"  MFU {percent(record.mfu)}  mem {size(record.memory_bytes)}"
        f"  sent between nodes {size(record.bytes_between_nodes)}, inside"
        f" {size(record.bytes_inside_nodes)}{wire}"
        f"  hop 1 {seconds(record.hop_1_seconds)} ({seconds(record.hop_1_exposed)} exposed)"
        f"  hop 2 {seconds(record.hop_2_seconds)} ({seconds(record.hop_2_exposed)} exposed)"
        f"  ETA {clock(record.seconds_left)}"
    )


def evaluation_line(record: EvaluationRecord) -> str:
    """One line for the console."""
    bits = f"  {record.bits_per_byte:.3f} bits/byte" if record.bits_per_byte is not None else ""
    return f"held out after step {record.step}: loss {record.loss:.4f}{bits}"


def percent(share: float | None) -> str:
    """A share as text."""
    return "n/a" if share is None else f"{share:.1%}"


def size(num_bytes: int | None) -> str:
    """Bytes as text, in binary units."""
    if num_bytes is None:
        return "n/a"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"


def count(number: int) -> str:
    """A large number as text: 10.08 B, 3.34 M, 512."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def seconds(value: float | None) -> str:
    """A short time as text."""
    return "n/a" if value is None else f"{value:.2f} s"


def clock(value: float | None) -> str:
    """A long time as text."""
    if value is None:
        return "n/a"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
