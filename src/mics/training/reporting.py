"""Where the numbers of a run go: console, ``metrics.jsonl``, trackers, the picture at the end."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mics.errors import ConfigError
from mics.training.config import TrainConfig
from mics.training.display import open_display
from mics.training.plot import plot_run
from mics.training.record import EvaluationRecord, StepRecord
from mics.training.trackers import open_trackers

METRICS = "metrics.jsonl"
PLOT = "plot.png"


class Reporter:
    """Shows and records a run; rank 0's alone.

    A disk that is full must not end a run that computes well: what cannot be recorded is said
    once, counted, and said again at the end.

    Args:
        config: of the run.
        settings: the same as nested plain values, for trackers.
        title: of the picture.
        first_step: the first one that will be taken.

    Raises:
        ConfigError: the metrics file cannot be opened.
    """

    def __init__(
        self, config: TrainConfig, *, settings: dict[str, Any], title: str, first_step: int
    ) -> None:
        self._folder = config.run.folder
        self._title = title
        self._metrics = _open_to_append(self._folder / METRICS)
        self._trackers = open_trackers(config.log, self._folder, settings)
        self._display = open_display(
            config.log.live, steps=config.run.steps, first=first_step, every=config.log.every
        )
        self._lost = 0

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._display.close()
        if self._lost:
            print(f"!!! {self._lost} entries of {self._folder / METRICS} are lost", flush=True)
        for tracker in self._trackers:
            tracker.close()

    def say(self, words: str) -> None:
        """Say something that stays."""
        self._display.say(words)

    def alarm(self, words: str) -> None:
        """Say something that nobody may miss."""
        line = "!" * 88
        self._display.say(f"{line}\n{words}\n{line}")

    def step(self, record: StepRecord) -> None:
        """A step has ended."""
        self._display.step(record)
        self._record(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """An evaluation has ended."""
        self._display.evaluation(record)
        self._record(record)

    def plot(self) -> Path:
        """Draw the run, all its parts together, and return where."""
        picture = self._folder / PLOT
        plot_run(self._folder / METRICS, picture, self._title)
        return picture

    def _record(self, record: StepRecord | EvaluationRecord) -> None:
        try:
            self._metrics.write(record.as_json() + "\n")
            self._metrics.flush()
            for tracker in self._trackers:
                tracker.log(record.step, record.as_scalars())
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                self.alarm(f"cannot record step {record.step}: {error}. Training goes on.")


def _open_to_append(path: Path) -> TextIO:
    try:
        # A line that a killed process left half-written must not swallow the next one.
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        file = path.open("a")
        file.write("\n" if torn else "")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}.", write="--run.folder <a writable folder>"
        ) from None
    return file
