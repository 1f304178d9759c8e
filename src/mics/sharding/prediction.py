"""What a step of a sharded model will send, and what it has sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from mics import compat
from mics.communication.apart import Message
from mics.communication.gathered import gathered
from mics.communication.hop_order import messages_of
from mics.communication.ledger import LedgerView
from mics.ranks.mesh import ranks_of
from mics.sharding.dealt_step import DealtStep
from mics.sharding.units import Unit, units_of
from mics.sharding.whole_step import WholeStep
from mics.topology import Topology
from mics.traffic import (
    Traffic,
    UnitBytes,
    View,
    fsdp,
    hop_2_traffic,
    message_traffic,
    unit_traffic,
)

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def predict_traffic(
    model: nn.Module, *, micro_steps: int = 1, optimizer: Optimizers = ()
) -> Traffic:
    """What one step of ``model`` will send on this rank, every block used once per micro-step.

    Scales of gathers in few bits are asked for as they stand: once ``precompute_scales`` was
    called, a step has one call of it. State of an optimizer is gathered from its second step on.

    ::

        view = mics.ledger(model)
        view.reset()
        ...                                           # one step of 4 micro-steps
        assert view.traffic() == mics.predict_traffic(model, micro_steps=4)

    Args:
        model: sharded by mics.
        micro_steps: of the step.
        optimizer: what steps it; what ``mics.WholeStep`` and ``mics.DealtStep`` send is added, as
            of all parameters that are trained. Others send nothing that mics knows of.

    Raises:
        ShardError: the model was not sharded by mics.
    """
    steppers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    rank = dist.get_rank()
    total = Traffic({})
    for unit in units_of(model):
        groups, sizes = unit.groups, bytes_of(unit, model)
        replicas = (rank,) if groups.replicas is None else ranks_of(groups.replicas)
        partition = ranks_of(groups.shard)
        gather, reduce = gathered(unit.group).dtype, compat.reduce_dtype(unit.group)
        total += unit_traffic(
            View(rank, partition, replicas, groups.gpus_per_node),
            sizes,
            micro_steps,
            hop_2_runs=0,
            all_gather=unit.decide("all_gather", partition, sizes.gather_bytes, gather),
            reduce_scatter=unit.decide("reduce_scatter", partition, sizes.reduce_bytes, reduce),
            gloo=unit.reduce_scatter.by_all_reduce,
        )
        gathers = micro_steps * (sizes.gathers + sizes.backward_gathers)
        own = [(message, gathers) for message in unit.scales.before_each_gather()]
        once = unit.precomputing + _steps_of(unit, steppers)
        for (collective, sent), calls in own + [(one, 1) for one in once]:
            total += message_traffic(0, collective, sent, calls, rank, groups.gpus_per_node)
    return total + _hop_2(model, rank)


def _hop_2(model: nn.Module, rank: int) -> Traffic:
    """One run of every message, which may be of several units."""
    beside: dict[tuple[int, int], list[Unit]] = {}
    for unit in units_of(model):
        root = compat.outermost(unit.group, model)
        beside.setdefault((id(root), id(unit.groups.shard)), []).append(unit)
    total = Traffic({})
    for units in beside.values():
        groups, hops = units[0].groups, [u.hop_two for u in units if u.hop_two is not None]
        replicas = (rank,) if groups.replicas is None else ranks_of(groups.replicas)
        view = View(rank, ranks_of(groups.shard), replicas, groups.gpus_per_node)
        for together in messages_of(hops):
            share = together[0].share  # a dealt unit has messages of its own
            if share is not None:
                for collective, one in share.messages():
                    total += message_traffic(2, collective, one, 1, rank, groups.gpus_per_node)
            else:
                sent = [hop.averaging.sent() for hop in together]
                exact, coded = sum(one.exact for one in sent), sum(one.coded for one in sent)
                averaging = together[0].averaging
                padded, form = averaging.padded(exact), averaging.form(exact)
                total += hop_2_traffic(view, padded, coded, form=form)
    return total


def predict_full_sharding(model: nn.Module, *, micro_steps: int = 1) -> Traffic:
    """What one step would send on this rank if FSDP2 sharded the same units over all ranks.

    Every collective is flat, on the backend at hand, and there is no hop 2. The padding is that of
    the model's own partition size.

    Args:
        model: sharded by mics over all ranks, replicas included.
        micro_steps: of the step.

    Raises:
        ShardError: the model was not sharded by mics.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    total = Traffic({})
    for unit in units_of(model):
        topology = Topology.from_world(world, unit.groups.gpus_per_node, world)
        gloo = unit.reduce_scatter.by_all_reduce
        total += fsdp(topology, [bytes_of(unit, model)], micro_steps, gloo=gloo, rank=rank)
    return total


def _steps_of(unit: Unit, optimizers: Sequence[torch.optim.Optimizer]) -> list[Message]:
    """What optimizers send of the parameters of a unit."""
    inside = {id(param) for param in compat.sharded_params(unit.group) if param.requires_grad}
    messages: list[Message] = []
    for one in optimizers:
        if isinstance(one, DealtStep):
            messages += one.messages_of(unit)
        elif isinstance(one, WholeStep):
            params = [p for group in one.param_groups for p in group["params"] if id(p) in inside]
            messages += [message for param in params for message in one.messages_for(param)]
    return messages


def bytes_of(unit: Unit, model: nn.Module) -> UnitBytes:
    """The sizes of one unit as ``traffic.py`` wants them; ``model`` contains its root."""
    group, p = unit.group, unit.groups.shard.size()
    reduce_itemsize = compat.reduce_dtype(group).itemsize
    shard_numel = compat.trainable_shard_numel(group)
    gathers, backward_gathers, backward_partition = 1, 0, 0
    if compat.reshards_after_forward(group) and not compat.becomes_root(group, model):
        backward_partition = compat.backward_gather_group(group).size()
        if backward_partition == p:
            gathers, backward_partition = 2, 0
        else:
            backward_gathers = 1
    exact, coded = shard_numel * reduce_itemsize, 0
    if unit.hop_two is not None:
        exact, coded = unit.hop_two.averaging.sent()
    return UnitBytes(
        gather_bytes=gathered(group).shard_bytes * p,
        reduce_bytes=shard_numel * p * reduce_itemsize,
        sync_bytes=exact,
        gathers=gathers,
        reduces=1 if shard_numel else 0,
        backward_gathers=backward_gathers,
        backward_partition=backward_partition,
        coded_bytes=coded,
    )


def ledger(model: nn.Module) -> LedgerView:
    """What ``model`` has communicated since the last reset, by link class, stage and hop.

    Returns:
        A live view: ``traffic()`` compares with ``mics.traffic``, ``seconds()`` gives times,
        ``reset()`` starts anew, ``print`` shows a table.

    Raises:
        ShardError: the model was not sharded by mics.
    """
    return LedgerView(tuple(unit.ledger for unit in units_of(model)))
