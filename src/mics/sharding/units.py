"""The units of a model: what mics attaches to each sharded module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from mics import compat
from mics.communication.backend import backend_of_mesh
from mics.communication.collectives import AllGather, ReduceScatter
from mics.communication.forms import Collectives, decide_by, measure
from mics.communication.hop_two import HopTwo
from mics.communication.landing import Landing
from mics.communication.ledger import Ledger
from mics.errors import ShardError
from mics.ranks.mesh import Groups, ranks_of

_ATTRIBUTE = "_mics_units"


class Step(Protocol):
    """The open step that a unit belongs to."""

    def check_trained(self) -> None:
        """Refuse to reduce gradients of parameters that other ranks have frozen."""


class Unit:
    """One FSDP2 parameter group: its collectives, its hop 2, and what is counted of them.

    Args:
        module: the first module of the group; it remembers the unit.
        group: the FSDP2 parameter group, see ``compat.py``.
        groups: the ranks it talks to.
        collectives: how the form of its collectives is chosen.
        overlap: whether it communicates beside computation also where the backend blocks.
    """

    def __init__(
        self,
        module: nn.Module,
        group: Any,
        groups: Groups,
        *,
        collectives: Collectives,
        overlap: bool,
    ) -> None:
        self.group = group
        self.groups = groups
        self.decide = decide_by(groups, collectives)
        if collectives == "auto":
            _measure(group, groups)
        self.ledger = Ledger(rank=dist.get_rank(), gpus_per_node=groups.gpus_per_node)

        replicated = groups.replicas is not None and not compat.is_replicated_by_torch(group)
        self.landing: Landing | None = None
        if overlap and backend_of_mesh(groups).blocks:
            compat.gather_beside_computation(group)
            self.landing = Landing(group, groups, self._landed if replicated else None)
        self.hop_two: HopTwo | None = None
        if replicated:
            self.hop_two = HopTwo(group, groups, self.ledger, self.landing, self._peers)

        self.all_gather = AllGather(groups, self.ledger, self.decide)
        self.reduce_scatter = ReduceScatter(
            groups,
            self.ledger,
            self.decide,
            self.hop_two.before_reduce if self.hop_two is not None else None,
            self.landing,
        )
        compat.set_comms(group, self.all_gather, self.reduce_scatter)
        self.forward_hook: RemovableHandle | None = None
        if self.hop_two is not None or self.landing is not None:
            told = outside_graphs(self._before_forward)
            self.forward_hook = module.register_forward_pre_hook(told)
        self._step: Step | None = None
        units_on(module).append(self)

    @property
    def step(self) -> Step | None:
        """The open step that will finish the unit's gradients, ``None`` if there is none."""
        return self._step

    def belong_to(self, step: Step | None) -> None:
        """Remember an open step, which then lasts as long as what it guards; ``None`` ends it."""
        self._step = step

    def before_backward(self) -> None:
        """Let the open step look, before the first gradient is reduced."""
        if self._step is not None:
            self._step.check_trained()

    def _before_forward(self) -> None:
        if self.hop_two is not None:
            self.hop_two.before_forward()
        if self.landing is not None:
            self.landing.reductions.before_forward()

    def _landed(self) -> None:
        if self.hop_two is not None:
            self.hop_two.landed()

    def _peers(self) -> list[HopTwo]:
        """Every hop 2 under the same root, in module order."""
        owners = [(g, compat.modules_of(g)[0]) for g in compat.root_param_groups(self.group)]
        units = [unit for g, module in owners for unit in units_on(module) if unit.group is g]
        return [unit.hop_two for unit in units if unit.hop_two is not None]


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


def outside_graphs(tell: Callable[[], None]) -> Callable[..., None]:
    """A forward hook that calls ``tell`` and, as FSDP2's own, is part of no compiled graph."""

    def hook(*_: Any) -> None:
        tell()

    outside: Callable[..., None] = torch.compiler.disable(hook, recursive=True)  # type: ignore[no-untyped-call]
    return outside


def _measure(group: Any, groups: Groups) -> None:
    """Let the form of every collective of a group be chosen."""
    shard_ranks = ranks_of(groups.shard)
    p = groups.shard.size()
    gather, reduce = compat.gather_dtype(group), compat.reduce_dtype(group)
    gather_bytes = compat.gathered_shard_bytes(group) * p
    reduce_bytes = compat.trainable_shard_numel(group) * reduce.itemsize * p
    measure(groups, groups.shard, shard_ranks, "all_gather", gather_bytes, gather)
    measure(groups, groups.shard, shard_ranks, "reduce_scatter", reduce_bytes, reduce)
    if compat.reshards_after_forward(group):
        backward = compat.backward_gather_group(group)
        if backward is not groups.shard:
            measure(groups, backward, ranks_of(backward), "all_gather", gather_bytes, gather)
