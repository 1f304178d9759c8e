"""Do an optimizer and the sharded models of this process belong together?

An optimizer made before sharding trains tensors that no model uses any more; one that also holds
parameters outside every unit trains those on the gradients of this rank alone. FSDP2 says nothing.
Both are looked for when an optimizer steps for the first time, and again when its parameters or
the units have changed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mics import compat
from mics.communication.guard import watch
from mics.communication.shares import stands_for
from mics.errors import MicroStepError, ShardError
from mics.quantities import MIB, first_of
from mics.sharding.foreign_state import refuse_foreign_state
from mics.sharding.other_axes import unsharded
from mics.sharding.rules import refuse_rule
from mics.sharding.units import Unit


@dataclass
class _Known:
    """What has been sharded in this process.

    No weak reference to a parameter that a module has: ``module.to`` could not swap it.
    """

    # Ids of each unit's first parameters, in order; load_state_dict(assign=True) replaces those.
    units: weakref.WeakKeyDictionary[Unit, list[int]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    replaced: dict[int, tuple[weakref.ref[Any], str]] = field(default_factory=dict)
    changes: int = 0

    def past_name(self, param: torch.Tensor) -> str | None:
        """The name of a parameter that a model had once, ``None`` of any other."""
        reference, name = self.replaced.get(id(param), (None, ""))
        if reference is not None and reference() is param:
            return name
        if not isinstance(param, DTensor):
            return None
        for unit, first in self.units.items():
            if id(param) in first:
                return compat.param_names(unit.group)[first.index(id(param))]
        return None


@dataclass(frozen=True)
class _Verdict:
    """What was found of one optimizer, and when it has to be looked for again."""

    stepped: set[int]
    changes: int
    units: list[weakref.ref[Unit]]
    sharded: int  # ids of the parameters of these units, hashed
    outside: set[int]  # ids of parameters of no unit


_known = _Known()
_verdicts: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Verdict] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def remember_replaced(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Remember which parameters of some modules are replaced inside, in whatever way."""
    before = [
        (name, weakref.ref(param))  # nothing must keep a whole model in memory
        for module in modules
        for name, param in module.named_parameters()
    ]
    yield
    after = {id(param) for module in modules for param in module.parameters()}
    for name, reference in before:
        param = reference()
        if param is not None and id(param) not in after:
            key = id(param)
            gone = weakref.ref(param, lambda _, key=key: _known.replaced.pop(key, None))  # type: ignore[misc]
            _known.replaced[key] = gone, name


def remember_unit(unit: Unit) -> None:
    """Know a unit's parameters when an optimizer steps."""
    watch(_check_optimizer)
    watch(refuse_rule)
    watch(refuse_foreign_state)
    watch(_free_gathered, last=True)
    _known.units[unit] = [id(param) for param in compat.sharded_params(unit.group)]
    _known.changes += 1


def known_units() -> list[Unit]:
    """The units of this process, oldest first."""
    return list(_known.units)


def units_by_param() -> dict[int, Unit]:
    """The unit of every sharded parameter of this process, by the parameter's id."""
    return {id(p): unit for unit in _known.units for p in compat.sharded_params(unit.group)}


def refuse_outside(model: nn.Module, modules: Sequence[nn.Module], units: Sequence[Unit]) -> None:
    """Refuse to train a model with parameters that no unit reduces.

    Those of a DistributedDataParallel inside are reduced by it, those with a gradient hook by it.

    Args:
        model: the model.
        modules: all of its modules.
        units: all of its units.

    Raises:
        ShardError: there are some, and other ranks.
    """
    if not _has_other_ranks(units):
        return
    inside = {id(param) for unit in units for param in compat.sharded_params(unit.group)}
    own = [param for module in modules for param in compat.own_params(module)]
    if not [param for param in own if param.requires_grad and id(param) not in inside]:
        return  # as in nearly every step
    # After a backward that raised they may still be gathered.
    inside |= {id(param) for unit in units for param in compat.gathered_params(unit.group)}
    ddp = [module for module in modules if isinstance(module, DistributedDataParallel)]
    inside |= {id(param) for module in ddp for param in module.parameters()}
    outside = [
        name
        for name, param in model.named_parameters()
        if id(param) not in inside and _is_unreduced(param)
    ]
    ranks = max(unit.groups.whole.size() for unit in units)
    outside += [
        name
        for name, param in unsharded([model]).items()
        if id(param) not in inside and _lacks_ranks(param, ranks)
    ]
    if outside:
        raise _outside_error(outside)


