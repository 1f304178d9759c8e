"""All that a rank would lose with its process: collected for keeping, and put back.

[Note: names once]
Names, places and options of every tensor take longer to collect than a small step takes. They stay
the same from step to step, while the same tensors are in use. So they are collected once, and again
when a parameter, a buffer or a tensor of an optimizer's state is another object, or a number in an
optimizer's state stands outside of a tensor. Options of groups, which schedules change, are looked
at every time. What ``state_dict`` gives that is no memory in use is collected every time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mics import compat
from mics.checkpoint.contents import Contents, contents_of, partition_of
from mics.checkpoint.differences import not_to_be
from mics.checkpoint.frozen import check_base
from mics.checkpoint.held_back import held_back_here, without_errors
from mics.checkpoint.layout import AVERAGE_UPDATES, MODEL
from mics.checkpoint.manifest import Entry, Json, Manifest, whole_entry
from mics.checkpoint.names import frozen_names, parameter_names
from mics.checkpoint.optimizers import GROUPS, NAMES, Optimizers, list_optimizers, shard_states
from mics.checkpoint.peers import Peers
from mics.checkpoint.restoration import plan_restoration
from mics.checkpoint.values import encode
from mics.communication.shares import owner_of
from mics.errors import MicroStepError
from mics.quantities import dtype_name
from mics.ranks.console import say
from mics.ranks.device import on_accelerator
from mics.recovery.own import (
    Own,
    check_extras,
    extras_now,
    random_now,
    restore_extras,
    restore_random,
)
from mics.recovery.slot import Layout, Reading
from mics.recovery.untrained import Untrained
from mics.recovery.words import errors_lost, exists_once
from mics.sharding.average import EMA
from mics.sharding.open_step import open_step
from mics.sharding.units import feedback_of, units_on


@dataclass(frozen=True)
class Moment:
    """The state of a rank after a step.

    ``tensors`` are in use, and must not be written before they are copied, but for the errors of
    hop 2 on an accelerator, which are copies. ``names`` is JSON, the same from step to step;
    ``changing`` is JSON too.
    """

    tensors: Mapping[str, torch.Tensor]
    layout: Layout
    names: bytes
    changing: bytes
    own: Own


@dataclass(frozen=True)
class _Collected:
    """What is collected once, see [Note: names once]; ``objects`` holds what it is valid for."""

    objects: list[Any]
    tensors: dict[str, torch.Tensor]
    apart: dict[str, torch.Tensor]
    layout: Layout
    buffers: dict[str, torch.Tensor]
    names: bytes
    values: dict[str, Json]
    own_values: dict[str, Json]
    members: dict[str, list[str]]
    stays: bool


class State:
    """What trains: a model, its optimizers, its average and the user's own things.

    Args:
        model: sharded by mics or FSDP2, or a plain module.
        optimizer: its optimizer, or several.
        ema: its moving average.
        extras: by name, objects with ``state_dict`` and ``load_state_dict``, or dictionaries.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers | None,
        ema: EMA | None,
        extras: Mapping[str, Any],
    ) -> None:
        self.model, self.optimizer, self.ema, self.extras = model, optimizer, ema, extras
        self._collected: _Collected | None = None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers, none or some."""
        return list_optimizers(self.optimizer)

    def check(self) -> None:
        """Refuse what cannot be kept.

        Raises:
            RecoveryError: optimizer state that exists once, or extras that JSON cannot hold.
        """
        params = [p for one in self.optimizers for g in one.param_groups for p in g["params"]]
        if dealt := sum(owner_of(param) is not None for param in params):
            raise exists_once(dealt, len(params))
        check_extras(self.extras)

    def open(self, peers: Peers) -> None:
        """Look at what does not train, which is not kept but has to be the same. Collective."""
        self._reshard()
        left_out = self._contents(frozen_names(self.model)).left_out
        self._untrained = Untrained(self.model, left_out, peers)

    def look(self, peers: Peers, *, now: bool = False) -> None:
        """See whether what does not train has been written, now or when it is due. Collective."""
        if self._untrained.is_due() or now:
            self._reshard()
            without = frozen_names(self.model) | self._untrained.prints().keys()
            self._untrained.compare(self._contents(without).left_out, peers)

    def key(self) -> str:
        """What this rank's shard is: equal on the ranks whose shards are interchangeable."""
        parts = [
            [name, list(param.shape), str(param.dtype), *map(list, compat.box_of(param.detach()))]
            for name, param in self.model.named_parameters()
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def facts(self) -> list[str]:
        """What all ranks have alike, and what a state in memory must have been of."""
        params = [
            f"{name} {list(param.shape)} {param.dtype} {param.requires_grad}"
            for name, param in self.model.named_parameters()
        ]
        kinds = [type(one).__name__ for one in self.optimizers]
        return [*params, f"optimizers {kinds}", f"average {self.ema is not None}"]

    def now(self) -> Moment:
        """The state of this rank now; small things are copied.

        Raises:
            CheckpointError: something cannot be kept.
            MicroStepError: gradients have been accumulated that no optimizer has used.
        """
        self._refuse_inside_step()
        self._reshard()
        known = self._collected
        if known is None or not known.stays or not _same_objects(known.objects, self._objects()):
            known = self._collected = self._collect()
        options = {name: self._options(name) for name in known.members}
        changing = {"options": options, "values": known.values}
        if self.ema is not None:
            changing["values"] = known.values | {AVERAGE_UPDATES: self.ema.updates}
        own = Own(
            {
                name: compat.local_of(buffer.detach()).to("cpu", copy=True)
                for name, buffer in known.buffers.items()
            },
            known.own_values,
            random_now(),
            extras_now(self.extras),
        )
        tensors = known.tensors | {name: _still(t) for name, t in known.apart.items()}
        return Moment(tensors, known.layout, known.names, json.dumps(changing).encode(), own)

    def restore(
        self, reading: Reading, own: Own, peers: Peers, without: Collection[str] = ()
    ) -> None:
        """Put back what was kept, but extras ``without`` a state. Collective.

        Raises:
            CheckpointError: on every rank: it is of another model or optimizer, or other extras
                were kept.
        """
        names, changing = reading.others[:2]
        name = Path(f"the state of step {reading.head.step} in memory")
        is_own = reading.head.rank == peers.rank
        if not is_own:
            names = without_errors(names)
        manifest = _manifest(names, changing, own)
        source = _Memory(name, {**reading.tensors, **own.tensors})
        shard_states(self.optimizer)
        plans: list[Any] = []
        given = self.model, self.optimizer, self.ema
        peers.together(lambda: plans.append(plan_restoration(name, manifest, *given)))
        check_base(name, manifest, plans[0].model.contents, peers)
        plans[0].carry_out(source, peers)
        held_back = plans[0].held_back
        rows = peers.gather(bool(held_back.feedback) and not is_own)
        if lost := [rank for rank, is_lost in enumerate(rows) if is_lost]:
            say(errors_lost(lost))
        elif held_back.words:
            say(held_back.words)
        for one in self.optimizers:
            one.zero_grad()
        peers.together(lambda: restore_extras(self.extras, own.extras, without))
        if own.random:  # a newcomer has none
            restore_random(own.random)
        self._collected = None

    # -- collecting --------------------------------------------------------------------------------

    def _contents(self, without: Collection[str]) -> Contents:
        shard_states(self.optimizer)
        return contents_of(self.model, self.optimizer, self.ema, without=without)

    def _refuse_inside_step(self) -> None:
        for step in filter(None, map(open_step, self.model.modules())):
            if not step.was_left:
                raise MicroStepError(
                    "keep was called between micro-steps: the gradients accumulated so far are not "
                    "kept, so a restart would lose them.",
                    numbers=f"{step.index} micro-step(s) of this step have run.",
                    write="snapshots.keep(step + 1) behind optimizer.step()",
                )

    def _reshard(self) -> None:
        """Let FSDP2's own modules have their shards; mics keeps those registered by itself."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule) and not units_on(module):
                module.reshard()

    def _collect(self) -> _Collected:
        prints = self._untrained.prints()
        contents = self._contents(prints)
        held_back = held_back_here(self.model)
        first_of = parameter_names(self.model)[0]
        buffers = {
            name: tensor
            for name, tensor in contents.tensors.items()
            if name.startswith(MODEL) and name.removeprefix(MODEL) not in first_of
        }
        shared = {n: t for n, t in contents.tensors.items() if n not in buffers}
        members = self._members()
        options = {f"{GROUPS}{name}" for group in members.values() for name in group}
        values = {n: v for n, v in contents.values.items() if n.rpartition(".")[0] not in options}
        own_values = {n: values.pop(n) for n in list(values) if n.startswith(MODEL)}
        names = {
            "world": dist.get_world_size() if dist.is_initialized() else 1,
            "partition": partition_of(self.model),
            "entries": {
                n: [dtype_name(t.dtype), list(t.shape), contents.forms.get(n, "")]
                for n, t in {**shared, **held_back}.items()
            },
            "buffers": {n: [dtype_name(t.dtype), list(t.shape)] for n, t in buffers.items()},
            "aliases": contents.aliases,
            "frozen": prints,
            "members": members,
        }
        objects = list(self._objects())
        apart = {n: compat.local_of(t) for n, t in held_back.items()}
        local = {n: compat.local_of(t.detach()) for n, t in shared.items()}
        all_groups = sum(len(one.param_groups) for one in self.optimizers)
        return _Collected(
            objects,
            local,
            apart,
            Layout(local, apart),
            buffers,
            json.dumps(names).encode(),
            values,
            own_values,
            members,
            stays=not own_values
            and len(members) == all_groups
            and all(map(_is_simple, objects))
            and _in_use([*local.values(), *apart.values(), *buffers.values()], objects),
        )

    def _members(self) -> dict[str, list[str]]:
        """The names of the parameters of each group whose options are no tensors."""
        names = parameter_names(self.model)[1]
        return {
            f"{number}.{at}": [names[id(param)] for param in group["params"]]
            for number, one in enumerate(self.optimizers)
            for at, group in enumerate(one.param_groups)
            if group["params"]
            and not any(isinstance(v, torch.Tensor) for k, v in group.items() if k not in NAMES)
        }

    def _options(self, name: str) -> dict[str, Json]:
        number, at = map(int, name.split("."))
        group = self.optimizers[number].param_groups[at]
        return {k: encode(f"{name}.{k}", v) for k, v in group.items() if k not in NAMES}

    def _objects(self) -> Iterator[Any]:
        """Everything whose place another object may take."""
        yield len(self._untrained.prints())
        yield from self.model.parameters()
        yield from self.model.buffers()
        for one in self.optimizers:
            for group in one.param_groups:
                yield len(group["params"])
            for state in one.state.values():
                yield from state.values() if isinstance(state, Mapping) else [state]
        if self.ema is not None:
            yield from self.ema.averages.values()
        yield from (feedback.buffer() for feedback in feedback_of(self.model))


def _same_objects(known: Sequence[Any], now: Iterator[Any]) -> bool:
    count = 0
    for count, one in enumerate(now, 1):
        if count > len(known):
            return False
        other = known[count - 1]
        if one is not other and (isinstance(one, torch.Tensor) or one != other):
            return False
    return count == len(known)


def _still(tensor: torch.Tensor) -> torch.Tensor:
    """What the next backward, which does not wait for the copy to the host, may not write."""
    return tensor.clone() if on_accelerator(tensor.device) else tensor


def _is_simple(one: Any) -> bool:
    """Whether what is in use is told by identity, or by its value."""
    if isinstance(one, torch.Tensor):
        return type(compat.local_of(one.detach())) is torch.Tensor
    return one is None or isinstance(one, bool | int | float | str)


def _in_use(tensors: Iterable[torch.Tensor], objects: Sequence[Any]) -> bool:
    """Whether tensors are the memory of these objects, not copies that ``state_dict`` made."""
    known = {
        compat.local_of(one.detach()).untyped_storage().data_ptr()
        for one in objects
        if isinstance(one, torch.Tensor)
    }
    return all(
        t.numel() == 0 or t.untyped_storage().data_ptr() in known
        for t in map(compat.local_of, tensors)
    )


# -- as a manifest ---------------------------------------------------------------------------------


def _manifest(names: Mapping[str, Any], changing: Mapping[str, Any], own: Own) -> Manifest:
    """What was kept as a checkpoint would have it, each tensor in the one part that is here."""
    tensors = {
        name: Entry(dtype, tuple(shape), [], form)
        for name, (dtype, shape, form) in names["entries"].items()
    }
    for name, (dtype, shape) in names["buffers"].items():
        tensors[name] = whole_entry(dtype, tuple(shape), "", name)
    values = dict(changing["values"]) | dict(own.values)
    for group, options in changing["options"].items():
        for member in names["members"][group]:
            values |= {f"{GROUPS}{member}.{option}": v for option, v in options.items()}
    return Manifest(
        world=names["world"],
        partition=names["partition"],
        tensors=tensors,
        aliases=names["aliases"],
        values=values,
        extra={},
        files={},
        frozen=names["frozen"],
    )


@dataclass(frozen=True)
class _Memory:
    """This rank's parts of tensors as a ``Source``."""

    name: Path
    parts: Mapping[str, torch.Tensor]

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            local, kept = compat.local_of(tensor.detach()), self.parts.get(name)
            if kept is None or (kept.shape, kept.dtype) != (local.shape, local.dtype):
                there = "nothing" if kept is None else f"{kept.dtype} {list(kept.shape)}"
                why = f"This rank has {local.dtype} {list(local.shape)} of it, and {there} was kept"
                raise not_to_be(self.name, name, why)

    def read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                compat.local_of(tensor.detach()).copy_(self.parts[name])
