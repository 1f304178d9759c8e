"""The communication units of a model: what mics attaches to each sharded module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from mics import compat
from mics.communication.collectives import Decide
from mics.communication.hop_two import HopTwo
from mics.communication.ledger import Ledger, LedgerView
from mics.errors import ShardError
from mics.ranks.mesh import Groups, ranks_of
from mics.traffic import Block, Traffic, View, block_traffic

_ATTRIBUTE = "_mics_units"


@dataclass
class Unit:
    """One FSDP2 parameter group, the groups it talks to, and what is counted of it."""

    group: Any  # the FSDP2 parameter group, see compat.py
    groups: Groups
    ledger: Ledger
    hop_two: HopTwo | None  # None with one replica
    decide: Decide  # flat or hierarchical
    exchanges: bool  # whether its flat reduce-scatter is an exchange, not the backend's


def attach(module: nn.Module, unit: Unit) -> None:
    """Remember a unit on the module that owns it."""
    units_on(module).append(unit)


def units_on(module: nn.Module) -> list[Unit]:
    """The units attached to one module."""
    units: list[Unit] = module.__dict__.setdefault(_ATTRIBUTE, [])
    return units


def units_of(model: nn.Module) -> list[Unit]:
    """All units of a model, in module order.

    Raises:
        ShardError: the model was not sharded by mics.
    """
    units = [unit for module in model.modules() for unit in module.__dict__.get(_ATTRIBUTE, [])]
    if not units:
        raise ShardError(
            f"{type(model).__name__} has no module sharded by mics.",
            write="model = mics.shard(model), or mics.fully_shard(block, mesh=mesh) for each block",
        )
    return units


def predict_traffic(model: nn.Module, *, micro_steps: int = 1) -> Traffic:
    """What one step of ``model`` will send on this rank, every block used once per micro-step.

    ::

        view = mics.ledger(model)
        view.reset()
        ...                                           # one step of 4 micro-steps
        assert view.traffic() == mics.predict_traffic(model, micro_steps=4)

    Raises:
        ShardError: the model was not sharded by mics.
    """
    rank = dist.get_rank()
    total = Traffic({})
    for unit in units_of(model):
        groups, block = unit.groups, block_of(unit, model)
        replicas = (rank,) if groups.replicas is None else ranks_of(groups.replicas)
        partition = ranks_of(groups.shard)
        gather, reduce = compat.gather_dtype(unit.group), compat.reduce_dtype(unit.group)
        total += block_traffic(
            View(rank, partition, replicas, groups.gpus_per_node),
            block,
            micro_steps,
            hop_2_runs=1,
            all_gather=unit.decide("all_gather", partition, block.gather_bytes, gather),
            reduce_scatter=unit.decide("reduce_scatter", partition, block.reduce_bytes, reduce),
            gloo=groups.device.type == "cpu" and not unit.exchanges,
        )
    return total


def block_of(unit: Unit, model: nn.Module) -> Block:
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
    return Block(
        gather_bytes=compat.gathered_shard_bytes(group) * p,
        reduce_bytes=shard_numel * p * reduce_itemsize,
        sync_bytes=shard_numel * reduce_itemsize,
        gathers=gathers,
        reduces=1 if shard_numel else 0,
        backward_gathers=backward_gathers,
        backward_partition=backward_partition,
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
