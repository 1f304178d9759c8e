"""What a tensor of a library's own type is made of: torch's ``__tensor_flatten__`` names the parts.

A wrapper (torchao's float8 and NF4 weights) has no values itself, and knows few of torch's
operators; its parts are plain tensors, of several dtypes perhaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics import compat
from mics.quantities import dtype_name


def plain_parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that hold the values of one, itself if it is plain; names are joined by dots."""
    parts = _parts(tensor)
    if not parts:
        yield name, tensor
    for part, inner in parts.items():
        yield from plain_parts(f"{name}.{part}", inner)


def values_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor of the same shape and dtype that holds all the values of one, in its memory.

    Returns:
        The tensor itself if it is plain, a DTensor for a sharded one; ``None`` where the values are
        spread over several tensors, or kept in another dtype.
    """
    local = compat.local_of(tensor)
    parts = _parts(local)
    if not parts:
        return tensor
    if len(parts) > 1:
        return None
    (inner,) = (values_of(part) for part in parts.values())
    if inner is None or (inner.shape, inner.dtype) != (local.shape, local.dtype):
        return None
    if not isinstance(tensor, DTensor):
        return inner
    return DTensor.from_local(
        inner.detach(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def plain_like(tensor: DTensor, dtype: torch.dtype) -> DTensor:
    """A DTensor without values that is sharded like one, its parts plain tensors."""
    local = compat.local_of(tensor)
    return DTensor.from_local(
        torch.empty(local.shape, dtype=dtype, device=local.device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def kind_of(tensor: torch.Tensor) -> str:
    """The type of this rank's part and the dtypes in it; nothing for torch's own types."""
    local: Any = compat.local_of(tensor)
    if type(local) in (torch.Tensor, nn.Parameter):
        return ""
    inside = [f"{name} {part.dtype}" for name, part in _parts(local).items()]
    return f"{type(local).__name__}({', '.join(inside)})"


def kind_and_options(tensor: torch.Tensor) -> str:
    """Dtype and type of this rank's part, and what it says of itself in numbers and text."""
    local: Any = compat.local_of(tensor)
    _, context = local.__tensor_flatten__()
    table = context if isinstance(context, Mapping) else {}
    plain = (bool, int, float, str, torch.dtype)
    options = [f"{name}={value}" for name, value in table.items() if isinstance(value, plain)]
    return f"{dtype_name(tensor.dtype)} {type(local).__name__}({', '.join(options)})"


def times_written(tensor: torch.Tensor) -> int:
    """How often a tensor was written in place, before it was wrapped too."""
    return compat.times_written(tensor) + sum(map(times_written, _parts(tensor).values()))


def _parts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        return {}
    names, _ = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    return {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}
