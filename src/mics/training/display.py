"""What a person sees while a run goes on: plain lines, or a live table on a terminal."""

from __future__ import annotations

import sys
from typing import Literal, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from mics.quantities import clock, percent, seconds, size
from mics.ranks.console import outliving, show
from mics.training.record import EvaluationRecord, StepRecord


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
    """Open a live display on a terminal (or when forced), else one of lines."""
    if live == "on" or (live == "auto" and sys.stdout.isatty()):
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
        self._console = Console()
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(bar_width=None),
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
        if not record.taken:
            self.say(step_line(record, self._steps))
        with outliving(sys.stdout):
            self._live.update(Group(self._table(record), self._progress))

    def evaluation(self, record: EvaluationRecord) -> None:
        bits = record.bits_per_byte
        unit = "" if bits is None else f", {bits:.3f} bits/byte"
        self._held_out = f"{_loss(record)}{unit} (step {record.step})"
        self.say(evaluation_line(record))

    def say(self, words: str) -> None:
        with outliving(sys.stdout):
            self._live.console.print(words, markup=False, highlight=False)

    def close(self) -> None:
        with outliving(sys.stdout):
            self._live.stop()

    def _table(self, record: StepRecord) -> Table:
        bits = record.bits_per_byte
        rows = [
            ("loss", _loss(record) + ("" if bits is None else f", {bits:.3f} bits/byte")),
            *([] if record.router_loss is None else [("router loss", f"{record.router_loss:.4f}")]),
            ("held out", self._held_out),
            ("learning rate", f"{record.learning_rate:.2e}"),
            ("gradient norm", f"{record.norm:.3f}"),
            (
                "throughput",
                f"{record.tokens_per_second:,.0f} tokens/s, "
                f"{record.tokens_per_second_per_gpu:,.0f} per GPU, MFU {percent(record.mfu)}",
            ),
            ("memory, rank 0", size(record.memory_bytes)),
            (
                "sent in a step",
                f"{size(record.bytes_between_nodes)} between nodes, "
                f"{size(record.bytes_inside_nodes)} inside; "
                + ("as predicted" if record.traffic_as_predicted else "NOT as predicted"),
            ),
            (
                "hop 1",
                f"{seconds(record.hop_1_seconds)}, exposed {seconds(record.hop_1_exposed)}",
            ),
            (
                "hop 2",
                f"{seconds(record.hop_2_seconds)}, exposed {seconds(record.hop_2_exposed)}",
            ),
            *([] if record.slow is None else [("SLOW", record.slow)]),
        ]
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(f"[dim]{name}[/dim]", value)
        return table


def step_line(record: StepRecord, steps: int) -> str:
    """Write a step as one line."""
    bits = f"  {record.bits_per_byte:.3f} bits/byte" if record.bits_per_byte is not None else ""
    if record.router_loss is not None:
        bits += f"  router loss {record.router_loss:.4f}"
    skipped = "" if record.taken else f"  SKIPPED ({record.skipped})"
    wire = (
        "" if record.bytes_on_wire is None else f", on node 0's wire {size(record.bytes_on_wire)}"
    )
    return (
        f"step {record.step:>{len(str(steps))}}/{steps}{skipped}  loss {_loss(record)}{bits}"
        f"  lr {record.learning_rate:.1e}  norm {record.norm:.2f}"
        f"  {record.tokens_per_second:,.0f} tok/s ({record.tokens_per_second_per_gpu:,.0f}/GPU)"
        f"  MFU {percent(record.mfu)}  mem {size(record.memory_bytes)}"
        f"  sent between nodes {size(record.bytes_between_nodes)}, inside"
        f" {size(record.bytes_inside_nodes)}{wire}"
        f"  hop 1 {seconds(record.hop_1_seconds)} ({seconds(record.hop_1_exposed)} exposed)"
        f"  hop 2 {seconds(record.hop_2_seconds)} ({seconds(record.hop_2_exposed)} exposed)"
        f"  ETA {clock(record.seconds_left)}" + (f"  SLOW: {record.slow}" if record.slow else "")
    )


def evaluation_line(record: EvaluationRecord) -> str:
    """Write an evaluation as one line."""
    bits = f"  {record.bits_per_byte:.3f} bits/byte" if record.bits_per_byte is not None else ""
    return f"held out after step {record.step}: loss {_loss(record)}{bits}"


def _loss(record: StepRecord | EvaluationRecord) -> str:
    """Nats per predicted token; nobody can say where no token was to be predicted."""
    return "n/a" if record.loss is None else f"{record.loss:.4f}"
