"""Ranks of a partition group gather and reduce the same units, whatever blocks their data skips.

[Note: skipped blocks]
A gather needs every rank of the partition group. A rank that skips a block (layer drop, experts,
a tower for images) would leave the others waiting, or give them another block's weights. Nobody
knows beforehand what the others will skip, and asking before each block would cost every step. So
all ranks go through the units in one order, that of the model's modules:

    forward     a unit whose forward begins lets those before it that were left out be gathered
                and freed first; the root's end does so for those after the last one
    backward    a unit whose backward begins lets those that came after it and have had none be
                gathered and reduced, with zeros; the end of the pass does so for the first ones

A rank that uses every unit once, as all do in most models, finds nothing left out and pays nothing.
A unit that runs again, or before its turn, is left alone: ranks that differ there are refused at
the end of the step (``settling.py``). A unit found to run later than its place among the modules is
moved there, so that this costs one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mics import compat

if TYPE_CHECKING:
    from mics.sharding.units import Unit

_MOST_FORWARDS = 64


class Use:
    """One unit in one forward.

    Args:
        unit: the unit.
        forward: the number of the forward.
        reduces_in_place: whether its gradients are reduced when its backward ends; else FSDP2 does
            so when the pass ends, because no input of it has a gradient.
    """

    def __init__(self, unit: Unit, forward: int, *, reduces_in_place: bool) -> None:
        self.unit = unit
        self.forward = forward
        self.reduces_in_place = reduces_in_place
        self.begun = False  # its backward


class Lockstep:
    """Fills in what a rank leaves out of the units under one root.

    Args:
        units: without the root's, in module order; those that share ranks, p > 1.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._order = list(units)
        self._ids = {id(unit) for unit in units}
        self._forward = 0
        self._open = False
        self._position = 0  # in the order, of what may come next
        self._seen: set[int] = set()
        self._filled: set[int] = set()
        self._uses: list[Use] = []  # of forwards whose backward may come

    # -- forward ---------------------------------------------------------------------------------

    def open(self) -> None:
        """The root's forward begins."""
        self._forward += 1
        self._open = True
        self._position = 0
        self._seen.clear()
        self._filled.clear()
        oldest = self._forward - _MOST_FORWARDS
        self._uses = [use for use in self._uses if use.forward > oldest]

    def arrive(self, unit: Unit, *, with_gradient: bool) -> None:
        """A unit's forward begins: those left out before it come first.

        Args:
            unit: not yet gathered, unless ahead.
            with_gradient: whether its inputs need a gradient.
        """
        if not self._open or id(unit) not in self._ids:
            return
        place = self._order.index(unit)
        if place >= self._position:
            self._fill(self._order[self._position : place], with_gradient=with_gradient)
        elif id(unit) in self._filled:  # too early: it runs here
            self._order.insert(self._position - 1, self._order.pop(place))
            self._filled.discard(id(unit))
            place = self._position - 1
        self._position = place + 1
        self._seen.add(id(unit))

    def leave(self, unit: Unit, *, with_gradient: bool) -> Use | None:
        """A unit's forward ends, with an output that needs a gradient.

        Returns:
            What its backward is known by; ``None`` for a unit that shares no ranks.
        """
        if id(unit) not in self._ids:
            return None
        use = Use(unit, self._forward, reduces_in_place=with_gradient)
        self._uses.append(use)
        return use

    def close(self, *, with_gradient: bool) -> None:
        """The root's forward ends: those left out after the last unit come now."""
        if self._open:
            self._fill(self._order[self._position :], with_gradient=with_gradient)
        self._open = False

    def _fill(self, units: Sequence[Unit], *, with_gradient: bool) -> None:
        for unit in units:
            if id(unit) in self._seen:
                continue
            self._seen.add(id(unit))
            self._filled.add(id(unit))
            compat.pass_through(unit.group)
            if torch.is_grad_enabled() and (with_gradient or unit.trains):
                self._uses.append(Use(unit, self._forward, reduces_in_place=with_gradient))
                if unit.hop_two is not None:
                    unit.hop_two.before_forward()

    # -- backward --------------------------------------------------------------------------------

    def begin_backward(self, use: Use) -> None:
        """The backward of a use begins: what came after it and has had none comes first."""
        if use.begun:
            return
        use.begun = True
        after = self._uses[self._uses.index(use) + 1 :]
        self._empty([other for other in after if other.forward == use.forward])

    def end_backward(self) -> None:
        """The pass ends: what came before the first use that had a backward comes now."""
        begun = {use.forward for use in self._uses if use.begun}
        self._empty([use for use in self._uses if use.forward in begun])
        self._uses = [use for use in self._uses if use.forward not in begun]

    def forget(self) -> None:
        """A step was left, or ends: no backward of its forwards comes."""
        self._open = False
        self._uses.clear()

    @property
    def awaits_backward(self) -> bool:
        """Whether a forward has run that had no backward at all."""
        return bool(self._uses)

    def begin_last(self) -> None:
        """A pass stands for the backward that this rank has left out of its last forward."""
        last = self._uses[-1].forward
        self._empty([use for use in self._uses if use.forward == last])

    @staticmethod
    def _empty(uses: Sequence[Use]) -> None:
        for use in reversed(uses):
            if use.begun:
                continue
            use.begun = True
            compat.begin_empty_backward(use.unit.group)
            if use.reduces_in_place:
                use.unit.used.note()
                compat.end_empty_backward(use.unit.group)
