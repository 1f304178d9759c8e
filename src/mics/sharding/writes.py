"""Do the initialisers at hand write a parameter as often as construction did?

[Note: writes]
Operations in place count on the meta device too: ``nn.Linear`` writes its weight
once when it is built, ``nn.init.zeros_(linear.weight)`` afterwards makes it twice. Whose values the
parameter had is lost, that somebody set others is not. A copy begins at 0 again (``copy.deepcopy``,
``module.to("meta")``), and ``param.data.zero_()`` leaves no trace: what these hide cannot be known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from mics.sharding.initialisers import Owners, is_torchs, tensors_of
from mics.sharding.tensor_parts import times_written


@dataclass
class _Watched:
    """A parameter or buffer that is given its values.

    ``times`` is how often construction wrote it, ``built`` how often torch.nn's own modules do;
    ``counts`` how often the initialisers had after each call, ``writers`` who they are.
    """

    times: int
    built: set[int]
    holders: list[nn.Module] = field(default_factory=list)
    counts: list[int] = field(default_factory=lambda: [0])
    writers: list[nn.Module] = field(default_factory=list)


class Writes:
    """What construction and initialisers write of one unit's parameters."""

    def __init__(self, owners: Owners) -> None:
        self._owners = owners
        self._watched: dict[torch.Tensor, _Watched] = {}

    def watch(self, param: torch.Tensor, *, built: torch.Tensor, holder: nn.Module) -> None:
        """Watch a tensor of ``holder`` that takes the place of ``built``, on the meta device."""
        if param not in self._watched:
            times = times_written(built)
            self._watched[param] = _Watched(times, self._owners.built(built))
        self._watched[param].holders.append(holder)

    @contextmanager
    def counted(self, module: nn.Module) -> Iterator[None]:
        """Count what is written below ``module`` meanwhile."""
        below = [t for m in module.modules() for _, t in tensors_of(m) if t in self._watched]
        before = [times_written(param) for param in below]
        yield
        for param, times in zip(below, before, strict=True):
            if written := times_written(param) - times:
                watched = self._watched[param]
                watched.counts.append(watched.counts[-1] + written)
                watched.writers.append(module)

    def objection(self, param: torch.Tensor, unit: nn.Module) -> str | None:
        """Say why the values of a parameter are not those it was built with, where they are not."""
        watched = self._watched.get(param)
        if watched is None:
            return None
        owner = self._owners.of(watched.holders[0])
        if owner is None:
            kinds = {type(m).__name__ for m in watched.writers if m in watched.holders}
            if len(kinds) > 1 and watched.writers[-1] in watched.holders:
                return (
                    f"is tied, and of the modules that share it ({', '.join(sorted(kinds))}) each "
                    "sets other values"
                )
            expected = set(watched.counts[1:] or [0])
        elif owner.applied:
            expected = {b + count for b in watched.built for count in _after_own(watched)}
        else:
            expected = watched.built
        if not expected or watched.times in expected:
            return None
        if self._lost(watched.holders[0]):
            above = self._owners.resets_above(unit)
            if owner is not None or above is None or not is_torchs(watched.holders[0]):
                return None
            return (
                f"was copied on the meta device, and what the {type(above).__name__} around it set "
                "is not known"
            )
        return (
            f"was set {watched.times} time(s) when the model was built, and the initialisers that "
            f"can be called now set it {max(expected)} time(s): values that somebody else set "
            "(zeros of a last layer, an adapter) were lost on the meta device"
        )

    def _lost(self, holder: nn.Module) -> bool:
        """Whether nothing of a module was ever written, because it is a copy."""
        own = [self._watched[t] for _, t in tensors_of(holder) if t in self._watched]
        return all(watched.times == 0 for watched in own)


def _after_own(watched: _Watched) -> list[int]:
    """How often an owner's calls wrote it: after the first, and after each of a parent."""
    return watched.counts[1:] or [0]
