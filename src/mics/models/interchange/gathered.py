"""Whole weights of a model that trains, unit by unit: for an engine that serves it.

[Note: one replica is enough]
Every partition group holds all weights, so one of them gathers and the others go on. Which ranks
must come for that is worked out from the tensors: all that are joined by axes that split one.

[Note: a consumer may take its time]
Whoever iterates may send each tensor to an engine before it asks for the next. So ranks meet on a
Gloo group before each unit, where waiting costs nothing, no kernel spins on an accelerator, and a
rank that has left the loop is heard of, also one that never began it.

[Note: one name, other weights]
A loop of its own may spread experts by giving each rank another one under the same name. Ranks that
hold a weight of this name without sharing its pieces compare what they have, as loosely as
``copies.py`` compares copies; those that hold all of it by themselves do so over all ranks, once.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mics import compat
from mics.checkpoint.names import is_extra_state, plain_names
from mics.checkpoint.peers import Peers
from mics.communication.digests import SIZE, Digests
from mics.communication.ledger import Ledger
from mics.communication.whole import check_splits, groups_that_split, wholes_of
from mics.errors import DisagreementError, MicroStepError, RankError, ShardError
from mics.quantities import dtype_name
from mics.ranks.heartbeat import taking_long
from mics.ranks.issuing import all_gather, make_group
from mics.ranks.mesh import ranks_of
from mics.ranks.together import gather_json
from mics.sharding.tensor_parts import kind_of, values_of
from mics.sharding.units import Unit, units_of

_LONGEST = timedelta(hours=24)  # that a consumer may take for one unit
_GOES_ON, _LEFT = 0, 1
_NEAR = 0.5  # of the norm, that copies may be apart


@dataclass(frozen=True)
class _Replica:
    """The ranks that gather together.

    Args:
        index: of this one, by their first ranks.
        count: of all replicas.
        ranks: of this one.
        group: where they meet; ``None`` for a process alone.
    """

    index: int
    count: int
    ranks: list[int]
    group: dist.ProcessGroup | None


@dataclass
class _Batch:
    """What is gathered at once: the parameters of a unit, or what is in none."""

    ledger: Ledger | None
    named: dict[str, torch.Tensor] = field(default_factory=dict)


_Joined = tuple[tuple[int, ...], ...]
_replicas: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[_Joined, _Replica]] = (
    weakref.WeakKeyDictionary()
)


def gathered(
    model: nn.Module, *, replica: int | None = 0, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole weights by name, one unit of the model after the other.

    For sending them to an inference engine while a model trains::

        for name, value in mics.gathered(model, dtype=torch.bfloat16):
            if dist.get_rank() == 0:
                engine.update(name, value)

    Each unit is gathered inside one replica, in one message, when its first tensor is asked for; on
    the ranks of other replicas there is nothing to iterate over, and they go on. At most two units
    are in memory, if none is kept. A consumer may take its time: the others wait for it. The ranks
    of the replica all iterate to the end, or all leave after the same unit. Collective when called;
    call it between steps.

    Args:
        model: sharded by mics.
        replica: which one gathers, from 0; ``None`` is each, inside itself.
        dtype: of floating-point tensors, sent in it too; their own by default.

    Returns:
        Plain names, as in the ``state_dict`` of the model that nobody has sharded, and tensors of
        the whole shape on the device that computes; tied ones under each name, buffers last.

    Raises:
        MicroStepError: a step is under way.
        ShardError: mics has not sharded the model, there is no such replica, or a weight has no
            plain values, or not all of them.
        DisagreementError: ranks of a replica were told other things.
        RankError: when iterated: a rank has left the loop.
        MicroStepError: when iterated: an optimizer has stepped meanwhile.
    """
    units = units_of(model)
    for unit in units:
        if unit.in_step:
            raise MicroStepError(
                "mics.gathered was called in a step, between its micro-steps.",
                numbers=f"The step of {unit.name} has not ended.",
                write="it after optimizer.step()",
            )
    batches = _batches(model, units)
    mine = _replica_of(units[0], batches)
    _check_told(replica, dtype, mine)
    if replica is not None and replica != mine.index:
        return iter(())
    walk = _walk(batches, mine, dtype)
    next(walk)  # it has begun, so that a rank which drops it tells the others too
    return walk


