"""A program traced as one rank of its job: any script that uses mics, or the trainer."""

from __future__ import annotations

from collections.abc import Callable

from mics.errors import TraceError
from mics.lab.checking.leaving import Enough
from mics.lab.tracing.summary import Summary
from mics.lab.tracing.tracing import Options, Tracing
from mics.ranks.console import show
from mics.ranks.starting import leave_groups
from mics.sharding.belonging import units_by_param
from mics.sharding.units import Unit


def trace_program(program: Callable[[], object], options: Options) -> int:
    """Run a program until so many of its steps are recorded; then it is ended.

    Returns:
        0.

    Raises:
        TraceError: it ended before; or as ``mics.trace`` raises it.
    """
    tracing = Tracing(options, _units, _finished)
    tracing.begin()
    try:
        program()
    except Enough:
        pass
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
    finally:
        if not tracing.over:
            tracing.drop()
    if not tracing.written:
        raise TraceError(
            "The program ended before its steps were recorded.",
            numbers=f"{tracing.num_steps} step(s) of a model sharded by mics began and ended; "
            f"{options.skip} are skipped, {options.steps} recorded, and one more has to begin.",
            write="a program that trains for longer, or --steps and --skip with fewer",
        )
    leave_groups()
    return 0


def _units() -> list[Unit]:
    """Those of all models of this process."""
    return list(dict.fromkeys(units_by_param().values()))


def _finished(summary: Summary) -> None:
    show(str(summary))
    raise Enough
