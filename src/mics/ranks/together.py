"""Work that every rank does, or one for all, with an end that all of them share.

Where one rank fails the others must not wait for it, so its error is raised on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mics.errors import MicsError
from mics.ranks.agreement import gather_text


def gather_json(facts: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The facts of every rank of a Gloo group, in its order; this process' alone without one."""
    if group is None:
        return [facts]
    return [json.loads(text) for text in gather_text(json.dumps(facts), group, torch.device("cpu"))]


def together(
    work: Callable[[], Any] | None,
    group: dist.ProcessGroup | None,
    *,
    kind: type[MicsError],
    explain: Callable[[Exception], MicsError],
) -> list[Any]:
    """Do ``work`` and gather, as JSON, what it returns on every rank.

    Args:
        work: what this rank does; ``None`` where it only waits for the others.
        group: a Gloo group of all ranks that work or wait; ``None`` for a process alone.
        kind: the error that ``work`` raises on purpose, and that is raised on all ranks.
        explain: says in such an error what another exception of ``work`` means.

    Raises:
        MicsError: of that kind, on every rank: the error of the first rank that failed.
    """
    result: Any = None
    failure: MicsError | None = None
    cause: Exception | None = None
    try:
        result = None if work is None else work()
        if group is not None:
            json.dumps(result)  # what is no JSON must not end this rank alone, in the gathering
    except kind as error:
        result, failure = None, error
    except Exception as error:
        result, failure, cause = None, explain(error), error
    trouble = None if failure is None else [failure.what, failure.numbers, failure.write]
    gathered = gather_json({"result": result, "trouble": trouble}, group)
    for one in gathered:
        if one["trouble"] is not None:
            what, numbers, write = one["trouble"]
            raise kind(what, numbers=numbers, write=write) from cause
    return [one["result"] for one in gathered]
