"""Ranks of a partition group gather and reduce the same units, whatever blocks their data skips.

[Note: skipped blocks]
A gather needs every rank of the partition group. A rank that skips a block (layer drop, experts,
a tower for images) would leave the others waiting, or give them another block's weights. Nobody
knows beforehand what the others will skip, and asking before each block would cost every step. So
all ranks go through the units in one order, that of the model's modules:

    forward     a unit whose forward begins lets those before it that were left out be gathered
                and freed first; the root's end does so for those after the last one, a unit's end
                for those inside it
    backward    a unit whose backward begins lets those that came after it be over first: gathered
                and reduced with zeros if they have had no backward, reduced if FSDP2 would do so
                when the pass ends (their inputs needed no gradient, which on another rank they
                may); the end of the pass does so for the first ones, a unit's end for those inside

Units inside a unit (the blocks of a tower for images) are gathered while it is, and reduced before
it. Units of one module on several meshes are gathered together. A rank that uses every unit once,
as all do in most models, finds nothing left out and pays nothing. A unit that runs again, or before
its turn, is left alone: ranks that differ there are refused at the end of the step
(``settling.py``). A unit found to run later than its place among the modules is moved there, so
that this costs one forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from mics import compat
from mics.communication.hop_two import HopTwo
from mics.communication.used import Used
from mics.ranks.mesh import Groups

_MOST_FORWARDS = 64  # without a backward, that are remembered


class Skippable(Protocol):
    """What has to be known of a unit to stand in for it (``units.py`` has the units)."""

    group: Any
    used: Used
    hop_two: HopTwo | None
    groups: Groups

    @property
    def trains(self) -> bool:
        """Whether it has a parameter that needs a gradient."""


class Moment(NamedTuple):
    """When a use of a unit began.

    Attributes:
        forward: the number of the forward.
        clock: among all beginnings and ends of uses.
    """

    forward: int
    clock: int


@dataclass(eq=False)
class Use:
    """One unit in one forward.

    Attributes:
        unit: the unit.
        forward: the number of the forward.
        entered: when it began, among all beginnings and ends of uses.
        left: when it ended.
        begun: whether its backward has.
    """

    unit: Skippable
    forward: int
    entered: int
    left: int
    begun: bool = False

    def is_inside(self, other: Use) -> bool:
        """Whether it came while the other was under way, and is of another module."""
        under_way = other.entered < self.entered < other.left
        beside = _module(self.unit) is _module(other.unit)
        return self.forward == other.forward and under_way and not beside


def _module(unit: Skippable) -> nn.Module:
    return compat.modules_of(unit.group)[0]


def _found_inside(units: Sequence[Skippable]) -> dict[int, set[int]]:
    """Those inside the modules of each unit that has some; all by id."""
    found: dict[int, set[int]] = {}
    for unit in units:
        modules = {id(m) for one in compat.modules_of(unit.group) for m in one.modules()}
        others = [other for other in units if _module(other) is not _module(unit)]
        inside = {id(other) for other in others if id(_module(other)) in modules}
        if inside:
            found[id(unit)] = inside
    return found


def _first(units: Sequence[Skippable], ids: set[int]) -> list[Skippable]:
    """Those of some units that come first and are all among ``ids``."""
    return list(itertools.takewhile(lambda unit: id(unit) in ids, units))


class Lockstep:
    """Fills in what a rank leaves out of the units under one root.

    Args:
        units: in module order, of all meshes; those whose p is 1 wait for nobody.
        root: of the tree; its own units are in every forward.
    """

    def __init__(self, units: Sequence[Skippable], root: nn.Module) -> None:
        self._roots = [unit for unit in units if root in compat.modules_of(unit.group)]
        shared = [unit for unit in units if unit.groups.shard.size() > 1]
        units = [unit for unit in shared if unit not in self._roots]
        self._order = list(units)
        self._ids = {id(unit) for unit in units}
        self._inside = _found_inside(units)
        self._forward = 0
        self._open = False
        self._clock = 0
        self._position = 0  # in the order, of what may come next
        self._entered: dict[int, int] = {}  # in this forward, when
        self._filled: set[int] = set()
        self._flows = False  # whether what has come out of units so far needs a gradient
        self._uses: list[Use] = []  # of forwards whose backward may come
        self._begun: set[int] = set()  # forwards whose backward has begun in this pass
        self.number = -1  # autograd's, of the pass

    # -- forward ---------------------------------------------------------------------------------

    def open(self) -> None:
        """The root's forward begins."""
        self._forward += 1
        self._open = True
        self._position = 0
        self._entered.clear()
        self._filled.clear()
        self._flows = False
        oldest = self._forward - _MOST_FORWARDS
        self._uses = [use for use in self._uses if use.forward > oldest]

    def arrive(self, unit: Skippable, inputs: Any) -> None:
        """A unit's forward begins: those left out before it come first."""
        if not self._open or id(unit) not in self._ids:
            self._entered[id(unit)] = self._tick()
            return
        place = self._order.index(unit)
        if place >= self._position:
            self._fill(self._order[self._position : place], inputs)
        elif id(unit) in self._filled:  # too early: it runs here
            moved = self._order[place : min(self._end_of(place), self._position)]
            del self._order[place : place + len(moved)]
            place = self._position - len(moved)
            self._order[place:place] = moved
            for key in self._filled & {id(one) for one in moved}:
                self._filled.discard(key)
                del self._entered[key]
        self._position = place + 1
        self._entered[id(unit)] = self._tick()

    def now(self, unit: Skippable) -> Moment:
        """When the latest use of a unit began."""
        return Moment(self._forward, self._entered.get(id(unit), self._clock))

    def finish(self, unit: Skippable, outputs: Any) -> None:
        """A unit's forward is about to end: those inside it that were left out come now."""
        if self._open and self._inside.get(id(unit)):
            end = self._end_of(self._order.index(unit))
            self._fill(self._order[self._position : end], outputs)
            self._position = max(self._position, end)

    def leave(self, unit: Skippable, *, needs_gradient: bool) -> Use:
        """A unit's forward ends, with gradients enabled.

        Args:
            unit: the unit.
            needs_gradient: whether its outputs do. They may not here and do on another rank, which
                then reduces a unit that trains.

        Returns:
            What its backward is known by.
        """
        now = self._tick()
        use = Use(unit, self._forward, self._entered.get(id(unit), now), now)
        if id(unit) in self._ids and (needs_gradient or unit.trains):
            self._uses.append(use)
            self._flows = True
        return use

    def close(self, outputs: Any) -> None:
        """The root's forward ends: those left out after the last unit come now."""
        if self._open:
            self._fill(self._order[self._position :], outputs)
        self._open = False

    def _end_of(self, place: int) -> int:
        """The place behind a unit in the order and those that follow it and are inside it."""
        inside = self._inside.get(id(self._order[place]), set())
        end = place + 1
        while end < len(self._order) and id(self._order[end]) in inside:
            end += 1
        return end

    def _fill(self, units: Sequence[Skippable], passed_on: Any) -> None:
        """Stand in for units, which would have been given what is now passed on."""
        rest = [unit for unit in units if id(unit) not in self._entered]
        while rest:
            beside = _first(rest, {id(unit) for unit in rest if _module(unit) is _module(rest[0])})
            rest = rest[len(beside) :]
            inside = _first(rest, self._inside.get(id(beside[-1]), set()))
            rest = rest[len(inside) :]
            # A parent that uses one by hand has gathered it: it stays.
            to_gather = [unit for unit in beside if not compat.is_whole(unit.group)]
            for unit in beside:
                self._entered[id(unit)] = self._tick()
                self._filled.add(id(unit))
            for unit in to_gather:
                if unit.hop_two is not None:
                    unit.hop_two.before_gather()
                compat.begin_empty_forward(unit.group)
            self._fill(inside, passed_on)
            for unit in to_gather:
                compat.end_empty_forward(unit.group)
            for unit in reversed(beside):
                self._leave_out(unit, passed_on)

    def _leave_out(self, unit: Skippable, passed_on: Any) -> None:
        """A unit's forward, in which nothing ran, ends."""
        if torch.is_grad_enabled():
            flows = self._flows or bool(compat.tensors_with_grad(passed_on))
            self.leave(unit, needs_gradient=flows)
            if unit.hop_two is not None and unit.trains:
                unit.hop_two.before_forward()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    # -- backward --------------------------------------------------------------------------------

    @property
    def forward(self) -> int:
        """The number of the latest forward of the root."""
        return self._forward

    def begin_pass(self, number: int) -> None:
        """A pass has begun; autograd gives it a number.

        The root gathers ahead as its backward begins: before anything is filled in, since an output
        may be a block's own and a rank's loss may use another one.
        """
        self.number = number
        for unit in self._roots:
            compat.begin_empty_backward(unit.group)

    def begin_forward(self, forward: int) -> None:
        """The backward of a forward begins."""
        self._begun.add(forward)

    def begin_backward(self, use: Use) -> None:
        """The backward of a use begins: what came after it is over first."""
        if use.begun:
            return
        use.begun = True
        self._begun.add(use.forward)
        forward, left = use.forward, use.left  # one inside it does not come after it
        self._end([one for one in self._uses if one.entered > left and one.forward == forward])

    def end_inside(self, unit: Skippable, moment: Moment) -> None:
        """The backward of a use is about to end: what came inside it is over first."""
        if id(unit) not in self._inside:
            return
        for use in self._uses:
            if use.unit is unit and use.entered == moment.clock:
                self._end([other for other in self._uses if other.is_inside(use)])
                return

    def end_forward(self, forward: int) -> None:
        """The backward of a forward is over but for the root's own part."""
        self._end([use for use in self._uses if use.forward == forward])

    def end_backward(self) -> None:
        """The pass ends: what came before the first use that had a backward is over now."""
        self._end([use for use in self._uses if use.forward in self._begun])
        self._uses = [use for use in self._uses if use.forward not in self._begun]
        self._begun.clear()

    def forget(self) -> None:
        """A step was left, or ends: no backward of its forwards comes."""
        self._open = False
        self._uses.clear()
        self._begun.clear()

    @property
    def awaits_backward(self) -> bool:
        """Whether a forward has run that had no backward at all."""
        return bool(self._uses)

    def begin_last(self) -> None:
        """A pass stands for the backward that this rank has left out of its last forward."""
        self._begun.add(self._uses[-1].forward)

    @staticmethod
    def _end(uses: Sequence[Use]) -> None:
        """Let uses be over, in the reverse of the order in which their forwards began and ended."""
        beginnings = [(use.left, use, True) for use in uses]
        endings = [(use.entered, use, False) for use in uses]
        for _, use, begins in sorted([*beginnings, *endings], key=itemgetter(0), reverse=True):
            if begins and not use.begun:
                use.begun = True
                compat.begin_empty_backward(use.unit.group)
            elif not begins and compat.is_in_backward(use.unit.group):
                use.unit.used.note()
                compat.end_empty_backward(use.unit.group)