def _check_optimizer(optimizer: torch.optim.Optimizer, stepped: set[int]) -> None:
    """See ``guard.Watcher``."""
    verdict = _verdicts.get(optimizer)
    if verdict is None or not _holds(verdict, stepped):
        verdict = _verdicts[optimizer] = _judge(optimizer, stepped)
    units = [unit for reference in verdict.units if (unit := reference()) is not None]
    params = (p for group in optimizer.param_groups for p in group["params"])
    trained = verdict.outside and [p for p in params if id(p) in verdict.outside]
    trained = [param for param in trained or [] if _is_unreduced(param)]
    if trained and _has_other_ranks(units):
        raise _outside_error([_spelled(param) for param in trained])
    _refuse_whole_gradients(units)


def _free_gathered(optimizer: torch.optim.Optimizer, _: set[int]) -> None:
    """Free what will be old; behind owners, one of which may have a backward to take part in."""
    for reference in _verdicts[optimizer].units:
        unit = reference()
        if unit is not None:
            unit.stepped()
            compat.free(unit.group)


def _holds(verdict: _Verdict, stepped: set[int]) -> bool:
    return (
        verdict.changes == _known.changes
        and verdict.stepped == stepped
        and verdict.sharded == _hash_of(verdict.units)
    )


def _hash_of(units: Sequence[weakref.ref[Unit]]) -> int:
    alive = [unit for reference in units if (unit := reference()) is not None]
    return hash(tuple([id(p) for unit in alive for p in compat.sharded_params(unit.group)]))


def _judge(optimizer: torch.optim.Optimizer, stepped: set[int]) -> _Verdict:
    """Look at every parameter of an optimizer.

    Raises:
        ShardError: it holds some that a model had once, or has for a moment.
    """
    owner = units_by_param()
    gathered = {id(p) for unit in _known.units for p in compat.gathered_params(unit.group)}
    units: dict[int, weakref.ref[Unit]] = {}
    outside: set[int] = set()
    past: list[str] = []
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        if id(stands_for(param)) in owner:
            unit = owner[id(stands_for(param))]
            units[id(unit)] = weakref.ref(unit)
        elif id(param) in gathered or _known.past_name(param) is not None:
            past.append(_known.past_name(param) or _spelled(param))
        elif not isinstance(param, DTensor):
            outside.add(id(param))
    if past:
        raise ShardError(
            "The optimizer holds parameters that the sharded model does not have, or not any "
            "more; it would train nothing.",
            numbers=f"{len(past)} of {len(params)}: {first_of(past)}.",
            write=f"torch.optim.{type(optimizer).__name__}(model.parameters(), ...) after "
            "mics.shard, and after whatever replaces parameters",
        )
    found = list(units.values())
    return _Verdict(stepped, _known.changes, found, _hash_of(found), outside)


def _refuse_whole_gradients(units: Sequence[Unit]) -> None:
    size = sum(compat.whole_gradient_bytes(unit.group) for unit in units)
    if not size:
        return
    raise MicroStepError(
        "optimizer.step() was called while gradients are whole on every rank and not reduced: "
        "their backward ran under set_requires_gradient_sync(False).",
        numbers=f"{size / MIB:.2f} MiB of them on this rank.",
        write="model.set_requires_gradient_sync(True) before the last backward of a step; or "
        "mics.micro_steps, which defers hop 2 and keeps shards",
    )


def _has_other_ranks(units: Sequence[Unit]) -> bool:
    return any(unit.groups.shard.size() * unit.groups.num_replicas > 1 for unit in units)


def _is_unreduced(param: torch.Tensor) -> bool:
    return param.requires_grad and not isinstance(param, DTensor) and not compat.num_hooks(param)


def _lacks_ranks(param: torch.Tensor, ranks: int) -> bool:
    """Whether a DTensor of no unit is on fewer ranks than the units, as experts over "ep" alone."""
    if not isinstance(param, DTensor) or not param.requires_grad or compat.num_hooks(param):
        return False
    return param.device_mesh.size() < ranks


def _outside_error(names: Sequence[str]) -> ShardError:
    return ShardError(
        "Parameters outside every unit need a gradient, and nobody would reduce it: they would "
        "differ between ranks after one step.",
        numbers=f"{len(names)}: {first_of(names)}.",
        write="mics.shard of the module that holds them too; or param.requires_grad_(False); or "
        "param.register_post_accumulate_grad_hook(...) with a hook that reduces it",
    )


def _spelled(param: Any) -> str:
    return f"one of shape {tuple(param.shape)}"
