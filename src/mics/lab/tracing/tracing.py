"""Some steps of a job recorded on all its ranks, by torch's profiler and by what mics knows.

[Note: when a step ends]
A step ends where a forward of a sharded model begins after an optimizer has stepped, so several
optimizers may step in one, and input that is read in between belongs to the step before. All ranks
come to that place, so there they may compare clocks, and in the end bring together what they have.

The profiler takes a while to start, on every rank another one, for which the others would seem to
wait. So it starts one step before those that are kept.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from mics.communication.guard import optimizer_steps, watch_optimizers
from mics.communication.same_steps import same_steps_of
from mics.errors import TraceError
from mics.lab.tracing.accounts import Account, Interval, account_of_host
from mics.lab.tracing.clocks import Offset, between, compare_clocks
from mics.lab.tracing.devices import settle_on_device
from mics.lab.tracing.events import Origin, events_of_mics, events_of_torch
from mics.lab.tracing.file import check_file, write_file
from mics.lab.tracing.profiles import Profile, Profiler
from mics.lab.tracing.summary import Job, Summary, summarise
from mics.ranks.device import on_accelerator
from mics.ranks.mesh import Groups, ranks_of
from mics.ranks.recording import Recorder, record_by
from mics.ranks.times import Places
from mics.ranks.together import gather_json, together
from mics.ranks.whereabouts import during
from mics.sharding.units import Unit


@dataclass(frozen=True)
class Options:
    """What is traced.

    Args:
        file: that is written, by the first rank.
        steps: that are kept.
        skip: before them; in the last of these the profiler runs already.
    """

    file: Path
    steps: int
    skip: int


class Tracing:
    """The recording of one process, from ``begin`` to ``finish`` or ``drop``.

    Args:
        options: what is traced.
        units: those of the model; asked for when recording starts.
        finished: called on every rank when the file has been written, with what it says.
    """

    def __init__(
        self,
        options: Options,
        units: Callable[[], Sequence[Unit]],
        finished: Callable[[Summary], None],
    ) -> None:
        self._options, self._units, self._finished = options, units, finished
        self._recorder = Recorder(
            self._before_forward, lambda: {unit.ledger: unit.name for unit in units()}
        )
        self._profiler: Profiler | None = None
        self._spans: list[list[int]] = []  # beginning and end of every step so far
        self._stepped = 0
        self._clocks: list[Offset] = []
        self.over = False
        self.written = False

    @property
    def num_steps(self) -> int:
        """Steps that have begun and ended."""
        return sum(len(span) == 2 for span in self._spans)

    def check(self) -> None:
        """Refuse what cannot be traced. Collective.

        Raises:
            TraceError: the model is on some ranks only, or the file cannot be written; on all.
        """
        file, group = self._options.file, self._group()
        first = group is None or group.rank() == 0
        together(
            (lambda: check_file(file)) if first else None,
            group,
            kind=TraceError,
            explain=lambda error: TraceError(f"{file} cannot be looked at: {error}"),
        )

    def begin(self) -> None:
        """Watch for steps from now on."""
        watch_optimizers()
        record_by(self._recorder)

    def drop(self) -> None:
        """Stop, and write nothing."""
        self.over = True
        record_by(None)
        self._recorder.switch(False)
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def finish(self) -> None:
        """Write what has been recorded, also of fewer steps. Collective.

        Raises:
            TraceError: there is no step to be kept, or the file cannot be written; on every rank.
        """
        profiler, now = self._profiler, time.time_ns()
        self._end_step(now)
        self._profiler = None
        self.drop()
        if profiler is not None:
            profiler.stop()
        if profiler is None or len(self._spans) <= self._options.skip:
            raise TraceError(
                "The training was over before a step was recorded.",
                numbers=f"It took {len(self._spans)} step(s), of which the first "
                f"{self._options.skip} are skipped.",
                write=f"at least {self._options.skip + 1} steps, or fewer to skip",
            )
        with during("the end of a trace"):
            summary = self._bring_together(profiler.read())
        self.written = True
        self._finished(summary)

    # -- steps, see [Note: when a step ends] -------------------------------------------------------

    def _before_forward(self) -> None:
        if self._spans and optimizer_steps() == self._stepped:
            return
        self._stepped = optimizer_steps()
        now, options = time.time_ns(), self._options
        self._end_step(now)
        if len(self._spans) == options.skip + options.steps:
            self.finish()
            return
        if len(self._spans) == options.skip - 1:
            with during("the beginning of a trace"):
                self._start()
        now = time.time_ns()
        if len(self._spans) == options.skip:
            self._recorder.clear(now)
        self._recorder.begin_step(now)
        self._spans.append([now])

    def _end_step(self, now: int) -> None:
        if self._spans and len(self._spans[-1]) == 1:
            self._spans[-1].append(now)
            self._recorder.close_backwards()

    def _start(self) -> None:
        self.check()
        self._clocks = compare_clocks(self._group())
        self._profiler = Profiler()
        self._recorder.switch(True)

    # -- who takes part ----------------------------------------------------------------------------

    def _groups(self) -> Groups:
        groups = max((unit.groups for unit in self._units()), key=lambda one: one.whole.size())
        if groups.whole.size() != dist.get_world_size():
            raise TraceError(
                "A trace is of all ranks of a job, and the model is on some of them.",
                numbers=f"It is on {groups.whole.size()} of {dist.get_world_size()} ranks.",
                write="torch.profiler around the steps, on every rank",
            )
        return groups

    def _group(self) -> dist.ProcessGroup | None:
        groups = self._groups()
        return same_steps_of(groups).group if groups.whole.size() > 1 else None

    # -- the end -----------------------------------------------------------------------------------

    def _bring_together(self, profile: Profile) -> Summary:
        group, groups, skip = self._group(), self._groups(), self._options.skip
        kept = [(n + 1, (a, b)) for n, (a, b) in enumerate(self._spans)][skip:]
        numbers = gather_json([number for number, _ in kept], group)
        if any(one != numbers[0] for one in numbers):
            raise TraceError(
                "The ranks have recorded different steps.",
                numbers=f"The first one {numbers[0]}, others {max(numbers)}.",
                write="a loop whose optimizers step as often on every rank",
            )
        clocks = list(map(between, self._clocks, compare_clocks(group)))
        errors = gather_json(profile.error, group)
        clocks = [Offset(c.ahead, c.error + e) for c, e in zip(clocks, errors, strict=True)]
        rank = dist.get_rank()
        mine = clocks[0 if group is None else group.rank()]
        start = min(gather_json(kept[0][1][0] - mine.ahead, group))
        ranks = (rank,) if group is None else ranks_of(group)
        order = tuple(groups.whole.mesh.flatten().tolist())
        job = Job(
            str(self._options.file),
            Places(order, groups.shard.size(), groups.gpus_per_node),
            dict(zip(ranks, clocks, strict=True)),
            self._step_before(),
        )
        accounts = self._accounts(profile, kept, groups)
        origin = Origin(rank, job.label(rank), start, mine.ahead)
        own = events_of_mics(origin, accounts, self._recorder.flights, self._recorder.blocks)
        span = kept[0][1][0], kept[-1][1][1]
        others = events_of_torch(origin, profile, span)
        seen = write_file(self._options.file, job.head(), own, others, group)
        summary = summarise(seen, job) if seen else None
        told = gather_json(None if summary is None else summary.as_json(), group)[0]
        return Summary.from_json(told)

    def _accounts(
        self, profile: Profile, kept: Sequence[tuple[int, Interval]], groups: Groups
    ) -> list[Account]:
        flights, waits = self._recorder.flights, self._recorder.waits
        if on_accelerator(groups.device):
            return settle_on_device(profile.events, flights, kept)
        begins = [span[0] for _, span in kept]
        accounts = []
        for place, (number, span) in enumerate(kept):
            inside = [
                (f.hop, (f.begun, f.ended))
                for f in flights
                if f.ended is not None and bisect_right(begins, f.begun) == place + 1
            ]
            accounts.append(
                account_of_host(number, span, inside, [(h, (a, b)) for h, a, b in waits])
            )
        return accounts

    def _step_before(self) -> int | None:
        """Nanoseconds of the last step before the profiler ran; not of the first, which builds."""
        number = self._options.skip - 2
        return self._spans[number][1] - self._spans[number][0] if number >= 1 else None
