"""Collectives that somebody else issues: what a gather hook sends, or a function of a library.

[Note: hop 0]
Weights may need more than the hops move: scales that ranks agree on before each gather of few bits,
whole matrices for an optimizer. The ledger and the prediction keep it as hop 0. Calls of torch are
seen by a dispatch mode, where a mode can be put around them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from mics import compat
from mics.communication.ledger import Ledger
from mics.topology import Ranks
from mics.traffic import Collective, StageMessage

_KNOWN: dict[str, Collective] = {
    "all_reduce": "all_reduce",
    "allreduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "allgather_base": "all_gather",
}


class Apart(NamedTuple):
    """A collective that mics does not issue.

    Args:
        operator: torch's name of it.
        nbytes: of its message, gathered or reduced; of its first tensor, if mics does not know it.
        ranks: that take part.
    """

    operator: str
    nbytes: int
    ranks: Ranks


class Message(NamedTuple):
    """One message of hop 0."""

    collective: Collective
    sent: StageMessage


def apart_of(func: Any, args: Any, kwargs: dict[str, Any]) -> Apart | None:
    """What an operator communicates; ``None`` of one that computes, or waits."""
    if func.namespace not in ("c10d", "_c10d_functional"):
        return None
    name = func.__name__.partition(".")[0].strip("_")
    if name.startswith(("wait", "wrap", "barrier")):
        return None
    sizes = [one.nbytes for one in compat.tree_leaves((args, kwargs)) if _is_tensor(one)]
    ranks = compat.ranks_of_call(func, args, kwargs)
    collective = _KNOWN.get(name)
    nbytes = sizes[0] if sizes else 0
    if collective == "all_reduce":
        nbytes = sum(sizes)
    elif collective == "all_gather":
        nbytes = min(sizes) * len(ranks)
    return Apart(collective or name, nbytes, ranks)


def messages_of(apart: Iterable[Apart]) -> list[Message]:
    """Those whose bytes mics knows, and that are sent to another rank."""
    return [
        Message(_KNOWN[one.operator], StageMessage("flat", one.ranks, one.nbytes, 1))
        for one in apart
        if one.operator in _KNOWN and len(one.ranks) > 1
    ]


def unknown(apart: Iterable[Apart]) -> list[Apart]:
    """Those of which mics cannot tell what they send."""
    return [one for one in apart if one.operator not in _KNOWN]


def count(messages: Iterable[Message], ledger: Ledger, device: torch.device) -> None:
    """Count what somebody else has issued, of which no times are known."""
    for one in messages:
        ledger.issue(0, one.collective, one.sent, device)


class Seen(compat.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the collectives that are issued inside of it, and lets them go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.apart: list[Apart] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # its own operators come next, collectives among them
        kwargs = kwargs or {}
        one = apart_of(func, args, kwargs)
        if one is not None:
            self.apart.append(one)
        return func(*args, **kwargs)


def _is_tensor(one: Any) -> bool:
    return isinstance(one, torch.Tensor)
