"""Optimizer state of a checkpoint, in the form that the optimizers at hold load themselves.

Everything is decoded and checked before a byte is read, and nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mics.checkpoint.dealt_state import owned_state
from mics.checkpoint.differences import differ, not_to_be
from mics.checkpoint.few_bits import Place, check_unquantised, place_few_bits, read_few_bits
from mics.checkpoint.layout import OPTIMIZER, of_kind
from mics.checkpoint.manifest import Entry, Json, Manifest
from mics.checkpoint.names import parameter_names
from mics.checkpoint.optimizer_checks import check_options, check_state
from mics.checkpoint.optimizer_placing import Home
from mics.checkpoint.optimizers import EMPTY_GROUPS, GROUPS, NAMES, SHARED, STATE, Packed, pack
from mics.checkpoint.values import decode, tensors_in
from mics.communication.shares import owner_of
from mics.compat import tree_leaves
from mics.errors import CheckpointError

SCHEDULED = frozenset(
    (
        "initial_lr",
        "max_lr",
        "min_lr",
        "max_momentum",
        "base_momentum",
        "swa_lr",
        "anneal_step_index",
    )
)
"""Options that torch's schedulers add to groups."""


@dataclass(frozen=True)
class Restoring:
    """What optimizers will load, and the tensors in it, by name, that have yet to be read."""

    tables: list[tuple[torch.optim.Optimizer, dict[str, Any]]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stored:
    """The part of a manifest that is about optimizers, by parameter."""

    folder: Path
    partition: int
    entries: Mapping[str, Entry]
    values: Mapping[str, Json]
    options: dict[str, dict[str, Json]] = field(default_factory=dict)
    """PARAMETER -> OPTION -> its value."""
    state: dict[str, dict[str, Json]] = field(default_factory=dict)
    """PARAMETER -> KEY -> its value; the key is "" where the value is all of the state."""


def plan_optimizers(
    folder: Path,
    manifest: Manifest,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
) -> Restoring:
    """Match what a checkpoint holds of optimizers with those at hand, by names of parameters.

    Args:
        folder: the checkpoint, for messages.
        manifest: its table of contents.
        model: the one whose parameters the optimizers have.
        optimizers: perhaps in another order, and with other groups, than when they were saved.

    Raises:
        CheckpointError: it holds none, or of other parameters or options, or values that cannot be.
    """
    if not optimizers:
        return Restoring()
    names = parameter_names(model)[1]
    packed = pack(optimizers, names)
    stored = _sort(folder, manifest)
    _check_parameters(folder, stored, packed, names)
    plan = Restoring()
    num_empty = 0
    for number, one in enumerate(packed):
        groups = []
        for group, params in zip(one.groups, one.parameters, strict=True):
            members = [names[id(param)] for param in params]
            if members:
                options = _options(stored, plan, members, group)
            else:
                options = _options_of_empty(stored, plan, num_empty, group, packed)
                num_empty += 1
            own = {name: value for name, value in group.items() if name in NAMES}
            groups.append(options | own)
        state = _states(stored, plan, one, groups, names)
        state |= _shared(stored, plan, number)
        plan.tables.append((one.optimizer, {"state": state, "param_groups": groups}))
    return plan


def restore_optimizers(plan: Restoring) -> None:
    """Let the optimizers load what has been read, by their own ``load_state_dict``."""
    for optimizer, table in plan.tables:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        numbers = [number for group in table["param_groups"] for number in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            owner = owner_of(param)
            if owner is not None and number in table["state"]:
                table["state"][number] = owned_state(owner, table["state"][number])
        optimizer.load_state_dict(table)
        for number, param in zip(numbers, params, strict=True):
            _keep_exact(optimizer.state, param, table["state"].get(number, {}))


def _keep_exact(states: Any, param: nn.Parameter, wanted: Mapping[Any, Any]) -> None:
    """Put back what ``load_state_dict`` has cast to the dtype of the parameter, or taken apart."""
    for key, value in wanted.items():
        if key == "step" or param not in states or key not in states[param]:
            continue  # the optimizer knows best on which device, and in what, it counts
        loaded, kept = tree_leaves(states[param][key]), tree_leaves(value)
        if len(loaded) == len(kept) and not all(map(_as_it_was, loaded, kept)):
            states[param][key] = value


def _as_it_was(loaded: Any, kept: Any) -> bool:
    if isinstance(loaded, torch.Tensor) and isinstance(kept, torch.Tensor):
        return loaded.dtype == kept.dtype
    return type(loaded) is type(kept) and (loaded is kept or bool(loaded == kept))


# -- what is there ---------------------------------------------------------------------------------


def _sort(folder: Path, manifest: Manifest) -> _Stored:
    entries = {name: e for name, e in manifest.tensors.items() if name.startswith(OPTIMIZER)}
    values = {name: v for name, v in manifest.values.items() if name.startswith(OPTIMIZER)}
    stored = _Stored(folder, manifest.partition, entries, values)
    inside: set[str] = set()
    try:
        for value in values.values():
            inside.update(tensors_in(value))
    except RecursionError:
        raise not_to_be(folder, OPTIMIZER, "It is nested too deep") from None
    every: dict[str, Json] = {n: {"tensor": n} for n in entries if n not in inside}
    every |= values
    for name, value in of_kind(GROUPS, every).items():
        param, _, option = name.rpartition(".")
        if option not in NAMES:
            stored.options.setdefault(param, {})[option] = value
    for name, value in of_kind(STATE, every).items():
        owner, key = _parameter_in(name, stored.options)
        if owner is None:
            raise not_to_be(folder, STATE + name, "No parameter has this name")
        stored.state.setdefault(owner, {})[key] = value
    return stored


def _parameter_in(name: str, params: Mapping[str, Any]) -> tuple[str | None, str]:
    """The parameter at the beginning of a name, and the rest."""
    parts = name.split(".")
    for at in range(1, len(parts) + 1):
        param = ".".join(parts[:at])
        if param in params:
            return param, ".".join(parts[at:])
    return None, name


def _check_parameters(
    folder: Path, stored: _Stored, packed: Sequence[Packed], names: Mapping[int, str]
) -> None:
    """Raise where an optimizer is of other parameters than those of the checkpoint."""
    here = {
        names[id(param)]
        for one in packed
        for group, params in zip(one.groups, one.parameters, strict=True)
        for param in params
        if any(option not in NAMES for option in group)
    }
    if here and not stored.options:
        raise CheckpointError(
            f"{folder} holds no optimizer.",
            numbers=f"This optimizer has {len(here)} parameters.",
            write="mics.load(path, model=model), without the optimizer",
        )
    there = set(stored.options)
    if here != there:
        raise CheckpointError(
            f"{folder} is of another optimizer: names of parameters differ.",
            numbers=differ(there, here),
            write="the optimizers it was saved from, all of them in a list",
        )


# -- options of groups -----------------------------------------------------------------------------


def _options(
    stored: _Stored, plan: Restoring, members: Sequence[str], group: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of a group, which must have been the same for all that are in it now."""
    first = stored.options[members[0]]
    there = {f"{param}.{option}" for param in members for option in stored.options[param]}
    here = {f"{param}.{option}" for param in members for option in group if option not in NAMES}
    strange = {n for n in there ^ here if n.rpartition(".")[2] not in SCHEDULED}
    if strange:
        raise CheckpointError(
            f"{stored.folder} is of another optimizer: names differ.",
            numbers=differ(there & strange, here & strange),
            write="the optimizer it was saved from; options that a scheduler of your own adds need "
            "that scheduler made before the load",
        )
    for param in members[1:]:
        for option, value in stored.options[param].items():
            other = first.get(option, value)
            same = value == other or repr(value) == repr(other)  # as text, nan is nan
            if not same and not any(tensors_in(value)):
                raise CheckpointError(
                    f"{stored.folder} has other groups: {members[0]} and {param} are in one here, "
                    f"and had different options there.",
                    numbers=f"{option} is {first[option]} for the one and {value} for the other.",
                    write="the groups it was saved with",
                )
    prefix = f"{GROUPS}{members[0]}"
    return _decoded_options(stored, plan, prefix, first, group)


def _options_of_empty(
    stored: _Stored,
    plan: Restoring,
    number: int,
    group: Mapping[str, Any],
    packed: Sequence[Packed],
) -> dict[str, Any]:
    """The options of a group without parameters; its own, where there were not as many there."""
    own = {name: value for name, value in group.items() if name not in NAMES}
    there = [name for name in stored.values if name.startswith(EMPTY_GROUPS)]
    here = sum(not params for one in packed for params in one.parameters)
    table = stored.values.get(f"{EMPTY_GROUPS}{number}")
    if len(there) != here or not isinstance(table, dict):
        return own
    pairs = table.get("dict")
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise not_to_be(stored.folder, f"{EMPTY_GROUPS}{number}", "It is no table")
    options: dict[str, Json] = {str(pair[0]): pair[1] for pair in pairs if isinstance(pair, list)}
    if {*options} - SCHEDULED != {*own} - SCHEDULED:
        return own
    return _decoded_options(stored, plan, f"{EMPTY_GROUPS}{number}", options, group)


def _decoded_options(
    stored: _Stored,
    plan: Restoring,
    prefix: str,
    options: Mapping[str, Json],
    group: Mapping[str, Any],
) -> dict[str, Any]:
    """Options as values, checked, and those that a scheduler has added here."""
    decoded = {
        option: _decode(stored, plan, f"{prefix}.{option}", value, _beside(group.get(option)))
        for option, value in options.items()
    }
    check_options(stored.folder, prefix, decoded, group)
    return {name: v for name, v in group.items() if name in SCHEDULED} | decoded


def _beside(own: Any) -> Callable[[Entry], torch.Tensor]:
    """Make tensors where one of the optimizer's own is, if it is one."""
    device = own.device if isinstance(own, torch.Tensor) else torch.device("cpu")

    def make(entry: Entry) -> torch.Tensor:
        return torch.empty(entry.shape, dtype=entry.torch_dtype, device=device)

    return make


# -- state -----------------------------------------------------------------------------------------


def _states(
    stored: _Stored,
    plan: Restoring,
    packed: Packed,
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
) -> dict[Any, Any]:
    """The state of each parameter that has one, by its number; what is missing stays missing."""
    states: dict[Any, Any] = {}
    for group, params in zip(groups, packed.parameters, strict=True):
        on_device = bool(group.get("fused") or group.get("capturable"))
        of_group = {}
        for number, param in zip(group["params"], params, strict=True):
            name = names[id(param)]
            if name in stored.state:
                states[number] = _state(
                    stored,
                    plan,
                    name,
                    Home(param, _in_use(packed, number, param), on_device),
                    packed.optimizer,
                )
                of_group[name] = (param, states[number])
        check_state(stored.folder, packed.optimizer, of_group)
    return states


def _in_use(packed: Packed, number: Any, param: nn.Parameter) -> Mapping[Any, Any]:
    """What may be read in place: the state of a parameter, but not that of a part of it."""
    return {} if id(param) in packed.owners else packed.state.get(number, {})


def _state(
    stored: _Stored, plan: Restoring, name: str, home: Home, optimizer: torch.optim.Optimizer
) -> dict[Any, Any]:
    """The state of one parameter."""
    state: dict[Any, Any] = {}
    for key, value in stored.state[name].items():
        known = stored.folder, stored.partition, f"{STATE}{name}.{key}"
        place = Place(*known, home.param, home.state.get(key), optimizer)
        quantised = _quantised(stored, plan, place, value)
        if quantised is not None:
            state[key] = quantised
            continue
        top = key.partition(".")[0]
        decoded = _decode(
            stored,
            plan,
            f"{STATE}{name}.{key}",
            value,
            lambda e, top=top: home.place(e, top),  # type: ignore[misc]
        )
        if key == "":
            if not isinstance(decoded, dict):
                raise not_to_be(stored.folder, f"{STATE}{name}", "It is no table")
            state |= decoded
            continue
        # Dictionaries of tensors were once kept under names with a dot for each level.
        *above, last = key.split(".")
        table = state
        for level in above:
            table = table.setdefault(level, {})
            if not isinstance(table, dict):
                raise not_to_be(stored.folder, f"{STATE}{name}.{key}", "It is in no table")
        table[last] = decoded
    return state


def _quantised(stored: _Stored, plan: Restoring, place: Place, value: Json) -> torch.Tensor | None:
    """A state in few bits; ``None`` for any other, which must not be in few bits here."""
    try:
        few = read_few_bits(place.name, value)
    except ValueError as error:
        raise not_to_be(stored.folder, place.name, str(error)) from None
    if few is None:
        if value == {"tensor": place.name} and place.name in stored.entries:
            check_unquantised(place, stored.entries[place.name])
        return None
    state, tensors = place_few_bits(place, few, stored.entries)
    if tensors.keys() & plan.tensors.keys():
        raise not_to_be(stored.folder, place.name, "A tensor is used twice")
    plan.tensors.update(tensors)
    return state


def _shared(stored: _Stored, plan: Restoring, number: int) -> dict[Any, Any]:
    """What an optimizer keeps for all of its parameters."""
    prefix = f"{SHARED}{number}."
    return {
        key: _decode(stored, plan, prefix + key, value, _beside(None))
        for key, value in of_kind(prefix, stored.values).items()
    }


def _decode(
    stored: _Stored,
    plan: Restoring,
    name: str,
    value: Json,
    make: Callable[[Entry], torch.Tensor],
) -> Any:
    def tensor_of(inner: str) -> torch.Tensor:
        if inner not in stored.entries:
            raise ValueError(f"there is no tensor {inner}")
        if inner in plan.tensors:
            raise ValueError(f"the tensor {inner} is used twice")
        plan.tensors[inner] = make(stored.entries[inner])
        return plan.tensors[inner]

    try:
        return decode(value, tensor_of)
    except (ValueError, TypeError, RecursionError) as error:
        raise not_to_be(stored.folder, name, str(error)) from None