def _check_told(replica: int | None, dtype: torch.dtype | None, mine: _Replica) -> None:
    """Refuse arguments that ranks do not share, or that are not right. Collective."""
    told = f"replica={replica}, dtype={dtype and dtype_name(dtype)}"
    others = gather_json(told, mine.group)
    if len(set(others)) > 1:
        raise DisagreementError(
            "Ranks of one replica call mics.gathered with other arguments.",
            numbers=", ".join(
                f"rank {rank}: {one}" for rank, one in zip(mine.ranks, others, strict=True)
            ),
            write="the same on every rank",
        )
    if replica is not None and not 0 <= replica < mine.count:
        raise ShardError(
            f"There is no replica {replica}.",
            numbers=f"The model has {mine.count}, counted from 0.",
            write="replica=0",
        )


def _batches(model: nn.Module, units: list[Unit]) -> list[_Batch]:
    """What is gathered, in order; the tensors as they are sharded."""
    state = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor) and not is_extra_state(name)
    }
    plain = plain_names(model, state)
    batches = [_Batch(unit.ledger) for unit in units]
    rest = _Batch(None)
    by_param = {
        id(param): batch
        for unit, batch in zip(units, batches, strict=True)
        for param in compat.sharded_params(unit.group)
    }
    for name, value in state.items():
        values = values_of(value)
        if values is None:
            raise ShardError(
                f"{plain[name]} has no plain values that could be gathered.",
                numbers=f"It is a {kind_of(value)}.",
                write="mics.save, or adapters alone: mics.save_adapters",
            )
        check_splits(values)
        by_param.get(id(value), rest).named[plain[name]] = values
    return [batch for batch in [*batches, rest] if batch.named]


def _replica_of(unit: Unit, batches: list[_Batch]) -> _Replica:
    """Who gathers with whom; found out once for all models that are sharded alike."""
    joined = {
        ranks_of(group)
        for batch in batches
        for value in batch.named.values()
        if isinstance(value, DTensor)
        for group in groups_that_split(value)
    }
    known = _replicas.setdefault(unit.groups.shard, {})  # gone when its process groups are
    key = tuple(sorted(joined))
    if key not in known:
        known[key] = _meet(key, batches)
    return known[key]


def _meet(joined: _Joined, batches: list[_Batch]) -> _Replica:
    """Find out whom this rank is joined with, over others too. Collective over the job."""
    peers = Peers()
    alone = {n: v for batch in batches for n, v in batch.named.items() if _holders(v) == 1}
    digests = Digests([compat.local_of(v).detach() for v in alone.values()]).read()
    tables = [torch.tensor(t).view(-1, SIZE) for t in peers.gather(digests.tolist())]
    _check_alike(list(alone), tables, range(peers.world))
    first = list(range(peers.world))  # of each rank's replica: the first rank that it is joined to
    for groups in peers.gather(joined):
        for ranks in groups:
            roots = {first[rank] for rank in ranks}
            first = [min(roots) if one in roots else one for one in first]
    replicas = sorted(set(first))
    ranks = [rank for rank, one in enumerate(first) if one == first[peers.rank]]
    group = None
    if peers.world > 1:  # torch names a group by how many a process has made: each makes one
        group = make_group(ranks, "mics_gathered", backend="gloo", timeout=_LONGEST)
    return _Replica(replicas.index(first[peers.rank]), len(replicas), ranks, group)


