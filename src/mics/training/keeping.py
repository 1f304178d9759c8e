"""The checkpoints of a run: when they are written, what else they hold, where to go on from."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mics.checkpoint import (
    Loaded,
    PendingSave,
    load,
    newest_intact,
    prune,
    save,
    set_aside_newer,
    step_folder,
    step_of,
    steps_of,
)
from mics.checkpoint.layout import ASSETS, MODEL_FILES, OPTIMIZER
from mics.checkpoint.manifest import read_manifest
from mics.checkpoint.peers import Peers
from mics.errors import CheckpointError, ConfigError
from mics.models.small_files import OF_MODELS, small_files
from mics.ranks.console import alarm, say
from mics.ranks.skips import SkipRule
from mics.ranks.whereabouts import during
from mics.training.progress import Progress
from mics.training.schedules import learning_rate
from mics.training.setup import Run

_RULE = "skips"
_MOST = 2**53


class Keeper:
    """Writes the checkpoints of a run. One that cannot be written is an alarm, not the end.

    Args:
        run: what is trained; where it goes on from a state it is another one, of the same length
            in epochs.
        rule: says which steps are skipped; it is kept and resumed with the rest.
    """

    def __init__(self, run: Run, rule: SkipRule) -> None:
        self.run = run
        self._rule = rule
        self._back_to: int | None = None  # the step that the run has last gone back to
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
        wanted = self.run.config.run.resume
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
        else:
            self._set_aside_newer(found)
        self._take_assets(found)
        if not _has_optimizer(found):  # imported weights
            load(found, model=self.run.model)
            say(f"starts from the weights of {found}; it has no optimizer state")
            return Progress()
        # The newest one was verified when it was found.
        loaded, taken = self._load(found, verify=not isinstance(wanted, str))
        at = self._progress(found, loaded.extra)
        self._resume_rule(found, loaded.extra)
        self.run = self.run.going_on(at)
        self._announce_jump(at.step, taken)
        self.run.batch.say_if_another(loaded.extra)
        if step_of(found) == at.step and found.parent == self._folder:
            self.newest = found
        random = "" if loaded.random_restored else "; random state anew (other ranks)"
        say(f"goes on from {found}, step {at.step}{random}")
        return at

    def go_on(self, at: Progress) -> Progress:
        """Take note that the state comes from memory, not from a checkpoint; returns ``at``.

        Small files that only a checkpoint has go on into the next ones. No tensor is read.
        """
        with contextlib.suppress(OSError):
            steps = steps_of(self._folder)
            self.newest = step_folder(self._folder, steps[0]) if steps else None
            if self.newest is not None:
                self._take_assets(self.newest)
        return at

    def _set_aside_newer(self, found: Path) -> None:
        """Let the checkpoints behind the one that the run goes on from be out of its way."""
        if dist.get_rank() == 0:
            for aside in set_aside_newer(self._folder, found):
                say(f"set aside as {aside}")

    def _take_assets(self, found: Path) -> None:
        for name, data in small_files(found / MODEL_FILES, OF_MODELS).items():
            self.run.assets.setdefault(f"model/{name}", data)

    def go_back(self, at: Progress) -> tuple[Progress, Path] | None:
        """Load the newest state that was kept, and go on behind all data so far. Collective.

        Where every step since the last time was skipped, it is the one before that.

        Args:
            at: where the run is; all of its latest steps were skipped.

        Returns:
            Where it is now, and the checkpoint; ``None`` where there is none to go back to.

        Raises:
            CheckpointError: there are checkpoints, but none is intact.
        """
        self.look_after_save(wait=True)
        skipped = self._rule.in_a_row
        at_once = self._back_to is not None and at.step - self._back_to <= skipped
        found = newest_intact(self._folder, before=self._back_to if at_once else None)
        if found is None or not _has_optimizer(found):
            return None
        self._set_aside_newer(found)
        loaded, _ = self._load(found, verify=False)
        kept = self._progress(found, loaded.extra)
        self._resume_rule(found, loaded.extra)
        self._rule.begin_anew()
        self.newest, self._back_to = found, kept.step
        return Progress(kept.step, at.position, kept.tokens), found

    def _load(self, found: Path, *, verify: bool) -> tuple[Loaded, float]:
        """Load a checkpoint; return what else it held, and the learning rate it was taken with."""
        optimizer = self.run.optimizer
        options = [_options(group) for group in optimizer.param_groups]
        loaded = load(found, model=self.run.model, optimizer=optimizer, verify=verify)
        taken = float(optimizer.param_groups[0]["lr"])
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)  # this run's options, not those of the run it goes on from
        return loaded, taken

    def _resume_rule(self, found: Path, extra: Any) -> None:
        """Go on with the rule's state; a checkpoint from before it was kept has none."""
        if _RULE in extra:
            self._rule.load_state_dict(extra[_RULE])
        elif self._rule.looks_for_spikes:
            say(f"{found} does not say which losses and norms were usual: they are seen anew")

    def _announce_jump(self, step: int, taken: float) -> None:
        """Say where the learning rate does not go on as it was: a longer run, another schedule."""
        config, steps = self.run.config.optimizer, self.run.config.run.steps
        if step < 1 or step >= steps:
            return
        here, following = (learning_rate(config, one, steps) for one in (step, step + 1))
        if any(math.isclose(one, taken, rel_tol=1e-3) for one in (here, following)):
            return
        say(
            f"THE LEARNING RATE JUMPS: step {step} was taken with {taken:.1e}, step {step + 1} is "
            f"with {following:.1e}, as {steps} steps, decay "
            f"{config.decay} and peak {config.learning_rate:.1e} have it. To go on without a jump: "
            f"--optimizer.learning-rate {taken:.4g} --optimizer.decay none --optimizer.warmup 0"
            f"{self._same_shape(here, taken)}"
        )

    def _same_shape(self, here: float, taken: float) -> str:
        """Offer the schedule as it is, only lower or higher, so that it goes on from there."""
        config = self.run.config.optimizer
        if min(here, taken) <= 0 or config.decay == "none":
            return ""
        peak = config.learning_rate * taken / here
        return f"; or, falling as {config.decay} does: --optimizer.learning-rate {peak:.4g}"

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
            where = [extra[name] for name in ("step", "position", "tokens")]
            data = str(extra["data"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{found} was not written by mics train: it does not say how far the data was.",
                numbers=f"Its extra has {', '.join(extra) or 'nothing'}.",
                write="mics.load in a loop of your own, or --model.weights to start from weights",
            ) from None
        if any(type(one) is not int or not 0 <= one < _MOST for one in where):
            raise ConfigError(
                f"{found} says that the run is where no run can be.",
                numbers=f"step, position and tokens are {where}.",
                write="an older checkpoint: --run.resume <its folder>",
            )
        at = Progress(*where)
        if data == self.run.data.fingerprint:
            return at
        if self.run.config.run.resume == "auto":
            raise ConfigError(
                f"{found} was trained on other sequences than this run would go on with.",
                numbers=f"Text, tokenizer, sequence length and seed give {data} there and "
                f"{self.run.data.fingerprint} here.",
                write=f"the [data] and seed of {found / ASSETS / 'config.toml'}, or --run.resume "
                f"{found} to go on with new data",
            )
        say("the data is new: its order begins anew")
        return Progress(at.step, 0, at.tokens)

    def save(self, at: Progress) -> None:
        """Write a checkpoint of this step. Collective."""
        self.look_after_save(wait=True)
        folder = step_folder(self._folder, at.step)
        if Peers().together(folder.exists, only=0)[0]:  # this step is done for the second time
            self.newest, self.last_failed = folder, False
            return
        config = self.run.config.checkpoint
        extra: dict[str, Any] = {
            "step": at.step,
            "position": at.position,
            "tokens": at.tokens,
            "data": self.run.data.fingerprint,
            _RULE: self._rule.state_dict(),
            **self.run.batch.kept(),
        }
        try:
            self._pending = save(
                folder,
                model=self.run.model,
                optimizer=self.run.optimizer,
                extra=extra,
                assets=self.run.assets,
                asynchronous=config.asynchronous,
            )
        except CheckpointError as error:
            self._failed(error)

    @during("mics.save")
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
            prune(self._folder, self.run.config.checkpoint.keep)

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
