"""Attention as GPUs run it, for a trace without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mics import compat

Saw = Callable[[int, Sequence[torch.Tensor]], None]


class FusedAttention(TorchFunctionMode):
    """Traces ``scaled_dot_product_attention`` as one fused kernel, whatever its mask and dropout.

    It keeps its inputs, its output and one number per row, and recomputes the scores in backward
    (FlashAttention, Dao et al. 2022). Without this, a trace sees what torch would choose on the
    meta device: products of whole score matrices. A model that multiplies them itself
    (``attn_implementation="eager"``, ``nn.MultiheadAttention`` that is to return its weights) is
    traced as it is.

    Args:
        saw: is told FLOPs and the tensors read and written of each kernel.
    """

    def __init__(self, saw: Saw) -> None:
        super().__init__()
        self._attend = partial(_attend, saw)
        self._multi_head = compat.multi_head_attention_with(self._attend)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(
    saw: Saw,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Take the place of ``scaled_dot_product_attention``; query is (..., rows, width)."""
    products = 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    # Blocks of scores that a causal mask hides are not computed.
    flops = products // 2 if is_causal else products
    attended: torch.Tensor = _Kernel.apply(saw, flops, query, key, value)  # type: ignore[no-untyped-call]
    return attended


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, saw: Saw, flops: int, *inputs: torch.Tensor) -> torch.Tensor:
        query, _, value = inputs
        # Laid out as (batch, rows, heads, width): the kernels of today return it like that.
        shape = (*query.shape[:-1], value.shape[-1])
        if query.dim() == 4:
            batch, heads, rows, width = shape
            output = query.new_empty(batch, rows, heads, width).transpose(1, 2)
        else:
            output = query.new_empty(shape)
        per_row = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(*inputs, output, per_row)
        ctx.saw, ctx.flops = saw, flops
        saw(flops, [*inputs, output])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        *inputs, output, _ = ctx.saved_tensors
        results = [torch.empty_like(each) for each in inputs]
        # Five products instead of two: the scores again, and the gradient of each of four factors.
        ctx.saw(ctx.flops * 5 // 2, [*inputs, output, gradients[0], *results])
        return None, None, *results
