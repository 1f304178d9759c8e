"""How a script that has been seen enough of is ended: when every rank has written its report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from mics.ranks.files import write_whole

_PATIENCE_SECONDS = 10.0  # for ranks that are behind; a socket that is closed would end them


class Enough(SystemExit):
    """Ends a script that has taken all steps it was watched for, as ``sys.exit`` would.

    No script catches it unasked, and a thread of its own ends by it without a word.
    """


class Leaving:
    """A rank's report, and its end.

    Args:
        folder: of all reports.
        rank: this rank.
        world: all ranks.
        report: makes the report's text.
    """

    def __init__(self, folder: Path, rank: int, world: int, report: Callable[[], str]) -> None:
        self._folder, self._rank, self._world, self._report = folder, rank, world, report
        self.said = False

    def say(self) -> None:
        """Write the report, once."""
        if not self.said:
            write_whole(report_of(self._folder, self._rank), self._report())
        self.said = True

    def enough(self) -> None:
        """End the script.

        Raises:
            Enough: always, but where the script goes on although it was ended: then it is over.
        """
        if self.said:
            os._exit(0)
        self.say()
        self.wait_for_others()
        raise Enough

    def wait_for_others(self) -> None:
        """Keep connections open until every rank is as far."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline and not all_written(self._folder, self._world):
            time.sleep(0.01)


def report_of(folder: Path, rank: int) -> Path:
    """Where a rank's report is."""
    return folder / f"{rank}.json"


def all_written(folder: Path, world: int) -> bool:
    """Whether every rank has written its report."""
    return all(report_of(folder, rank).exists() for rank in range(world))
