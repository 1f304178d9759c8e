"""What the ranks of a checked script have seen, as text between processes; no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mics.topology import Ranks

When = Literal["forward", "backward", "after"]
"""What a step was at: a micro-step's forward, behind the begin of its backward, the optimizer."""

SMALL = 16
"""Elements of a message that holds no gradient: losses, norms, what ranks agree on."""


@dataclass(frozen=True)
class Call:
    """One collective.

    Args:
        collective: all_gather, reduce_scatter, all_reduce, or torch's own name.
        ranks: of its group.
        message_bytes: of the gathered or reduced message.
        numel: elements of that message.
        repeats: how many collectives were issued as this one.
        peer: the rank a message goes to, of a send; -1 otherwise.
        floating: whether its numbers are, as gradients are; ranks agree on integers.
    """

    collective: str
    ranks: Ranks
    message_bytes: int
    numel: int
    repeats: int = 1
    peer: int = -1
    floating: bool = True

    @property
    def small(self) -> bool:
        """Whether it holds no gradients: it is too small, or of whole numbers."""
        return self.numel <= SMALL or not self.floating


@dataclass(frozen=True)
class Seen:
    """A collective within a step.

    Args:
        call: what was issued.
        micro_step: how many micro-steps had begun their backward pass, that one included.
        when: what the step was at.
    """

    call: Call
    micro_step: int
    when: When


@dataclass(frozen=True)
class Print:
    """Values of a tensor, told apart: a hash of all bits, their norm, some of them."""

    digest: str
    norm: float
    sample: tuple[float, ...]

    def apart_from(self, other: Print) -> float:
        """How far two are apart, in the size of the larger one; 0 if they are equal to the bit."""
        if self.digest == other.digest:
            return 0.0
        size = max(map(abs, (*self.sample, *other.sample)), default=0.0)
        pairs = zip(self.sample, other.sample, strict=False)
        most = max((abs(a - b) for a, b in pairs), default=0.0)
        norms = abs(self.norm - other.norm) / max(self.norm, other.norm, 1e-300)
        return max(most / size if size else 0.0, norms, 1e-12)


@dataclass
class Param:
    """A parameter at an optimizer step.

    Args:
        shard: which part of the whole this rank holds; "" for all of it.
        spread: whether it is a DTensor.
        numel: elements that this rank holds.
        nbytes: and their bytes.
        before: its values in front of the step.
        gradient: what the optimizer is about to use; ``None`` if there is none.
        after: its values at the end of the step.
    """

    shard: str
    spread: bool
    numel: int
    nbytes: int
    before: Print
    gradient: Print | None = None
    after: Print | None = None


@dataclass
class Step:
    """One optimizer step of a rank.

    Args:
        micro_steps: forward and backward passes.
        calls: collectives, in order, each with how many of it came.
        params: parameters of all optimizers that stepped, by name.
        data: a hash of what the model was given.
    """

    micro_steps: int = 0
    calls: list[tuple[Seen, int]] = field(default_factory=list)
    params: dict[str, Param] = field(default_factory=dict)
    data: str = ""


@dataclass
class RankReport:
    """All that a rank has seen.

    Args:
        rank: its world rank.
        world: ranks of its process group; 0 if it made none.
        steps: that were finished.
        engines: what holds the model: mics, FSDP2, FSDP1, DDP.
        read_as: words of the script that were read otherwise than they stand there.
        failed: the traceback of what ended the script, "" if it was not ended.
        time: when it failed.
    """

    rank: int
    world: int = 0
    steps: list[Step] = field(default_factory=list)
    engines: list[str] = field(default_factory=list)
    read_as: list[str] = field(default_factory=list)
    failed: str = ""
    time: float = 0.0

    def to_text(self) -> str:
        """Write it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> RankReport:
        """What ``to_text`` has written."""
        report = cls(**json.loads(text))
        report.steps = [_step(one) for one in _each(report.steps)]
        return report


def _each(values: Any) -> Iterable[dict[str, Any]]:
    yield from values


def _step(value: dict[str, Any]) -> Step:
    calls = [(_seen(seen), number) for seen, number in value["calls"]]
    params = {name: _param(one) for name, one in value["params"].items()}
    return Step(value["micro_steps"], calls, params, value["data"])


def _seen(value: dict[str, Any]) -> Seen:
    call = value["call"]
    return Seen(Call(**{**call, "ranks": tuple(call["ranks"])}), value["micro_step"], value["when"])


def _param(value: dict[str, Any]) -> Param:
    prints = {name: _print(value[name]) for name in ("before", "gradient", "after")}
    return Param(**{**value, **prints})


def _print(value: dict[str, Any] | None) -> Any:
    return None if value is None else Print(value["digest"], value["norm"], tuple(value["sample"]))
