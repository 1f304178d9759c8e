"""One hook in front of every ``optimizer.step``, which asks whoever owns unfinished gradients."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mics.communication.shares import stands_for


class Owner(Protocol):
    """Whoever holds gradients that an optimizer may not use yet."""

    def check_optimizer(self, stepped: set[int]) -> bool:
        """Refuse an optimizer of the parameters with these ids, if it would use such gradients.

        Of one that steps what is owned of parameters they are the ids of those.

        Returns:
            Whether there are still gradients to be guarded.

        Raises:
            MicroStepError: it would.
        """


Watcher = Callable[[torch.optim.Optimizer, set[int]], None]
"""Sees every optimizer before it uses gradients, and the ids of its parameters; may refuse it."""

_owners: dict[int, weakref.ref[Any]] = {}
_watchers: dict[Watcher, None] = {}  # in order
_last_watchers: dict[Watcher, None] = {}
_steps = 0


def guard(owner: Owner) -> None:
    """Ask ``owner`` before every optimizer step, ahead of those that were guarded before it."""
    watch_optimizers()
    key = id(owner)
    _owners.pop(key, None)
    _owners[key] = weakref.ref(owner, lambda _: _owners.pop(key, None))


def watch(watcher: Watcher, *, last: bool = False) -> None:
    """Show every optimizer to ``watcher`` from now on, ahead of all owners or behind them."""
    watch_optimizers()
    (_last_watchers if last else _watchers)[watcher] = None


def optimizer_steps() -> int:
    """How many steps all optimizers of this process have begun since ``watch_optimizers``."""
    return _steps


@functools.cache
def watch_optimizers() -> None:
    """Register the hook, once per process."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Check before gradients are used: at once, or each time a closure has made them."""
    global _steps
    _steps += 1
    _, *given = args  # the optimizer comes first
    if given and callable(given[0]):
        return (optimizer, _checked(given[0], optimizer), *given[1:]), kwargs
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _checked(kwargs["closure"], optimizer)}
    _check(optimizer)
    return None


def _checked(closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """A closure whose gradients are checked when it has run."""

    @functools.wraps(closure, updated=())
    def run() -> Any:
        result = closure()
        _check(optimizer)
        return result

    return run


def _check(optimizer: torch.optim.Optimizer) -> None:
    params = (param for group in optimizer.param_groups for param in group["params"])
    stepped = {id(stands_for(param)) for param in params}
    for watcher in list(_watchers):
        watcher(optimizer, stepped)
    asked: set[int] = set()
    # One of them may end a step, which may find something that yet another one then guards.
    while waiting := [key for key in reversed(_owners) if key not in asked]:
        key = waiting[0]
        asked.add(key)
        owner = _owners[key]()
        if owner is None or not owner.check_optimizer(stepped):
            _owners.pop(key, None)
    for watcher in list(_last_watchers):
        watcher(optimizer, stepped)
