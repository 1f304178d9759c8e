"""Optimizer state that torchao keeps in few bits: codes, and a scale for each block of a shard.

It is kept as plain tensors and a value that says what they are, behind the name of the state::

    STATE         {"quantised": {"kind": "OptimState8bit", "block": 256, "signed": true,
                   "parts": {"codes": {"tensor": "STATE.codes"}, ...}}}
    STATE.codes   in the shape of the parameter; of 4 bits [*grid, block / 2], two in a byte
    STATE.scale   [*grid], one for each block
    STATE.qmap    what each code stands for; fp8 has none

[Note: the grid of blocks]
A block is a run of a rank's flattened shard, so which elements share a scale depends on the layout,
and so does whether there are blocks at all. A parameter of shape [8, 64] in blocks of 256 elements
is a grid [2, 1]: four rows are a block. Where no rank's shard ends inside a block, the blocks of
shards are those of the whole flattened parameter, and the grid is sharded as the parameter is: the
same at any such layout. Codes and scales then move bit for bit. Everything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics import compat
from mics.checkpoint.differences import not_to_be
from mics.checkpoint.manifest import PLAIN, SHARDED, Entry, Json
from mics.errors import CheckpointError

_QMAP = "qmap"


@dataclass(frozen=True)
class Grid:
    """Blocks of a flattened parameter, see [Note: the grid of blocks].

    ``dim`` is the last dim of the parameter that is one of the grid too; ``rows`` of it make up
    whole blocks. The grid has one more dim: the blocks in these rows.
    """

    dim: int
    rows: int
    shape: tuple[int, ...]

    def part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part of the grid that a shard of this shape is."""
        return (*shape[: self.dim], shape[self.dim] // self.rows, self.shape[-1])


def grid_of(shape: tuple[int, ...], block: int) -> Grid | None:
    """The blocks of ``block`` elements of a parameter; ``None`` where it ends inside of one."""
    inner = 1
    for dim in reversed(range(len(shape))):
        rows = block // gcd(block, inner)
        if shape[dim] % rows == 0:
            return Grid(dim, rows, (*shape[:dim], shape[dim] // rows, inner * rows // block))
        inner *= shape[dim]
    return None


def is_whole(param: torch.Tensor, grid: Grid) -> bool:
    """Whether this rank's shard of a parameter is whole blocks of its grid."""
    if not isinstance(param, DTensor):
        return True
    for dim, factor in map(compat.split_of, param.placements):
        if dim is None:
            continue
        if dim > grid.dim or (dim == grid.dim and factor != 1 and grid.rows != 1):
            return False
    return compat.local_of(param.detach()).shape[grid.dim] % grid.rows == 0


# -- saving ----------------------------------------------------------------------------------------


def quantised_in(state: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """The states of a parameter that are of torchao's quantised types."""
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and compat.kind_of_state(_local(value))
    }


def parts_to_keep(
    name: str, state: torch.Tensor, param: nn.Parameter
) -> tuple[Json, dict[str, torch.Tensor], dict[str, str]]:
    """A quantised state as what a manifest says of it, its tensors by name, and their forms.

    Args:
        name: of the state in the manifest.
        state: the tensors returned share its memory.
        param: the parameter whose state it is.

    Raises:
        CheckpointError: a block of this rank's shard is not one of the whole parameter.
    """
    local: Any = _local(state)
    shape = tuple(param.shape)
    grid = grid_of(shape, local.block_size)
    if grid is None or not is_whole(param, grid):
        raise CheckpointError(
            f"{name} cannot be kept: blocks of a shard are none of the whole parameter.",
            numbers=f"The parameter is {list(shape)}, this rank's shard "
            f"{list(compat.local_of(param.detach()).shape)}, a block has {local.block_size} "
            "elements.",
            write="another partition size, or a checkpoint without the optimizer",
        )
    parts = _parts(local, param, grid)
    named = {f"{name}.{part}": tensor for part, tensor in parts.items()}
    described: Json = {
        "quantised": {
            "kind": compat.kind_of_state(local),
            "block": local.block_size,
            "signed": getattr(local, "signed", None),
            "parts": {part: {"tensor": f"{name}.{part}"} for part in parts},
        }
    }
    forms = {
        part: (SHARDED if isinstance(tensor, DTensor) else PLAIN)
        for part, tensor in named.items()
        if isinstance(param, DTensor)
    }
    return described, named, forms


def check_one_kind(name: str, optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    """Raise where an optimizer quantises the state of some shards of a parameter and not of others.

    Every rank comes to the same answer from the shape of the parameter.

    Raises:
        CheckpointError: it does; the sizes of shards are named.
    """
    kinds: dict[str, list[int]] = {}
    for numel in _numels_of_shards(param):
        new = compat.new_state(optimizer, torch.empty(numel, device="meta"), True)
        if new is None:
            return
        kinds.setdefault(compat.kind_of_state(new), []).append(numel)
    if len(kinds) > 1:
        shown = "; ".join(
            f"{kind or 'unquantised'} of {' and '.join(map(str, sorted(numels)))} elements"
            for kind, numels in sorted(kinds.items(), reverse=True)
        )
        raise CheckpointError(
            f"{name} cannot be kept: some ranks have it in few bits and others have not, because "
            "their shards are of other sizes.",
            numbers=f"Shards of {list(param.shape)}: {shown}.",
            write="a partition size that splits it evenly, or torch.optim.AdamW for this parameter",
        )


def _numels_of_shards(param: torch.Tensor) -> set[int]:
    """The numbers of elements that shards of a parameter have on the ranks of its mesh."""
    shapes = {tuple(param.shape)}
    if isinstance(param, DTensor):
        for axis, placement in enumerate(param.placements):
            dim, factor = compat.split_of(placement)
            if dim is None:
                continue
            if factor != 1:  # its sizes are no chunks; ranks that differ are found by their facts
                return {compat.local_of(param.detach()).numel()}
            ranks = param.device_mesh.size(axis)
            shapes = {
                (*shape[:dim], size, *shape[dim + 1 :])
                for shape in shapes
                for size in _chunks(shape[dim], ranks)
            }
    return set(map(prod, shapes))


def _chunks(size: int, ranks: int) -> set[int]:
    full = -(-size // ranks)
    return {min(full, max(0, size - rank * full)) for rank in range(ranks)}


# -- loading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FewBits:
    """What a manifest says of a quantised state; ``parts`` are names of tensors."""

    kind: str
    block: int
    signed: bool | None
    parts: dict[str, str]


@dataclass(frozen=True)
class Place:
    """A state of a parameter that is to be loaded, and whose it will be."""

    folder: Path
    partition: int
    """p of the checkpoint."""
    name: str
    """Of the state, in the manifest."""
    param: nn.Parameter
    own: Any
    """The state in use, ``None`` where there is none yet."""
    optimizer: torch.optim.Optimizer

    def expected(self, signed: bool) -> torch.Tensor | None:
        """This rank's part of the state as the optimizer has it, or would have it if that is known.

        What it would have has no values: it is on the meta device.
        """
        if isinstance(self.own, torch.Tensor):
            return _local(self.own)
        local = compat.local_of(self.param.detach())
        like = torch.empty(local.shape, dtype=local.dtype, device="meta")
        return compat.new_state(self.optimizer, like, signed)


def read_few_bits(name: str, value: Json) -> FewBits | None:
    """What a value of a manifest says, if it is that of a quantised state.

    Raises:
        ValueError: it is, and is not what ``parts_to_keep`` writes.
    """
    if not isinstance(value, dict) or "quantised" not in value:
        return None
    table = value["quantised"]
    if len(value) != 1 or not isinstance(table, dict):
        raise ValueError("a quantised state that is no table")
    if set(table) != {"kind", "block", "signed", "parts"}:
        raise ValueError(f"a quantised state with {sorted(table)}")
    kind, block, signed, parts = (table[key] for key in ("kind", "block", "signed", "parts"))
    if not isinstance(kind, str) or type(block) is not int or block < 1:
        raise ValueError(f"a quantised state {kind!r} in blocks of {block!r}")
    if not (signed is None or isinstance(signed, bool)) or not isinstance(parts, dict):
        raise ValueError(f"a quantised state that is signed: {signed!r}")
    for part, tensor in parts.items():
        if tensor != {"tensor": f"{name}.{part}"}:
            raise ValueError(f"a quantised state with {part} in {tensor!r}")
    return FewBits(kind, block, signed, {part: f"{name}.{part}" for part in parts})


def check_unquantised(place: Place, entry: Entry) -> None:
    """Raise where a state that was not quantised would be quantised here.

    Raises:
        CheckpointError: it would be rounded, or be of another precision than the others.
    """
    if entry.shape != tuple(place.param.shape):
        return
    here = place.expected(True)
    if here is not None and type(here) is not torch.Tensor:
        raise _other_precision(place, "unquantised", type(here).__name__, entry)


def place_few_bits(
    place: Place, few: FewBits, entries: Mapping[str, Entry]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A new state, and the tensors in it that have yet to be read, by name.

    Args:
        place: whose it will be.
        few: what was kept.
        entries: the tensors of the manifest.

    Raises:
        CheckpointError: this state would be unquantised here, or in other blocks, or cut inside of
            one; or the manifest has tensors that cannot be.
    """
    param = place.param
    here: Any = place.expected(bool(few.signed))
    kind = "" if here is None else compat.kind_of_state(here)
    codes = entries.get(few.parts.get("codes", ""))
    if kind != few.kind:
        raise _other_precision(place, few.kind, kind or "unquantised", codes)
    if (here.block_size, getattr(here, "signed", None)) != (few.block, few.signed):
        raise _other_precision(
            place,
            f"blocks of {few.block}, signed={few.signed}",
            f"blocks of {here.block_size}, signed={getattr(here, 'signed', None)}",
            codes,
        )
    grid = grid_of(tuple(param.shape), few.block)
    if grid is None or not is_whole(param, grid):
        raise _other_precision(place, few.kind, f"in other blocks of {few.block}", codes)
    new = _empty_like(here, param.device)
    parts = _parts(new, param, grid)
    if set(parts) != set(few.parts):
        raise not_to_be(place.folder, place.name, f"It is {sorted(few.parts)}")
    for part, tensor in parts.items():
        entry = entries.get(few.parts[part])
        wanted = (tuple(tensor.shape), tensor.dtype)
        if entry is None or (entry.shape, entry.torch_dtype) != wanted:
            raise not_to_be(place.folder, few.parts[part], f"It is not {wanted}")
        mine = getattr(new, part)
        if isinstance(tensor, DTensor) and _local(tensor).data_ptr() != mine.data_ptr():
            raise CheckpointError(
                f"{place.name} cannot be loaded: parameters are on another device than their mesh.",
                numbers=f"{mine.device} and {tensor.device_mesh.device_type}.",
                write="quantised state without CPUOffloadPolicy",
            )
    state = _sharded(new, param, tuple(param.shape)) if isinstance(param, DTensor) else new
    return state, {few.parts[part]: tensor for part, tensor in parts.items()}


def _other_precision(place: Place, there: str, here: str, codes: Entry | None) -> CheckpointError:
    sizes = {prod(chunk.shape) for chunk in codes.chunks} if codes is not None else set()
    shards = " and ".join(map(str, sorted(sizes))) or "no"
    local = compat.local_of(place.param.detach())
    block = getattr(place.optimizer, "block_size", None)
    return CheckpointError(
        f"{place.folder} has {place.name} as another optimizer or layout keeps it: {there} there, "
        f"{here} here. It is never converted.",
        numbers=f"Its shards have {shards} elements there (partition {place.partition}), "
        f"{local.numel()} on this rank" + (f"; a block has {block}." if block else "."),
        write=f"partition={place.partition}, as it was saved, and the optimizer it was saved from; "
        "or mics.load(path, model=model) and a fresh optimizer",
    )


# -- parts -----------------------------------------------------------------------------------------


def _local(state: torch.Tensor) -> torch.Tensor:
    return compat.local_of(state.detach())


def _parts(local: Any, param: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """The tensors of this rank's part of a state, sharded as the parameter is; in its memory."""
    names, _ = local.__tensor_flatten__()
    cells = grid.part(tuple(local.shape))
    parts = {}
    for name in names:
        part: torch.Tensor = getattr(local, name)
        if name == _QMAP:
            parts[name] = part
            continue
        if part.shape == local.shape:
            whole = tuple(param.shape)
        else:
            inside = part.numel() // prod(cells)
            rest = (inside,) if inside != 1 else ()
            part, whole = part.view(*cells, *rest), (*grid.shape, *rest)
        parts[name] = _sharded(part, param, whole) if isinstance(param, DTensor) else part
    return parts


def _sharded(part: torch.Tensor, param: DTensor, whole: tuple[int, ...]) -> DTensor:
    stride = tuple(prod(whole[dim + 1 :]) for dim in range(len(whole)))
    return DTensor.from_local(
        part,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=torch.Size(whole),
        stride=stride,
    )


def _empty_like(local: Any, device: torch.device) -> Any:
    """A quantised state with room of its own on a device."""
    names, rest = local.__tensor_flatten__()
    room = {name: torch.empty_like(getattr(local, name), device=device) for name in names}
    return type(local).__tensor_unflatten__(room, rest, local.shape, local.stride())
