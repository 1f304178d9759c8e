"""Operators of torch that communicate, as the collectives that they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mics import compat
from mics.lab.checking.report import Call
from mics.topology import Ranks

# c10d's own spelling, and that of functional collectives (DTensor, compiled code); what is missing
# keeps its name.
_NAMES = (
    ("all_gather", "all_gather"),
    ("allgather", "all_gather"),
    ("reduce_scatter", "reduce_scatter"),
    ("all_reduce", "all_reduce"),
    ("allreduce", "all_reduce"),
    ("all_to_all", "all_to_all"),
    ("alltoall", "all_to_all"),
)
_SENDS_NOTHING = ("wait", "wrap", "barrier", "monitored", "recv", "irecv", "check")
_MEETS_NOBODY = ("wait", "wrap", "check", "send", "isend", "recv", "irecv")
_SPACES = ("c10d", "_c10d_functional")


def call_of(func: Any, args: Any, kwargs: dict[str, Any]) -> Call | None:
    """The collective that an operator is; ``None`` of one that computes, waits or receives."""
    name, ranks = _name_and_ranks(func, args, kwargs, _SENDS_NOTHING)
    if not ranks:
        return None
    known = _known(name)
    given = _given(func, args, kwargs)
    times = len(ranks) if known == "all_gather" else 1
    repeats = len(given) if "coalesced" in name and known != "all_reduce" else 1
    return Call(
        known,
        ranks,
        times * sum(one.nbytes for one in given),
        times * sum(one.numel() for one in given),
        max(1, repeats),
        ranks[_value(func, args, kwargs, "dst")] if name == "send" else -1,
        any(one.dtype.is_floating_point for one in given),
    )


@dataclass(frozen=True)
class Meeting:
    """What an operator is in which all ranks of a group meet.

    Args:
        collective: its name.
        group: torch's name of the group, the same on all its ranks.
        ranks: of it.
    """

    collective: str
    group: str
    ranks: Ranks


def meeting_of(func: Any, args: Any, kwargs: dict[str, Any]) -> Meeting | None:
    """The meeting that an operator is; ``None`` of one that computes, waits, sends or receives."""
    name, ranks = _name_and_ranks(func, args, kwargs, _MEETS_NOBODY)
    group = compat.group_of_call(func, args, kwargs) if ranks else None
    return None if group is None else Meeting(_known(name), group.group_name, ranks)


def _name_and_ranks(
    func: Any, args: Any, kwargs: dict[str, Any], others: tuple[str, ...]
) -> tuple[str, Ranks]:
    """torch's name of a collective and its ranks; () of what is none, or of one rank."""
    name = func.__name__.partition(".")[0].strip("_")
    if func.namespace not in _SPACES or name.startswith(others):
        return name, ()
    ranks = compat.ranks_of_call(func, args, kwargs)
    return name, ranks if len(ranks) > 1 else ()


def _known(name: str) -> str:
    return next((ours for theirs, ours in _NAMES if name.startswith(theirs)), name)


def _given(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a rank brings along."""
    for name in compat.names_of_arguments(func):
        if name.startswith(("input", "tensor")):
            tree = _value(func, args, kwargs, name)
            return [one for one in compat.tree_leaves(tree) if isinstance(one, torch.Tensor)]
    return []


def _value(func: Any, args: Any, kwargs: dict[str, Any], name: str) -> Any:
    number = compat.names_of_arguments(func).index(name)
    return args[number] if number < len(args) else kwargs.get(name)
