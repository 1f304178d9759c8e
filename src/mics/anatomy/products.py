"""FLOPs of operators that multiply matrices; one that looks like it and is not known is refused.

torch's registry (``torch.utils.flop_counter``) knows most of them. Not those here: products of
groups of rows, as mixtures of experts compute them, and products with vectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from mics import compat
from mics.errors import PlanError

_NAMED = re.compile(r"(^|_)(\w*mm|mv|addmv|dot|vdot|matmul|linear|conv\w*|attention|attn)(_|$)")


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Count the FLOPs of one call of an operator; 0 where it multiplies no matrices.

    Raises:
        PlanError: it does, by its name, and nobody knows how many; or its factors differ in dtype,
            which no device but meta takes.
    """
    packet = compat.operator_of(func)
    own, count = _OWN.get(packet), flop_registry.get(packet)
    if own is not None or count is not None:
        _check_dtypes(func, args)
    if count is not None:
        return int(count(*args, **kwargs, out_val=result))
    if own is not None:
        return own(*args)
    if _NAMED.search(packet.__name__):
        raise PlanError(
            f"How many FLOPs {func} computes is not known.",
            write="torch.utils.flop_counter.register_flop_formula for it, or a model that computes "
            "with torch's own operators",
        )
    return 0


def run_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operator on the meta device, in any dtype that a device computes it in.

    CPUs and GPUs multiply groups of rows in fp32 and fp16 too, torch's meta device in bf16 alone
    (2.13): there the shape is that of bf16, the dtype what it would have been.
    """
    if compat.operator_of(func) is not compat.GROUPED_PRODUCTS[0]:
        return func(*args, **kwargs)
    factors = {arg.dtype for arg in args[:2]}
    if factors == {torch.bfloat16} or len(factors) > 1:
        return func(*args, **kwargs)
    result = func(*(arg.to(torch.bfloat16) for arg in args[:2]), *args[2:4])
    return result.new_empty(result.shape, dtype=factors.pop())


def _check_dtypes(func: Any, args: tuple[Any, ...]) -> None:
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()]
    dtypes = dict.fromkeys(str(tensor.dtype) for tensor in tensors)
    if len(dtypes) > 1:
        raise PlanError(
            f"The model multiplies tensors of {' and '.join(dtypes)}.",
            numbers=f"{func} of shapes {', '.join(str(tuple(t.shape)) for t in tensors)}.",
            write="one dtype; parameters and what enters a block are in the dtype of computation",
        )


def _grouped(a: torch.Tensor, b: torch.Tensor, *_: Any) -> int:
    """Count a product that is cut into groups along one dim: every number is used once."""
    if a.dim() == 3 and b.dim() == 3:
        return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _vector(a: torch.Tensor, *_: Any) -> int:
    return 2 * a.numel()


def _added_vector(_: torch.Tensor, a: torch.Tensor, *__: Any) -> int:
    return 2 * a.numel()


def _added_batch(_: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


_ATEN = torch.ops.aten
_OWN: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(compat.GROUPED_PRODUCTS, _grouped),
    _ATEN.mv: _vector,
    _ATEN.dot: _vector,
    _ATEN.vdot: _vector,
    _ATEN.addmv: _added_vector,
    _ATEN.addbmm: _added_batch,
}
