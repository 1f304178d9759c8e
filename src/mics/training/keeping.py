"""The checkpoints of a run: when they are written, what else they hold, where to go on from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mics.checkpoint import (
    PendingSave,
    load,
    newest_intact,
    prune,
    save,
    set_aside_newer,
    step_folder,
    step_of,
)
from mics.checkpoint.layout import ASSETS, MODEL_FILES, OPTIMIZER
from mics.checkpoint.manifest import read_manifest
from mics.errors import CheckpointError, ConfigError
from mics.models.small_files import OF_MODELS, small_files
from mics.ranks.console import alarm, say
from mics.training.optimisation import learning_rate
from mics.training.progress import Progress
from mics.training.setup import Run


class Keeper:
    """Writes the checkpoints of a run. One that cannot be written is an alarm, not the end."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._folder = run.config.run.folder
        self._pending: PendingSave | None = None
        self.newest: Path | None = None
        self.last_failed = False

    def resume(self) -> Progress:
        """Load what ``run.resume`` asks for and return how far that run had come. Collective.

        Raises:
            CheckpointError: it is damaged, or of another model.
            ConfigError: "never" in a folder that has checkpoints, or they saw other sequences.
        """
        wanted = self._run.config.run.resume
        found = newest_intact(self._folder) if isinstance(wanted, str) else wanted
        if found is None:
            return Progress()
        if wanted == "never":
            raise ConfigError(
                f"{self._folder} has checkpoints, and run.resume is never: two runs would mix.",
                numbers=f"The newest is {found.name}.",
                write="--run.folder <a new folder>, or --run.resume auto to go on",
            )
        if wanted != "auto":
            self._refuse_to_collide(found)
        elif dist.get_rank() == 0:
            for aside in set_aside_newer(self._folder, found):
                say(f"set aside as {aside}")
        for name, data in small_files(found / MODEL_FILES, OF_MODELS).items():
            self._run.assets.setdefault(f"model/{name}", data)
        if not _has_optimizer(found):  # imported weights
            load(found, model=self._run.model)
            say(f"starts from the weights of {found}; it has no optimizer state")
            return Progress()
        optimizer = self._run.optimizer
        options = [_options(group) for group in optimizer.param_groups]
        # The newest one was verified when it was found.
        loaded = load(
            found, model=self._run.model, optimizer=optimizer, verify=not isinstance(wanted, str)
        )
        taken = optimizer.param_groups[0]["lr"]
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)  # this run's options, not those of the run it goes on from
        at = self._progress(found, loaded.extra)
        self._announce_jump(at.step, float(taken))
        if step_of(found) == at.step and found.parent == self._folder:
            self.newest = found
        random = "" if loaded.random_restored else "; random state anew (other ranks)"
        say(f"goes on from {found}, step {at.step}{random}")
        return at

    def _announce_jump(self, step: int, taken: float) -> None:
        """Say where the learning rate does not go on as it was: a longer run, another schedule."""
        config, steps = self._run.config.optimizer, self._run.config.run.steps
        if step < 1 or step >= steps:
            return
        here = learning_rate(config, step, steps)
        if math.isclose(here, taken, rel_tol=1e-3):
            return
        say(
            f"THE LEARNING RATE JUMPS: step {step} was taken with {taken:.1e}, step {step + 1} is "
            f"with {learning_rate(config, step + 1, steps):.1e}, as {steps} steps, decay "
            f"{config.decay} and peak {config.learning_rate:.1e} have it. To go on without a jump: "
            f"--optimizer.learning-rate {taken:.4g} --optimizer.decay none --optimizer.warmup 0"
        )

    def _refuse_to_collide(self, found: Path) -> None:
        """A run from a named checkpoint would meet what its folder has already, and save nothing.

        Raises:
            ConfigError: the folder has newer ones, or some although the named one is elsewhere.
        """
        steps = [step for f in self._folder.glob("step-*") if (step := step_of(f)) is not None]
        own = step_of(found) if found.resolve().parent == self._folder.resolve() else None
        if not steps or own == max(steps):
            return
        newest = f"the newest is step-{max(steps):08d}"
        if own is None:
            raise ConfigError(
                f"{self._folder} has checkpoints, and run.resume names one elsewhere: two runs "
                "would mix.",
                numbers=f"run.resume is {found}, {newest}.",
                write="--run.resume auto to go on from the newest, or --run.folder <a new folder>",
            )
        raise ConfigError(
            f"{self._folder} has newer checkpoints than the one to go on from.",
            numbers=f"run.resume is {found.name}, {newest}.",
            write=f"--run.folder <a new folder> --run.resume {found}",
        )

    def _progress(self, found: Path, extra: Any) -> Progress:
        """Raises where the checkpoint is of another run's data, unless it was named."""
        try:
            at = Progress(*(int(extra[name]) for name in ("step", "position", "tokens")))
            data = str(extra["data"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{found} was not written by mics train: it does not say how far the data was.",
                numbers=f"Its extra has {', '.join(extra) or 'nothing'}.",
                write="mics.load in a loop of your own, or --model.weights to start from weights",
            ) from None
        if data == self._run.data.fingerprint:
            return at
        if self._run.config.run.resume == "auto":
            raise ConfigError(
                f"{found} was trained on other sequences than this run would go on with.",
                numbers=f"Text, tokenizer, sequence length and seed give {data} there and "
                f"{self._run.data.fingerprint} here.",
                write=f"the [data] and seed of {found / ASSETS / 'config.toml'}, or --run.resume "
                f"{found} to go on with new data",
            )
        say("the data is new: its order begins anew")
        return Progress(at.step, 0, at.tokens)

    def save(self, at: Progress) -> None:
        """Write a checkpoint of this step. Collective."""
        self.look_after_save(wait=True)
        config = self._run.config.checkpoint
        extra: dict[str, Any] = {
            "step": at.step,
            "position": at.position,
            "tokens": at.tokens,
            "data": self._run.data.fingerprint,
        }
        try:
            self._pending = save(
                step_folder(self._folder, at.step),
                model=self._run.model,
                optimizer=self._run.optimizer,
                extra=extra,
                assets=self._run.assets,
                asynchronous=config.asynchronous,
            )
        except CheckpointError as error:
            self._failed(error)

    def look_after_save(self, *, wait: bool = False) -> None:
        """Take note of a save that has ended; ``wait``: let it end first."""
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
        if dist.get_rank() == 0:
            prune(self._folder, self._run.config.checkpoint.keep)

    def _failed(self, error: CheckpointError) -> None:
        self.last_failed = True
        there = self.newest is not None and self.newest.is_dir()
        kept = f"{self.newest} is kept" if there else "there is none before it"
        alarm(f"CHECKPOINT NOT WRITTEN: {error}\n{kept}. Training goes on.")


def _has_optimizer(checkpoint: Path) -> bool:
    manifest = read_manifest(checkpoint)
    return any(name.startswith(OPTIMIZER) for name in (*manifest.tensors, *manifest.values))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
