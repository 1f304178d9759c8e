"""What a tensor is, in a few numbers that are near each other where tensors are.

[Note: sums with random signs]
Sums of magnitudes do not tell two large tensors of one kind apart: of n independent values they
differ by 1 / sqrt(n). A sum in which each value has a random sign differs by about the norm of
the difference, whatever n is. So a digest is a few of those, and the norm to measure them by: two
tensors that are independent pass for alike (within a tenth of the norm) once in 10^5.

Of a large tensor every n-th value is looked at. What makes tensors differ makes all of their values
differ, or whole rows, of which a stride across rows sees some values each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from mics.ranks.device import on_accelerator

SIZE = 5
"""Numbers of a digest; the last one is the norm, of the values that were looked at."""

_SUMS = SIZE - 1
_VALUES = 2**14  # at most, of a tensor


class Digests:
    """Digests of some tensors, under way from their devices to the host.

    Args:
        tensors: plain ones of floating point, of any shape; ``None`` is nothing, which is zeros.
    """

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        self._len = len(tensors)
        by_size: dict[tuple[torch.device, int], list[tuple[int, torch.Tensor]]] = {}
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                seen = _some(tensor)
                by_size.setdefault((seen.device, seen.numel()), []).append((i, seen))
        by_device: dict[torch.device, tuple[list[int], list[torch.Tensor]]] = {}
        for (device, _), alike in by_size.items():  # few kernels, since many are of one size
            order, parts = by_device.setdefault(device, ([], []))
            order += [i for i, _ in alike]
            parts.append(_digests([one for _, one in alike]))
        self._tables = [(order, *_to_host(torch.cat(parts))) for order, parts in by_device.values()]

    def read(self) -> torch.Tensor:
        """Return the numbers; waits for the devices, where they have not come yet.

        Returns:
            [number of tensors, ``SIZE``], on the host.
        """
        found = torch.zeros(self._len, SIZE)
        for order, table, event in self._tables:
            if event is not None:
                event.synchronize()
            found[order] = table
        return found


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Values of a tensor from all over it, in one dimension."""
    flat = tensor.reshape(-1)
    stride = -(-flat.numel() // _VALUES)
    return flat[:: stride | 1] if stride > 1 else flat  # odd: rows are often powers of two


def _digests(alike: Sequence[torch.Tensor]) -> torch.Tensor:
    """Digests of tensors of one size. Shape (tensors, SIZE)."""
    rows = torch.stack([one.to(torch.float32) for one in alike])
    sums = rows @ _signs(rows.device)[: rows.shape[1]]
    return torch.cat([sums, torch.linalg.vector_norm(rows, dim=1, keepdim=True)], 1)


@functools.cache
def _signs(device: torch.device) -> torch.Tensor:
    """The same on every rank. Shape (_VALUES, _SUMS)."""
    seed = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 2, (_VALUES, _SUMS), generator=seed, device="cpu")
    return (2.0 * drawn - 1.0).to(device)


def _to_host(table: torch.Tensor) -> tuple[torch.Tensor, torch.Event | None]:
    if not on_accelerator(table.device):
        return table, None
    host = torch.empty(table.shape, pin_memory=True)
    host.copy_(table, non_blocking=True)
    return host, torch.accelerator.current_stream().record_event()
