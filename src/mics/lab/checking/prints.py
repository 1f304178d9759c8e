"""Prints of parameters and gradients, by which copies on other ranks are compared."""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mics import compat
from mics.lab.checking.report import Print
from mics.ranks.device import on_accelerator

_SAMPLE = 64
_BITS = 16  # bytes of a hash


def print_of(tensor: torch.Tensor) -> Print:
    """Values of a tensor, of what this rank holds of a DTensor."""
    local = local_of(tensor)
    flat = local.reshape(-1)
    if flat.numel() == 0:
        return Print("", 0.0, ())
    values = flat.to(torch.float64)
    places = torch.linspace(0, flat.numel() - 1, min(_SAMPLE, flat.numel())).long()
    sample = tuple(float(one) for one in values[places].tolist())
    return Print(hash_of([local]), float(values.norm()), sample)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds, without history."""
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def shard_of(tensor: torch.Tensor) -> str:
    """Which part of the whole a DTensor's rank holds, as text; "" for all of it.

    Ranks with one text hold copies of each other, on whatever meshes.
    """
    if not isinstance(tensor, DTensor):
        return ""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    parts = []
    for axis, placement in enumerate(tensor.placements):
        dim, _ = compat.split_of(placement)
        if dim is not None and mesh.size(axis) > 1:
            parts.append(f"{dim}:{coordinate[axis]}/{mesh.size(axis)}")
    return " ".join(parts)


def hash_of(tree: Any) -> str:
    """Hash of the bits of all tensors of a tree."""
    digest = hashlib.blake2b(digest_size=_BITS)
    for one in compat.tree_leaves(tree):
        if isinstance(one, torch.Tensor) and not on_accelerator(one.device):
            held = local_of(one).contiguous()
            if held.layout == torch.strided and held.numel():
                digest.update(ctypes.string_at(held.data_ptr(), held.nbytes))
    return digest.hexdigest()
