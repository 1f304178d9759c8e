"""The state of a run in the memory of its nodes: kept after every step, for when ranks restart."""

from __future__ import annotations

import os
from typing import Any

from mics.checkpoint.peers import Peers
from mics.errors import ConfigError
from mics.ranks.console import alarm
from mics.ranks.skips import SkipRule
from mics.recovery.job import has_name, why_unusable
from mics.recovery.snapshots import Snapshots
from mics.training.progress import Progress
from mics.training.setup import Run


class Memory:
    """Keeps a run in memory, if it is to be kept. Collective, as are its methods."""

    def __init__(self, run: Run, rule: SkipRule) -> None:
        self._data, self._batch = run.data.fingerprint, run.batch
        self._at: dict[str, Any] = {}
        self._snapshots: Snapshots | None = None
        self._folder = run.config.run.folder
        # Agents of several nodes count their own restarts: what one has seen counts for all.
        mine = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        again = any(Peers().gather(mine))
        self._goes_on = again or run.config.run.resume == "auto"  # else it begins where it is told
        config = run.config.checkpoint
        if config.memory and _is_usable():
            self._snapshots = Snapshots(
                run.model,
                run.optimizer,
                extras={"progress": self._at, "rule": rule},
                job=_name(run),
                every=config.memory_every,
            )

    def recall(self) -> Progress | None:
        """Go back to the newest step that is in memory; ``None`` where there is none.

        Raises:
            ConfigError: it was trained on other sequences.
            CheckpointError: it is of another model or optimizer.
        """
        if self._snapshots is None:
            return None
        if not self._goes_on:
            self._snapshots.forget()
            return None
        if self._snapshots.recall(self._folder) is None:
            return None
        if self._at["data"] != self._data:
            raise ConfigError(
                "The state in memory was trained on other sequences than this run would go on "
                "with.",
                numbers=f"Text, tokenizer, sequence length and seed give {self._at['data']} there "
                f"and {self._data} here.",
                write="the same [data] and seed, or MICS_JOB=<another name> for another run",
            )
        self._batch.say_if_another(self._at)
        return self._progress()

    def keep(self, at: Progress) -> Progress:
        """Keep the run as it is; returns where it is: further back where replicas differed.

        Raises:
            RankError: a rank is gone.
            RecoveryError: replicas differ again and again.
        """
        if self._snapshots is None:
            return at
        self._at.clear()
        self._at.update(step=at.step, position=at.position, tokens=at.tokens, data=self._data)
        self._at.update(self._batch.kept())
        return at if self._snapshots.keep(at.step) == at.step else self._progress()

    def forget(self) -> None:
        """Take note that the run has gone back to a checkpoint: what is in memory is left."""
        if self._snapshots is not None:
            self._snapshots.forget()

    def close(self) -> None:
        """The run has ended well, and is kept elsewhere."""
        if self._snapshots is not None:
            self._snapshots.close()

    def _progress(self) -> Progress:
        return Progress(*(int(self._at[name]) for name in ("step", "position", "tokens")))


def _is_usable() -> bool:
    """Whether every node has memory to keep states in; says where one has not. Collective."""
    reasons = [why for why in Peers().gather(why_unusable()) if why]
    if reasons:
        alarm(
            f"THE STATE IS NOT KEPT IN MEMORY: {reasons[0]} (of {len(reasons)} rank(s)). Training "
            "goes on; a restart goes on from the newest checkpoint.\n"
            "Write: MICS_MEMORY=<a folder in memory>, or --checkpoint.no-memory"
        )
    return not reasons


def _name(run: Run) -> str | None:
    """The launcher's name for the job, or that of the folder, where no launcher restarts ranks."""
    if has_name() or "TORCHELASTIC_RESTART_COUNT" in os.environ:
        return None
    return str(Peers().together(run.folder.identity, only=0)[0])
