"""Parameters that say themselves what is gathered of them: refused where FSDP2 would fail later.

FSDP2 finds out in the first forward, and some of it on the ranks with padding alone, while the
others wait for them. Each rank has the whole parameters before they are sharded, so it can ask for
the first rank's part and for the last one's, and all of them refuse alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from mics import compat
from mics.communication.apart import Apart, messages_of, unknown
from mics.communication.gathered import Answer, Sent, ask, num_arguments
from mics.errors import ShardError
from mics.ranks.console import say
from mics.ranks.mesh import Groups, PerMesh
from mics.sharding.other_axes import unsharded
from mics.sharding.placements import Placements


class _Hooked(NamedTuple):
    """One parameter that is not sharded yet, and whose tensor has a hook."""

    name: str
    param: nn.Parameter
    module: nn.Module


def _nothing_yet(_: Groups) -> list[str]:
    return []


_said_of = PerMesh(_nothing_yet)  # it is said once for a mesh, not for every unit


def check_gather_hooks(
    modules: Sequence[nn.Module],
    placements: Placements,
    policy: MixedPrecisionPolicy,
    *,
    ignored: set[nn.Parameter],
    reshard_after_forward: bool | int | None,
) -> None:
    """Refuse a hook that cannot be sharded as asked, before anything is.

    Args:
        modules: what is to be sharded.
        placements: where its parameters go.
        policy: the hooks are given it.
        ignored: parameters that are.
        reshard_after_forward: as FSDP2's.

    Raises:
        ShardError: there is one.
    """
    apart: dict[str, list[Apart]] = {}
    for one in _hooked(modules, ignored):
        own = placements.of(one.param)
        p = own.shard.size()
        fewer = type(reshard_after_forward) is int and reshard_after_forward not in (1, p)
        if fewer and own is placements.home:
            raise ShardError(
                f"{one.name} says itself what is gathered of it, and FSDP2 cannot reshard such "
                "parameters to fewer ranks after forward.",
                numbers=f"Its tensor is of type {_kind(one.param)}; reshard_after_forward = "
                f"{reshard_after_forward}.",
                write="reshard_after_forward=True",
            )
        answer = _check_shards(one, own, placements.dim_of(one.param), policy)
        if answer is not None and (left_out := _not_counted(answer, p)):
            apart[one.name] = left_out
    if apart:
        _tell(apart, placements.home)


def _hooked(modules: Sequence[nn.Module], ignored: set[nn.Parameter]) -> Iterator[_Hooked]:
    left = {id(param) for param in unsharded(modules).values()}
    for top in modules:
        for path, module in top.named_modules():
            for name, param in module.named_parameters(recurse=False):
                if id(param) not in left or param in ignored or not param.dim():
                    continue
                if not compat.has_gather_hook(param):
                    continue
                left.remove(id(param))  # a tied one once
                yield _Hooked(f"{path}.{name}".lstrip("."), param, module)


@torch.no_grad()
def _check_shards(
    one: _Hooked, groups: Groups, dim: int, policy: MixedPrecisionPolicy
) -> Answer | None:
    """Ask the hook for the first rank's part, and for the last one's where it is shorter.

    Returns:
        The first answer; ``None`` from a hook that cannot be asked before there are values.

    Raises:
        ShardError: the parts would be gathered in other sizes, or FSDP2 would drop some of them.
    """
    whole, p = compat.local_of(one.param), groups.shard.size()
    longest = -(-whole.shape[dim] // p)
    shortest = max(0, whole.shape[dim] - (p - 1) * longest)
    arguments = (groups.mesh, whole.shape, whole.stride(), one.module, policy)
    try:
        first = whole.split(longest, dim)[0] if p > 1 else whole  # type: ignore[no-untyped-call]
        answer = ask(first, arguments)
    except Exception as error:  # a user's code
        if whole.is_meta:
            return None
        raise ShardError(
            f"{one.name} cannot be split and asked what is gathered of it.",
            numbers=f"{_kind(one.param)} of shape {list(whole.shape)}: {_short(error)}",
            write="the parameter as its library makes it",
        ) from error
    if p == 1 and len(answer.tensors) != 1:
        raise ShardError(
            f"{one.name} is gathered as {len(answer.tensors)} tensors, of which FSDP2 keeps one "
            "where a rank holds the whole parameter.",
            numbers=f"Its tensor is of type {_kind(one.param)}; the partition group has 1 rank.",
            write="a partition of 2 or more ranks",
        )
    if shortest < longest and dim == 0:  # FSDP2 splits others evenly, or refuses
        last = _last(first, shortest, arguments)
        if last != answer.tensors:
            raise _uneven(one, p, answer.tensors, last)
    return answer


def _last(
    first: torch.Tensor, rows: int, arguments: tuple[object, ...]
) -> tuple[Sent, ...] | Exception:
    """What the last rank gives, whose part has fewer rows, or why it gives nothing."""
    try:
        last = ask(first.narrow(0, 0, rows), arguments).tensors
    except Exception as error:  # a user's code
        return error
    if num_arguments(first) > 1 and any(one.shape != first.shape for one in last):
        return ValueError(f"FSDP2 wants each of its tensors as {list(first.shape)}")
    return last


def _uneven(
    one: _Hooked, p: int, first: tuple[Sent, ...], last: tuple[Sent, ...] | Exception
) -> ShardError:
    given = _short(last) if isinstance(last, Exception) else _shapes(last)
    return ShardError(
        f"{one.name} cannot be split unevenly: what the last rank gathers differs from what the "
        "first does.",
        numbers=f"{one.param.shape[0]} rows of {_kind(one.param)} over {p} ranks; the first "
        f"gives {_shapes(first)}, the last {given}.",
        write="a partition that divides the rows, or an fsdp_pre_all_gather that pads",
    )


def _shapes(tensors: tuple[Sent, ...]) -> str:
    return " and ".join(str(list(one.shape)) for one in tensors)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _not_counted(answer: Answer, p: int) -> list[Apart]:
    """What a hook communicates that the ledger will not have."""
    if p > 1:
        return unknown(answer.apart)
    # FSDP2 gathers nothing then, and the ledger counts a hook's messages where a gather follows.
    return [one for one in answer.apart if unknown([one]) or messages_of([one])]


def _tell(apart: dict[str, list[Apart]], groups: Groups) -> None:
    """Say what of the traffic the ledger does not see."""
    if _said_of(groups):
        return
    (name, calls), *_ = apart.items()
    _said_of(groups).append(name)
    words = ", ".join(
        f"{one.operator} of {one.nbytes} bytes over {len(one.ranks)} ranks" for one in calls
    )
    say(
        f"{name} communicates itself whenever FSDP2 asks what is gathered of it ({words}); the "
        "ledger and predict_traffic leave this out"
    )


def _kind(param: torch.Tensor) -> str:
    return type(compat.local_of(param)).__name__
