"""Hop 2: the all-reduce of the accumulated gradient shard over the replicas.

[Note: .grad is the accumulator]
``fully_shard`` runs on the 1-D shard mesh, so FSDP2 reduce-scatters every micro-step and adds the
result to each parameter's ``.grad``, as PyTorch always does. That is MiCS' hop 1 and its
accumulation (paper, section 3.4). FSDP2's own 2-D mesh keeps a flat partial sum beside ``.grad``
instead, which survives ``zero_grad``, is lost when a block is unused on the last micro-step, and
mixes up gradients when the set of used parameters changes. With ``.grad`` as the only place a
gradient can be, none of these can happen.

[Note: when hop 2 starts]
Before FSDP2 touches a group's ``.grad`` it asks the communication object for a buffer. That is
where a hop 2 under way is waited for, and where the backward's end is told to expect this group:
whatever way the gradient came about, it is synchronised by then. Most groups are earlier: FSDP2
runs a parameter's post-accumulate hooks right after it has added to ``.grad``, and when the last
parameter of a group has its gradient and no further use of the group is to come in this backward,
the group is ready. Ready groups start in one order, that of ``hop_order.py``: the group's ``.grad``
shards (views of one flat buffer) are all-reduced in place: on a stream of ours on a GPU,
asynchronously on Gloo, in both cases beside the rest of the backward.

[Note: the same message on every rank]
What a rank's data did not use must not change what it sends: a message always holds the padded
shards of all trainable parameters, with zeros for those that have no gradient here, and all of them
have one afterwards. Those that nobody has used are dropped at the end of the step
(``settling.py``).

[Note: repeated hop 2]
When gradients that went through hop 2 are still in ``.grad`` and more are added (accumulation
without ``micro_steps``), another hop 2 must leave the old part alone. An average does: the old part
is equal on all replicas. A sum (``set_gradient_divide_factor``) would multiply it by R, so it is
divided by R first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mics import compat
from mics.communication.averaging import Averaging
from mics.communication.backend import Flight, Issue, Program, backend_of
from mics.communication.gradients import (
    copy_back,
    gradients_of,
    message_of,
    offsets_of,
    trainable_gradients,
)
from mics.communication.guard import guard, optimizer_steps, watch_optimizers
from mics.communication.landing import Landing
from mics.communication.same_steps import same_steps_of
from mics.communication.shares import Share
from mics.communication.used import Used
from mics.errors import MicroStepError, MicsWarning
from mics.quantities import MIB, first_of
from mics.ranks.console import speaks
from mics.ranks.mesh import Groups


@dataclass
class _Pass:
    """What one backward pass has seen of a unit; the next pass gets a new one."""

    uses: int = 0  # forwards whose backward is still to come
    arrived: set[int] = field(default_factory=set)  # parameters that have this use's gradient
    synced: bool = False  # hop 2 has been started
    complete: bool = False  # no gradient is to come that is not under way


class HopTwo:
    """Hop 2 of one parameter group.

    Args:
        group: the FSDP2 parameter group, sharded over a 1-D mesh.
        groups: of the unit, with more than one replica.
        averaging: how the replicas come to the same gradients.
        landing: of the unit's reduce-scatters, if they land beside the backward pass.
        used: what this rank has used of the unit.
        became_ready: called when its turn in the order of hops may have come.
        starts: called when it has.
    """

    def __init__(
        self,
        group: Any,
        groups: Groups,
        averaging: Averaging,
        landing: Landing | None,
        used: Used,
        became_ready: Callable[[], None],
        starts: Callable[[], None],
    ) -> None:
        assert groups.replicas is not None
        self.group = group
        self.partition, self._replicas = groups.shard, groups.replicas  # of its mesh
        self.averaging = averaging
        self._landing = landing
        self._used = used
        self._became_ready, self._starts = became_ready, starts
        self._device = groups.device
        self._backend = backend_of(groups.replicas, groups.device)
        # Asked before this rank waits for the others: do they take part in this all-reduce at all?
        self._same_steps = same_steps_of(groups) if self._backend.blocks else None
        # By position in the group: the hooked parameter, and the hook's handle.
        self._hooked: dict[int, tuple[nn.Parameter, RemovableHandle]] = {}
        self._num_trainable = 0
        self._pass = _Pass()
        self.held = False  # whether passes are parts of a larger one, whose end is awaited
        self._unsynced = False  # .grad holds something no other replica has seen
        self._synced_version: tuple[int, int, int] | None = None  # of .grad as hop 2 left it
        self._flight: Flight | None = None
        self._in_stages = False  # whether the one under way has more to be issued
        self.share: Share | None = None  # what this rank owns, if the unit is dealt to the replicas
        watch_optimizers()

    @property
    def has_partial_gradients(self) -> bool:
        """Whether ``.grad`` holds gradients that have not been through hop 2."""
        return self._unsynced and bool(gradients_of(self.group))

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that will not be finished."""
        self.wait()
        for param in compat.sharded_params(self.group):
            param.grad = None
        if self.share is not None:
            self.share.drop_gradients()
        self._unsynced = False
        self._pass = _Pass()

    def check_optimizer(self, stepped: set[int]) -> bool:
        """Refuse an optimizer of gradients that differ between replicas, see ``guard.Owner``."""
        if not self.has_partial_gradients:
            return False
        if any(id(p) in stepped for p in compat.sharded_params(self.group)):
            names = first_of(compat.param_names(self.group))
            raise MicroStepError(
                "optimizer.step() was called before the last micro-step: the gradients are sums "
                "of this replica alone, and the replicas would drift apart.",
                numbers=f"Hop 2 has not run for the group of {names} "
                f"({self._replicas.size()} replicas).",
                write="let the loop over mics.micro_steps(...) finish, or drop the gradients with "
                "optimizer.zero_grad()",
            )
        return True

    # -- called during forward and backward ------------------------------------------------------

    def before_gather(self) -> None:
        """The shards are about to be gathered: what other replicas have stepped has to be there."""
        if self.share is None:
            return
        self.share.check()
        if self.share.may_be_stepped and self._same_steps is not None and torch.is_grad_enabled():
            for share in self.share.beside:
                share.may_be_stepped = (
                    share.may_be_stepped and share.partition is not self.partition
                )
            self._same_steps.compare_steps(self._used)
        self.share.wait()

    def before_forward(self) -> None:
        """Count a use: with more of them to come, a gradient is not complete yet."""
        self._pass.uses += 1

    def before_reduce(self) -> None:
        """FSDP2 is about to add to ``.grad``: nothing of ours may be reading or writing it."""
        self.wait()
        if self.share is not None:
            self.share.before_reduce()
        self._watch_parameters()
        self._unsynced = True
        if self._synced_version is None:
            return
        version, self._synced_version = self._synced_version, None
        if self.averaging.errors is not None:
            self.averaging.errors.forget_dropped()
        gradients = gradients_of(self.group)
        if not gradients:
            return
        if self.share is not None:
            return  # what was accumulated stays as it was
        if compat.divide_factor(self.group) is not None:  # see [Note: repeated hop 2]
            compat.divide_all(gradients, float(self._replicas.size()))
        untouched = version == self._version()
        if untouched and not self._pass.synced and self.wanted:
            _warn_once_about_repeats(self._replicas.size(), sum(g.nbytes for g in gradients))

    def landed(self) -> None:
        """The last reduce-scatter is in the gradients, which may be what was waited for."""
        if self._pass.complete:
            self._became_ready()

    @property
    def ready(self) -> bool:
        """Whether hop 2 may start: the gradients of this backward are complete and in place."""
        return self._pass.complete and (self._landing is None or not self._landing.pending)

    @property
    def wanted(self) -> bool:
        """Whether the backward passes to come run hop 2, and there is something to reduce."""
        if self.held or not compat.wants_all_reduce(self.group):
            return False
        return compat.has_trainable_shard(self.group)

    @property
    def awaits_backward(self) -> bool:
        """Whether a forward has run whose backward is still to come."""
        return self._pass.uses > 0

    def begin_pass(self, *, unused: bool) -> None:
        """A backward pass has begun.

        Args:
            unused: no gradient of the group comes in it.
        """
        self._pass = _Pass(self._pass.uses, complete=unused)

    def _watch_parameters(self) -> None:
        """See that every sharded parameter reports its gradient, and to nobody else before us."""
        params = compat.sharded_params(self.group)
        self._num_trainable = 0
        hooked = compat.nums_of_gradient_hooks(params)
        for position, (param, hooks) in enumerate(zip(params, hooked, strict=True)):
            ours = position in self._hooked and self._hooked[position][0] is param
            if hooks > ours:
                raise _other_hook_error(self.group, self._replicas.size())
            if not param.requires_grad:
                continue
            self._num_trainable += 1
            if hooks == 0:
                handle = param.register_post_accumulate_grad_hook(self._after_accumulation)  # type: ignore[no-untyped-call]
                self._hooked[position] = param, handle

    def _after_accumulation(self, param: torch.Tensor) -> None:
        arrived = self._pass.arrived
        arrived.add(id(param))
        if len(arrived) == self._num_trainable:
            arrived.clear()
            self.all_arrived()

    def all_arrived(self) -> None:
        """Every parameter has its gradient of one use."""
        seen = self._pass
        seen.uses -= 1
        # Below 0 more come than forwards were counted, as in a second backward of one: nobody knows
        # how many, and hop 2 starts when the pass ends.
        if seen.uses == 0 and self.wanted:
            seen.complete = True
            self.landed()

    def close_pass(self) -> None:
        """Wait for hop 2; what was left out of it is kept from optimizers."""
        self.wait()
        self._pass = _Pass()
        if self._unsynced:
            guard(self)
        if self._unsynced and self.share is not None:
            self.share.signs.lend()

    # -- hop 2 itself -----------------------------------------------------------------------------

    @property
    def message_bytes(self) -> int:
        """Bytes of its message, 0 if it never has one."""
        return compat.trainable_shard_numel(self.group) * self.averaging.dtype.itemsize

    @property
    def kind(self) -> Hashable:
        """What units must have in common to be sent as one message; ``None`` if none are."""
        return self.averaging.kind() if self.share is None else None

    @torch.no_grad()
    def go_on(self) -> None:
        """Issue what follows the last call of a hop 2 in stages, in the order of hops.

        Nobody else would before its end, and what is issued then runs beside nothing.
        """
        if self._flight is None or not self._in_stages:
            return
        if self._same_steps is not None:
            self._same_steps.check()
        self._flight.go_on()

    @torch.no_grad()
    def start(self, *others: HopTwo) -> None:
        """Begin hop 2, whether there are gradients here or not.

        Args:
            others: of the same kind, which are sent in the same message.
        """
        hops = (self, *others)
        for hop in hops:
            hop.wait()
            if hop.share is not None:
                hop.share.wait()  # a rank may have left out the forward
            hop._starts()
            hop._unsynced = False
            hop._pass.synced = True
        num_bytes = sum(hop.message_bytes for hop in hops)
        self._in_stages = self.share is None and self.averaging.in_stages(num_bytes)
        flight = self._backend.beside(partial(self._synchronise, hops), self._device, "hop 2")
        for hop in hops:
            hop._flight = flight

    def _synchronise(self, hops: Sequence[HopTwo], issue: Issue) -> Program:
        if self.share is not None:
            yield from self.share.reduce(issue)
            return
        gradients = [trainable_gradients(hop.group) for hop in hops]
        parts = [message_of(hop.group, self.averaging.dtype, self._device) for hop in hops]
        # On every backend a copy: memory is faster than any link, and one call has one order.
        message = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield from self.averaging.program(message, issue)
        if any(g is not None and g.device != message.device for each in gradients for g in each):
            yield  # gradients offloaded to the host are copied once the caller waits
        reduced = torch.split(message, [part.numel() for part in parts])
        for hop, part, each in zip(hops, reduced, gradients, strict=True):
            hop._take(part, each)

    def _take(self, message: torch.Tensor, gradients: Sequence[torch.Tensor | None]) -> None:
        offsets = offsets_of(self.group)
        copy_back(message, gradients, offsets)
        for i, (gradient, offset) in enumerate(zip(gradients, offsets, strict=True)):
            if gradient is None:
                compat.give_gradient(self.group, i, message[offset:])
                self._used.received(i)

    def wait(self) -> None:
        """Wait for a hop 2 under way, if there is one; those in the same message are over too."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        with torch.no_grad():
            if self._same_steps is not None:
                self._same_steps.check()
            flight.wait()
            self._synced_version = self._version()

    def _version(self) -> tuple[int, int, int] | None:
        """What changes when the first gradient is zeroed, replaced or used by an optimizer.

        Editing a DTensor in place counts on the DTensor, not on its local tensor; an optimizer's
        ``zero_grad(set_to_none=False)`` counts on neither, but comes after a step.
        """
        for param in compat.sharded_params(self.group):
            if param.grad is not None:
                return id(param.grad), compat.times_written(param.grad), optimizer_steps()
        return None


def _other_hook_error(group: Any, replicas: int) -> MicroStepError:
    return MicroStepError(
        "A post-accumulate-gradient hook (an optimizer in backward?) would see the gradient before "
        "hop 2 has averaged it over the replicas.",
        numbers=f"Group of {first_of(compat.param_names(group))}; {replicas} replicas.",
        write="optimizer.step() after backward, or partition=<world size>",
    )


_warned_about_repeats = False


def _warn_once_about_repeats(replicas: int, shard_bytes: int) -> None:
    global _warned_about_repeats
    if _warned_about_repeats or not speaks():
        return
    _warned_about_repeats = True
    cost = 2 * (replicas - 1) * shard_bytes / replicas / MIB
    warnings.warn(
        "Hop 2 runs more than once a step: in every backward of a model that mics.micro_steps was "
        "not given, and in every further one inside its last micro-step. Each extra run sends "
        f"{cost:.2f} MiB per rank for the first group alone. Write: for batch in "
        "mics.micro_steps(model, batches): ..., with one backward for each of them, and with "
        "torch.nn.ModuleList([a, b]) for model where one step trains several.",
        MicsWarning,
        stacklevel=2,
    )
