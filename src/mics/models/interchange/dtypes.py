"""The dtypes that weights can be converted to, by the words of the command line."""

from __future__ import annotations

import torch

FLOATS: dict[str, torch.dtype | None] = {
    "as-is": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
