"""The backward passes of one FSDP2 tree: how they begin and end for the units of one mesh.

What a rank leaves out is filled in in one order of all units, whatever mesh they are on, and so
does hop 2 start: the meshes of a tree owe it together, and their passes end together.

first unit      its output's gradient comes: hop 2 is owed, the end below is queued
every unit      what was left out after it is filled in (``lockstep.py``), its unused parameters
                get zeros (``used.py``), FSDP2 reduces, hop 2 starts in turn (``hop_order.py``)
end, before     FSDP2's own end: the first units that were left out, unused parameters of units
                that FSDP2 reduces there
end, after      it: reductions land, hop 2 of the rest, and the step is settled, unless an open
                step does that
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import nn

from mics import compat
from mics.communication.finite import finite_of
from mics.communication.hop_order import HopOrder
from mics.communication.hop_two import HopTwo
from mics.communication.issued import issued_of
from mics.communication.landing import Landing
from mics.communication.settling import settle
from mics.errors import MicroStepError, MicsWarning, ShardError
from mics.ranks.device import is_capturing
from mics.ranks.mesh import Groups
from mics.sharding.lockstep import Lockstep, Moment, Skippable, Use
from mics.sharding.other_axes import refuse_left_out
from mics.sharding.same_replicas import check_same_replicas

_ATTRIBUTE = "_mics_passes"


class Step(Protocol):
    """The open step that a unit belongs to."""

    @property
    def was_left(self) -> bool:
        """Whether it can not go on."""

    def before_forward(self) -> None:
        """A forward of its units begins."""


class Member(Skippable, Protocol):
    """What has to be known of a unit to end its passes (``units.py`` has the units)."""

    groups: Groups
    landing: Landing | None
    number: int

    @property
    def name(self) -> str:
        """What it is called under its root."""

    @property
    def step(self) -> Step | None:
        """The open step that will finish the unit's gradients."""

    @property
    def in_step(self) -> bool:
        """Whether it will, and has not been left."""

    def tree(self) -> Sequence[Self]:
        """Every unit under the same root, in module order."""

    def note(self) -> None:
        """Look at its whole gradients, before FSDP2 reduces them."""


