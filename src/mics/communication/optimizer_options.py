"""The options of optimizers, which have to be equal on all ranks; compared before they are used.

A rank that steps with another learning rate, as by a schedule that looks at its own loss, trains
its shards unlike the rest of the model, and its replica drifts from the others. So what an
optimizer steps, and with which options, is part of what ranks compare (``same_steps.py``): at the
end of the backward passes what optimizers that have stepped before are about to use, and with the
next question what they have used, which differs where options were changed in between.

Compared are numbers, words and lists of them, under their names, for every group that has
parameters of a model. What else is in a group (a mesh, a function) belongs to its rank; a tensor of
one number is compared on the host alone, since reading one of a device waits for it.
"""

from __future__ import annotations

import numbers
import weakref
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mics.communication.guard import watch
from mics.communication.shares import stands_for
from mics.communication.used import Used
from mics.ranks.device import on_accelerator

_NAMES = ("params", "param_names")
_REMEMBERED = 16
_EXACT = 2**53  # integers up to here are floats too


class Group(NamedTuple):
    """A group of an optimizer, as far as ranks have to agree on it.

    Args:
        places: of its parameters, model by model, among those that the ranks compare.
        options: by name.
    """

    places: list[list[int]]
    options: dict[str, Any]


class Stepped(NamedTuple):
    """An optimizer, as far as ranks have to agree on it."""

    name: str
    groups: list[Group]

    @property
    def num_params(self) -> int:
        """How many parameters of the models it steps."""
        return sum(len(places) for group in self.groups for places in group.places)

    def lines(self) -> list[str]:
        """What it steps, and its options one by one, in words."""
        places = repr([group.places for group in self.groups])
        sizes = " + ".join(str(sum(map(len, group.places))) for group in self.groups)
        steps = f"{self.name} of {sizes} parameter(s), checksum {zlib.crc32(places.encode()):08x}"
        return [steps] + [
            f"{self.name}, group {number}, {name} = {value!r}"
            for number, group in enumerate(self.groups)
            for name, value in sorted(group.options.items())
        ]


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group says of its parameters."""
    return {name: value for name, value in group.items() if name not in _NAMES}


def common_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group says that ranks have in common: numbers, words, and lists of them."""
    found = {name: _plain(value) for name, value in sorted(options_of(group).items())}
    return {name: value for name, value in found.items() if value is not NotImplemented}


def _plain(value: Any) -> Any:
    """A value that is spelled alike wherever it is equal; ``NotImplemented`` for what has none."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not on_accelerator(value.device):
        value = value.item()
    if isinstance(value, numbers.Integral) and abs(int(value)) > _EXACT:
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)  # 1 is 1.0
    if isinstance(value, list | tuple):
        parts = tuple(_plain(one) for one in value)
        return parts if NotImplemented not in parts else NotImplemented
    return NotImplemented


def spelled_options(groups: Iterable[Mapping[str, Any]]) -> str:
    """The options of groups that ranks have in common, in words."""
    return repr([common_options(group) for group in groups])


class Optimizers:
    """Every optimizer that holds parameters of a mesh's models: what it steps, and with what.

    Attributes:
        steps: how many there were.
        digest: a checksum of them, in order.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.digest = 0
        # No weak reference to a parameter: ``module.to`` could not swap it.
        self._models: dict[int, tuple[weakref.ref[Used], dict[int, int]]] = {}
        self._latest: deque[list[str] | Stepped] = deque(maxlen=_REMEMBERED)
        # The latest, and how many parameters each has stepped.
        self._known: list[tuple[weakref.ref[torch.optim.Optimizer], int]] = []
        self._compared = True  # whether the options of those have been, since they stepped
        _counting.add(self)
        watch(_count, last=True)  # not those that are refused

    def watch(self, params: Sequence[nn.Parameter], used: Used) -> None:
        """Count the optimizers of these parameters, as long as ``used`` lasts."""
        ids = {id(param): place for place, param in enumerate(params)}
        self._models = {key: model for key, model in self._models.items() if model[0]() is not None}
        self._models[id(used)] = weakref.ref(used), ids

    def count(self, optimizer: torch.optim.Optimizer) -> None:
        """Count an optimizer that is about to step, if it has parameters of the models."""
        stepped = self._stepped(optimizer)
        if not stepped.groups:
            return
        self.steps += 1
        self._add(repr(stepped))
        self._latest.append(stepped)
        if self._compared:
            self._known, self._compared = [], False
        self._known.append((weakref.ref(optimizer), stepped.num_params))

    def note(self, lines: Sequence[str]) -> None:
        """Count in what else ranks have to agree on, line by line."""
        self._add("\n".join(lines))
        self._latest.append(list(lines))

    def _add(self, text: str) -> None:
        self.digest = zlib.crc32(text.encode(), self.digest) & 2**31 - 1

    def to_come(self) -> int | None:
        """A checksum of the options that the latest optimizers have now.

        ``None`` where one of them is gone, or a model of it: on other ranks they may not be, for as
        long as nobody has collected the garbage.
        """
        self._compared = True
        to_come = [self._stepped(one) for one in self._alive()]
        before = [num_params for _, num_params in self._known]
        if not before or [one.num_params for one in to_come] != before:
            return None
        return zlib.crc32(repr(to_come).encode()) & 2**31 - 1

    def lines_to_come(self) -> list[str]:
        """What ``to_come`` is a checksum of, in words."""
        return [line for one in self._alive() for line in self._stepped(one).lines()]

    def lines(self) -> list[str]:
        """What the latest optimizers have stepped with, in words."""
        spelled = (one.lines() if isinstance(one, Stepped) else one for one in self._latest)
        return [line for lines in spelled for line in lines]

    def _alive(self) -> list[torch.optim.Optimizer]:
        return [one for reference, _ in self._known if (one := reference()) is not None]

    def _stepped(self, optimizer: torch.optim.Optimizer) -> Stepped:
        # Ids of a model that is gone may be those of others by now, on some ranks only.
        watched = [ids for first, ids in self._models.values() if first() is not None]
        groups = []
        for group in optimizer.param_groups:
            ids = [id(stands_for(param)) for param in group["params"]]
            places = [sorted(known[key] for key in ids if key in known) for known in watched]
            # A model that is gone on some ranks only, so far, has none.
            if held := sorted(some for some in places if some):
                groups.append(Group(held, common_options(group)))
        return Stepped(type(optimizer).__name__, groups)


_counting: weakref.WeakSet[Optimizers] = weakref.WeakSet()


def _count(optimizer: torch.optim.Optimizer, _: set[int]) -> None:
    for one in list(_counting):
        one.count(optimizer)
