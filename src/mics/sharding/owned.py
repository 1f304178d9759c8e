"""owned: what an optimizer steps on this rank, where replicas share out its state."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mics import compat
from mics.communication.guard import watch
from mics.communication.same_steps import same_steps_of
from mics.communication.shares import Share, owned_of, owner_of
from mics.errors import MicroStepError, ShardError
from mics.ranks.agreement import check_agreement
from mics.ranks.whereabouts import during
from mics.sharding.belonging import known_units
from mics.sharding.tensor_parts import kind_of
from mics.sharding.units import Unit, units_of

_BY_ELEMENT = (
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
_told: set[type] = set()  # other classes of which a user has said that they go by element
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


@during("mics.owned")
def owned(
    model: nn.Module,
    params: Iterable[nn.Parameter] | None = None,
    *,
    elementwise: Sequence[type[torch.optim.Optimizer]] = (),
) -> list[nn.Parameter]:
    """Share out a model's optimizer state to its replicas: what this rank's optimizer steps.

    ::

        optimizer = torch.optim.AdamW(mics.owned(model), lr=1e-4)

    The R replicas hold the same shards, and with ``AdamW(model.parameters())`` each of them the
    same optimizer state. Here each owns an equal share of every unit's shard, steps it, and gets
    the rest from the others: optimizer memory is divided by R, and what goes between replicas is
    what went before, a reduce-scatter to the owners in the last backward and an all-gather of new
    shards, which each unit waits for in its next forward. With one replica it is the parameters.

    The first call deals the units of the model, for good, and is collective; call it on every rank
    after ``mics.shard`` and behind all ``requires_grad_``. Between ``optimizer.step()`` and the
    next forward read parameters by ``model.state_dict()``, which waits for the new ones. Gradients
    of a step are with what is owned. Those of the model's parameters raise a ``MicroStepError``
    when they are read, as do norms of what is owned: clip them by ``mics.clip_grad_norm_``.

    Args:
        model: sharded by mics.
        params: those parameters of the model alone, as for a group with options of its own; by
            default all that are trained.
        elementwise: classes of optimizers, other than torch's, whose rule steps every element by
            itself, whatever its tensor's shape.

    Returns:
        For each of ``params`` that is trained, in their order, what this rank owns of it: a flat
        view of its memory, empty where other replicas own all of it.

    Raises:
        MicroStepError: a step is under way, or there are gradients.
        ShardError: mics has not sharded the model, a parameter is not the model's, or a unit cannot
            be dealt: parameters on the host or of a library's type, several dtypes that are
            trained, replicas that torch itself reduces over.
        DisagreementError: ranks were given other models.
    """
    units = units_of(model)
    wanted = list(model.parameters() if params is None else params)
    _refuse_strange(model, wanted)
    if any(map(_is_undealt, units)):
        _deal(model, units)
    _told.update(elementwise)
    mine = [param for param in wanted if param.requires_grad]
    parts = [param if (part := owned_of(param)) is None else part for param in mine]
    for owner in map(owner_of, parts):
        if owner is not None:
            owner[0].given.add(owner[1])
    return parts


def _refuse_strange(model: nn.Module, params: Sequence[nn.Parameter]) -> None:
    known = {id(param) for param in model.parameters()}
    strange = [param for param in params if id(param) not in known]
    if strange:
        raise ShardError(
            "mics.owned was given parameters that the model does not have.",
            numbers=f"{len(strange)} of {len(params)}, the first of shape "
            f"{list(strange[0].shape)}.",
            write="some of model.parameters(), read behind mics.shard",
        )


def await_shards(params: Iterable[torch.Tensor]) -> None:
    """See that what other replicas have stepped of some parameters is there."""
    for share in _shares_of(params):
        share.wait()


def _is_undealt(unit: Unit) -> bool:
    return unit.share is None and unit.groups.replicas is not None and unit.trains


def _deal(model: nn.Module, units: Sequence[Unit]) -> None:
    """Make the share of every unit without one, once all ranks have come and nothing is in the way.

    What was dealt before stays as it is, with the optimizers that step it.
    """
    undealt = [unit for unit in units if _is_undealt(unit)]
    error: Exception | None = None
    try:
        for unit in undealt:
            _refuse(unit)
    except (MicroStepError, ShardError) as found:
        error = found
    names = {id(param): name for name, param in model.named_parameters()}
    meshes = {unit.groups.shard: unit.groups for unit in units}
    for groups in meshes.values():
        mine = [p for u in units if u.groups.shard is groups.shard for p in u.used.params]
        facts = {
            "what mics.owned is given": [
                f"{names.get(id(param))} {list(param.shape)} {param.dtype} {param.requires_grad}"
                for param in mine
            ],
            "whether it can be dealt": [str(error)],
        }
        check_agreement(facts, groups.axes, groups.device)
    if error is not None:
        raise error
    for unit in undealt:
        unit.deal(Share(unit.group, unit.groups, unit.ledger))
    watch(_see)
    of_model = [unit.share for unit in units if unit.share is not None]
    shares = list(dict.fromkeys([*of_model, *(one for share in of_model for one in share.beside)]))
    for share in shares:
        share.beside = shares

    def wait(*_: Any) -> None:
        for share in shares:
            share.wait()

    for module in model.modules():
        module.register_state_dict_pre_hook(wait)  # type: ignore[no-untyped-call]


def _refuse(unit: Unit) -> None:
    """Refuse to deal a unit.

    Raises:
        MicroStepError: it is in a step, or has gradients.
        ShardError: its shards are none that can be cut.
    """
    if unit.in_step or any(param.grad is not None for param in unit.used.params):
        raise MicroStepError(
            "mics.owned was called in a step: gradients are on their way, or there already.",
            numbers=f"In the unit of {unit.name}.",
            write="mics.owned(model) before the first step, or behind model.zero_grad()",
        )
    params = compat.trainable_params(unit.group)
    dtypes = sorted({str(param.dtype) for param in params})
    here = [compat.local_of(param) for param in params]
    away = sorted({str(local.device.type) for local in here} - {unit.groups.device.type})
    kinds = sorted({kind for param in params if (kind := kind_of(param))})
    reduced = compat.reduce_dtype(unit.group)
    why = ""
    if unit.hop_two is None:
        why = "torch itself reduces over its replicas"
    elif unit.hop_two.averaging.sent().coded or unit.hop_two.averaging.dtype != reduced:
        why = "its hop 2 was asked to send fewer bits than it reduces in, hop_two=..."
    elif len(dtypes) > 1:
        why = f"its parameters are {' and '.join(dtypes)}"
    elif away:
        why = f"its parameters are on {away[0]}, and computed with on {unit.groups.device.type}"
    elif kinds:
        why = f"its parameters are of a type of their own, {kinds[0]}"
    elif not all(local.is_contiguous() for local in here):
        why = "the memory of its shards is not in one piece"
    if why:
        raise ShardError(
            "mics.owned cannot deal the optimizer state of a unit to the replicas.",
            numbers=f"Of the unit of {unit.name}: {why}.",
            write="the optimizer of model.parameters(); or one dtype, no CPUOffloadPolicy, no "
            "hop_two=... and plain parameters in each unit",
        )


# -- optimizers ----------------------------------------------------------------------------------


def _see(optimizer: torch.optim.Optimizer, _: set[int]) -> None:
    """Look at an optimizer before it steps, see ``guard.Watcher``."""
    for unit in known_units():
        if unit.share is not None:
            unit.share.signs.follow_zero_grad()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    _refuse_parameters_of_model(optimizer, params)
    shares = _shares_of(params)
    if not shares:
        return
    _refuse_rule(optimizer)
    if getattr(optimizer, "found_inf", None) is not None:
        raise ShardError(
            "A loss scaler asks each rank by itself whether its gradients are finite, and a rank "
            "that owns none which are not would step alone.",
            numbers=f"{type(optimizer).__name__} was lent found_inf by a GradScaler.",
            write="fused=False and torch's ShardedGradScaler, which asks all ranks; or bf16, which "
            "needs no scaler",
        )
    for share in shares:
        share.check()
        share.signs.before_step(share.names)
        share.land()
    meshes = {unit.groups.shard: unit.groups for unit in known_units() if unit.share in shares}
    for partition, groups in meshes.items():
        owned_here = [p for one in shares if one.partition is partition for p in one.params]
        stepped = [param.grad is not None for param in owned_here]
        same_steps_of(groups).note([f"steps what it owns of {stepped}"])
    if optimizer not in _seen:
        _seen.add(optimizer)
        optimizer.register_step_post_hook(_gather)


def _gather(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Begin to bring what has been stepped to the other replicas, the first unit first."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = {id(param) for param in params}
    for share in _shares_of(params):
        share.stepped(ids)


def _shares_of(params: Iterable[torch.Tensor]) -> list[Share]:
    """The shares that some owned or dealt parameters are of, in the order of the model."""
    parts = (param if (part := owned_of(param)) is None else part for param in params)
    found = {id(owner[0]) for part in parts if (owner := owner_of(part)) is not None}
    shares = [unit.share for unit in known_units() if unit.share is not None]
    return [share for share in shares if id(share) in found]


def _refuse_parameters_of_model(
    optimizer: torch.optim.Optimizer, params: Sequence[torch.Tensor]
) -> None:
    dealt = [param for param in params if owned_of(param) is not None]
    if dealt:
        name = type(optimizer).__name__
        other = "no mics.owned for a model with an optimizer of whole matrices"
        raise ShardError(
            "The optimizer holds parameters whose state is dealt to the replicas; their gradients "
            "are with what each rank owns of them, and it would train nothing.",
            numbers=f"{len(dealt)} of {len(params)} are such.",
            write=f"{name}(mics.owned(model), ...)" if _goes_by_element(optimizer) else other,
        )


def _goes_by_element(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step is that of a known class, not one that a class made of it has instead."""
    known: list[type[torch.optim.Optimizer]] = [*_BY_ELEMENT, *_told]
    step = inspect.unwrap(type(optimizer).step)  # torch wraps it once
    return any(isinstance(optimizer, one) and inspect.unwrap(one.step) is step for one in known)


def _refuse_rule(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a rule that may look at more of a parameter than one element at a time."""
    if not _goes_by_element(optimizer):
        name = type(optimizer).__name__
        raise ShardError(
            f"mics does not know whether {name} steps every element by itself, and what a rank "
            "owns of a parameter is a flat part of it.",
            numbers=f"Known are {', '.join(one.__name__ for one in _BY_ELEMENT)}, and what is made "
            "of one and has no step of its own.",
            write=f"{name}(model.parameters(), ...) where it needs whole matrices; else "
            f"mics.owned(model, elementwise=[{name}])",
        )
