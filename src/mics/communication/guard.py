"""One hook in front of every ``optimizer.step``, which asks whoever owns unfinished gradients."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Owner(Protocol):
    """Whoever holds gradients that an optimizer may not use yet."""

    def check_optimizer(self, stepped: set[int]) -> bool:
        """Refuse an optimizer of the parameters with these ids, if it would use such gradients.

        Returns:
            Whether there are still gradients to be guarded.

        Raises:
            MicroStepError: it would.
        """


_owners: dict[int, weakref.ref[Any]] = {}
_steps = 0


def guard(owner: Owner) -> None:
    """Ask ``owner`` before every optimizer step, ahead of those that were guarded before it."""
    watch_optimizers()
    key = id(owner)
    _owners.pop(key, None)
    _owners[key] = weakref.ref(owner, lambda _: _owners.pop(key, None))


def optimizer_steps() -> int:
    """How many steps all optimizers of this process have begun since ``watch_optimizers``."""
    return _steps


@functools.cache
def watch_optimizers() -> None:
    """Register the hook, once per process."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    global _steps
    _steps += 1
    if not _owners:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key, reference in reversed(list(_owners.items())):
        owner = reference()
        if owner is None or not owner.check_optimizer(stepped):
            _owners.pop(key, None)
