"""When the hop 2 of a step has its turn, where another step is open around it.

A step that begins inside the last micro-step of another one (Accelerate's ``accumulate`` of two
models) ends before it. So all ranks send its hop 2 first, and then what the other one has not
started by then, whichever of the two a rank's data leaves out.
"""

from __future__ import annotations

from mics.communication.hop_order import HopOrder

_last: list[Turn] = []
"""Of the steps that are in their last micro-step, the innermost last."""


class Turn:
    """The turn of one step.

    Args:
        own: the order of its own units.
    """

    def __init__(self, own: HopOrder) -> None:
        self._own = own
        self.order = own
        """The order that its units start in: its own, or that of the step around it."""

    def begin(self, *, last: bool) -> None:
        """A micro-step begins: all units owe hop 2, if it is the last."""
        self._own.begin()
        self.order = self._own
        if not last:
            return
        if _last:
            self.order = _last[-1].order
            self.order.let_in(self._own)
        _last.append(self)

    def finish(self, *, owed: bool) -> None:
        """The step ends: start what has not started.

        Args:
            owed: whether that is all of it, as no micro-step was the last.
        """
        self._withdraw()
        if owed:
            self._own.begin()
        self.order.finish(self._own)

    def leave(self) -> None:
        """The step does not end: nobody waits for its units."""
        self._withdraw()
        if self.order is not self._own:
            self.order.let_out(self._own)

    def _withdraw(self) -> None:
        if self in _last:
            _last.remove(self)
