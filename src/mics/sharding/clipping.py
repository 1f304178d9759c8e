"""The norm of whole gradients, over every mesh and every shard, and gradients clipped by it.

torch's ``get_total_norm`` and ``clip_grad_norm_`` give the same for norms of finite order over one
mesh. They raise where a shard is empty and the norm is the largest value, on the ranks that have
such a shard, and where parameters are on several meshes; of gradients in 16 bits they add up in 16
bits. Experts that fewer ranks hold than the rest are counted once each.

Nothing is read from a device here, but for ``error_if_nonfinite``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import clip_grads_with_norm_

from mics import compat
from mics.communication.same_steps import same_steps_of
from mics.communication.shares import owned_of, stands_for
from mics.communication.signposts import bare, bared, read
from mics.errors import ConfigError, NormError
from mics.ranks.issuing import all_reduce
from mics.sharding.belonging import units_by_param
from mics.sharding.owned import await_shards
from mics.sharding.spread import Spread, spread_of

_WIDE = (torch.float64, torch.complex128)


@torch.no_grad()
def get_total_norm(
    tensors: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """The norm of tensors, whole ones and shards, all taken as one vector.

    As ``torch.nn.utils.get_total_norm``: give it gradients, as
    ``[p.grad for p in model.parameters() if p.grad is not None]``; of parameters it is the norm of
    the weights. Collective over the ranks that hold shards, not over replicas, but for experts of
    which a partition group has not all. All ranks pass what they have of the same parameters.

    Args:
        tensors: one or more; shards are DTensors.
        norm_type: the order of the norm, above 0; ``inf`` takes the largest absolute value.
        error_if_nonfinite: raise where the norm is not finite; waits for the device.
        foreach: as torch's: False takes one kernel for each tensor, None and True one for many.

    Returns:
        The same on every rank, in 32 bits or more. Shape ().

    Raises:
        ConfigError: there is no norm of this order, or it cannot be told who holds a tensor.
        NormError: it is not finite (a RuntimeError, as torch's).
    """
    given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    found = [one for tensor in given if (one := read(tensor)) is not None]
    _check_order(norm_type)
    await_shards(found)
    spread = spread_of(found)
    return _finite(_norm(spread, found, norm_type, foreach), norm_type, error_if_nonfinite)


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale gradients in place so that their norm is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_``, for every norm, also where a rank's shard is empty and
    where parameters are on several meshes. Collective as ``get_total_norm``; all ranks pass the
    same parameters. Of those that ``mics.owned`` has dealt, or of what it returned, each rank
    clips the gradients that it owns, by the norm of all.

    Args:
        parameters: one or more, sharded or whole.
        max_norm: of the gradients of all of them, taken as one vector.
        norm_type: the order of the norm, above 0; ``inf`` takes the largest absolute value.
        error_if_nonfinite: raise where the norm is not finite; waits for the device.
        foreach: as torch's.

    Returns:
        The norm before clipping, the same on every rank, in 32 bits or more. Shape ().

    Raises:
        ConfigError: there is no norm of this order.
        NormError: it is not finite (a RuntimeError, as torch's); no gradient has been scaled.
    """
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    params = [param if (part := owned_of(param)) is None else part for param in given]
    _check_order(norm_type)
    spread = spread_of(params)
    _tell_others(params, max_norm, norm_type)
    with bared(params):
        gradients = [param.grad for param in params]
        norm = _finite(_norm(spread, gradients, norm_type, foreach), norm_type, error_if_nonfinite)
        for split in spread.splits:  # torch scales DTensors of one mesh at a time
            alike = [p for p, one in zip(params, spread.of, strict=True) if one == split]
            clip_grads_with_norm_(alike, max_norm, norm, foreach)
    return norm


def _tell_others(params: Sequence[torch.Tensor], max_norm: Any, norm_type: float) -> None:
    """Let ranks compare by what they have clipped, with the optimizer's options.

    Replicas and partition groups that clip by another norm would step other gradients. A norm that
    is a tensor is not read: it may be on a device.
    """
    largest = "a tensor" if isinstance(max_norm, torch.Tensor) else float(max_norm)
    by_param = units_by_param()
    ids = [id(stands_for(param)) for param in params]
    units = [by_param[key] for key in ids if key in by_param]
    for groups in {unit.groups.shard: unit.groups for unit in units}.values():
        same_steps_of(groups).note(
            [f"gradients clipped to max_norm = {largest}, norm_type = {float(norm_type)}"]
        )


def _check_order(norm_type: float) -> None:
    """Refuse what is not the order of a norm.

    Raises:
        ConfigError: it is not.
    """
    if not norm_type > 0:
        raise ConfigError(
            f"norm_type = {norm_type} is not the order of a norm.", write="norm_type=2.0, or inf"
        )


def _finite(norm: torch.Tensor, order: float, wanted: bool) -> torch.Tensor:
    if wanted and not bool(norm.isfinite()):
        raise NormError(
            f"The norm of order {order} is not finite, so nothing can be clipped by it.",
            numbers=f"It is {float(norm)}.",
            write="optimizer.zero_grad() and the next step; or error_if_nonfinite=False",
        )
    return norm


def _norm(
    spread: Spread, tensors: Sequence[torch.Tensor | None], order: float, foreach: bool | None
) -> torch.Tensor:
    """The norm over all ranks of what each split has of tensors (``None`` is nothing)."""
    double = any(one is not None and one.dtype in _WIDE for one in tensors)
    sums = []
    for split in spread.splits:
        mine = [
            _local(tensor)
            for tensor, one in zip(tensors, spread.of, strict=True)
            if one == split and tensor is not None
        ]
        part = _sum_of(mine, order, foreach)
        if split.mesh is not None:
            part = part.to(split.mesh.device_type)
            groups = [split.mesh.get_group(axis) for axis in split.axes]
            groups += [] if split.replicas is None else [split.replicas]
            part = _over_ranks(part, groups, order)
        if split.copies:
            part = part if math.isinf(order) else part / split.copies
            part = _over_ranks(part, spread.others, order)
        sums.append(part)
    if not sums:
        return torch.zeros(())
    stacked = torch.stack([part.to(sums[0].device) for part in sums])
    norm = stacked.max() if math.isinf(order) else stacked.sum().pow(1 / order)
    return norm if double else norm.to(torch.float32)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return bare(tensor)
    if any(placed.is_partial() for placed in tensor.placements):
        whole = [Replicate() if one.is_partial() else one for one in tensor.placements]
        tensor = tensor.redistribute(placements=whole)
    return tensor.to_local()


def _sum_of(shards: list[torch.Tensor], order: float, foreach: bool | None) -> torch.Tensor:
    """The sum of absolute values to the power of ``order``, or the largest; 64 bits, shape ()."""
    full = [shard for shard in shards if shard.numel()]  # of nothing there is no largest value
    if not full:
        return torch.zeros((), dtype=torch.float64)
    norms = [norm.to(torch.float64) for norm in compat.norms(full, order, foreach)]
    stacked = torch.stack([norm.to(full[0].device) for norm in norms])
    return stacked.max() if math.isinf(order) else stacked.pow(order).sum()


def _over_ranks(
    part: torch.Tensor, groups: Iterable[dist.ProcessGroup], order: float
) -> torch.Tensor:
    for group in groups:
        if group.size() == 1:
            continue
        if math.isinf(order):
            part = part.nan_to_num(nan=math.inf)  # a maximum need not see what is no number
            all_reduce(part, dist.ReduceOp.MAX, group, name="norm of the gradients")
        else:
            all_reduce(part, group=group, name="norm of the gradients")
    return part
