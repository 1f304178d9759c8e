"""Throughput, utilisation and time left, from measured seconds only."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import deque

import torch

from mics.hardware.lookup import gpu_that_torch_calls
from mics.ranks.device import device_name, on_accelerator

_RECENT = 50


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOPs per second of one device's dense products, from the catalogue of GPUs.

    Args:
        device: whose name torch is asked for.
        dtype: what is computed in, "bf16" or "fp32".

    Returns:
        ``None``, which shows "n/a" rather than a guess, for a device that is not in the catalogue,
        and for fp32 where its rate is not known or products are rounded to TF32.
    """
    if not on_accelerator(device):
        return None
    gpu = gpu_that_torch_calls(device_name(device.type))
    if gpu is None:
        return None
    if dtype == "bf16":
        return gpu.peak
    return gpu.peak_fp32 if torch.get_float32_matmul_precision() == "highest" else None


class Stopwatch:
    """Seconds per step, without what lies between steps (evaluation, checkpoints)."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._start = 0.0
        self._first = True

    def start(self) -> None:
        """Begin the time of a step."""
        self._start = time.perf_counter()

    def stop(self) -> float:
        """End it and return its seconds. The first step, which warms up, predicts nothing."""
        spent = time.perf_counter() - self._start
        if not self._first:
            self._recent.append(spent)
        self._first = False
        return spent

    def left(self, steps: int) -> float | None:
        """Seconds that ``steps`` more will take, by the median of recent ones."""
        return statistics.median(self._recent) * steps if self._recent else None


def memory_bytes(device: torch.device) -> int | None:
    """Peak memory of this rank so far: the accelerator's allocator, or the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if on_accelerator(device):
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
