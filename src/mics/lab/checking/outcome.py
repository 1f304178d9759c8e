"""Whether the ranks of a script came to their end, and what is said if they did not; no torch."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mics.errors import CheckError
from mics.lab.checking.report import RankReport
from mics.lab.checking.standing import Standing, in_words, waits_for

_OF_GPUS = ("CUDA", "cuda", "NVIDIA", "nccl", "NCCL", "device_ids")
# Words of a last line that says only that another rank is no longer there.
_LOST = ("gloo/", "Connection reset", "Connection closed", "Broken pipe", "TCPStore", "Socket")

_IN_ITS_OWN_PROCESS = "a script that trains in the process it is started as, like under torchrun"


@dataclass(frozen=True)
class Job:
    """What is run, and on what.

    Args:
        words: the script and its arguments.
        nodes: how many the ranks stand for.
        ranks_per_node: ranks of each.
        steps: optimizer steps that are watched.
        seconds: in which they must have ended.
    """

    words: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    steps: int
    seconds: float

    @property
    def world(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Outcome:
    """What has become of the ranks.

    Args:
        reports: of those that have written one, in order.
        codes: exit code of every rank; ``None`` of those that still ran.
        steps: that every rank had come to.
        standings: where ranks stand that did not come to an end.
        in_time: whether they had come to it.
    """

    reports: list[RankReport]
    codes: list[int | None]
    steps: list[int]
    standings: list[Standing]
    in_time: bool


def check(job: Job, outcome: Outcome) -> None:
    """Refuse what is no complete report of every rank.

    Raises:
        CheckError: names the rank that failed first, died, left or holds up the others.
    """
    failed = sorted((one for one in outcome.reports if one.failed), key=lambda one: one.time)
    own = [one for one in failed if not _lost_another(one)]
    if own:
        _say_failed(job, own[0])
    said = {report.rank for report in outcome.reports}
    dead = [n for n, code in enumerate(outcome.codes) if code is not None and n not in said]
    if dead:
        _say_dead(job, outcome, dead)
    left = [one.rank for one in outcome.reports if not one.failed]
    if failed and left:
        _say_left(job, outcome, left, failed[0])
    if failed:
        _say_failed(job, failed[0])
    if not outcome.in_time or len(said) < job.world:
        _say_late(job, outcome)
    _check_steps(job, outcome.reports)


def _lost_another(report: RankReport) -> bool:
    return any(word in _last_line(report.failed) for word in _LOST)


def _last_line(failed: str) -> str:
    return failed.rstrip().splitlines()[-1]


def _say_failed(job: Job, report: RankReport) -> None:
    raise CheckError(
        f"{job.words[0]} fails on rank {report.rank} of {job.world}:\n{report.failed.rstrip()}",
        write=_advice(report.failed, job),
    )


def _say_dead(job: Job, outcome: Outcome, dead: Sequence[int]) -> None:
    rank = dead[0]
    code = outcome.codes[rank] or 0
    if code < 0:
        raise CheckError(
            f"{job.words[0]}: rank {rank} was killed by {_signal_name(-code)}.",
            numbers=f"It had taken {outcome.steps[rank]} of {job.steps} optimizer steps.",
            write="arguments that make the model smaller, if the memory of this machine was "
            "spent; or the same script under torchrun, to see why",
        )
    raise CheckError(
        f"{job.words[0]}: rank {rank} ended its process without a word, as os._exit does.",
        numbers=f"Its exit code is {code}; it had taken {outcome.steps[rank]} of {job.steps} "
        "optimizer steps.",
        write="sys.exit in the place of os._exit, or --steps with fewer, so that the check ends "
        "the script before",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say_left(job: Job, outcome: Outcome, left: Sequence[int], lost: RankReport) -> None:
    rank = min(left, key=lambda one: outcome.steps[one])
    raise CheckError(
        f"{job.words[0]}: rank {rank} ended its program, and other ranks went on.",
        numbers=f"It had taken {len(_report(outcome, rank).steps)} optimizer steps; then rank "
        f"{lost.rank} waited for it in vain.",
        write="the same number of micro-steps and steps on every rank, as "
        "DistributedSampler(drop_last=True) or mics.steps(loader) give them",
    )


def _report(outcome: Outcome, rank: int) -> RankReport:
    return next(one for one in outcome.reports if one.rank == rank)


def _say_late(job: Job, outcome: Outcome) -> None:
    what = f"{job.words[0]} has not taken {job.steps} optimizer steps in {job.seconds:g} s."
    write = (
        "--seconds with more, --steps with fewer, or arguments that make the model smaller, "
        "behind the script"
    )
    if not outcome.standings:
        raise CheckError(what, write=write)
    who, lines = in_words(outcome.standings, Path(job.words[0]))
    passes = [one.micro_step for one in outcome.standings]
    if not any(outcome.steps) and any(passes):
        who += f" {max(passes)} backward passes, and no optimizer of torch.optim has stepped."
        write = f"an optimizer that is a torch.optim.Optimizer; or {write}"
    if not any(outcome.steps) and any(one.waits_for_processes for one in outcome.standings):
        who = "Its ranks wait for processes that they have started, which are not watched."
        write = f"{_IN_ITS_OWN_PROCESS}; here {job.world} of them are started by mics check"
    missing = sorted(set(range(job.world)) - {one.rank for one in outcome.standings})
    lines += [f"rank {rank}: it has not begun" for rank in missing]
    if any(waits_for(one, outcome.standings)[1] for one in outcome.standings):
        write = f"the same collectives in the same order on every rank; or {write}"
    raise CheckError(f"{what} {who}", numbers="\n  ".join(lines), write=write)


def _check_steps(job: Job, reports: Sequence[RankReport]) -> None:
    idle = [report.rank for report in reports if not report.steps]
    if idle:
        raise CheckError(
            f"{job.words[0]} ended without a step of a torch.optim optimizer.",
            numbers=f"That is so on {len(idle)} of {job.world} ranks, the first is {idle[0]}.",
            write=f"{_IN_ITS_OWN_PROCESS}; an optimizer that is a torch.optim.Optimizer",
        )


def _advice(failed: str, job: Job) -> str:
    """What to write where a script asks for what this machine has not."""
    last = _last_line(failed)
    if _names_gpus(failed):
        return (
            'device = "cuda" if torch.cuda.is_available() else "cpu" in the script, and that '
            "device everywhere; ranks of a check have no GPU"
        )
    if "FSDP needs a non-CPU accelerator" in last:
        return "fully_shard, FSDP2; FSDP1 does not run on a machine without a GPU"
    asked = re.search(r"Mesh should not be bigger .* found (\d+) ranks", last)
    if asked is not None and int(asked[1]) % job.nodes == 0:
        return f"--nodes {job.nodes} --ranks-per-node {int(asked[1]) // job.nodes}"
    if any(word in last.lower() for word in ("world size", "world_size", "divisible")):
        return (
            f"--nodes and --ranks-per-node as the script's mesh wants them; these ranks are "
            f"{job.nodes} x {job.ranks_per_node}"
        )
    return ""


def _names_gpus(failed: str) -> bool:
    """Whether a traceback ends because there is no GPU."""
    return any(word in _last_line(failed) for word in _OF_GPUS)
