"""What ranks along the axes beside the data tell each other at the end of a step.

A parameter may be spread over axes beside those of the data: all experts in one tensor, or the
columns of a matrix. The ranks along such an axis have other parts of it and meshes of their own, so
the end of a step on one mesh does not tell what the others have used. In one process it is one
parameter: if any part of it was used it has a gradient, zeros elsewhere, and an optimizer decays
all of it. So the ranks along these axes tell each other too.

What is not spread over such an axis is there as copies, which have to stay alike (``copies.py``).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mics.communication.copies import Copies, Drift, as_bounds, drift_in
from mics.communication.used import Used
from mics.errors import MicroStepError
from mics.ranks.issuing import all_gather, all_reduce, host_group
from mics.ranks.mesh import Groups, axes_beside, ranks_of
from mics.topology import Ranks


class Axis(NamedTuple):
    """An axis beside the data: this rank's row of it, and its name in the mesh."""

    ranks: Ranks
    name: str


class _Beside:
    """What there is along axes beside the data of the parameters that are settled together.

    Args:
        groups: of their mesh.
        used: the units.
    """

    def __init__(self, groups: Groups, used: Sequence[Used]) -> None:
        params = _params(used)
        self._ids = [id(param) for param in params]
        self.over = _axes_of(groups, params)  # of each parameter, and whether it is split there
        # By name: what is told along one axis after the other reaches all ranks along both, if all
        # of them take the axes in one order.
        self.axes = sorted({axis for axes in self.over for axis in axes}, key=lambda a: a[::-1])
        self.copies = {i for i, axes in enumerate(self.over) if not all(axes.values())}
        self.of_copies = Copies(used)

    def is_of(self, used: Sequence[Used]) -> bool:
        """Whether it is about the parameters of these units, as they are now."""
        return self._ids == [id(param) for param in _params(used)]


_known: weakref.WeakKeyDictionary[Used, _Beside] = weakref.WeakKeyDictionary()


def tell_others(
    groups: Groups, used: Sequence[Used], flags: list[list[bool]]
) -> tuple[list[list[bool]], Drift | None]:
    """Whether a parameter was used by any rank that has a part of it, and which copies differ.

    Collective over the axes beside the data that parameters are spread over, if there are any.

    Args:
        groups: of the mesh.
        used: of all units of the step on it.
        flags: of each trainable parameter, whether it was used.
    """
    beside = _beside_of(groups, used)
    if not beside.axes:
        return flags, None
    said = beside.of_copies.said(beside.copies)
    params, flat = _params(used), iter([flag for unit in flags for flag in unit])
    seen = [param.requires_grad and next(flat) for param in params]
    drift: Drift | None = None
    for axis in beside.axes:
        here = [i for i, axes in enumerate(beside.over) if axis in axes]
        copies = [i for i in here if not beside.over[i][axis]]
        message = torch.cat(
            [torch.tensor([seen[i] for i in here]).float(), as_bounds(said[copies])]
        )
        group = host_group(axis.ranks, "mics_beside")
        all_reduce(message, dist.ReduceOp.MAX, group, name="end of the step")
        for i, by_any in zip(here, message[: len(here)].bool().tolist(), strict=True):
            seen[i] = by_any
        if copies:
            drift = drift_in(message[len(here) :], said[copies], copies, group) or drift
    if len(beside.axes) > 1:  # those who are on no axis of the ranks that differ
        drift = _found_by_any(
            drift, [host_group(axis.ranks, "mics_beside") for axis in beside.axes]
        )
    left = iter(flag for param, flag in zip(params, seen, strict=True) if param.requires_grad)
    return [list(itertools.islice(left, len(unit))) for unit in flags], drift


def _found_by_any(drift: Drift | None, groups: Sequence[dist.ProcessGroup]) -> Drift | None:
    """What any rank along any of the axes has found; collective over each in turn."""
    is_found = torch.tensor([float(drift is not None)])
    for group in groups:
        all_reduce(is_found, dist.ReduceOp.MAX, group, name="end of the step")
    for group in groups if is_found else ():
        drift = _first_of(drift, group)
    return drift


def _first_of(drift: Drift | None, group: dist.ProcessGroup) -> Drift | None:
    """What the first rank of a group has found that has found something; collective."""
    numbers = [1.0, *drift.as_numbers()] if drift is not None else [0.0] * 8
    mine = torch.tensor(numbers, dtype=torch.float64)
    table = mine.new_empty(group.size() * len(mine))
    all_gather(table, mine, group, name="comparison of copies that differ")
    rows = table.view(group.size(), -1).tolist()
    return next((Drift.from_numbers(numbers) for is_one, *numbers in rows if is_one), None)


def drift_error(
    groups: Groups, used: Sequence[Used], drift: Drift | None, control: dist.ProcessGroup | None
) -> MicroStepError:
    """The error of copies that differ, the same on every rank; collective over the mesh.

    Args:
        groups: of the mesh.
        used: of all units of the step on it.
        drift: what this rank has found.
        control: all ranks of the mesh, on the host; ``None`` of one rank.
    """
    found = drift if control is None else _first_of(drift, control)
    assert found is not None  # by a rank of this mesh, or it would not be asked for
    over = _beside_of(groups, used).over[found.param]
    axes = sorted(axis.name for axis, is_split in over.items() if not is_split)
    names = [name for unit in used for name in unit.names]
    return found.error(names[found.param], " and ".join(axes))


def _beside_of(groups: Groups, used: Sequence[Used]) -> _Beside:
    known = _known.get(used[0])
    if known is None or not known.is_of(used):
        known = _known[used[0]] = _Beside(groups, used)
    return known


def _params(used: Sequence[Used]) -> list[nn.Parameter]:
    return [param for unit in used for param in unit.params]


def _axes_of(groups: Groups, params: Sequence[nn.Parameter]) -> list[dict[Axis, bool]]:
    """The axes beside the data that each parameter is held along, and whether it is split there.

    One that is on no such axis itself is there as copies, along all that others are on.
    """
    if all(not isinstance(p, DTensor) or p.device_mesh.ndim == 1 for p in params):
        return [{} for _ in params]
    data = set(groups.whole.mesh.flatten().tolist())
    here = dist.get_rank()
    by_mesh: dict[object, dict[int, Axis]] = {}
    for param in params:
        if isinstance(param, DTensor) and param.device_mesh not in by_mesh:
            names = param.device_mesh.mesh_dim_names or ()
            by_mesh[param.device_mesh] = {
                place: Axis(ranks_of(group), repr(names[place]) if names else f"axis {place}")
                for place, group in axes_beside(groups, param.device_mesh).items()
                if group.size() > 1
            }
    everywhere = {
        axis: False
        for axes in by_mesh.values()
        for axis in axes.values()
        if set(axis.ranks) & data == {here}
    }
    found: list[dict[Axis, bool]] = []
    for param in params:
        own = by_mesh[param.device_mesh] if isinstance(param, DTensor) else {}
        split = {
            axis: not param.placements[place].is_replicate()  # type: ignore[attr-defined]
            for place, axis in own.items()
        }
        # An axis inside of those of the data, one of several that were flattened, has no copies.
        found.append(
            {
                axis: is_split
                for axis, is_split in {**everywhere, **split}.items()
                if is_split or axis in everywhere
            }
        )
    return found
