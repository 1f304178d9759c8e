"""Scripts in turn on the same links: step time, bytes and losses side by side."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mics.errors import LabError
from mics.lab import running
from mics.lab.state import Lab
from mics.quantities import seconds
from mics.ranks.console import progress

_RANK = ("-m", "mics.lab.checking.stepping")
_OF_GPUS = ("CUDA", "cuda", "NVIDIA")


@dataclass(frozen=True)
class Compared:
    """What a script's steps took, the first one left out.

    Args:
        words: the script and its arguments.
        seconds: of each step, those of the slowest rank.
        bytes_sent: what a node has sent per step, the mean over nodes, headers included; ``None``
            where the kernel does not tell.
        losses: of each step, the first one too: the sum of what ``backward`` was called on, the
            mean over ranks; ``None`` where it was called otherwise.
    """

    words: tuple[str, ...]
    seconds: list[float]
    bytes_sent: int | None
    losses: list[float | None]

    @property
    def median(self) -> float:
        """Seconds of the step in the middle."""
        return statistics.median(self.seconds)


def scripts_of(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Split words into scripts, each with the arguments behind it.

    Raises:
        LabError: there are less than two.
    """
    starts = [n for n, word in enumerate(words) if word.endswith(".py")]
    if len(starts) < 2 or starts[0] != 0:
        raise LabError(
            "There are not two scripts to compare.",
            numbers=f"The words are {running.shown(words) or 'none'}.",
            write="mics lab compare [options] -- a.py [its arguments] b.py [its arguments]",
        )
    ends = [*starts[1:], len(words)]
    return [tuple(words[start:end]) for start, end in zip(starts, ends, strict=True)]


def compare(
    lab: Lab, scripts: Sequence[tuple[str, ...]], steps: int, logs: Path, *, seconds: float
) -> list[Compared]:
    """Run scripts one after the other on every rank of a lab.

    Args:
        lab: one that is up.
        scripts: each with its arguments; a script may be an endless loop.
        steps: that are timed, behind one that is not.
        logs: folder for what ranks print, a folder per script.
        seconds: in which each script must have taken them.

    Raises:
        LabError: a script failed, took fewer steps, or took too long.
    """
    compared = []
    for number, words in enumerate(scripts):
        progress(f"lab {lab.name}: {running.shown(words)}")
        compared.append(_run(lab, words, steps, logs / f"{number}", seconds))
    return compared


def _run(lab: Lab, words: tuple[str, ...], steps: int, logs: Path, longest: float) -> Compared:
    with tempfile.TemporaryDirectory(prefix="mics-compare-") as name:
        done: Any = None
        for without_gpus in ("0", "1"):  # GPUs that a script names are the host, at its second try
            command = (*_RANK, name, str(steps + 1), str(longest), without_gpus, *words)
            done = running.run(lab, command, logs, screen=sys.stderr)
            if done.code == 0 or not any(word in done.words for word in _OF_GPUS):
                break
        if done.code != 0:
            raise LabError(f"{words[0]} fails.\n{done.words}")
        ranks = range(lab.nodes * lab.gpus_per_node)
        files = [Path(name) / f"{rank}.json" for rank in ranks]
        seen = [json.loads(file.read_text()) for file in files if file.exists()]
    taken = min((len(one["losses"]) for one in seen), default=0)
    if len(seen) < len(ranks) or taken < 2:
        raise LabError(
            f"{words[0]} has taken too few steps.",
            numbers=f"{taken} of {steps + 1} on {len(seen)} of {len(ranks)} ranks.",
            write="a script of two steps or more, with an optimizer of torch.optim",
        )
    return _compared(words, seen, taken, lab)


def _compared(
    words: tuple[str, ...], seen: Sequence[dict[str, Any]], taken: int, lab: Lab
) -> Compared:
    times = [[end[0] for end in one["ends"]] for one in seen]
    spent = [max(t[n + 1] - t[n] for t in times) for n in range(1, taken)]
    firsts = [one["ends"] for one in seen[:: lab.gpus_per_node]]
    counts = [(ends[1][1], ends[taken][1]) for ends in firsts]
    known = [last - first for first, last in counts if first is not None and last is not None]
    sent = round(statistics.mean(known) / (taken - 1)) if known else None
    losses = [_mean([one["losses"][n] for one in seen]) for n in range(taken)]
    return Compared(words, spent, sent, losses)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None


def as_text(compared: Sequence[Compared], lab: Lab) -> str:
    """A table for people."""
    first = compared[0]
    lines = [
        f"{lab.nodes} nodes x {lab.gpus_per_node} ranks, {lab.link} each way; "
        f"{len(first.seconds)} steps timed, the first one left out",
        f"{'':<4}{'step (median)':>14}{'fastest':>10}{'slowest':>10}{'times':>8}"
        f"{'bytes a node sends':>21}  script",
    ]
    for number, one in enumerate(compared, 1):
        sent = "n/a" if one.bytes_sent is None else f"{one.bytes_sent:,}"
        lines.append(
            f"{number:<4}{seconds(one.median):>14}{seconds(min(one.seconds)):>10}"
            f"{seconds(max(one.seconds)):>10}{one.median / first.median:>8.2f}{sent:>21}  "
            f"{running.shown(one.words)}"
        )
    lines += ["", "loss of step", *_losses(compared)]
    return "\n".join(lines)


def _losses(compared: Sequence[Compared]) -> list[str]:
    lines = []
    for number in range(min(len(one.losses) for one in compared)):
        values = [one.losses[number] for one in compared]
        shown = "".join("         n/a" if v is None else f"{v:>12.6f}" for v in values)
        lines.append(f"{number + 1:<4}{shown}")
    pairs = [
        abs(one - other)
        for each in compared[1:]
        for one, other in zip(compared[0].losses, each.losses, strict=False)
        if one is not None and other is not None
    ]
    lines.append(f"largest difference to the first: {max(pairs):.1e}" if pairs else "n/a")
    return lines
