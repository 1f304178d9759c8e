"""What ranks with another part of a parameter have used of it.

A parameter may be spread over axes beside those of the data: all experts in one tensor, or the
columns of a matrix. The ranks along such an axis have other parts of it and meshes of their own, so
the end of a step on one mesh does not tell what the others have used. In one process it is one
parameter: if any part of it was used it has a gradient, zeros elsewhere, and an optimizer decays
all of it. So the ranks along these axes tell each other too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mics.ranks.issuing import all_reduce, make_group
from mics.ranks.mesh import Groups, PerMesh, axes_beside, ranks_of
from mics.topology import Ranks


def _none_yet(_: Groups) -> dict[Ranks, dist.ProcessGroup]:
    return {}


_groups_of = PerMesh(_none_yet)  # on the host, by ranks


def by_other_parts(
    groups: Groups, params: Sequence[Sequence[nn.Parameter]], flags: list[list[bool]]
) -> list[list[bool]]:
    """Whether a parameter was used by any rank that has a part of it.

    Collective over the axes beside the data that parameters are spread over, if there are any.

    Args:
        groups: of the mesh.
        params: of each unit on it.
        flags: whether any rank of the mesh has used them.
    """
    over = [_beside(groups, param) for unit in params for param in unit]
    if not any(over):
        return flags
    flat = [flag for unit in flags for flag in unit]
    for ranks in sorted({one for axes in over for one in axes}):
        spread = [i for i, axes in enumerate(over) if ranks in axes]
        message = torch.tensor([flat[i] for i in spread], dtype=torch.int64)
        made = _groups_of(groups)
        if ranks not in made:
            made[ranks] = make_group(ranks, "mics_beside", backend="gloo")
        all_reduce(message, dist.ReduceOp.MAX, made[ranks], name="end of the step")
        for i, used in zip(spread, message.bool().tolist(), strict=True):
            flat[i] = used
    left = iter(flat)
    return [list(itertools.islice(left, len(unit))) for unit in flags]


def _beside(groups: Groups, param: nn.Parameter) -> list[Ranks]:
    """The ranks along each axis, beside the data, that splits a parameter."""
    if not isinstance(param, DTensor):
        return []
    return [
        ranks_of(group)
        for axis, group in axes_beside(groups, param.device_mesh).items()
        if not param.placements[axis].is_replicate() and group.size() > 1
    ]
