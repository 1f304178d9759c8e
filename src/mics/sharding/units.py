"""The units of a model: what mics attaches to each sharded module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from mics import compat
from mics.communication.apart import Message
from mics.communication.backend import backend_of_mesh
from mics.communication.bits_by_measurement import settle
from mics.communication.collectives import AllGather, ReduceScatter
from mics.communication.error_feedback import ErrorFeedback
from mics.communication.fewer_bits import Asked, averaging_in
from mics.communication.finite import finite_of
from mics.communication.forms import Collectives, decide_by, measure
from mics.communication.gathered import gathered
from mics.communication.gradients import add_whole
from mics.communication.hop_two import HopTwo
from mics.communication.issued import issued_of
from mics.communication.landing import Landing
from mics.communication.ledger import Ledger
from mics.communication.pace import pace_of
from mics.communication.scales import Scales
from mics.communication.shares import Share
from mics.communication.used import Used
from mics.errors import MicroStepError, ShardError
from mics.ranks.heartbeat import hold_in
from mics.ranks.mesh import Groups, ranks_of
from mics.ranks.recording import recorder
from mics.sharding.gradient_hooks import refuse_idle_hooks
from mics.sharding.lockstep import Moment, Use
from mics.sharding.passes import Passes, Step, passes_of

_ATTRIBUTE = "_mics_units"


class Unit:
    """One FSDP2 parameter group: its collectives, its hop 2, and what is counted of them.

    Args:
        module: the first module of the group; it remembers the unit.
        group: the FSDP2 parameter group, see ``compat.py``.
        groups: the ranks it talks to.
        collectives: how the form of its collectives is chosen.
        overlap: whether it communicates beside computation also where the backend blocks.
        hop_two: what is asked of its hop 2.
    """

    def __init__(
        self,
        module: nn.Module,
        group: Any,
        groups: Groups,
        *,
        collectives: Collectives,
        overlap: bool,
        hop_two: Asked,
    ) -> None:
        self.group = group
        self.groups = groups
        self.decide = decide_by(groups, collectives)
        if collectives == "auto":
            _measure(group, groups)
        hold_in(dist.get_world_size() // groups.num_replicas)
        self.ledger = Ledger(
            rank=dist.get_rank(), gpus_per_node=groups.gpus_per_node, pace=pace_of(groups)
        )

        self.scales = Scales(group, self.ledger, groups.device)
        self.precomputing: list[Message] = []  # scales of several units, in the first one's name
        self.number = issued_of(groups).number(self.name)
        self.used = Used(group, finite_of(groups))
        self.hop_two: HopTwo | None = None
        self.landing: Landing | None = None
        self._communicate(overlap=overlap, asked=hop_two)

        self._passes: Passes | None = None
        self._is_alone = groups.shard.size() == 1  # in its partition group
        self._entering = False
        self._step: Step | None = None
        self._optimizer_steps = 0
        self.forward_hooks = [self._hook(one) for one in compat.modules_of(group)]
        units_on(module).append(self)

    def _communicate(self, *, overlap: bool, asked: Asked) -> None:
        """Make its collectives, its hop 2 and its landing, in the order they need each other."""
        group, groups = self.group, self.groups
        replicated = groups.replicas is not None and not compat.is_replicated_by_torch(group)
        if overlap and backend_of_mesh(groups).blocks:
            compat.gather_beside_computation(group)
            self.landing = Landing(group, groups, self._landed if replicated else None)
        if replicated:
            asked = settle(asked, group, groups)
            averaging = averaging_in(asked, group, groups, self.ledger)
            self.used.errors = averaging.errors
            starts = partial(issued_of(groups).start_hop_two, self.number)
            self.hop_two = HopTwo(
                group, groups, averaging, self.landing, self.used, self._became_ready, starts
            )
        issued = partial(issued_of(groups).add, self.number)
        self.all_gather = AllGather(
            groups, self.ledger, self.decide, partial(issued, "gathers"), self._before_gather
        )
        self.reduce_scatter = ReduceScatter(
            groups,
            self.ledger,
            self.decide,
            partial(issued, "reduces"),
            self._before_reduce,
            self.landing,
        )
        compat.set_comms(group, self.all_gather, self.reduce_scatter)

    def _hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Stand before and behind FSDP2's own hooks on one module."""
        return [
            module.register_forward_pre_hook(compat.outside_graphs(self._enter), with_kwargs=True),
            module.register_forward_hook(compat.outside_graphs(self._leave), prepend=True),
            self._stand_first(module),
        ]

    def _stand_first(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(compat.outside_graphs(self._arrive), prepend=True)

    def stand_first(self) -> None:
        """Come before the hooks that were put before FSDP2's since the unit was made."""
        for module, handles in zip(compat.modules_of(self.group), self.forward_hooks, strict=True):
            handles.pop().remove()
            handles.append(self._stand_first(module))

    @property
    def name(self) -> str:
        """Its module's under the root, or its first parameter's."""
        return compat.module_name(self.group) or compat.param_names(self.group)[0]

    @property
    def share(self) -> Share | None:
        """What this rank owns of it, if its optimizer state is dealt to the replicas."""
        return None if self.hop_two is None else self.hop_two.share

    def deal(self, share: Share) -> None:
        """Let hop 2 bring gradients to those who own them, from now on."""
        assert self.hop_two is not None
        self.hop_two.share = self.used.share = share

    @property
    def step(self) -> Step | None:
        """The open step that will finish the unit's gradients, ``None`` if there is none."""
        return self._step

    def belong_to(self, step: Step | None) -> None:
        """Remember an open step, which then lasts as long as what it guards; ``None`` ends it."""
        self._step = step

    @property
    def in_step(self) -> bool:
        """Whether an open step will finish the unit's gradients."""
        return self._step is not None and not self._step.was_left

    @property
    def trains(self) -> bool:
        """Whether it has a parameter that needs a gradient."""
        return compat.has_trainable_shard(self.group)

    def tree(self) -> list[Unit]:
        """Every unit under the same root, in module order."""
        owners = [(g, compat.modules_of(g)[0]) for g in compat.root_param_groups(self.group)]
        return [unit for g, module in owners for unit in units_on(module) if unit.group is g]

    # -- around the forward of its modules, outside of recomputation ---------------------------

    def _arrive(self, module: nn.Module, args: Any) -> None:
        """Let what this rank has skipped come first; FSDP2 gathers next."""
        if compat.in_backward():
            return
        self._entering = compat.enters_forward(self.group)
        if self.hop_two is not None:
            self.hop_two.before_gather()
        tracer = recorder()
        if self._entering and tracer is not None:
            tracer.arrive(self.ledger)
        passes = self.find_passes()
        if self._entering and passes is not None:
            passes.lockstep.arrive(self, args)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Count the use, and look at the inputs; FSDP2 has gathered."""
        if self.landing is not None:
            self.landing.reductions.before_forward()
        if compat.in_backward() or not self._entering:
            return
        passes = self.find_passes()
        if not torch.is_grad_enabled():
            return
        if self.hop_two is not None:
            self.hop_two.before_forward()
        end = partial(self._end_backward, passes.lockstep.now(self) if passes else None)
        for one in compat.tensors_with_grad((args, kwargs)):
            one.register_hook(end)  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Stand before FSDP2's own hooks on what the forward returns."""
        if compat.in_backward() or self._passes is None:
            return
        if not compat.completes_forward(self.group, module):
            return
        tracer = recorder()
        if tracer is not None:
            tracer.leave(self.ledger)
        self._passes.lockstep.finish(self, output)
        if not torch.is_grad_enabled():
            return
        outputs = compat.tensors_with_grad(output)
        use = self._passes.lockstep.leave(self, needs_gradient=bool(outputs))
        begin = partial(self._begin_backward, use, self._written())
        for one in outputs:
            one.register_hook(begin)  # type: ignore[no-untyped-call]

    def find_passes(self) -> Passes | None:
        """Those of the unit's tree, once the root's first forward has told who the root is."""
        if self._passes is None:
            self._passes = passes_of(self)
        return self._passes

    def stepped(self) -> None:
        """An optimizer of its parameters is about to write them."""
        self._optimizer_steps += 1
        if self.used.errors is not None:
            self.used.errors.stepped()

    def _written(self) -> int:
        """How often its weights were written so far.

        Autograd counts the writes of all optimizers but the fused ones on DTensors.
        """
        return self._optimizer_steps + compat.times_group_written(self.group)

    # -- in backward -----------------------------------------------------------------------------

    def _begin_backward(self, use: Use, written: int, gradient: torch.Tensor | None) -> None:
        assert self._passes is not None
        if writes := self._written() - written:
            params = len(self.used.params)
            raise MicroStepError(
                f"The weights of {self.name} were written between a forward and its backward, "
                "which would use the new ones.",
                numbers=f"{writes} write(s) of its {params} parameter(s) in between.",
                write="the backward of a loss before its weights change; or a new forward",
            )
        tracer = recorder()
        if tracer is not None:
            tracer.begin_backward(self.ledger)
        self._passes.begin(use)

    def _end_backward(self, moment: Moment | None, gradient: torch.Tensor | None) -> None:
        """The gradients of its inputs have come; FSDP2 reduces next."""
        tracer = recorder()
        if tracer is not None:
            tracer.end_backward(self.ledger)
        if moment is not None and self._passes is not None:
            self._passes.end_use(self, moment)
        self.note()

    def note(self) -> None:
        """Look at its whole gradients, before FSDP2 reduces them.

        Where a replica is one rank there is nothing to reduce: they are added up at once.
        """
        self.used.note()
        if self._is_alone and self.trains and compat.whole_gradients_are_sums(self.group):
            self._before_gradients(self.used.reduced)
            add_whole(self.group)
            if self.hop_two is not None:
                self.hop_two.all_arrived()
            else:  # with replicas such hooks are refused
                compat.run_gradient_hooks(self.group)

    def _before_gather(self) -> None:
        self.scales.sent()
        if self.share is not None and self.share.pending:
            raise MicroStepError(
                "A unit was gathered before what other replicas have stepped of it had come.",
                numbers=f"The unit {self.name}, outside of its own forward.",
                write="model.state_dict() before unshard(), and no "
                "set_modules_to_forward_prefetch: mics gathers ahead by itself",
            )

    def _before_reduce(self) -> None:
        self._before_gradients(self.used.before_reduce)

    def _before_gradients(self, use: Callable[[], None]) -> None:
        """Something is about to be added to its gradients, which is the end of a use."""
        refuse_idle_hooks(self.group)
        passes = self.find_passes()  # also of a unit that this rank has always left out
        if passes is not None:
            passes.before_reduce()
        use()
        if self.hop_two is not None:
            self.hop_two.before_reduce()

    def _landed(self) -> None:
        if self.hop_two is not None:
            self.hop_two.landed()

    def _became_ready(self) -> None:
        if self._passes is not None:
            self._passes.order.advance()


def units_on(module: nn.Module) -> list[Unit]:
    """The units attached to one module."""
    units: list[Unit] = module.__dict__.setdefault(_ATTRIBUTE, [])
    return units


def feedback_of(model: nn.Module) -> list[ErrorFeedback]:
    """What the hop 2 of units of a model holds back, of those that do, in module order."""
    hops = [unit.hop_two for module in model.modules() for unit in units_on(module)]
    found = [hop.averaging.errors for hop in hops if hop is not None]
    return [one for one in found if one is not None]


def units_of(model: nn.Module) -> list[Unit]:
    """All units of a model, in module order.

    Raises:
        ShardError: the model was not sharded by mics.
    """
    below = compat.modules_under(model)
    units = [unit for module in below for unit in module.__dict__.get(_ATTRIBUTE, ())]
    if not units:
        raise ShardError(
            f"{type(model).__name__} has no module sharded by mics.",
            write="model = mics.shard(model), or mics.fully_shard(block, mesh=mesh) for each block",
        )
    return units


def _measure(group: Any, groups: Groups) -> None:
    """Let the form of every collective of a group be chosen."""
    shard_ranks = ranks_of(groups.shard)
    p = groups.shard.size()
    sent, reduce = gathered(group), compat.reduce_dtype(group)
    gather, gather_bytes = sent.dtype, sent.shard_bytes * p
    reduce_bytes = compat.trainable_shard_numel(group) * reduce.itemsize * p
    measure(groups, groups.shard, shard_ranks, "all_gather", gather_bytes, gather)
    measure(groups, groups.shard, shard_ranks, "reduce_scatter", reduce_bytes, reduce)
    if compat.reshards_after_forward(group):
        backward = compat.backward_gather_group(group)
        if backward is not groups.shard:
            measure(groups, backward, ranks_of(backward), "all_gather", gather_bytes, gather)
