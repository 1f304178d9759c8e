"""What is known of one step or evaluation: numbers for the console, the files and the trackers."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """What one step came to. ``None`` is not measured, or unknown for this hardware."""

    step: int
    loss: float | None  # nats per predicted token; None where none was to be predicted
    router_loss: float | None  # of experts, before its weight, not in loss; None without it
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
        """Write one line of ``metrics.jsonl``; numbers that are not finite become null."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return json.dumps({"kind": "step", **values})

    def as_scalars(self) -> dict[str, float]:
        """Return what a tracker takes: everything that is known."""
        return _known("train", dataclasses.asdict(self))


@dataclass(frozen=True)
class EvaluationRecord:
    """The loss on held-out text after a step."""

    step: int
    loss: float | None
    bits_per_byte: float | None

    def as_json(self) -> str:
        """Write one line of ``metrics.jsonl``."""
        return json.dumps({"kind": "evaluation", **dataclasses.asdict(self)})

    def as_scalars(self) -> dict[str, float]:
        """Return what a tracker takes: everything that is known."""
        return _known("held_out", dataclasses.asdict(self))


def _known(prefix: str, values: dict[str, float | None]) -> dict[str, float]:
    return {
        f"{prefix}/{name}": float(value)
        for name, value in values.items()
        if value is not None and name != "step"
    }


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Return the loss free of the tokenizer: nats / ln 2 / bytes per token."""
    return nats_per_token / math.log(2) / bytes_per_token
