"""How far long work on bytes has got, on standard error."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mics.quantities import clock
from mics.ranks.console import say

_QUIET_SECONDS = 2.0  # shorter work says nothing
_LINE_EVERY = 30.0  # where standard error is not a terminal


class TextProgress:
    """A bar on a terminal, a line now and then elsewhere; silent while work is short."""

    def __init__(self) -> None:
        self._start = self._said = time.monotonic()
        self._bar: Progress | None = None
        self._begun = ("", self._start, 0)  # what is being done, since when, and how far it was

    def __enter__(self) -> TextProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes (0: unknown) of ``what`` are done."""
        now = time.monotonic()
        if what != self._begun[0]:
            self._begun = (what, now, done)
        if now - self._start < _QUIET_SECONDS:
            return
        if sys.stderr.isatty():
            self._show_bar(what, done, total)
        elif now - self._said >= _LINE_EVERY:
            self._said = now
            of = f" of {total / 1e6:,.0f}" if total else ""
            amount = f", {done / 1e6:,.0f}{of} MB" if done or total else ""
            say(f"{what}{amount}{self._pace(now, done, total)}")

    def _pace(self, now: float, done: int, total: int) -> str:
        """How fast it goes, and how long it will take, where that can be known."""
        _, since, before = self._begun
        if total == 0 or now <= since or done <= before:
            return ""
        rate = (done - before) / (now - since)
        return f", {rate / 1e6:,.2f} MB/s, {clock((total - done) / rate)} left"

    def _show_bar(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._shown = what
            self._task = self._bar.add_task(what, completed=done, total=total or None)
        elif what != self._shown:  # the pace of other work says nothing of this
            self._shown = what
            self._bar.reset(self._task, completed=done, total=total or None)
        self._bar.update(self._task, description=what, completed=done, total=total or None)
