"""trace: steps of a loop of one's own, recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from mics.errors import TraceError
from mics.lab.tracing.summary import Summary
from mics.lab.tracing.tracing import Options, Tracing
from mics.ranks.console import progress
from mics.ranks.recording import recorder
from mics.sharding.units import units_of


class Traced:
    """What ``trace`` gives.

    Attributes:
        summary: what the trace says, the same on every rank; ``None`` until it is written.
    """

    def __init__(self) -> None:
        self.summary: Summary | None = None


@contextmanager
def trace(model: nn.Module, file: str | Path, *, steps: int = 3, skip: int = 3) -> Iterator[Traced]:
    """Record some steps of the loop inside on every rank, and write one file for Perfetto.

    ::

        with mics.trace(model, "trace.json.gz"):      # on every rank
            for batches in mics.steps(loader, micro_steps=4):
                for batch in mics.micro_steps(model, batches):
                    loss(model(batch)).backward()
                optimizer.step()
                optimizer.zero_grad()

    A step ends where a forward begins after an optimizer has stepped. Behind the last one that is
    recorded, or at the end of the loop, all ranks send what they have to the first one, which
    writes the file and prints what it says in words. Then the loop goes on as it would without.
    Nothing that is computed changes. Collective over all ranks of the job.

    Args:
        model: sharded by mics, over all ranks of the job.
        file: a path on the first rank that ends with .json or .json.gz; it is overwritten.
        steps: how many are recorded.
        skip: how many are not, before; during the last of them the profiler runs already.

    Returns:
        An object that has the summary when the file has been written.

    Raises:
        TraceError: numbers that make no sense, another trace under way, a file that cannot be
            written, a model on some of the ranks only, or a loop that ends while steps are skipped.
        ShardError: the model was not sharded by mics.
    """
    for name, number in (("steps", steps), ("skip", skip)):
        if type(number) is not int or number < 1:
            raise TraceError(
                f"{name} = {number!r} is not a number of steps from 1 on.", write=f"{name}=3"
            )
    if recorder() is not None:
        raise TraceError("A trace is under way already.", write="one at a time")
    traced = Traced()

    def finished(summary: Summary) -> None:
        traced.summary = summary
        progress(str(summary))

    units = units_of(model)
    tracing = Tracing(Options(Path(file), steps, skip), lambda: units, finished)
    tracing.check()
    tracing.begin()
    try:
        yield traced
        if not tracing.over:
            tracing.finish()
    finally:
        if not tracing.over:
            tracing.drop()
