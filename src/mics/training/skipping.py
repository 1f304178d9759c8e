"""What follows from skipped steps: a record of their data, and a way back from too many."""

from __future__ import annotations

import torch.distributed as dist

from mics.errors import MicsError
from mics.ranks.skips import Verdict
from mics.training.keeping import Keeper
from mics.training.progress import Progress
from mics.training.record import RollbackRecord, SkipRecord
from mics.training.setup import Run


class Skipping:
    """Goes back to a kept state after too many skipped steps, and on behind their data.

    A step that is skipped leaves no trace, so to take the same steps with the same data again from
    an earlier state would end where the run is now. What may help is another state, and other data.

    Args:
        run: what is trained.
        keeper: has the states that were kept.
    """

    def __init__(self, run: Run, keeper: Keeper) -> None:
        self._run = run
        self._keeper = keeper
        self._gone_back = 0

    def record(self, at: Progress, verdict: Verdict) -> SkipRecord:
        """Say which data a step was of that has just been skipped."""
        count = self._run.batch.global_batch
        first = at.position - count
        return SkipRecord(
            step=at.step,
            why=verdict.why,
            loss=verdict.loss,
            norm=verdict.norm,
            in_a_row=verdict.in_a_row,
            first=first,
            last=at.position - 1,
            sequences=self._run.data.train.sequences(first, count),
        )

    def is_due(self, verdict: Verdict) -> bool:
        """Whether too many steps in a row were skipped."""
        return verdict.in_a_row >= self._run.config.optimizer.bad_steps

    def go_back(self, at: Progress, verdict: Verdict) -> tuple[Progress, RollbackRecord]:
        """Load the newest kept state. Collective.

        Returns:
            Where the run is now, and what is said of it.

        Raises:
            MicsError: it has gone back too often, or there is no state.
        """
        if self._gone_back == self._run.config.optimizer.rollbacks:
            raise self._too_many(at, verdict)
        found = self._keeper.go_back(at)
        if found is None:
            raise self._too_many(at, verdict)
        self._gone_back += 1
        now, checkpoint = found
        return now, RollbackRecord(at.step, now.step, now.position, str(checkpoint))

    def _too_many(self, at: Progress, verdict: Verdict) -> MicsError:
        self._keeper.look_after_save(wait=True)
        newest = self._keeper.newest
        kept = f"the newest checkpoint is {newest}" if newest else "there is none yet"
        count = verdict.in_a_row
        what = f"Loss or gradient norm was not finite in {count} steps in a row."
        if not verdict.why.startswith("not finite"):
            what = f"{count} steps in a row were skipped, the latest for a {verdict.why}."
        often = f"; the run has gone back {self._gone_back} time(s)" if self._gone_back else ""
        return MicsError(
            what,
            numbers=f"Steps {at.step - count + 1} to {at.step} of {dist.get_world_size()} ranks"
            f"{often}; {kept}.",
            write="a smaller --optimizer.learning-rate or more --optimizer.warmup; it goes on from "
            "the newest checkpoint",
        )
