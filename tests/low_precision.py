"""Parameters that are gathered in few bits: tensors with FSDP2's ``fsdp_pre_all_gather``.

Three ways that users' own tensors go, torchao's among them:

    "float8"  one scale for the whole parameter, agreed on by an all-reduce inside the hook; one
              tensor is gathered, of a dtype that Gloo does not know
    "int8"    a scale for each row, gathered beside the values: two tensors of two dtypes
    "stored"  as "int8", and kept in int8 too, as a frozen base of NF4 is

``unquantised`` of a weight, in one process, is what both give back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

Way = Literal["float8", "int8", "stored"]

FLOAT8 = torch.float8_e4m3fn
_ATEN = torch.ops.aten
_KEEPS = {
    _ATEN.empty_like.default,
    _ATEN.new_zeros.default,
    _ATEN.slice.Tensor,
    _ATEN.view.default,
    _ATEN.as_strided.default,
    _ATEN._to_copy.default,
    _ATEN.split.Tensor,
    _ATEN.clone.default,
}


class Cast(torch.Tensor):
    """Full values that travel in few bits; what is computed on them is computed in full.

    Args:
        values: in fp32 or bf16.
    """

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Cast:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, values.size(), strides=values.stride(), dtype=values.dtype, device=values.device
        )

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.values})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, *_: Any) -> Cast:
        return cls(inner["values"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN.detach.default:
            return cls(args[0].values)  # as torchao does, so that what wrote them stays counted
        args, kwargs = tree_map_only(Cast, lambda t: t.values, (args, kwargs or {}))
        out = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, cls, out) if func in _KEEPS else out


class Float8(Cast):
    """Gathered as float8 with one scale, which every rank of the mesh agrees on."""

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: Any,
    ) -> Any:
        amax = self.values.abs().amax() if self.numel() else self.values.new_zeros(())
        dist.all_reduce(amax, dist.ReduceOp.MAX, mesh.get_group())
        scale = scale_of(amax, FLOAT8)
        rows = -(-outer_size[0] // mesh.size())
        padded = self.values.new_zeros(rows, *outer_size[1:])
        padded[: len(self.values)] = self.values
        return ((padded * scale).to(FLOAT8),), scale

    def fsdp_post_all_gather(
        self, gathered: Any, scale: Any, dtype: torch.dtype, *, out: torch.Tensor | None = None
    ) -> Any:
        return _give((gathered[0].to(scale.dtype) / scale).to(dtype), out)


class Int8(Cast):
    """Gathered as int8 with a scale for each row; it may only be sharded evenly."""

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> Any:
        scale = scale_of(self.values.abs().amax(1, keepdim=True), torch.int8)
        return ((self.values * scale).round().to(torch.int8), scale), None

    def fsdp_post_all_gather(
        self, gathered: Any, _: Any, dtype: torch.dtype, *, out: torch.Tensor | None = None
    ) -> Any:
        values, scale = gathered
        return _give((values.to(scale.dtype) / scale).to(dtype), out)


class Stored(torch.Tensor):
    """Values in int8 with a scale for each row, in memory too; for parameters without gradients."""

    few: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, few: torch.Tensor, scale: torch.Tensor) -> Stored:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, few.size(), strides=few.stride(), dtype=scale.dtype, device=few.device
        )

    def __init__(self, few: torch.Tensor, scale: torch.Tensor) -> None:
        self.few, self.scale = few, scale

    def __repr__(self) -> str:
        return f"Stored({self.few}, {self.scale})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["few", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        few, scale = args[0].few, args[0].scale
        if func is _ATEN.new_zeros.default:
            return cls(few.new_zeros(args[1]), scale.new_zeros(args[1][0], 1))
        if func is _ATEN.copy_.default:
            few.copy_(args[1].few)
            scale.copy_(args[1].scale)
            return args[0]
        if func is _ATEN.view.default:
            return cls(few, scale)  # FSDP2 flattens a shard, but leaves it to a hook to read it
        if func is _ATEN.split.Tensor:
            pairs = zip(func(few, *args[1:]), func(scale, *args[1:]), strict=True)
            return [cls(*pair) for pair in pairs]
        if func in (_ATEN.detach.default, _ATEN.slice.Tensor, _ATEN.clone.default):
            return cls(func(few, *args[1:]), func(scale, *args[1:]))
        return NotImplemented

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> Any:
        return (self.few, self.scale), None

    def fsdp_post_all_gather(
        self, gathered: Any, _: Any, dtype: torch.dtype, *, out: torch.Tensor | None = None
    ) -> Any:
        few, scale = gathered
        return _give((few.to(scale.dtype) / scale).to(dtype), out)


def scale_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What brings values up to ``amax`` into the range of a dtype."""
    info = torch.iinfo(dtype) if dtype == torch.int8 else torch.finfo(dtype)
    return info.max / amax.clamp(min=1e-12)


def _give(whole: torch.Tensor, out: torch.Tensor | None) -> Any:
    if out is None:
        return whole, (whole,)
    out = out._local_tensor if isinstance(out, DTensor) else out  # of other axes' parallelism
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(out):
        out.copy_(whole[: len(out)])  # without padding
    return None


def unquantised(weight: torch.Tensor, way: Way) -> torch.Tensor:
    """What the ranks compute with; its gradient is the weight's own."""
    values = weight.detach()
    if way == "float8":
        scale = scale_of(values.abs().amax(), FLOAT8)
        few = (values * scale).to(FLOAT8)
    else:
        scale = scale_of(values.abs().amax(1, keepdim=True), torch.int8)
        few = (values * scale).round().to(torch.int8)
    return weight + (few.to(values.dtype) / scale - values).detach()


def stored(values: torch.Tensor) -> Stored:
    """Values as they are kept in int8."""
    scale = scale_of(values.abs().amax(1, keepdim=True), torch.int8)
    return Stored((values * scale).round().to(torch.int8), scale)


def cast_linears(model: nn.Module, way: Way) -> nn.Module:
    """Let the weights of all linear layers of a model be gathered in few bits; ties stay."""
    kind: Any = {"float8": Float8, "int8": Int8, "stored": stored}[way]
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            if weight not in made:
                trained = weight.requires_grad and way != "stored"
                made[weight] = nn.Parameter(kind(weight.detach()), trained)
            module.weight = made[weight]
    return model
