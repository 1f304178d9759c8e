"""Every rank starts from the same weights, whatever its seed.

FSDP2 keeps each rank's shard of *that rank's* weights. Ranks that were seeded differently would
train a patchwork inside a partition group and different models across replicas, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mics import compat
from mics.ranks import issuing
from mics.ranks.console import say
from mics.ranks.mesh import Groups, PerMesh
from mics.sharding.other_axes import unsharded
from mics.sharding.tensor_parts import plain_parts


def _nothing_yet(_: Groups) -> list[str]:
    return []


_NOWHERE: Mapping[nn.Parameter, Groups] = {}

_said_of = PerMesh(_nothing_yet)  # it is said once for a mesh, not for every unit

_PIECE = 2**16
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_start(
    module: nn.Module,
    groups: Groups,
    ignored: set[nn.Parameter],
    elsewhere: Mapping[nn.Parameter, Groups] = _NOWHERE,
) -> None:
    """Give every rank of the mesh the first rank's parameters and buffers.

    Parameters that are sharded already, on the meta device, or ignored are left alone. Of those on
    an axis beside the mesh (tensor parallelism) each rank along it has its part, which is the first
    rank's with that part; all else is equal along that axis too.

    Args:
        module: its parameters and buffers.
        groups: of the mesh.
        ignored: parameters that are.
        elsewhere: parameters that have another mesh, whose ranks get those of its first rank.
    """
    tensors: dict[tuple[dist.ProcessGroup, ...], dict[str, torch.Tensor]] = {}
    home = tuple(groups.axes[::-1])
    everywhere = (*_beside(module, groups), *home)
    found = {n: p for n, p in unsharded([module]).items() if p not in ignored}
    for name, tensor in [*found.items(), *module.named_buffers()]:
        if tensor.is_meta:
            continue
        if isinstance(tensor, nn.Parameter) and tensor in elsewhere:
            chain = tuple(elsewhere[tensor].axes[::-1])
        else:
            chain = home if isinstance(tensor, DTensor) else everywhere
        tensors.setdefault(chain, {})[name] = compat.local_of(tensor.detach())
    for chain, alike in tensors.items():
        parts = dict(part for pair in alike.items() for part in plain_parts(*pair))
        if parts:
            _give_firsts(parts, groups, chain)


def _beside(module: nn.Module, groups: Groups) -> list[dist.ProcessGroup]:
    """The groups of the axes beside those of the data that parameters of a module are on."""
    meshes = [param.device_mesh for param in module.parameters() if isinstance(param, DTensor)]
    found = [group for mesh in dict.fromkeys(meshes) for group in mesh.get_all_groups()]
    return [group for group in dict.fromkeys(found) if group not in groups.axes]


@torch.no_grad()
def _give_firsts(
    tensors: Mapping[str, torch.Tensor], groups: Groups, chain: Sequence[dist.ProcessGroup]
) -> None:
    """Compare fingerprints first, so that equal values cost one small message."""
    names = list(tensors)
    mine = torch.stack([fingerprint(tensors[name]).to(groups.device) for name in names])
    different = torch.zeros(len(names), dtype=torch.int32, device=groups.device)
    for group in chain:
        rows = torch.empty(group.size() * len(names), dtype=torch.int64, device=groups.device)
        issuing.all_gather(rows, mine, group)
        table = rows.view(group.size(), -1)
        different |= (table != table[0]).any(dim=0).int()
    for group in chain:
        issuing.all_reduce(different, dist.ReduceOp.MAX, group)
    unequal = [name for name, flag in zip(names, different.tolist(), strict=True) if flag]
    for name in unequal:
        _broadcast_first(tensors[name], groups, chain)
    if unequal and not _said_of(groups):
        _said_of(groups).append(unequal[0])
        say(
            f"ranks had different initial values ({unequal[0]} and others; were they seeded "
            "differently?): every rank now starts from the first rank's"
        )


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over the bits, equal on every rank that has the same values. Shape (), int64."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    bits = flat.view(_INTEGER[flat.element_size()])
    # Weighted, so that values in another order do not pass for the same. In pieces, because the
    # products take more room than the tensor.
    weights = torch.arange(1, min(bits.numel(), _PIECE) + 1, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in torch.split(bits, _PIECE):
        total = total * 31 + (piece * weights[: piece.numel()]).sum()
    return total


def _broadcast_first(
    tensor: torch.Tensor, groups: Groups, chain: Sequence[dist.ProcessGroup]
) -> None:
    on_device = tensor.detach().to(groups.device).contiguous()
    for group in chain:  # axis by axis
        issuing.broadcast(on_device, group)
    tensor.copy_(on_device)
