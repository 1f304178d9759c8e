"""Values in blocks of few bits: 256 codes of a byte behind the scale of their largest.

A block is 260 bytes: the scale in fp32, then a code for each value. A value decodes to scale times
code; the scale is the block's largest magnitude over the largest code, so no value is cut off.
Block-wise scales of the largest magnitude: Dettmers et al. 2021, section 2.1.

[Note: what is no number]
A block that holds an infinity or a nan has such a scale too, and every value of it decodes to an
infinity or a nan: a step that has overflowed is seen behind the sum, as without blocks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from mics.ranks.device import on_accelerator

BLOCK = 256
"""Values of a block."""

_SCALE_BYTES = 4
_BLOCK_BYTES = _SCALE_BYTES + BLOCK
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # also of zeros, which then need no case

Code = Literal["fp8", "int8"]


class _Kind(NamedTuple):
    dtype: torch.dtype
    largest: float  # that a code can be


_KINDS: dict[Code, _Kind] = {
    "fp8": _Kind(torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max),
    "int8": _Kind(torch.int8, 127.0),
}


def piece_numel(numel: int, ranks: int) -> int:
    """Values of each rank's piece of so many, in whole blocks."""
    return -(-numel // (BLOCK * ranks)) * BLOCK


def coded_bytes(numel: int, ranks: int) -> int:
    """Bytes of so many values in blocks, cut into equal pieces of whole blocks, all together."""
    return piece_numel(numel, ranks) // BLOCK * _BLOCK_BYTES * ranks


def coded_where_fewer(numel: int, ranks: int, itemsize: int) -> int:
    """Bytes of values in blocks; 0 where as many values of a dtype are no more bytes.

    A piece has whole blocks, so few values are many bytes.

    Args:
        numel: how many values.
        ranks: that have a piece each.
        itemsize: bytes of a value of that dtype.
    """
    coded = coded_bytes(numel, ranks)
    return coded if coded < numel * itemsize else 0


def encode(values: torch.Tensor, code: Code) -> torch.Tensor:
    """Round values to blocks, each to the nearest code.

    Args:
        values: [..., n] fp32; n is a multiple of ``BLOCK``.
        code: of what kind.

    Returns:
        [..., n / 256 * 260] uint8.
    """
    kind = _KINDS[code]
    blocks = values.reshape(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True).div_(kind.largest).clamp_(min=_SMALLEST_SCALE)
    scaled = blocks / scales
    if not kind.dtype.is_floating_point:
        scaled.round_()
    coded = torch.empty(len(blocks), _BLOCK_BYTES, dtype=torch.uint8, device=values.device)
    coded[:, :_SCALE_BYTES] = scales.view(torch.uint8)
    coded[:, _SCALE_BYTES:] = scaled.to(kind.dtype).view(torch.uint8)
    return coded.view(*values.shape[:-1], values.shape[-1] // BLOCK * _BLOCK_BYTES)


def decode(coded: torch.Tensor, code: Code) -> torch.Tensor:
    """The values of blocks.

    Args:
        coded: [..., m * 260] uint8.
        code: of what kind.

    Returns:
        [..., m * 256] fp32, the same bits wherever the same bytes are decoded.
    """
    blocks = coded.reshape(-1, _BLOCK_BYTES)
    scales = blocks[:, :_SCALE_BYTES].contiguous().view(torch.float32)
    values = _numbers(blocks[:, _SCALE_BYTES:].contiguous(), _KINDS[code].dtype).mul_(scales)
    return values.view(*coded.shape[:-1], coded.shape[-1] // _BLOCK_BYTES * BLOCK)


def _numbers(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes as fp32; on the host fp8 is looked up, which takes a third of torch's conversion."""
    if dtype.is_floating_point and not on_accelerator(codes.device):
        every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).to(torch.float32)
        return torch.index_select(every, 0, codes.view(-1).to(torch.int32)).view(codes.shape)
    return codes.view(dtype).to(torch.float32)