def _walk(
    batches: list[_Batch], replica: _Replica, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather batch after batch, and hand out what is in it; first of all, that it has begun."""
    at = -1
    begun = _writes(batches)
    try:
        yield "", torch.empty(0)
        with taking_long():  # nobody hangs where a consumer takes its time
            for at, batch in enumerate(batches):
                if _writes(batches) != begun:
                    _tell(replica, at, _LEFT)
                    raise _changed(at, len(batches))
                _tell(replica, at, _GOES_ON)
                values = _wholes(batch, dtype)
                _compare(batch, values, replica)
                while values:
                    yield values.popitem()
    except GeneratorExit:
        if at + 1 < len(batches):  # else nobody waits any more
            _tell(replica, at + 1, _LEFT)
        raise


def _writes(batches: Sequence[_Batch]) -> list[int]:
    """How often each weight was written, by torch's counter; buffers change in every forward."""
    weights = [v for batch in batches for v in batch.named.values() if v.requires_grad]
    return [compat.times_written(v) + compat.times_written(compat.local_of(v)) for v in weights]


def _changed(at: int, batches: int) -> MicroStepError:
    return MicroStepError(
        "Weights have changed in the loop over mics.gathered: what it hands out would be of "
        "different steps.",
        numbers=f"{at} of {batches} units had been gathered.",
        write="the whole loop between two optimizer steps",
    )


def _wholes(batch: _Batch, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The whole tensors of a batch, last first; tied ones are gathered once."""
    with torch.no_grad():
        sharded = {id(v): v for v in batch.named.values() if isinstance(v, DTensor)}
        whole = dict(
            zip(sharded, wholes_of(list(sharded.values()), batch.ledger, dtype), strict=True)
        )
        found = {}
        for name, value in reversed(batch.named.items()):
            mine = whole.get(id(value), value.detach())
            is_cast = dtype is not None and mine.is_floating_point()
            found[name] = mine.to(dtype) if is_cast else mine
        return found


def _holders(value: torch.Tensor) -> int:
    """The ranks that share the pieces of a parameter; 0 for buffers, which are each rank's own."""
    if isinstance(value, DTensor):
        return math.prod(group.size() for group in groups_that_split(value))
    return int(isinstance(value, nn.Parameter))


def _compare(batch: _Batch, values: Mapping[str, torch.Tensor], replica: _Replica) -> None:
    """Refuse other weights under one name, see [Note: one name, other weights]."""
    ranks = len(replica.ranks)
    names = [n for n, value in batch.named.items() if 0 < _holders(value) < ranks]
    if not names or replica.group is None:
        return
    mine = Digests([values[name] for name in names]).read()
    table = mine.new_empty(ranks * mine.numel())
    all_gather(table, mine.view(-1), replica.group, name="mics.gathered, digests")
    _check_alike(names, list(table.view(ranks, *mine.shape)), replica.ranks)


def _check_alike(
    names: Sequence[str], tables: Sequence[torch.Tensor], ranks: Sequence[int]
) -> None:
    """Compare the digests of all ranks with those of the first."""
    for rank, table in zip(ranks, tables, strict=True):
        apart = (table[:, :-1] - tables[0][:, :-1]).square().mean(1).sqrt()
        norms = torch.maximum(table[:, -1], tables[0][:, -1])
        bad = (~(apart <= _NEAR * norms)).nonzero().view(-1).tolist()  # also what is no number
        if bad:
            raise ShardError(
                f"Ranks have other weights under one name: {names[bad[0]]}.",
                numbers=f"One has the norm {tables[0][bad[0], -1]:.4g} on rank {ranks[0]}, "
                f"{table[bad[0], -1]:.4g} on rank {rank}; {len(bad)} of {len(names)} differ.",
                write="experts as one DTensor over the axis that spreads them, or under names of "
                "their own",
            )


def _tell(replica: _Replica, at: int, what: int) -> None:
    """Meet the others before a batch, or say that this rank comes no more."""
    if replica.group is None:
        return
    table = torch.empty(2 * len(replica.ranks), dtype=torch.int64)
    all_gather(table, torch.tensor([what, at]), replica.group, name="mics.gathered, next unit")
    left = [r for r, row in zip(replica.ranks, table.view(-1, 2).tolist(), strict=True) if row[0]]
    if left and what == _GOES_ON:
        raise RankError(
            f"Rank(s) {', '.join(map(str, left))} left the loop over mics.gathered before its end.",
            numbers=f"{at} units had been gathered.",
            write="the whole loop on every rank of the replica; leave it on all of them or on none",
        )
