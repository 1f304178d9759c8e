"""A fingerprint of a parameter, the same at any layout, from the parts that ranks have of it.

[Note: sums over cells]
Every cell gives 64 bits, mixed from its own bits and its place in the whole tensor, and the
fingerprint is their sum. A sum does not ask how the cells are spread over ranks, so parts of any
shape add up to the same, if each is counted once.

A tensor of a library's own type (NF4) is as many sums as it has inner tensors. Those that its
``fsdp_pre_all_gather`` gives away are cut beside its rows, and their cells have places in what is
gathered; the others (a table, a mean) are whole on every rank, and must be equal there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics import compat
from mics.checkpoint.pieces import other_layouts, other_values
from mics.communication.gathered import given, num_arguments
from mics.errors import CheckpointError
from mics.quantities import dtype_name
from mics.sharding.tensor_parts import kind_and_options, plain_parts, values_of

_Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape of a part."""

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 2**20  # cells that are mixed at once
_FACTORS = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB  # large and odd
_ALL_BITS = 2**64 - 1


def print_of_part(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """What this rank adds to the fingerprint of a parameter, as JSON. Nothing is communicated.

    Args:
        name: the parameter's, for messages.
        tensor: the parameter, sharded or whole.

    Returns:
        ``offset`` and ``shape`` of the part; ``kind``, the type; and ``sums``, for each tensor
        inside its name, dtype and cells, the sum, and whether ranks have parts of it.

    Raises:
        CheckpointError: it is of a type whose values cannot be found.
    """
    offset, shape = compat.box_of(tensor)
    part: dict[str, Any] = {"offset": list(offset), "shape": list(shape), "kind": "", "sums": []}
    if not prod(shape):
        return part
    plain = values_of(tensor)
    if plain is None:
        part["kind"] = f" {kind_and_options(tensor)}"
        part["sums"] = _sums_inside(name, tensor, offset, shape)
        return part
    values = compat.local_of(plain.detach())
    if type(values) not in (torch.Tensor, nn.Parameter) or values.layout is not torch.strided:
        raise _not_found(name, tensor, "It does not say which tensors are inside of it")
    total = _sum(values, offset, tensor.shape)
    part["sums"] = [["", dtype_name(tensor.dtype), prod(tensor.shape), total, True]]
    return part


def whole_print(name: str, shape: Sequence[int], parts: Sequence[Mapping[str, Any]]) -> str:
    """The fingerprint of a parameter, as a line of text.

    Args:
        name: the parameter's, for messages.
        shape: the whole parameter's.
        parts: what ``print_of_part`` returned on every rank, in rank order.

    Raises:
        CheckpointError: ranks have other values in one place, or parts that do not fit together.
    """
    first: dict[_Box, tuple[int, Mapping[str, Any]]] = {}
    for rank, part in enumerate(parts):
        box = tuple(part["offset"]), tuple(part["shape"])
        if prod(box[1]):
            holder, other = first.setdefault(box, (rank, part))
            if part != other:
                raise other_values(name, box[0], holder, rank)
    held = sum(prod(box[1]) for box in first)
    if held != prod(shape):
        raise other_layouts(name, held, prod(shape))
    sums: dict[str, tuple[int, int]] = {}
    for rank, part in first.values():
        for inner, dtype, cells, value, cut in part["sums"]:
            key = f"{inner} {dtype} of {cells}".strip()
            holder, so_far = sums.setdefault(key, (rank, 0 if cut else value))
            if cut:
                sums[key] = holder, so_far + value
            elif value != so_far:
                raise other_values(f"{name}.{inner}", tuple(part["offset"]), holder, rank)
    kinds = "".join(sorted({part["kind"] for _, part in first.values()}))
    shown = [f"{key} {value & _ALL_BITS:016x}" for key, (_, value) in sorted(sums.items())]
    return f"{list(shape)}{kinds} {', '.join(shown)}"


def _sums_inside(
    name: str, tensor: torch.Tensor, offset: Sequence[int], shape: Sequence[int]
) -> list[list[Any]]:
    """The sum of each tensor inside of one of a library's own type."""
    local, whole = compat.local_of(tensor), tuple(tensor.shape)
    inside = {inner.lstrip("."): part for inner, part in plain_parts("", local)}
    cut = _cut(name, tensor, local, inside) if tuple(shape) != whole else set()
    if cut and tuple(shape[1:]) != whole[1:]:
        raise _not_found(name, tensor, "It is not cut by rows")
    sums: list[list[Any]] = []
    for inner, part in inside.items():
        cells, start = part.numel(), 0
        if inner in cut:
            if cells % shape[0]:
                raise _not_found(name, tensor, f"{inner} has {cells} cells for {shape[0]} rows")
            cells, start = cells // shape[0] * whole[0], cells // shape[0] * offset[0]
        total = _sum(part.reshape(-1), (start,), (cells,))
        sums.append([inner, dtype_name(part.dtype), cells, total, inner in cut])
    return sums


def _cut(
    name: str, tensor: torch.Tensor, local: torch.Tensor, inside: Mapping[str, torch.Tensor]
) -> set[str]:
    """The tensors inside that ranks have parts of, as its own gather hook says."""
    if not isinstance(tensor, DTensor) or not compat.has_gather_hook(tensor):
        raise _not_found(name, tensor, "It has no fsdp_pre_all_gather that says what is cut")
    if num_arguments(local) != 1:
        raise _not_found(name, tensor, "Its fsdp_pre_all_gather wants more than a mesh")
    gathered, apart = given(local, (tensor.device_mesh,))
    cut = {inner for inner, part in inside.items() if any(part is one for one in gathered)}
    if apart or len(cut) != len(gathered):
        raise _not_found(name, tensor, "Its fsdp_pre_all_gather gives other tensors than it has")
    return cut


def _sum(values: torch.Tensor, offset: Sequence[int], whole: Sequence[int]) -> int:
    """The sum over a box of cells; see [Note: sums over cells].

    Args:
        values: the cells.
        offset: where in the whole tensor they begin.
        whole: the shape of the whole tensor.
    """
    if values.is_complex():
        real, imaginary = torch.view_as_real(values.resolve_conj()).unbind(-1)
        return _sum(real, offset, whole) + 3 * _sum(imaginary, offset, whole)
    steps = [prod(whole[dim + 1 :]) for dim in range(len(whole))]
    start = sum(at * step for at, step in zip(offset, steps, strict=True))
    bits = values.contiguous().view(_INTEGER[values.element_size()])
    if tuple(values.shape[1:]) == tuple(whole[1:]):  # one run of cells
        bits, steps = bits.view(-1), [1]
    row = torch.zeros((), dtype=torch.int64, device=bits.device)
    for size, step in zip(bits.shape[1:], steps[1:], strict=True):
        row = row.unsqueeze(-1) + torch.arange(size, device=bits.device) * step
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in torch.split(bits, max(1, _PIECE // row.numel())):
        rows = start + torch.arange(len(piece), device=bits.device) * steps[0]
        places = rows.view(-1, *[1] * row.ndim) + row
        mixed = piece.long() * _FACTORS[0] + places * _FACTORS[1]  # of 64 bits, and wraps
        mixed = (mixed ^ (mixed >> 29)) * _FACTORS[2]
        total += (mixed ^ (mixed >> 32)).sum()
        start += len(piece) * steps[0]
    return int(total)


def _not_found(name: str, tensor: torch.Tensor, why: str) -> CheckpointError:
    return CheckpointError(
        f"{name} cannot be left out: no fingerprint of its values can be taken, by which another "
        "base would be known.",
        numbers=f"It is a {type(compat.local_of(tensor)).__name__}. {why}.",
        write="mics.save_adapters, which keeps adapters alone, or the parameter in a dtype of "
        "torch",
    )
