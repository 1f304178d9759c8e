"""Are the copies of a parameter alike, that ranks along axes beside the data have?

Beside tensor parallelism every rank has a copy of what is not spread: norms, biases, embeddings.
Each rank makes its gradient itself, and nobody reduces it over the axis: the copies stay alike as
long as their gradients do. They drift apart, without a word, where a gradient is a part of a sum (a
norm of the heads that this rank has), where ranks along the axis are given other data, and where
one of them was written otherwise.

[Note: when copies are compared]
What an optimizer is about to use is measured when it steps, because a program may sum gradients
over the axis by itself at any time before. The digests travel in the message that ranks along the
axis send each other at the end of the next step anyway (``beside.py``): nothing is sent for them
alone, and the device has long computed them. So one step is taken before gradients that differ
are refused. Values are compared at the end of the first step too, before any optimizer used them,
and on an accelerator that step waits for them.

[Note: how near is alike]
A part of a sum, and the gradient of other data, are as far from the other rank's as the norm of
either. Additions in another order, in 16 bits and over a thousand ranks, make a few hundredths.
Values are to be the same before an optimizer has used them. Afterwards they are not as near as
gradients: Adam makes a whole step of an element whose gradient is nothing but rounding, up on one
rank and down on another, and of values that began as zeros that is 7% of the norm where rounding
makes a thousandth.

[Note: norms of the last steps]
A gradient of few values is near zero now and then, and all that is left of it is rounding. So it is
measured by the largest norm of the last steps, of which each counts for a tenth less than the one
after it. One of fewer than 4 values on a rank may be half of that apart, and is not judged before
there have been some steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.digests import SIZE, Digests
from mics.communication.guard import guard
from mics.communication.signposts import is_real
from mics.communication.used import Used
from mics.errors import MicroStepError
from mics.ranks.issuing import all_gather
from mics.ranks.mesh import ranks_of

# Of the norm, see [Note: how near is alike]; values before an optimizer has used them, and after.
_NEAR_FRESH, _NEAR_VALUES, _NEAR_GRADIENTS = 0.01, 0.5, 0.1
_FEW_VALUES, _NEAR_FEW, _SOME_STEPS, _LASTING = 4, 0.5, 8, 0.9  # [Note: norms of the last steps]
_LEAST_NORM = 1e-15  # below it squares are too small for 32 bits, and the norm is wrong

# What a rank says of each copy: whether it is no number, it trains, its optimizer has used it; that
# no optimizer has ever done so, how near gradients have to be; digests of its value and of its
# gradient, and the norms that they are measured by.
_BAD, _TRAINS, _STEPPED, _FRESH, _NEAR, _VALUE = range(6)
_GRADIENT = _VALUE + SIZE
_NORMS = _GRADIENT + SIZE
_NUMBERS = _NORMS + 2

_KINDS = ("trains", "stepped", "value", "gradient")  # in the order in which they are refused


@dataclass(frozen=True)
class Drift:
    """A parameter of which ranks have copies that are not alike.

    Attributes:
        kind: in what they differ, by its place in ``_KINDS``.
        param: its number among those of the step.
        apart: how far, as a part of the norm of the last steps.
        ranks: two that differ.
        said: what each of them said.
    """

    kind: int
    param: int
    apart: float
    ranks: tuple[int, int]
    said: tuple[float, float]

    def as_numbers(self) -> list[float]:
        """What is sent of it."""
        return [self.kind, self.param, self.apart, *self.ranks, *self.said]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Drift:
        """Make one of what was sent."""
        kind, param, apart, one, other, said, of_other = numbers
        return cls(int(kind), int(param), apart, (int(one), int(other)), (said, of_other))

    def error(self, name: str, axes: str) -> MicroStepError:
        """What people are told.

        Args:
            name: of the parameter.
            axes: on which there are copies of it.
        """
        (one, other), (said, of_other) = self.ranks, self.said
        each = f"Ranks along {axes} have a copy of {name} each, and"
        kind = _KINDS[self.kind]
        if kind == "trains":
            return MicroStepError(
                f"{each} not all of them train it.",
                numbers=f"requires_grad is {bool(said)} on rank {one}, {bool(of_other)} on rank "
                f"{other}.",
                write="param.requires_grad_(...) on every rank",
            )
        if kind == "stepped":
            return MicroStepError(
                f"{each} an optimizer has stepped it on some of them only: the copies differ by "
                "now.",
                numbers=f"Steps with a gradient since the last end of a step: {said:.0f} on rank "
                f"{one}, {of_other:.0f} on rank {other}.",
                write="optimizer.step() on every rank, or on none (of loss scalers torch's "
                "ShardedGradScaler, not GradScaler, skips it on all of them)",
            )
        norms = f"rank {one}'s has the norm {said:.4g}, rank {other}'s {of_other:.4g}"
        far = f"They are {self.apart:.2g} of the norm apart; allowed is"
        if kind == "value":
            return MicroStepError(
                f"{each} their values differ: they were initialised or loaded otherwise, or have "
                "drifted apart.",
                numbers=f"Of its values, {norms}. {far} {_NEAR_FRESH:.0%} before the first "
                f"optimizer step, {_NEAR_VALUES:.0%} later.",
                write=f"the same seed and the same file on ranks along these axes; {_OWN}",
            )
        return MicroStepError(
            f"{each} used other gradients for it in the step before: the copies drift apart.",
            numbers=f"Of its gradient, {norms}. {far} {_NEAR_GRADIENTS:.0%}, "
            f"of few values {_NEAR_FEW:.0%}.",
            write=f"the same data on ranks along these axes; {_PART}; {_OWN}",
        )


_PART = (
    "for a gradient that is a part of a sum (a norm of this rank's heads) "
    'DTensor.from_local(param, mesh["tp"], [Replicate()]) before sharding, used as '
    "param.to_local(grad_placements=[Partial()]), or an all-reduce of param.grad before "
    "optimizer.step()"
)
_OWN = (
    "for a parameter of which each rank has its own "
    'DTensor.from_local(param, mesh["tp"], [Shard(0)])'
)


class Copies:
    """What this rank knows of the copies among the parameters of one step.

    Args:
        used: the units that are settled together.
    """

    def __init__(self, used: Sequence[Used]) -> None:
        self._units = [weakref.ref(unit) for unit in used]
        self._copies: set[int] = set()  # by their numbers
        self._stepped: dict[int, int] = {}  # by their numbers: how often since the last time
        # Of the values of some copies, then of their gradients, by their numbers.
        self._measured: dict[tuple[int, ...], Digests] = {}
        self._is_first = True
        params = self._params()
        self._uses = torch.zeros(len(params))  # steps in which an optimizer has used each
        self._norms = torch.zeros(len(params), 2)  # see [Note: norms of the last steps]

    def said(self, copies: set[int]) -> torch.Tensor:
        """What this rank says at the end of a step, and from now on of these parameters.

        Args:
            copies: the numbers of those with copies.

        Returns:
            [parameters, numbers of each], on the host.
        """
        params = self._params()
        if self._is_first:  # see [Note: when copies are compared]
            self._measure(tuple(sorted(copies)), with_gradients=False)
        self._is_first, self._copies = False, copies
        said = torch.zeros(len(params), _NUMBERS)
        for numbers, digests in self._measured.items():
            said[list(numbers), _VALUE:_NORMS] = (
                digests.read().view(2, len(numbers), SIZE).transpose(0, 1).flatten(1)
            )
        finite = said.isfinite().all(dim=1)
        said = said.where(finite[:, None], 0.0)
        said[:, _BAD] = (~finite).float()
        said[:, _TRAINS] = torch.tensor([float(param.requires_grad) for param in params])
        for number, steps in self._stepped.items():
            said[number, _STEPPED] = steps
            self._uses[number] += 1
            self._norms[number] *= _LASTING
        self._norms = self._norms.maximum(said[:, [_VALUE + SIZE - 1, _GRADIENT + SIZE - 1]])
        are_many = torch.tensor([compat.local_of(p).numel() >= _FEW_VALUES for p in params])
        said[:, _FRESH] = (self._uses == 0).float()
        said[:, _NEAR] = torch.where(self._uses < _SOME_STEPS, torch.inf, _NEAR_FEW).masked_fill(
            are_many, _NEAR_GRADIENTS
        )
        said[:, _NORMS:] = self._norms
        self._stepped, self._measured = {}, {}
        guard(self)
        return said

    def check_optimizer(self, stepped: set[int]) -> bool:
        """Measure what an optimizer is about to use, see ``guard.Owner``; nothing is refused."""
        params = self._params()
        known = [i for i in sorted(self._copies) if i < len(params)]
        used = [i for i in known if id(params[i]) in stepped and is_real(params[i].grad)]
        for i in used:
            self._stepped[i] = self._stepped.get(i, 0) + 1
        if used:
            self._measure(tuple(used), with_gradients=True)
        return True

    @torch.no_grad()
    def _measure(self, numbers: tuple[int, ...], *, with_gradients: bool) -> None:
        params = self._params()
        values = [_plain(params[i]) for i in numbers]
        gradients = [params[i].grad if with_gradients else None for i in numbers]
        self._measured[numbers] = Digests(
            [*values, *(None if one is None else _plain(one) for one in gradients)]
        )

    def _params(self) -> list[torch.nn.Parameter]:
        alive = [unit for reference in self._units if (unit := reference()) is not None]
        return [param for unit in alive for param in unit.params]


def as_bounds(said: torch.Tensor) -> torch.Tensor:
    """What ranks take the largest of, to know the largest and the smallest of each number."""
    return torch.stack([said, -said]).flatten()


def drift_in(
    bounds: torch.Tensor, said: torch.Tensor, numbers: Sequence[int], group: dist.ProcessGroup
) -> Drift | None:
    """Where copies along an axis are not alike; collective over the axis if there are such.

    Args:
        bounds: ``as_bounds``, the largest of all ranks.
        said: this rank's. Shape (copies, numbers of each).
        numbers: of the parameters.
        group: the ranks along the axis, on the host.
    """
    far = _far(*bounds.view(2, len(numbers), _NUMBERS))
    kinds = [kind for kind, one in far.items() if bool((one > 0).any())]
    if not kinds:
        return None
    kind, at = _KINDS.index(kinds[0]), int(far[kinds[0]].argmax())
    column = {"trains": _TRAINS, "stepped": _STEPPED, "value": _VALUE, "gradient": _GRADIENT}
    first = column[kinds[0]]
    wide = SIZE if kinds[0] in ("value", "gradient") else 1
    rows = torch.empty(group.size() * wide)
    mine = said[at, first : first + wide].contiguous()
    all_gather(rows, mine, group, name="comparison of copies that differ")
    table = rows.view(group.size(), wide)
    other = int((table - table[0]).abs().amax(dim=1).argmax())
    ranks = ranks_of(group)
    spoken = table[0, -1], table[other, -1]
    return Drift(
        kind,
        numbers[at],
        float(far[kinds[0]][at]),
        (ranks[0], ranks[other]),
        (float(spoken[0]), float(spoken[1])),
    )


def _far(most: torch.Tensor, minus_least: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far copies are apart, by kind; 0 where they are near. Shapes (copies,)."""
    comparable = most[:, _BAD] == 0
    near = most[:, _NEAR]
    spans = most + minus_least
    of_values, of_gradients = most[:, _NORMS:].clamp(min=_LEAST_NORM).unbind(1)
    values = spans[:, _VALUE:_GRADIENT].amax(dim=1) / of_values
    gradients = spans[:, _GRADIENT:_NORMS].amax(dim=1) / of_gradients
    near_values = near.clamp(min=_NEAR_VALUES).where(most[:, _FRESH] == 0, _NEAR_FRESH)
    return {
        "trains": spans[:, _TRAINS],
        "stepped": spans[:, _STEPPED] * comparable,
        "value": values * ((values > near_values) & comparable),
        "gradient": gradients * ((gradients > near) & comparable),
    }


def _plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """This rank's part; ``None`` of a library's own type, and of what is no floating point."""
    local = compat.local_of(tensor)
    if type(local) not in (torch.Tensor, torch.nn.Parameter):
        return None
    if local.is_complex():
        return torch.view_as_real(local)
    return local if local.is_floating_point() else None
