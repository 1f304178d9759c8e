"""What a person sees while a run goes on: plain lines, or a live table on a terminal."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from mics.quantities import clock, count, percent, seconds, size
from mics.ranks.console import outliving, show
from mics.training.lines import evaluation_line, loss_of, step_line
from mics.training.record import HELD_OUT, EvaluationRecord, StepRecord

_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII = "_.-=+*#"
_MOST_MEANS = 512  # of losses; more than a terminal is wide


class Display(Protocol):
    """Shows a run on rank 0's terminal or log."""

    def step(self, record: StepRecord) -> None:
        """A step has ended."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """An evaluation has ended."""

    def say(self, words: str) -> None:
        """Say something that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_display(
    live: Literal["auto", "on", "off"], *, steps: int, first: int, every: int
) -> Display:
    """Open a live display on a terminal that moves its cursor (or when forced), else lines."""
    moves = sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    if live == "on" or (live == "auto" and moves):
        return _LiveDisplay(steps, first)
    return _Lines(steps, every)


class _Lines:
    def __init__(self, steps: int, every: int) -> None:
        self._steps = steps
        self._every = every
        self._slow = False  # somebody was, when last shown

    def step(self, record: StepRecord) -> None:
        # A skipped step is never silent, nor that somebody has become slow.
        news = not record.taken or bool(record.slow) > self._slow
        self._slow = bool(record.slow)
        if record.step % self._every == 0 or record.step == self._steps or news:
            self.say(step_line(record, self._steps))

    def evaluation(self, record: EvaluationRecord) -> None:
        self.say(evaluation_line(record))

    def say(self, words: str) -> None:
        show(words)

    def close(self) -> None:
        pass


class _LiveDisplay:
    def __init__(self, steps: int, first: int) -> None:
        self._steps = steps
        self._begun = time.monotonic()
        self._losses = History()
        self._console = Console()
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(None, complete_style="cyan", finished_style="green", pulse_style="cyan"),
            MofNCompleteColumn(),
            TextColumn("ETA {task.fields[left]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("step", total=steps, completed=first - 1, left="n/a")
        self._live = Live(self._progress, console=self._console, refresh_per_second=4)
        self._live.start()
        self._held_out = "n/a"

    def step(self, record: StepRecord) -> None:
        self._progress.update(self._task, completed=record.step, left=clock(record.seconds_left))
        if record.taken and record.loss is not None:
            self._losses.add(record.loss)
        if not record.taken:
            self.say(step_line(record, self._steps))
        with outliving(sys.stdout):
            self._live.update(Group(self._table(record), self._progress))

    def evaluation(self, record: EvaluationRecord) -> None:
        bits = record.bits_per_byte
        unit = "" if bits is None else f", {bits:.3f} bits/byte"
        if record.name == HELD_OUT:
            self._held_out = f"{loss_of(record)}{unit} (step {record.step})"
        self.say(evaluation_line(record))

    def say(self, words: str) -> None:
        with outliving(sys.stdout):
            self._live.console.print(words, markup=False, highlight=False)

    def close(self) -> None:
        with outliving(sys.stdout):
            self._live.stop()

    def _table(self, record: StepRecord) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, value in self._rows(record):
            table.add_row(name, Text(value))
        return table

    def _rows(self, record: StepRecord) -> Iterator[tuple[str, str]]:
        bits = record.bits_per_byte
        yield "loss", loss_of(record) + ("" if bits is None else f", {bits:.3f} bits/byte")
        if self._losses.values:
            yield "loss so far", self._history()
        if record.router_loss is not None:
            yield "router loss", f"{record.router_loss:.4f}"
        yield "held out", self._held_out
        yield "tokens seen", count(record.tokens)
        yield "elapsed", clock(time.monotonic() - self._begun)
        yield (
            "throughput",
            f"{record.tokens_per_second:,.0f} tokens/s, "
            f"{record.tokens_per_second_per_gpu:,.0f} per GPU, MFU {percent(record.mfu)}",
        )
        yield "learning rate", f"{record.learning_rate:.2e}"
        yield "gradient norm", f"{record.norm:.3f}"
        yield "memory, rank 0", size(record.memory_bytes)
        yield (
            "sent in a step",
            f"{size(record.bytes_between_nodes)} between nodes, "
            f"{size(record.bytes_inside_nodes)} inside; "
            + ("as predicted" if record.traffic_as_predicted else "NOT as predicted"),
        )
        for hop, spent, exposed in (
            ("hop 1", record.hop_1_seconds, record.hop_1_exposed),
            ("hop 2", record.hop_2_seconds, record.hop_2_exposed),
        ):
            yield hop, f"{seconds(spent)}, exposed {seconds(exposed)}"
        if record.slow is not None:
            yield "SLOW", record.slow

    def _history(self) -> str:
        """Draw the losses of this process, from the first to the last."""
        signs = _ASCII if self._console.options.ascii_only else _BLOCKS
        ends = f"{self._losses.first:.3f} ", f" {self._losses.last:.3f}"
        room = self._console.width - len("memory, rank 0") - 4 - len("".join(ends))
        return ends[0] + drawn(self._losses.values, max(room, 1), signs) + ends[1]


class History:
    """Numbers that come one after the other, of which a bounded number of means is kept."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each = 1  # numbers in a mean
        self._open: list[float] = []  # in none yet
        self.first = self.last = math.nan

    def add(self, value: float) -> None:
        """Take the next one."""
        if not self.values:
            self.first = value
        self.last = value
        self._open.append(value)
        if len(self._open) == self._each:
            self._means.append(statistics.fmean(self._open))
            self._open = []
        if len(self._means) == _MOST_MEANS:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(one + other) / 2 for one, other in pairs]
            self._each *= 2

    @property
    def values(self) -> list[float]:
        """What is kept, in order; the last mean may be of fewer numbers than the others."""
        return [*self._means, *([statistics.fmean(self._open)] if self._open else [])]


def drawn(values: Sequence[float], most: int, signs: str) -> str:
    """Draw values as one line of signs, the lowest value as the first sign.

    Args:
        values: in order; each sign is the mean of as many as there have to be.
        most: how many signs there is room for.
        signs: from low to high.
    """
    each = -(-len(values) // most)
    means = [statistics.fmean(values[n : n + each]) for n in range(0, len(values), each)]
    low, high = min(means), max(means)
    scale = (len(signs) - 1) / (high - low) if high > low else 0.0
    return "".join(signs[round((mean - low) * scale)] for mean in means)
