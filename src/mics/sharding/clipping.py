"""The norm of whole gradients, over every mesh and every shard, and gradients clipped by it.

torch's ``clip_grad_norm_`` gives the same for norms of finite order over one mesh. It raises where
a shard is empty and the norm is the largest value, on the ranks that have such a shard, and where
parameters are on several meshes. Experts that fewer ranks hold than the rest are counted once each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mics.errors import ConfigError
from mics.ranks.issuing import all_reduce
from mics.ranks.mesh import Groups
from mics.sharding.belonging import units_by_param


@dataclass(frozen=True)
class _Split:
    """How a gradient is spread over ranks.

    Attributes:
        mesh: of its shards; a whole one has none.
        axes: of the mesh, those it is sharded over.
        holders: the ranks that have a part of it or a copy, if the others have another gradient in
            its place, as with experts; 0 if there are no others.
    """

    mesh: DeviceMesh | None = None
    axes: tuple[int, ...] = ()
    holders: int = 0


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
) -> torch.Tensor:
    """Scale gradients in place so that their norm is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_``, for every norm, also where a rank's shard is empty and
    where parameters are on several meshes. Collective over the ranks that hold shards, which all
    pass the same parameters.

    Args:
        parameters: one or more, sharded or whole.
        max_norm: of the gradients of all of them, taken as one vector.
        norm_type: the order of the norm, above 0; ``inf`` takes the largest absolute value.

    Returns:
        The norm before clipping, the same on every rank. Shape ().

    Raises:
        ConfigError: there is no norm of this order.
    """
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    norm = gradient_norm(params, norm_type)
    for alike in _by_split(params).values():  # torch scales DTensors of one mesh at a time
        with_gradient = [param for param in alike if param.grad is not None]
        clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


@torch.no_grad()
def gradient_norm(parameters: Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """The norm of the gradients that parameters have, taken as one vector.

    Collective, as ``clip_grad_norm_``.

    Returns:
        Shape (), in 32 bits or more.

    Raises:
        ConfigError: there is no norm of this order.
    """
    if not norm_type > 0:
        raise ConfigError(
            f"norm_type = {norm_type} is not the order of a norm.", write="norm_type=2.0, or inf"
        )
    params, units = list(parameters), units_by_param()
    ours = [units[id(param)].groups for param in params if id(param) in units]
    everybody = max(ours, key=lambda groups: groups.whole.size(), default=None)
    norms = []
    for split, alike in _by_split(params).items():
        norm = _norm_of(split, [_local(p.grad) for p in alike if p.grad is not None], norm_type)
        if split.holders and everybody is not None:
            norm = _over_others(norm, split.holders, everybody, norm_type)
        norms.append(norm)
    return _together(norms, norm_type) if norms else torch.zeros(())


def _by_split(parameters: Iterable[torch.Tensor]) -> dict[_Split, list[torch.Tensor]]:
    """Parameters by how they are split, in the same order on every rank, whatever has gradients."""
    params, units = list(parameters), units_by_param()
    groups = {id(p): units[id(p)].groups for p in params if id(p) in units}
    most = max((one.whole.size() for one in groups.values()), default=0)
    found: dict[_Split, list[torch.Tensor]] = {}
    for param in params:
        holders = _num_holders(param, groups[id(param)], most) if id(param) in groups else 0
        found.setdefault(_split_of(param, holders), []).append(param)
    return found


def _num_holders(param: torch.Tensor, groups: Groups, most: int) -> int:
    """``holders`` of a split, where the units of some parameters are on ``most`` ranks.

    One DTensor may hold all experts, spread over ranks beside those that it is sharded over.
    """
    holders = groups.whole.size()
    if isinstance(param, DTensor) and holders < most:
        holders = param.device_mesh.size() * groups.num_replicas
    return holders if holders < most else 0


def _split_of(param: torch.Tensor, holders: int) -> _Split:
    if not isinstance(param, DTensor):
        return _Split()
    axes = tuple(i for i, placed in enumerate(param.placements) if not placed.is_replicate())
    return _Split(param.device_mesh, axes, holders)


def _local(gradient: torch.Tensor) -> torch.Tensor:
    if not isinstance(gradient, DTensor):
        return gradient
    assert not any(isinstance(placed, Partial) for placed in gradient.placements)
    return gradient.to_local()


def _norm_of(split: _Split, shards: list[torch.Tensor], order: float) -> torch.Tensor:
    """The norm of gradients that are split in one way, over all ranks that hold a part."""
    full = [shard for shard in shards if shard.numel()]  # of nothing there is no largest value
    norm: torch.Tensor = get_total_norm(full, order) if full else torch.zeros(())
    norm = norm.to(torch.promote_types(norm.dtype, torch.float32))
    if split.mesh is None:
        return norm
    norm = norm.to(split.mesh.device_type)
    return _over_ranks(norm, [split.mesh.get_group(axis) for axis in split.axes], order)


def _over_others(norm: torch.Tensor, holders: int, everybody: Groups, order: float) -> torch.Tensor:
    """The norm of all gradients that ranks have in each other's place, each held by as many."""
    share = norm if math.isinf(order) else norm / holders ** (1 / order)
    return _over_ranks(share, everybody.axes, order)


def _over_ranks(
    norm: torch.Tensor, groups: Iterable[dist.ProcessGroup], order: float
) -> torch.Tensor:
    for group in groups:
        if math.isinf(order):
            norm = norm.nan_to_num(nan=math.inf)  # a maximum need not see what is no number
            all_reduce(norm, dist.ReduceOp.MAX, group, name="norm of the gradients")
        else:
            norm = norm.pow(order)
            all_reduce(norm, group=group, name="norm of the gradients")
            norm = norm.pow(1 / order)
    return norm


def _together(norms: list[torch.Tensor], order: float) -> torch.Tensor:
    first, *rest = norms
    if not rest:
        return first
    stacked = torch.stack([norm.to(first.device) for norm in norms])
    together: torch.Tensor = torch.linalg.vector_norm(stacked, order)
    return together