class Passes:
    """What the units under one root and on one mesh share.

    Args:
        units: in module order.
        root: of the tree; its own units are in every forward.
        lockstep: of the tree.
        order: in which the units of the tree start hop 2.
        beside: the passes of every mesh of the tree, this one too; filled when all are made.
    """

    def __init__(
        self,
        units: Sequence[Member],
        root: nn.Module,
        lockstep: Lockstep,
        order: HopOrder,
        beside: list[Passes],
    ) -> None:
        self.units = tuple(units)
        self.groups = units[0].groups
        self._hops = _hops(units)
        self.order = order
        self._root = root
        self.lockstep, self._beside = lockstep, beside
        root.register_forward_pre_hook(compat.outside_graphs(self._open), prepend=True)
        root.register_forward_hook(compat.outside_graphs(self._close), prepend=True)
        self._ends = -1
        self._ran = False  # a backward, in this micro-step
        self._under_way = False
        for unit in units:
            issued_of(self.groups).rename(unit.number, unit.name)

    def _open(self, root: nn.Module, args: Any) -> None:
        if compat.in_backward():
            return
        if is_capturing(self.groups.device):
            raise MicroStepError(
                "A graph of the accelerator is being captured around a sharded model: replayed, "
                "its collectives would be neither counted nor followed by hop 2.",
                numbers=f"{len(self.units)} unit(s) on this mesh.",
                write="graphs inside of a block, such as mics.shard(model, compile={'mode': "
                "'reduce-overhead'})",
            )
        step = self.units[0].step
        if step is not None:
            step.before_forward()
        if self._under_way and not any(unit.in_step for unit in self.units):
            self._drop_what_raised()

    def _drop_what_raised(self) -> None:
        """A backward has raised, outside of a step that would know: it is no part of a gradient."""
        tree = self.units[0].tree()
        if drop_unfinished(tree, [one for one in map(passes_of, tree) if one is not None]):
            warnings.warn(
                "A backward raised before its end; the gradients accumulated so far have been "
                "dropped.",
                MicsWarning,
                stacklevel=4,
            )

    def _close(self, root: nn.Module, args: Any, output: Any) -> None:
        if compat.in_backward():
            return
        self.lockstep.close(output)
        if torch.is_grad_enabled():  # ahead of FSDP2's hook, which queues FSDP2's end
            forward = self.lockstep.forward
            for one in compat.tensors_with_grad(output):
                one.register_hook(lambda _: self._begin_forward(forward))  # type: ignore[no-untyped-call]

    def _begin_forward(self, forward: int) -> None:
        self.begin(None)
        self.lockstep.begin_forward(forward)

    def begin(self, use: Use | None) -> None:
        """The gradient of a unit's output has come."""
        if compat.backward_id() != self.lockstep.number:
            for passes in self._beside:
                passes._ran = passes._under_way = True
                compat.at_end_of_backward(passes._before_the_end)
            self.lockstep.begin_pass(compat.backward_id())
        if use is not None:
            self.lockstep.begin_backward(use)

    def end_use(self, unit: Member, moment: Moment) -> None:
        """The gradients of a unit's inputs are there, and FSDP2 reduces it next.

        What came inside it is over first. The root comes last on every rank, also on one that left
        out the first units.
        """
        if self._root in compat.modules_of(unit.group):
            self.lockstep.end_forward(moment.forward)
        else:
            self.lockstep.end_inside(unit, moment)

    def begin_empty(self) -> None:
        """A pass begins in which no unit of this rank has a gradient."""
        self.begin(None)
        self.lockstep.begin_last()
        for unit in self.units:
            if self._root in compat.modules_of(unit.group):
                compat.begin_empty_backward(unit.group)

    def before_reduce(self) -> None:
        """FSDP2 reduces a unit: all of the tree owe hop 2, and the pass has an end of ours."""
        current = compat.backward_id()
        if current == self._ends:
            return
        hops = [hop for passes in self._beside for hop in passes._hops]
        fresh = any(hop.awaits_backward for hop in hops)
        for hop in hops:
            # After a second backward of one forward nobody knows who comes again; and a unit that
            # is whole without a forward may be one that a parent uses by hand.
            waits = hop.awaits_backward or compat.is_whole(hop.group)
            hop.begin_pass(unused=fresh and not waits)
        for passes in self._beside:
            passes._ends = current
        self.order.begin()
        compat.at_end_of_backward(self._after_the_end)

    def begin_micro_step(self) -> None:
        """A micro-step begins: all units owe hop 2, if it is the last."""
        self.order.begin()
        self._ran = False

    def end_micro_step(self) -> None:
        """A micro-step ends: take part in a backward that only the other ranks have run.

        A rank may find its loss unusable and go on without backward. Those it shares its units with
        wait for its part, which is zeros.
        """
        if self._ran:
            return
        if self.lockstep.awaits_backward:
            _Nothing.apply(torch.zeros((), requires_grad=True), self).backward()  # type: ignore[no-untyped-call]
        for unit in self.units:
            compat.free(unit.group)

    def forget(self) -> None:
        """What has begun was cut short, and does not go on."""
        self._under_way = False
        self.lockstep.forget()
        issued_of(self.groups).clear()
        finite_of(self.groups).take()

    def _before_the_end(self) -> None:
        self._under_way = False
        self.lockstep.end_backward()
        for unit in self.units:
            if compat.is_in_backward(unit.group) or compat.has_whole_gradients(unit.group):
                unit.note()

    def _after_the_end(self) -> None:
        for passes in self._beside:
            passes._ends = -1
            for unit in passes.units:  # also without replicas: settling comes after every reduction
                if unit.landing is not None:
                    unit.landing.reductions.finish()
        settled = [passes for passes in self._beside if passes._settles]
        self.order.finish()
        for passes in self._beside:
            for hop in passes._hops:
                hop.close_pass()
        for passes in settled:
            used = [unit.used for unit in passes.units]
            settle(passes.groups, used)
            check_same_replicas(passes.groups, used)

    @property
    def _settles(self) -> bool:
        """Whether the end of the pass is the end of a step of the mesh."""
        wanted = any(hop.wanted for hop in self._hops) or not self._hops
        return wanted and not any(unit.in_step for unit in self.units)


class _Nothing(torch.autograd.Function):
    """A graph without a model, whose backward is the model's in communication alone."""

    @staticmethod
    def forward(ctx: Any, one: torch.Tensor, passes: Passes) -> torch.Tensor:
        ctx.passes = passes
        return one.clone()

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, None]:
        ctx.passes.begin_empty()
        return None, None


