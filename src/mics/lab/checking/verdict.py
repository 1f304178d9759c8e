"""What a check says of a script; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mics.lab.checking.flows import Row
from mics.lab.checking.report import Call

Kind = Literal[
    "right",
    "full sharding",
    "hop 2 in every micro-step",
    "unsharded gradients",
    "parameters without hop 2",
    "replicas differ",
    "ranks alone",
]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        kind: what.
        what: a sentence.
        numbers: that show it.
        write: what to write instead.
        names: of parameters.
    """

    kind: Kind
    what: str
    numbers: str
    write: str
    names: tuple[str, ...] = ()


@dataclass
class Verdict:
    """What a check has found.

    Args:
        kind: the first finding's, or what the script does.
        headline: a sentence.
        findings: what is wrong, in order of weight.
        notes: what a person should know.
        rows: the last step's collectives.
        all_reduces: found between copies in a step, and needed.
        unsharded_bytes: whole gradients that a rank keeps between micro-steps.
        copies_apart: the largest difference between copies afterwards.
        needless: collectives of rank 0 in the last step that need not run.
        partition: ranks that hold one copy together; 0 where parts differ.
        replicas: copies there are; 0 where parts differ.
    """

    kind: Kind = "right"
    headline: str = ""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    all_reduces: tuple[int, int] = (0, 0)
    micro_steps: int = 0
    unsharded_bytes: int = 0
    copies_apart: float = 0.0
    needless: list[tuple[Call, int]] = field(default_factory=list)
    needless_bytes: int = 0
    partition: int = 0
    replicas: int = 0
