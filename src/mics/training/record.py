"""What is known of one step or evaluation: numbers for the console, the files and the trackers."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass

from mics.ranks.lateness import Lateness

HELD_OUT = "held_out"
"""What the share of the training data that is held out is called among what is measured."""


@dataclass(frozen=True)
class StepRecord:
    """What one step came to. ``None`` is not measured, or unknown for this hardware."""

    step: int
    loss: float | None  # nats per predicted token; None where none was to be predicted
    router_loss: float | None  # of experts, before its weight, not in loss; None without it
    bits_per_byte: float | None  # causal models only
    learning_rate: float
    norm: float  # of the whole gradient, before clipping
    taken: bool  # False: every rank left its weights alone
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
    ranks: int  # that have taken it; fewer than the job has while some are away
    skipped: str | None = None  # why it was not taken
    slow: str | None = None  # the rank or link that the others wait for

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
class SkipRecord:
    """A step that every rank has skipped, and the data that it was of."""

    step: int
    why: str
    loss: float | None
    norm: float
    in_a_row: int
    first: int  # position in the run's endless order of its first sequence
    last: int
    sequences: list[int]  # what stands there: number n begins at token n x length

    def __str__(self) -> str:
        return (
            f"step {self.step} was skipped on all ranks ({self.why}); its data are positions "
            f"{self.first} to {self.last} of the run's order"
        )

    def as_json(self) -> str:
        """Write one line of ``metrics.jsonl``; numbers that are not finite become null."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return json.dumps({"kind": "skip", **values})

    def as_scalars(self) -> dict[str, float]:
        """Return what a tracker takes."""
        return {"skips/in_a_row": float(self.in_a_row)}


@dataclass(frozen=True)
class RollbackRecord:
    """A run that has gone back to an earlier state of its weights, and on behind its data."""

    step: int  # the last one that was skipped
    to: int  # the step whose state was loaded
    position: int  # in the order of sequences, where it goes on
    checkpoint: str

    def __str__(self) -> str:
        return (
            f"AFTER STEP {self.step} THE RUN GOES BACK: weights and optimizer are those of step "
            f"{self.to} ({self.checkpoint}) again; no data before position {self.position} is seen "
            "again"
        )

    def as_json(self) -> str:
        """Write one line of ``metrics.jsonl``."""
        return json.dumps({"kind": "rollback", **dataclasses.asdict(self)})

    def as_scalars(self) -> dict[str, float]:
        """Return what a tracker takes."""
        return {"rollbacks/to": float(self.to)}


@dataclass(frozen=True)
class LatenessRecord:
    """What a look for the slow rank or link has found."""

    step: int
    lateness: Lateness

    def as_json(self) -> str:
        """Write one line of ``metrics.jsonl``."""
        return json.dumps({"kind": "stragglers", "step": self.step, **self.lateness.as_json()})

    def as_scalars(self) -> dict[str, float]:
        """Return what a tracker takes: how far apart the ranks are."""
        own = [one.own_seconds for one in self.lateness.times.values()]
        rates = list(self.lateness.rates.values())
        scalars = {
            "ranks/own_seconds_most": max(own),
            "ranks/own_seconds_median": statistics.median(own),
            "ranks/slow": float(len(self.lateness.named)),
        }
        if rates:
            scalars |= {
                "links/bits_per_second_least": min(rates),
                "links/bits_per_second_median": statistics.median(rates),
            }
        return {name: value for name, value in scalars.items() if math.isfinite(value)}


@dataclass(frozen=True)
class EvaluationRecord:
    """The loss on what is not trained on, after a step."""

    step: int
    loss: float | None
    bits_per_byte: float | None
    seconds: float | None = None  # that it took
    name: str = HELD_OUT  # of what was measured: a set of evaluation.sets, or this

    def as_json(self) -> str:
        """Write one line of ``metrics.jsonl``."""
        return json.dumps({"kind": "evaluation", **dataclasses.asdict(self)})

    def as_scalars(self) -> dict[str, float]:
        """Return what a tracker takes: everything that is known."""
        return _known(self.name, dataclasses.asdict(self))


@dataclass(frozen=True)
class BeginRecord:
    """A run that begins, or goes on; what is predicted of its steps. Bytes are all ranks'."""

    step: int  # the last one before
    steps: int  # of the whole run
    model: str
    parameters: int
    device: str
    ranks: int
    nodes: int
    gpus_per_node: int
    partition: int
    micro_steps: int
    global_batch: int
    sequence: int  # tokens
    predicted_between_nodes: int  # bytes of a step
    predicted_inside_nodes: int
    full_sharding_between_nodes: int  # what FSDP2 over all ranks would send instead
    full_sharding_inside_nodes: int
    predicted_seconds: float | None  # of a step; None where no node was named
    predicted_memory_bytes: int | None  # of a rank, for training
    memory_before_bytes: int | None  # of rank 0, before there was a model
    mics: str  # version
    torch: str

    def as_json(self) -> str:
        """Write one line of ``metrics.jsonl``."""
        return json.dumps({"kind": "begin", **dataclasses.asdict(self)})

    def as_scalars(self) -> dict[str, float]:
        """Return what a tracker takes: nothing."""
        return {}


@dataclass(frozen=True)
class SaveRecord:
    """A checkpoint that was written, or begun to be, after a step."""

    step: int
    seconds: float  # that training waited for it

    def as_json(self) -> str:
        """Write one line of ``metrics.jsonl``."""
        return json.dumps({"kind": "save", **dataclasses.asdict(self)})

    def as_scalars(self) -> dict[str, float]:
        """Return what a tracker takes."""
        return {"checkpoint/seconds": self.seconds}


@dataclass(frozen=True)
class EndRecord:
    """A run that has ended in order: of itself, or because it was asked to."""

    step: int
    checkpoint: str | None
    sample: str | None  # of what the model writes
    finished: bool  # else it goes on when it is started again; job scripts ask for it

    def as_json(self) -> str:
        """Write one line of ``metrics.jsonl``."""
        return json.dumps({"kind": "end", **dataclasses.asdict(self)})

    def as_scalars(self) -> dict[str, float]:
        """Return what a tracker takes: nothing."""
        return {}


Record = (
    StepRecord
    | EvaluationRecord
    | LatenessRecord
    | SkipRecord
    | RollbackRecord
    | BeginRecord
    | SaveRecord
    | EndRecord
)
"""What is written to ``metrics.jsonl`` and sent to trackers."""


def _known(prefix: str, values: dict[str, float | str | None]) -> dict[str, float]:
    return {
        f"{prefix}/{name}": float(value)
        for name, value in values.items()
        if value is not None and name != "step" and not isinstance(value, str)
    }


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Return the loss free of the tokenizer: nats / ln 2 / bytes per token."""
    return nats_per_token / math.log(2) / bytes_per_token