def passes_of(unit: Member) -> Passes | None:
    """The passes of a unit's tree on its mesh; ``None`` before the first forward of its root.

    Raises:
        ShardError: ranks that see other tokens are in none of its meshes.
    """
    root = compat.root_module(unit.group)
    if root is None:
        return None
    if _ATTRIBUTE not in root.__dict__:
        root.__dict__[_ATTRIBUTE] = _passes_of_tree(unit.tree(), root)
    made: dict[int, Passes] = root.__dict__[_ATTRIBUTE]
    return made[id(unit.groups.shard)]


def _passes_of_tree(tree: Sequence[Member], root: nn.Module) -> dict[int, Passes]:
    """The passes of every mesh, by its partition group's id; made in the root's first forward."""
    largest = max(tree, key=lambda one: one.groups.whole.size())
    refuse_left_out(largest.groups.whole, compat.sharded_params(largest.group))
    average_over_all_ranks(tree, root)
    lockstep = Lockstep(tree, root)
    lockstep.open()
    meshes: dict[int, list[Member]] = {}
    for unit in tree:
        meshes.setdefault(id(unit.groups.shard), []).append(unit)
    root.register_forward_pre_hook(compat.outside_graphs(_opens(lockstep)), prepend=True)
    beside: list[Passes] = []
    order = HopOrder(_hops(tree))
    beside += [Passes(units, root, lockstep, order, beside) for units in meshes.values()]
    return dict(zip(meshes, beside, strict=True))


def _hops(units: Sequence[Member]) -> list[HopTwo]:
    return [unit.hop_two for unit in units if unit.hop_two is not None]


def _opens(lockstep: Lockstep) -> Callable[[nn.Module, Any], None]:
    """A hook that says that the root's forward begins."""

    def hook(_: nn.Module, args: Any) -> None:
        if not compat.in_backward():
            lockstep.open()

    return hook


def drop_unfinished(units: Sequence[Member], passes: Sequence[Passes]) -> bool:
    """Clear what a backward or a step that was cut short has left behind.

    Units whose backward had ended are ahead of the others, by a micro-step or by hop 2: what is
    there is no step's gradient.

    Args:
        units: of whole trees.
        passes: theirs, of those that have run a forward.

    Returns:
        Whether there were gradients.
    """
    roots = dict.fromkeys(root for unit in units if (root := compat.root_module(unit.group)))
    for root in roots:
        compat.reset_iteration(root)
    for unit in units:
        unit.used.make_room()
    params = [param for unit in units for param in compat.sharded_params(unit.group)]
    # Zeros are what an optimizer that keeps its memory has left.
    shards = [compat.local_of(param.grad) for param in params if param.grad is not None]
    dropped = any(bool(shard.any()) for shard in shards)
    for unit in units:
        unit.used.forget()
        if unit.landing is not None:
            unit.landing.reductions.finish()
    for one in passes:
        one.forget()
    for unit in units:
        if unit.hop_two is not None:
            unit.hop_two.drop_gradients()
    for param in params:
        param.grad = None
    return dropped


def average_over_all_ranks(units: Sequence[Member], root: nn.Module) -> None:
    """Divide gradients of units on fewer ranks than the others by as many ranks.

    Experts on a mesh of their own are on other ranks too, as other experts, and have been given the
    tokens of all of them. FSDP2 alone divides by the ranks of their own mesh. A factor that
    somebody has set stays.

    Raises:
        ShardError: units without such a factor are on more ranks than the root's, which are all
            that have tokens of their own: nobody knows by what they would have to be divided.
    """
    ranks = max(unit.groups.whole.size() for unit in units)
    told = [compat.divide_factor(unit.group) is not None for unit in units]
    of_root = [u.groups.whole.size() for u in units if root in compat.modules_of(u.group)]
    for unit, is_told in zip(units, told, strict=True):
        here = unit.groups.whole.size()
        if of_root and here > max(of_root) and not is_told:
            raise ShardError(
                f"{unit.name} is on more ranks than the root of its model; its gradients would be "
                "divided by all of them, those of the rest by the root's.",
                numbers=f"{here} ranks, the root is on {max(of_root)}.",
                write="set_gradient_divide_factor(ranks that have other tokens) of its module",
            )
        if here < ranks and not is_told:
            compat.divide_by(unit.group, ranks)
