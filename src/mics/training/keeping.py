"""The checkpoints of a run: when to write, what else they hold, where to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from mics.checkpoint import PendingSave, load, newest_intact, prune, save, step_folder
from mics.errors import CheckpointError, ConfigError
from mics.training.config import CheckpointConfig
from mics.training.progress import Progress


class Keeper:
    """Writes the checkpoints of one run; a save that fails is an alarm, never the end of the run.

    Args:
        folder: of the run.
        config: how many to keep, whether to write beside the next steps.
        model: sharded by mics.
        optimizer: its optimizer.
        data: identity of the order of sequences; a checkpoint of another order is refused.
        assets: small files that every checkpoint holds, by name.
        alarm: told, on every rank, what could not be written.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: str,
        assets: Mapping[str, bytes],
        alarm: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._data = data
        self._assets = assets
        self._alarm = alarm
        self._pending: PendingSave | None = None
        self.newest: Path | None = None
        self.last_failed = False

    def resume(self, wanted: str | Path) -> Progress:
        """Load what ``run.resume`` names and return how far that run had come. Collective.

        Raises:
            CheckpointError: it is damaged, or of another model.
            ConfigError: "never" in a folder that has checkpoints, or another order of sequences.
        """
        found = newest_intact(self._folder) if isinstance(wanted, str) else wanted
        if found is None:
            return Progress()
        if wanted == "never":
            raise ConfigError(
                f"{self._folder} holds the checkpoints of an earlier run, and run.resume is "
                '"never": two runs would mix.',
                numbers=f"The newest is {found.name}.",
                write="--run.folder <a new folder>, or --run.resume auto to go on",
            )
        loaded = load(found, model=self._model, optimizer=self._optimizer)
        at = Progress(*(int(loaded.extra[name]) for name in ("step", "position", "tokens")))
        self.newest = found
        if loaded.extra["data"] == self._data:
            return at
        if wanted == "auto":
            raise ConfigError(
                f"{found} was trained on other sequences than this run's.",
                numbers=f"Data, tokenizer, sequence length and seed there give "
                f"{loaded.extra['data']}, here {self._data}.",
                write=f"the data options of {found / 'assets/config.toml'}, or --run.resume "
                f"{found} to go on with new data from its start",
            )
        return Progress(at.step, 0, at.tokens)

    def save(self, at: Progress) -> None:
        """Write a checkpoint, unless this step's is there. Collective."""
        self.look_after_pending(wait=True)
        if at.step == 0 or (self.newest is not None and at.step == step_of(self.newest)):
            return
        target = step_folder(self._folder, at.step)
        extra = {"step": at.step, "position": at.position, "tokens": at.tokens, "data": self._data}
        try:
            self._pending = save(
                target,
                model=self._model,
                optimizer=self._optimizer,
                extra=extra,
                assets=self._assets,
                asynchronous=self._config.asynchronous,
            )
        except CheckpointError as error:
            self._failed(error)

    def look_after_pending(self, *, wait: bool = False) -> None:
        """Take note of a save that has ended; ``wait`` for it to end."""
        pending = self._pending
        if pending is None or not (wait or pending.done()):
            return
        self._pending = None
        try:
            pending.wait()
        except CheckpointError as error:
            self._failed(error)
            return
        self.newest, self.last_failed = pending.path, False
        prune(self._folder, self._config.keep)

    def _failed(self, error: CheckpointError) -> None:
        self.last_failed = True
        kept = f"{self.newest} is kept" if self.newest else "there is none before it"
        self._alarm(f"CHECKPOINT NOT WRITTEN: {error}\n{kept}; training goes on.")
