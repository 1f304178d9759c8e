"""Where the numbers of a run go: console, ``metrics.jsonl``, trackers, the picture at the end."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TextIO

import torch
import torch.distributed as dist

from mics.errors import ConfigError
from mics.models.presets import rule_of
from mics.quantities import count, size
from mics.ranks.columns import fitted
from mics.ranks.console import alarm, say, show
from mics.ranks.device import on_accelerator
from mics.ranks.drawing import draw
from mics.training.display import open_display
from mics.training.meter import Meter
from mics.training.page.entries import METRICS
from mics.training.page.writing import PAGE, write_page
from mics.training.plot import plot_run
from mics.training.progress import Progress
from mics.training.record import (
    BeginRecord,
    EndRecord,
    EvaluationRecord,
    LatenessRecord,
    Record,
    RollbackRecord,
    SaveRecord,
    SkipRecord,
    StepRecord,
)
from mics.training.settings import as_plain, as_toml
from mics.training.setup import Run
from mics.training.trackers import open_trackers
from mics.version import __version__

PLOT = "plot.png"
_COMPARED = 20  # steps until predictions are compared


class Reporter(Protocol):
    """Shows and records a run while it is entered."""

    def __enter__(self) -> Reporter:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """Hand over what is still buffered, and leave the terminal as it was."""

    def step(self, record: StepRecord) -> None:
        """A step has ended."""

    def evaluation(self, record: EvaluationRecord | None) -> None:
        """An evaluation has ended; ``None``: there is nothing held out."""

    def lateness(self, record: LatenessRecord) -> None:
        """The ranks have been compared."""

    def skipped(self, record: SkipRecord) -> None:
        """A step was skipped."""

    def saved(self, record: SaveRecord) -> None:
        """A checkpoint was written, or is being written."""

    def rolled_back(self, record: RollbackRecord) -> None:
        """The run has gone back to an earlier state."""

    def end(self, at: Progress, checkpoint: Path | None, text: str | None) -> None:
        """The run has ended: show the sample, the picture, the bytes and what to do next."""


def open_reporter(run: Run, meter: Meter, at: Progress) -> Reporter:
    """Make the reporter of this rank: rank 0's speaks, the others' are silent.

    Args:
        run: what is trained.
        meter: what measures it.
        at: where it begins.

    Raises:
        ConfigError: the metrics file cannot be opened.
    """
    return _Speaker(run, meter, at) if dist.get_rank() == 0 else _Silence()


class _Silence:
    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        pass

    def evaluation(self, record: EvaluationRecord | None) -> None:
        pass

    def lateness(self, record: LatenessRecord) -> None:
        pass

    def skipped(self, record: SkipRecord) -> None:
        pass

    def saved(self, record: SaveRecord) -> None:
        pass

    def rolled_back(self, record: RollbackRecord) -> None:
        pass

    def end(self, at: Progress, checkpoint: Path | None, text: str | None) -> None:
        pass


class _Speaker:
    """Shows and records as rank 0.

    A disk that is full must not end a run that computes well: what cannot be recorded is said
    once, counted, and said again at the end.
    """

    def __init__(self, run: Run, meter: Meter, at: Progress) -> None:
        self._run = run
        self._meter = meter
        self._begin = at
        self._folder = run.config.run.folder
        self._metrics = _open_to_append(self._folder / METRICS)
        (self._folder / "config.toml").write_text(as_toml(run.config))
        self._trackers = open_trackers(run.config.log, self._folder, as_plain(run.config))
        self._lost = 0
        self._not_as_predicted: list[int] = []
        self._last: StepRecord | None = None
        self._seconds: list[float] = []
        show(_header(run, meter, at))
        self._record(_beginning(run, meter, at))
        log = run.config.log
        self._display = open_display(
            log.live, steps=run.config.run.steps, first=at.step + 1, every=log.every
        )

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()
        if self._lost:
            alarm(f"{self._lost} entries of {self._folder / METRICS} could not be written.")
        with suppress(OSError):  # of entries that are counted already
            self._metrics.close()
        for tracker in self._trackers:
            tracker.close()

    def step(self, record: StepRecord) -> None:
        if not self._run.folder.is_there():
            self._begin_anew(record.step)
        self._last = record
        self._seconds.append(record.seconds)
        if len(self._seconds) == _COMPARED:
            say(self._against_expected(record))
        if not record.traffic_as_predicted:
            self._not_as_predicted.append(record.step)
        self._display.step(record)
        self._record(record)

    def evaluation(self, record: EvaluationRecord | None) -> None:
        if record is not None:
            self._display.evaluation(record)
            self._record(record)

    def lateness(self, record: LatenessRecord) -> None:
        if self._run.config.log.stragglers:
            self._display.say(f"ranks after step {record.step}\n{record.lateness}")
        self._record(record)

    def skipped(self, record: SkipRecord) -> None:
        self._display.say(str(record))
        self._record(record)

    def saved(self, record: SaveRecord) -> None:
        self._record(record)

    def rolled_back(self, record: RollbackRecord) -> None:
        alarm(str(record))
        self._record(record)

    def end(self, at: Progress, checkpoint: Path | None, text: str | None) -> None:
        self._display.close()
        words = []
        if text is not None:
            words += ["", "sample", *(f"  | {line}" for line in text.splitlines())]
        kept = None if checkpoint is None else str(checkpoint)
        finished = at.step >= self._run.config.run.steps
        self._record(EndRecord(at.step, kept, text, finished))
        words += self._pictures()
        words += ["", *self._traffic(at)]
        words += ["", *self._next(at, checkpoint)]
        show("\n".join(words))

    def _pictures(self) -> list[str]:
        """Draw the run, and say where."""
        metrics, name = self._folder / METRICS, self._run.config.model.name
        ways: dict[str, tuple[str, Callable[[Path], bool]]] = {
            "plot": (PLOT, lambda file: plot_run(metrics, file, name)),
            "page": (PAGE, lambda file: write_page(self._folder, file)),
        }
        words = []
        for what, (file_name, write) in ways.items():
            file = self._folder / file_name
            try:
                if write(file):
                    words.append(f"{what:<12}{file}")
            except (OSError, ConfigError) as error:
                alarm(f"{file} cannot be written: {error}.")
        return ["", *words] if words else []

    def _begin_anew(self, step: int) -> None:
        """Somebody has deleted or moved the folder: make another one, hold it, and say so.

        Raises:
            CheckpointError: another job has taken its place.
        """
        words = f"THE FOLDER OF THE RUN IS GONE: {self._folder} was deleted or moved by step {step}"
        try:
            self._run.folder.take()
            with suppress(OSError):
                self._metrics.close()
            self._metrics = _open_to_append(self._folder / METRICS)
            (self._folder / "config.toml").write_text(as_toml(self._run.config))
        except (OSError, ConfigError) as error:
            alarm(f"{words}, and cannot be made again: {error}. Training goes on.")
            return
        alarm(
            f"{words}, with its checkpoints and metrics. It is made again, and training goes on; "
            "the next checkpoint is the only one. To end with one: SIGTERM."
        )

    def _against_expected(self, record: StepRecord) -> str:
        """Compare what was predicted with what was measured."""
        expected, before = self._run.expected, self._run.memory_before
        time = "n/a" if expected.step_seconds is None else f"{expected.step_seconds:.3f} s"
        memory = "n/a" if expected.memory_bytes is None else size(expected.memory_bytes)
        grown = "n/a"
        if record.memory_bytes is not None and before is not None:
            grown = size(record.memory_bytes - before)
            if not on_accelerator(self._run.device):  # the system counts processes, not tensors
                grown += " (of the process, libraries included)"
        return (
            f"after {_COMPARED} steps, predicted against measured: step {time}, "
            f"{statistics.median(self._seconds[1:]):.3f} s; memory for training "
            f"{memory}, {grown}; between nodes "
            f"{size(self._meter.predicted_between_nodes)}, {size(record.bytes_between_nodes)}"
        )

    def _traffic(self, at: Progress) -> list[str]:
        if self._last is None:
            return [f"no step was taken: the run is at step {at.step} of {self._steps}"]
        last, meter = self._last, self._meter
        taken = len(self._seconds)
        equal = taken - len(self._not_as_predicted)
        wrong = ""
        if self._not_as_predicted:
            wrong = f"; NOT in steps {', '.join(map(str, self._not_as_predicted[:8]))}"
        return [
            f"{'bytes sent per step':<24}{'predicted':>16}{'counted':>16}",
            f"{'  between nodes':<24}{meter.predicted_between_nodes:>16,}"
            f"{last.bytes_between_nodes:>16,}",
            f"{'  inside nodes':<24}{meter.predicted_inside_nodes:>16,}"
            f"{last.bytes_inside_nodes:>16,}",
            f"  counted = predicted, every rank, stage and link: {equal} of {taken} steps{wrong}",
        ]

    def _next(self, at: Progress, checkpoint: Path | None) -> list[str]:
        words = [f"step {at.step} of {self._steps}, {count(at.tokens)} tokens"]
        if checkpoint is None:
            return [*words, "no checkpoint was written"]
        words += [f"checkpoint  {checkpoint}"]
        if at.step < self._steps:
            # A checkpoint that was named is where the same command would begin once more.
            named = isinstance(self._run.config.run.resume, Path)
            auto = " with --run.resume auto" if named else ""
            return [*words, f"next        the same command{auto} goes on from there"]
        adapters = " --adapters" if self._run.config.lora.rank else ""
        epochs = self._run.epochs
        longer = f"steps {2 * self._steps}" if epochs is None else f"epochs {2 * epochs:g}"
        return [
            *words,
            f"next        mics export {checkpoint} {self._folder / 'exported'}{adapters}",
            f"            or the same command with --run.{longer}, to go on",
        ]

    @property
    def _steps(self) -> int:
        return self._run.config.run.steps

    def _record(self, record: Record) -> None:
        try:
            entry = json.loads(record.as_json()) | {"time": round(time.time(), 3)}
            self._metrics.write(json.dumps(entry) + "\n")
            self._metrics.flush()
            for tracker in self._trackers:
                tracker.log(record.step, record.as_scalars())
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                begins = isinstance(record, BeginRecord)
                what = "The beginning" if begins else f"Step {record.step}"
                alarm(f"{what} cannot be recorded: {error}. Training goes on.")


def _beginning(run: Run, meter: Meter, at: Progress) -> BeginRecord:
    expected, topology = run.expected, run.topology
    return BeginRecord(
        step=at.step,
        steps=run.config.run.steps,
        model=run.config.model.name,
        parameters=run.parameters,
        device=run.device.type,
        ranks=topology.world,
        nodes=topology.nodes,
        gpus_per_node=topology.gpus_per_node,
        partition=topology.partition,
        micro_steps=run.batch.micro_steps,
        global_batch=run.batch.global_batch,
        sequence=run.sequence,
        predicted_between_nodes=meter.predicted_between_nodes,
        predicted_inside_nodes=meter.predicted_inside_nodes,
        full_sharding_between_nodes=meter.full_sharding_between_nodes,
        full_sharding_inside_nodes=meter.full_sharding_inside_nodes,
        predicted_seconds=expected.step_seconds,
        predicted_memory_bytes=expected.memory_bytes,
        memory_before_bytes=run.memory_before,
        mics=__version__,
        torch=torch.__version__,
    )


def _header(run: Run, meter: Meter, at: Progress) -> str:
    data, batch = run.data, run.batch
    steps_left = run.config.run.steps - at.step
    end = at.position + steps_left * batch.global_batch
    epochs = f", {end / data.train.num_sequences:.2f} epochs in the end"
    lines = [
        f"model   {run.config.model.name}: {type(run.model).__name__.removeprefix('FSDP')}, "
        f"{count(run.parameters)} parameters{_trained(run)}, {run.sequence} tokens per sequence",
        *(f"shape   {words}" for words in rule_of(run.config.model.name)),
        *(f"data    {line}" for line in data.lines(end)),
        f"batch   {batch}",
        f"plan    {run.planned or 'n/a'}",
        *(f"ranks   {words}" for words in [batch.on(run.ranks)] if words),
        f"steps   {at.step + 1} to {run.config.run.steps}{'' if len(data.sources) > 1 else epochs}",
        f"bytes   {size(meter.predicted_between_nodes)} between nodes and "
        f"{size(meter.predicted_inside_nodes)} inside them per step, predicted",
        "",
        draw(run.topology),
    ]
    return "\n".join([as_toml(run.config), fitted("\n".join(lines))]) + "\n"


def _trained(run: Run) -> str:
    """How many of the parameters train, where not all of them do."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return "" if trained == run.parameters else f", of which {count(trained)} train"


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
