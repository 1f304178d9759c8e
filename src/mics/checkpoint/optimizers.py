"""The state of optimizers as they hold it: per parameter, by its name, what is missing is missing.

Names in the manifest, each behind ``optimizer/``::

    param_groups.PARAMETER.OPTION   an option of the parameter's group, for every parameter of it
    state.PARAMETER.KEY             a state of a parameter: a tensor, a number, or a container; of
                                    quantised ones few_bits.py has the form
    state.PARAMETER                 all of its state, where keys are no words
    empty_groups.NUMBER             the options of a group without parameters
    shared.NUMBER.KEY               what an optimizer keeps for all of its parameters

Several optimizers share these names, because no parameter may belong to two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics.checkpoint.dealt_state import Owner, check_alike, whole_state
from mics.checkpoint.few_bits import check_one_kind, parts_to_keep, quantised_in
from mics.checkpoint.layout import OPTIMIZER
from mics.checkpoint.manifest import PLAIN, REPLICATED, SHARDED, Json
from mics.checkpoint.names import parameter_names
from mics.checkpoint.values import encode
from mics.communication.shares import owner_of, stands_for
from mics.errors import CheckpointError
from mics.sharding.dealt_step import DealtStep

Optimizers = (
    torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer]
)

GROUPS = f"{OPTIMIZER}param_groups."
STATE = f"{OPTIMIZER}state."
EMPTY_GROUPS = f"{OPTIMIZER}empty_groups."
SHARED = f"{OPTIMIZER}shared."
NAMES = ("params", "param_names")
"""What a group says of its members; the manifest has their names in the model instead."""

_MOST_NAMED = 3


@dataclass(frozen=True)
class OptimizerContents:
    """Tensors and values by their names in the manifest, and what each tensor is (``forms``)."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Json] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed:
    """What ``state_dict`` of an optimizer returns, and the parameters behind its numbers.

    Where it steps what the rank owns of parameters, its state is of that.
    """

    optimizer: torch.optim.Optimizer
    state: Mapping[Any, Any]
    groups: Sequence[Mapping[str, Any]]
    parameters: Sequence[Sequence[nn.Parameter]]
    """The parameters of each group, those of the model."""
    owners: Mapping[int, Owner]
    """By the ids of those of which the optimizer steps what the rank owns."""

    def by_number(self) -> dict[Any, nn.Parameter]:
        """The parameters by what stands for them in ``state``."""
        return {
            number: param
            for group, params in zip(self.groups, self.parameters, strict=True)
            for number, param in zip(group["params"], params, strict=True)
        }


def list_optimizers(given: Optimizers | None) -> list[torch.optim.Optimizer]:
    """One optimizer, several of them or none, as a list.

    Raises:
        CheckpointError: something else was given.
    """
    if given is None:
        return []
    if isinstance(given, Mapping):
        several = list(given.values())
    else:
        several = list(given) if isinstance(given, Sequence) else [given]
    for one in several:
        if not all(hasattr(one, name) for name in ("param_groups", "state_dict")):
            raise CheckpointError(
                f"A {type(one).__name__} is no optimizer.",
                write="optimizer=optimizer, or a list of optimizers",
            )
    return several


def shard_states(given: Optimizers | None) -> None:
    """Bring the states that are with owners to all ranks, so that they can be read. Collective.

    Raises:
        CheckpointError: as ``list_optimizers``; or on every rank, a state cannot be sent.
    """
    for one in list_optimizers(given):
        if isinstance(one, DealtStep):
            one.shard_state()


def pack(optimizers: Sequence[torch.optim.Optimizer], names: Mapping[int, str]) -> list[Packed]:
    """The state of optimizers in their own form; nothing is made for what has no state.

    Args:
        optimizers: their ``state_dict`` is called, with its hooks.
        names: the names of the model's parameters, by id.

    Raises:
        CheckpointError: an optimizer is of another model, a parameter is in two of them, or an
            optimizer has a form of its own.
    """
    packed = []
    seen: set[int] = set()
    for optimizer in optimizers:
        stepped = [list(group["params"]) for group in optimizer.param_groups]
        params = [[cast(nn.Parameter, stands_for(one)) for one in group] for group in stepped]
        every = [param for group in params for param in group]
        strange = sum(id(param) not in names for param in every)
        if strange:
            raise CheckpointError(
                f"This {type(optimizer).__name__} is of another model.",
                numbers=f"{strange} of its {len(every)} parameters are not in this one.",
                write="the optimizer of this model, made after mics.shard",
            )
        twice = [names[id(param)] for param in every if id(param) in seen]
        if twice:
            raise CheckpointError(
                "A parameter is in two optimizers, whose states cannot be told apart by its name.",
                numbers=f"{len(twice)} are: {', '.join(twice[:_MOST_NAMED])}.",
                write="each optimizer into a checkpoint of its own",
            )
        seen |= {id(param) for param in every}
        packed.append(_packed(optimizer, params, stepped))
    return packed


def _packed(
    optimizer: torch.optim.Optimizer,
    params: list[list[nn.Parameter]],
    stepped: list[list[nn.Parameter]],
) -> Packed:
    table: Any = optimizer.state_dict()
    try:
        state, groups = table["state"], table["param_groups"]
        fits = [len(group["params"]) for group in groups] == [len(group) for group in params]
        fits = fits and isinstance(state, Mapping)
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise CheckpointError(
            f"The state_dict of this {type(optimizer).__name__} is not of torch's form.",
            numbers="It has other entries than state and param_groups of its groups.",
            write="extra=... for what it keeps, and no optimizer",
        )
    owners = {
        id(stands_for(param)): owner
        for group in stepped
        for param in group
        if (owner := owner_of(param)) is not None
    }
    return Packed(optimizer, state, groups, params, owners)


