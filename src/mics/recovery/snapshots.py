"""Snapshots: the state of every rank in memory after each step, and the way back from there."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from mics.checkpoint.folder import newest_intact, step_folder
from mics.checkpoint.optimizers import Optimizers
from mics.checkpoint.peers import Peers
from mics.checkpoint.reading import load
from mics.checkpoint.writing import PendingSave, let_save_end, save
from mics.errors import RecoveryError
from mics.ranks.console import say, say_of_this_rank
from mics.ranks.whereabouts import during
from mics.recovery.agreeing import Agreeing
from mics.recovery.comparing import Comparing
from mics.recovery.healing import Recalled, Resting, look, recall
from mics.recovery.holders import Held, Seat, choose, next_generation
from mics.recovery.job import Hold, open_job
from mics.recovery.newcomers import Samples, leave, settle
from mics.recovery.own import Own, resting_name
from mics.recovery.places import Places
from mics.recovery.saved import extras_to_save, newer_than, restore_saved, set_aside
from mics.recovery.staging import Staging
from mics.recovery.state import State
from mics.recovery.turns import Turns
from mics.recovery.words import differs_at_the_end, healed, no_agreement_left, not_survived
from mics.recovery.writing import Outcome, Writing, restore_owns
from mics.sharding.average import EMA
from mics.version import __version__


class Snapshots:
    """Keeps what a rank would lose with its process, so that a restart goes on where it was.

    After each step every rank copies its shard of parameters and optimizer state, its random state
    and ``extras`` into a file in the memory of its node, beside the next step. A process that dies
    leaves the file; a node that dies leaves the files of the replicas. Works for a model sharded by
    mics and by plain FSDP2, under any launcher that starts the ranks again. Collective when made,
    as are its methods::

        snapshots = mics.Snapshots(model, optimizer, extras={"scheduler": scheduler})
        step = snapshots.restore()
        while step < steps:
            ...  # one step, from the data of this step
            step = snapshots.keep(step + 1)
        snapshots.close()

    Replicas compute the same bits, so after each kept step they are compared. Where one differs,
    by a bit that flipped, ``keep`` puts every rank back to the last step on which they agreed and
    returns that; the loop above then repeats the step.

    Args:
        model: sharded, or a plain module.
        optimizer: its optimizer, or several.
        ema: its moving average.
        extras: by name, what else is to be as it was: objects with ``state_dict`` and
            ``load_state_dict`` (schedulers, scalers, loaders), or dictionaries.
        job: names the job, so that its state is found again; by default the launcher's name for it.
        every: keep every so many steps. A restart repeats the steps since.
        compare: compare the replicas. Needs an arithmetic that is the same on all of them.

    Raises:
        RecoveryError: on every rank: the memory cannot be used, or an extra cannot be kept.
        DisagreementError: ranks were given other models, optimizers or names.
    """

    @during("mics.Snapshots")
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers | None = None,
        *,
        ema: EMA | None = None,
        extras: Mapping[str, Any] | None = None,
        job: str | None = None,
        every: int = 1,
        compare: bool = True,
    ) -> None:
        self._peers = Peers("mics_recovery")
        self._state = State(model, optimizer, ema, dict(extras or {}))
        self._every, self._compare = every, compare
        self._peers.together(lambda: self._check(job), kind=RecoveryError)
        self._state.open(self._peers)
        facts = self._state.facts()
        self._peers.agree(
            {
                "what trains": facts,
                "what snapshots keep": [*sorted(self._state.extras), f"every {every}, {compare}"],
            }
        )
        self._model = hashlib.sha256("\n".join([__version__, *facts]).encode()).hexdigest()[:16]
        rows = self._peers.gather([self._job.host, self._state.key()])
        self._seats = [Seat(rank, host, key) for rank, (host, key) in enumerate(rows)]
        self._me = self._seats[self._peers.rank]
        self._agreeing = Agreeing(self._seats, self._me.rank)
        self._comparing = Comparing(self._peers)
        self._staging = Staging()
        self._writing: Writing | None = None
        self._generation = 0
        self._turns = Turns(every, self._finish)
        self._checkpoints: Path | None = None
        self._rests: dict[int, Resting] = {}  # what ranks have of their own that are away
        self._newest = -1  # the newest step that is in every rank's memory
        self._places = Places(self._job, self._me.rank, self._seats, self._peers)
        self._said = False
        for one in self._state.optimizers:
            one.register_step_pre_hook(self._before_step)
        for words in not_survived(self._seats):
            say(words)

    def _check(self, job: str | None) -> None:
        """Raise where this rank cannot take part; take its place in the memory of its node."""
        if not isinstance(self._every, int) or self._every < 1:
            raise RecoveryError(
                "Snapshots are kept every 1, 2, 3, ... steps.",
                numbers=f"every = {self._every!r}.",
                write="every=1",
            )
        self._state.check()
        self._samples = Samples(self._state.model, self._peers.world)
        self._job = open_job(job)
        self._hold = Hold(self._job, self._peers.rank)
        self._hold.take()

    @property
    def finished(self) -> int:
        """The newest step that is known to be in the memory of every rank; -1 for none."""
        return self._newest

    # -- going back --------------------------------------------------------------------------------

    def restore(self, checkpoints: str | os.PathLike[str] | None = None) -> int:
        """Put everything back as it was after the newest step that can be had. Collective.

        From memory: the newest step of which every shard is held by some rank's node; ranks without
        it get it from a replica. Else, or if it is newer than all that is in memory, from the
        newest intact checkpoint that ``save`` of this class wrote. Checkpoints newer than a step
        that was taken from memory are renamed: their steps will be done again.

        Args:
            checkpoints: the folder of checkpoints; ``None`` for none.

        Returns:
            How many steps have been done: 0 at a new beginning.

        Raises:
            CheckpointError: what was found does not fit, or no checkpoint is intact.
            RecoveryError: on every rank: there are fewer ranks than kept the newest states, these
                have no whole copy, and there is no checkpoint. Nothing was removed.
        """
        folder = None if checkpoints is None else Path(checkpoints)
        step = self.recall(folder)
        if step is not None:
            return step
        found = None if folder is None else newest_intact(folder)
        if found is None:
            return 0
        loaded = load(
            found,
            model=self._state.model,
            optimizer=self._state.optimizer,
            ema=self._state.ema,
            verify=False,  # newest_intact has
        )
        step = restore_saved(found, loaded.extra, self._state.extras, self._peers)
        self._state.look(self._peers, now=True)
        self._turns.begin(step)
        say(f"goes on from {found}, step {step}")
        return step

    @during("mics.Snapshots.restore")
    def recall(self, checkpoints: Path | None = None) -> int | None:
        """Put everything back from memory alone; ``None``, and why is said, if it cannot be had.

        Args:
            checkpoints: the folder of checkpoints, of which one may be newer, or to be done again.

        Raises:
            CheckpointError: what was kept does not fit into this model, optimizer or extras.
            RecoveryError: as of ``restore``.
        """
        held = self._look()
        self._checkpoints = checkpoints
        choice = choose(self._seats, held, compare=self._compare)
        newer = newer_than(choice, held if self._compare else (), checkpoints, self._peers)
        found = None
        if newer is None:
            found = recall(self._job, held, self._seats, self._peers, compare=self._compare)
        if found is None:
            if held:
                leave(self._seats, held, newer, checkpoints, self._peers)
            self._begin_anew()
            return None
        self._take_over(found)
        say(f"goes on from memory, step {self._newest}{healed(self._seats, found.choice)}")
        return self._newest

    def forget(self) -> None:
        """Begin anew, whatever is in memory: it is removed. Collective."""
        self._look()
        self._begin_anew()

    def _look(self) -> list[Held]:
        self._turns.check_open()
        self._end_writing()
        held = look(self._job, self._model, self._seats, self._peers)
        self._generation = next_generation(held, self._peers.gather(time.time())[0])
        return held

    def _begin_anew(self) -> None:
        self._rests = {}
        self._places.clear(None)
        self._turns.begin(0)

    def _take_over(self, found: Recalled) -> None:
        """Load what was recalled, and forget everything else that is in memory. Collective."""
        self._samples.before(found.choice.world)
        given = settle(found, self._me.rank, self._peers)
        self._state.restore(found.reading, given.own, self._peers, given.left)
        self._rests = found.resting_for(self._me.key, world=len(self._seats))
        self._keep_owns(found, given.own)
        self._places.go_on_from(found.slot)
        self._newest = found.choice.step
        self._turns.begin(found.choice.step)
        set_aside(self._checkpoints, found.choice.step, self._peers)
        self._comparing.trust()

    def _keep_owns(self, found: Recalled, own: Own) -> None:
        """Let a slot that was taken from another rank be one to go on from, as its giver's is."""
        owns = self._agreeing.tell(own.to_bytes())
        mine = found.choice.shards[self._me.rank]
        is_ours = (mine.host, mine.place) == (self._me.host, self._me.rank)
        rest = {*mine.owns, *(rank for rank, _ in mine.rests)}
        if not is_ours or {*owns} - {*mine.owns} or {*self._rests} - rest:
            named = {str(rank): one for rank, one in owns.items()}
            restore_owns(found.slot, found.reading.head, named | self._resting())

    def _resting(self) -> dict[str, bytes]:
        return {resting_name(rank, one.step): one.own for rank, one in self._rests.items()}

    # -- going on ----------------------------------------------------------------------------------

    @during("mics.Snapshots.keep")
    def keep(self, step: int) -> int:
        """Keep the state after ``step`` steps, beside the next one. Collective.

        To be called behind ``optimizer.step()`` and whatever else belongs to the step. Until the
        next ``optimizer.step()``, which waits for the copy, nothing else may write weights; if
        something does, this step is not kept, and it is said.

        Args:
            step: how many steps have been done.

        Returns:
            How many have been done: ``step``, or fewer where replicas differed and all ranks were
            put back.

        Raises:
            RankError: a rank is gone.
            RecoveryError: replicas differ from the beginning, or again and again in one step; the
                step is not the next one, on this rank or beside the others; or nothing was
                restored before.
            CheckpointError: something cannot be kept.
        """
        step = self._turns.next(step)
        self._samples.look()
        if step % self._every:
            return step
        back = self._end_last()
        if back is not None:
            return back
        self._state.look(self._peers)
        moment = self._state.now()
        head = {
            "job": self._job.name,
            "generation": self._generation,
            "model": self._model,
            "key": self._me.key,
            "rank": self._me.rank,
            "world": len(self._seats),
            "step": step,
        }
        slot, rests = self._places.free, self._resting()
        self._writing = Writing(slot, head, moment, self._staging, self._agreeing, self._job, rests)
        self._turns.end()
        return step

    def _end_last(self) -> int | None:
        """Hear how the keeping of the last step ended; how many steps are left if all go back."""
        outcome = self._end_writing()
        if outcome is None:
            return None
        self._say_trouble(outcome)
        heard = outcome.heard
        if heard.everywhere:
            self._newest = outcome.step
            self._places.turn()
        if not self._compare:
            return None
        if heard.differ:
            self._comparing.differ(outcome.step, heard.digests)
            return self._go_back(outcome.step)
        self._comparing.agree(outcome.step, heard.digests)
        return None

    def _finish(self) -> None:
        """Wait for what is written beside the program; what went wrong is said where it is used."""
        if self._writing is not None:
            self._writing.wait()
        let_save_end()

    def _end_writing(self) -> Outcome | None:
        """Wait until all ranks have been heard of what is being kept, if something is."""
        writing, self._writing = self._writing, None
        return None if writing is None else writing.end()

    def _say_trouble(self, outcome: Outcome) -> None:
        if outcome.trouble and not self._said:
            say_of_this_rank(outcome.trouble)
        self._said = bool(outcome.trouble)

    def _go_back(self, step: int) -> int:
        let_save_end()
        back = self.recall(self._checkpoints)
        if back is None:
            raise no_agreement_left(step, self._newest)
        return back

    def _before_step(self, *_: Any) -> None:
        """No optimizer writes what is still being copied."""
        if self._writing is not None:
            self._writing.let_go()

    # -- checkpoints, and the end ------------------------------------------------------------------

    def save(
        self, checkpoints: str | os.PathLike[str], step: int, *, asynchronous: bool = False
    ) -> PendingSave:
        """Write a checkpoint of everything that is kept, for the day when no memory is left.

        Collective. ``restore(checkpoints)`` finds the newest one that is intact.

        Args:
            checkpoints: the folder of checkpoints, which every rank sees.
            step: how many steps have been done.
            asynchronous: as of ``mics.save``.

        Raises:
            CheckpointError: as of ``mics.save``.
        """
        self._turns.check_open()
        self._checkpoints = Path(checkpoints)
        return save(
            step_folder(Path(checkpoints), step),
            model=self._state.model,
            optimizer=self._state.optimizer,
            ema=self._state.ema,
            extra={"step": step, "extras": extras_to_save(self._state.extras, self._peers)},
            asynchronous=asynchronous,
        )

    def close(self) -> None:
        """End well: the state in memory is no longer needed, and removed. Collective.

        A second call does nothing.

        Raises:
            RankError: a rank is gone.
            RecoveryError: replicas differ in the last step; the state in memory stays, so that a
                restart goes on from the last step on which they agreed.
        """
        if self._turns.closed:
            return
        outcome = self._end_writing()
        if outcome is not None and outcome.heard.differ and self._compare:
            raise differs_at_the_end(outcome.step, self._me.rank, outcome.heard.digests)
        self._turns.close()
        self._places.clear(None)
        self._hold.release()
        self._peers.gather(None)  # nobody looks for locks before all have let go
        self._places.remove()

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Close, unless an error is on its way: then the memory is what is needed next."""
        if error is None:
            self.close()
