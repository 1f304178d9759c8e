"""Throughput, utilisation and time left, from measured seconds only."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import deque

import torch

from mics.ranks.device import on_accelerator

# Dense bf16 (V100: fp16) matrix products, TFLOPS, from the vendors' data sheets: NVIDIA V100 SXM2,
# A100, H100 SXM / H200 SXM, B200. Others show "n/a" rather than a guess.
_PEAK_TFLOPS = {
    "V100-SXM2": 125.0,
    "A100-SXM4": 312.0,
    "H100 80GB HBM3": 989.4,
    "H200": 989.4,
    "B200": 2250.0,
}
_RECENT = 50


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOPs per second one device can do in ``dtype``; ``None`` when that is not known."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for part, tera in _PEAK_TFLOPS.items() if part in name), None)


class Stopwatch:
    """Seconds per step, without what lies between steps (evaluation, checkpoints)."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._start = 0.0
        self._first = True

    def start(self) -> None:
        """A step begins."""
        self._start = time.perf_counter()

    def stop(self) -> float:
        """It has ended; returns its seconds. The first one, which warms up, predicts nothing."""
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
