"""Whose business the values of a parameter are, when a model is built.

A module's own ``reset_parameters`` is right only if nobody above it sets the values once more, as
the ``_init_weights`` of a transformers model does, and an adapter that begins at zero. Whether
somebody did is told by [Note: writes].
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mics import compat
from mics.errors import ShardError

Initialise = Callable[[nn.Module], None]

WRITE = (
    "mics.shard(model, initialise=function of a module that sets its own parameters), or "
    "{kind}.reset_parameters(), or a model that was built on the CPU"
)
_ADAPTED = "base_layer"  # what peft calls the layer that an adapter was put around
_GIVEN_VALUES = (True, False, "gaussian")  # of init_lora_weights: those that read no base weight


@dataclass(frozen=True)
class Owner:
    """A module whose ``_init_weights`` sets the values of the modules below it.

    ``applied`` says that construction has called it already, on the meta device.
    """

    module: nn.Module
    applied: bool

    def initialise(self, module: nn.Module) -> None:
        """Set what the owner sets of ``module``."""
        self.module._init_weights(module)  # type: ignore[operator]


class Owners:
    """The owner of every module of a model, and its adapters.

    A transformers model owns what is below it up to the next one inside; of other classes with an
    ``_init_weights`` the outermost does. What an adapter adds is the adapter's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[nn.Module, nn.Module | None] = {}
        self._above: dict[nn.Module, nn.Module] = {}
        self._adapters: set[nn.Module] = set()
        self._settings: dict[str, Any] = {}
        self._built: dict[torch.Tensor, set[int]] = {}
        self._unknown: set[torch.Tensor] = set()
        self._counted: dict[object, dict[str, int]] = {}
        self._walk(model, None)
        owners = [module for module in dict.fromkeys(self._of.values()) if module is not None]
        # A transformers model is initialised as a whole, with those inside.
        theirs = [module for module in owners if _is_transformers(module)]
        groups = [theirs, *([module] for module in owners if module not in theirs)]
        self._owners = {
            module: Owner(module, applied)
            for group in groups
            for applied in [self._is_applied(group)]
            for module in group
        }

    def of(self, module: nn.Module) -> Owner | None:
        """Who sets the values of ``module``; ``None``: itself."""
        owner = self._of.get(module)
        return None if owner is None else self._owners[owner]

    def embeds(self, module: nn.Module) -> bool:
        """Whether it is an embedding, so that its values are those of whoever is tied to it."""
        if isinstance(module, nn.Embedding):
            return True
        owner = self._of.get(module)
        inputs = getattr(owner, "get_input_embeddings", None)
        return inputs is not None and inputs() is module

    def has_added(self, layer: nn.Module, fresh: set[int]) -> bool:
        """Whether ``layer`` is an adapter's, and what it added is among the fresh parameters."""
        return layer in self._adapters and any(
            id(param) in fresh
            for name, child in layer.named_children()
            if name != _ADAPTED
            for param in child.parameters()
        )

    def resets_above(self, unit: nn.Module) -> nn.Module | None:
        """The innermost module around ``unit`` that has a ``reset_parameters`` too."""
        above = self._above.get(unit)
        while above is not None and compat.reset_of(above) is None:
            above = self._above.get(above)
        return above

    def finish_adapter(self, layer: nn.Module, name: str) -> None:
        """Let an adapter set the values of what it has added to a layer.

        Raises:
            ShardError: its values are worked out from the layer's, which are not there yet.
        """
        for adapter in layer.lora_A:  # type: ignore[union-attr]
            how = getattr(self._settings.get(adapter), "init_lora_weights", True)
            if how not in _GIVEN_VALUES:
                raise ShardError(
                    f"The adapter {adapter!r} of {name} was built on the meta device, and its "
                    "values are worked out from those of the layer.",
                    numbers=f"init_lora_weights = {how!r}.",
                    write='init_lora_weights=True or "gaussian", or build the model on the CPU',
                )
            if how is not False:
                layer.reset_lora_parameters(adapter, how)  # type: ignore[operator]

    def built(self, tensor: torch.Tensor) -> set[int]:
        """How often torch.nn's own modules write a tensor when they are built; empty: unknown."""
        return set() if tensor in self._unknown else self._built.get(tensor, set())

    def _walk(self, module: nn.Module, owner: nn.Module | None) -> None:
        if module in self._of:
            return
        self._settings.update(_settings_of(module))
        initialises = _takes_a_module(getattr(type(module), "_init_weights", None))
        if initialises and (owner is None or _is_transformers(module)):
            owner = module
        self._of[module] = owner
        is_adapter = _is_adapter(module)
        if is_adapter:
            self._adapters.add(module)
        for name, child in module.named_children():
            self._above.setdefault(child, module)
            added = is_adapter and name != _ADAPTED
            self._walk(child, None if added else owner)
        self._count_what_torch_builds(module)

    def _count_what_torch_builds(self, module: nn.Module) -> None:
        """Note how often a module writes what it has when torch builds it, children first.

        Other classes need not call in their constructor what they offer.
        """
        if not is_torchs(module):
            self._unknown.update(tensor for _, tensor in tensors_of(module))
            return
        whole = _all_of(module)
        if not all(tensor.is_meta for _, tensor in whole):
            return
        key = (type(module), getattr(module, "padding_idx", None) is None, *dict(whole))
        if key not in self._counted:
            self._counted[key] = _count_writes(module)
        own = {id(tensor) for _, tensor in tensors_of(module)}
        for name, tensor in whole:
            times, before = self._counted[key][name], self._built.get(tensor, set())
            self._built[tensor] = before | (
                {times} if id(tensor) in own else {times + each for each in before}
            )

    def _is_applied(self, owners: list[nn.Module]) -> bool:
        """Whether most of what owners have was written more often than when it was built."""
        more = [
            compat.times_written(tensor) > max(self.built(tensor))
            for module, owner in self._of.items()
            if owner in owners
            for _, tensor in tensors_of(module)
            if self.built(tensor)
        ]
        return 2 * sum(more) > len(more)


def is_torchs(module: nn.Module) -> bool:
    """Whether torch's own constructor sets the values of a module, by torch's own function."""
    own = compat.reset_of(module)
    return own is not None and own.__module__.startswith("torch.nn.modules.")


def tensors_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Name and value of a module's own parameters and buffers."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def reset(module: nn.Module) -> None:
    """Let a module set its own values, where it can."""
    own = compat.reset_of(module)
    if own is not None:
        own()


def _count_writes(module: nn.Module) -> dict[str, int]:
    """How often a torch.nn module's reset writes each tensor below it."""
    twin = copy.deepcopy(module)
    before = {name: compat.times_written(tensor) for name, tensor in _all_of(twin)}
    with torch.no_grad():
        reset(twin)
    return {name: compat.times_written(tensor) - before[name] for name, tensor in _all_of(twin)}


def _all_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _settings_of(module: nn.Module) -> dict[str, Any]:
    """The configurations of adapters by their names, where a module of peft keeps them."""
    settings = vars(module).get("peft_config")
    return settings if isinstance(settings, dict) else {}


def _is_adapter(module: nn.Module) -> bool:
    """Whether it is a layer with LoRA matrices of peft around it; other kinds hold no modules."""
    has_reset = callable(getattr(type(module), "reset_lora_parameters", None))
    return has_reset and isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def _takes_a_module(function: Any) -> bool:
    """Whether it can be called for one module; others go through all by themselves."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    return True


def _is_transformers(module: nn.Module) -> bool:
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(module).__mro__
    )