def optimizer_contents(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> OptimizerContents:
    """Everything that optimizers have to keep; tensors are those in use, not copies.

    Of state that is dealt to the replicas they are copies, made by all replicas together.

    Raises:
        CheckpointError: as ``pack``, or something in it cannot be kept.
    """
    contents = OptimizerContents()
    names = parameter_names(model)[1]
    num_empty = 0
    for number, packed in enumerate(pack(optimizers, names)):
        for group, params in zip(packed.groups, packed.parameters, strict=True):
            options = {name: value for name, value in group.items() if name not in NAMES}
            strange = [name for name in options if not _is_word(name)]
            if strange:
                raise CheckpointError(
                    f"The option {strange[0]!r} of a group cannot be kept under this name.",
                    write="a name without a dot",
                )
            for param in params:
                _keep(contents, f"{GROUPS}{names[id(param)]}", options)
            if not params:
                name = f"{EMPTY_GROUPS}{num_empty}"
                contents.values[name] = encode(name, options, contents.tensors)
                num_empty += 1
        by_number = packed.by_number()
        check_alike(
            packed.owners.values(),
            [
                (names[id(by_number[key])], packed.owners[id(by_number[key])], state)
                for key, state in packed.state.items()
                if key in by_number and id(by_number[key]) in packed.owners
            ],
        )
        for key, state in packed.state.items():
            if key in by_number:
                param = by_number[key]
                if id(param) in packed.owners:
                    state = whole_state(packed.owners[id(param)], state)
                prefix = f"{STATE}{names[id(param)]}"
                check_one_kind(prefix, packed.optimizer, param)
                _keep_state(contents, prefix, state, param)
            else:
                name = f"{SHARED}{number}.{key}"
                contents.values[name] = encode(name, state, contents.tensors)
    return contents


def _keep(contents: OptimizerContents, prefix: str, table: Mapping[Any, Any]) -> None:
    """Keep what a group or a state holds: tensors as such, anything else as a value."""
    if not all(map(_is_word, table)):
        contents.values[prefix] = encode(prefix, table, contents.tensors)
        return
    for key, value in table.items():
        name = f"{prefix}.{key}"
        if isinstance(value, torch.Tensor):
            contents.tensors[name] = value
        else:
            contents.values[name] = encode(name, value, contents.tensors)


def _is_word(key: Any) -> bool:
    return isinstance(key, str) and key != "" and "." not in key


def _keep_state(
    contents: OptimizerContents, prefix: str, state: Mapping[Any, Any], param: nn.Parameter
) -> None:
    quantised = quantised_in(state) if all(map(_is_word, state)) else {}
    for key, value in quantised.items():
        name = f"{prefix}.{key}"
        contents.values[name], tensors, forms = parts_to_keep(name, value, param)
        contents.tensors.update(tensors)
        contents.forms.update(forms)
    known = len(contents.tensors)
    _keep(contents, prefix, {key: v for key, v in state.items() if key not in quantised})
    others = dict(list(contents.tensors.items())[known:])
    for name, tensor in others.items():
        contents.forms[name] = _form(name, tensor, param)
    _check_no_codes(others, param)


def _form(name: str, tensor: torch.Tensor, param: nn.Parameter) -> str:
    """What a tensor of a state is, beside its parameter.

    Raises:
        CheckpointError: its values are not those of a tensor of any layout.
    """
    local = tensor.detach()
    if isinstance(local, DTensor):
        local = local.to_local()
    if type(local) is not torch.Tensor:
        raise CheckpointError(
            f"{name} cannot be kept: it is a {type(local).__name__}, not a plain tensor.",
            numbers="Quantised state depends on how its parameter is sharded.",
            write="an optimizer with unquantised state, or a checkpoint without the optimizer",
        )
    if not isinstance(param, DTensor):
        return ""
    if not isinstance(tensor, DTensor):
        return PLAIN
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(
            f"{name} cannot be kept: it is a sum that was not reduced, {tensor.placements}.",
            write="an optimizer whose state is sharded like its parameters",
        )
    return SHARDED if any(not p.is_replicate() for p in tensor.placements) else REPLICATED


def _check_no_codes(tensors: Mapping[str, torch.Tensor], param: nn.Parameter) -> None:
    """Raise where the state of a parameter looks like codes beside scales of their blocks.

    Raises:
        CheckpointError: a tensor of its shape has bytes, and another one is no number.
    """
    scales = [n for n, t in tensors.items() if t.ndim and t.shape != param.shape]
    for name, tensor in tensors.items():
        byte = tensor.dtype.itemsize == 1 and tensor.dtype is not torch.bool
        if scales and byte and tensor.shape == param.shape and param.dtype.itemsize > 1:
            raise CheckpointError(
                f"{name} cannot be kept: it seems to be codes, whose scales depend on how the "
                "parameter is sharded.",
                numbers=f"It is {tensor.dtype} in the shape of the parameter, beside {scales[0]}.",
                write="torchao.optim, an optimizer with unquantised state, or a checkpoint "
                "without the optimizer",
            )
