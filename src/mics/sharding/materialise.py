"""Gives a meta-device model its values, one unit at a time, so that it never exists whole.

Peak memory is what has been sharded so far plus the unit at hand. Values depend on the seed and on
the module's name only, not on the number of ranks, the partition size or the order of work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics import compat
from mics.errors import ShardError
from mics.ranks.device import on_accelerator
from mics.sharding.initialisers import WRITE, Initialise, Owners, reset, tensors_of
from mics.sharding.tensor_parts import kind_of, times_written
from mics.sharding.writes import Writes


class Materialiser:
    """Materialises the units of one model.

    Args:
        model: the model; its module names seed the values.
        device: where the values go.
        seed: the same on every rank.
        initialise: sets the values of one module's own parameters and buffers. By default the
            module's owner does, as when the model is built (``initialisers.py``).

    Raises:
        ShardError: a parameter's type makes no tensor that can be set.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        seed: int,
        initialise: Initialise | None = None,
    ) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._device = device
        self._seed = seed
        self._initialise = initialise
        _check_types(model)
        self._owners = Owners(model)
        self._real = {name for name, param in model.named_parameters() if not param.is_meta}

    @torch.no_grad()
    def materialise(self, unit: nn.Module) -> bool:
        """Give values to everything in ``unit`` that is on the meta device and not sharded.

        Returns:
            Whether there was anything.

        Raises:
            ShardError: a parameter or buffer was left without a value, or has another one than it
                would have been built with.
        """
        modules = [m for m in _children_first(unit) if _own_meta(m)]
        if not modules:
            return False
        writes = Writes(self._owners)
        # Tied parameters share a unit, so ties need not be remembered (and values kept) longer.
        made: dict[nn.Parameter, nn.Parameter] = {}
        real = {t: t.clone() for module in modules for t in _own(module) if not t.is_meta}
        untied = self._untie(modules)
        for module in modules:
            self._allocate(module, made, writes)
        versions = {t: times_written(t) for m in modules for t in _own(m) if t not in real}
        fresh = {id(t) for t in versions}
        devices = [self._device.index] if on_accelerator(self._device) else []
        with torch.random.fork_rng(devices, device_type=self._device.type if devices else "cuda"):
            # A parent may refine what its children set (GPT-2 scales its residual projections).
            for module in _children_first(unit):
                whole = module in modules or _consists_of(module, fresh)
                if self._initialise is not None:
                    if whole:
                        self._seeded(module, self._initialise)
                    continue
                if whole:
                    self._by_owner(module, versions, writes)
                elif any(id(param) in fresh for param in module.parameters()):
                    self._by_owner_of_part(module, fresh, writes)
                if self._owners.has_added(module, fresh):
                    self._by_adapter(module, writes)
        for tensor, value in real.items():  # that were there from the beginning
            if self._initialise is None and not isinstance(tensor, DTensor):
                tensor.copy_(value)
        for module, name, param in untied:
            setattr(module, name, made[param])
        for module in modules:
            self._check(module, versions, unit, writes)
        return True

    def _untie(self, modules: list[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Give those tied to an embedding a parameter of their own while they are initialised.

        transformers ties afterwards, so that the embedding's values are what stays.

        Returns:
            Module, name, and the embedding's parameter on the meta device.
        """
        if self._initialise is not None:
            return []
        owned = [m for m in modules if (o := self._owners.of(m)) is not None and not o.applied]
        embedded = {
            param
            for module in owned
            if self._owners.embeds(module)
            for param in module.parameters(recurse=False)
            if param.is_meta
        }
        untied = [
            (module, name, param)
            for module in owned
            if not self._owners.embeds(module)
            for name, param in module.named_parameters(recurse=False)
            if param in embedded
        ]
        for module, name, param in untied:
            setattr(module, name, nn.Parameter(torch.empty_like(param)))
        return untied

    def _allocate(
        self, module: nn.Module, made: dict[nn.Parameter, nn.Parameter], writes: Writes
    ) -> None:
        for name, param in list(module.named_parameters(recurse=False)):
            if not param.is_meta:
                continue
            if param not in made:
                value = _unset(torch.empty_like(param, device=self._device))
                made[param] = nn.Parameter(value, requires_grad=param.requires_grad)
                # A tensor subclass keeps its parts there, and has made new ones.
                made[param].__dict__ |= {**param.__dict__, **made[param].__dict__}
            setattr(module, name, made[param])
            writes.watch(made[param], built=param, holder=module)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                persistent = compat.is_persistent(module, name)
                value = _unset(torch.empty_like(buffer, device=self._device))
                module.register_buffer(name, value, persistent=persistent)
                writes.watch(value, built=buffer, holder=module)

    def _by_owner(
        self, module: nn.Module, versions: Mapping[torch.Tensor, int], writes: Writes
    ) -> None:
        owner = self._owners.of(module)
        if owner is None:
            with writes.counted(module):
                self._seeded(module, reset)
            return
        with writes.counted(module):
            self._seeded(module, owner.initialise)
        if any(_is_unset(t, versions) for t in _own(module) if t in versions):
            # What the owner leaves alone keeps what the module set when it was built.
            self._seeded(module, reset)
            self._seeded(module, owner.initialise)

    def _by_owner_of_part(self, module: nn.Module, fresh: set[int], writes: Writes) -> None:
        """A module around other units may set values of this one, and must not set theirs.

        It is not asked where it would meet values that were there from the beginning.

        Raises:
            ShardError: it does.
        """
        owner = self._owners.of(module)
        path = f"{name}." if (name := self._names.get(module)) else ""
        if owner is None or any(path + n in self._real for n, _ in module.named_parameters()):
            return
        others = [(n, p) for n, p in module.named_parameters() if id(p) not in fresh]
        times = [times_written(param) for _, param in others]
        with writes.counted(module):
            self._seeded(module, owner.initialise)
        for (name, param), before in zip(others, times, strict=True):
            if times_written(param) != before:
                kind = type(module).__name__
                raise ShardError(
                    f"{name} has its values already, and {kind} around it sets them once more.",
                    numbers=f"By _init_weights of {type(owner.module).__name__}.",
                    write=WRITE.format(kind=kind),
                )

    def _by_adapter(self, layer: nn.Module, writes: Writes) -> None:
        def finish(layer: nn.Module) -> None:
            self._owners.finish_adapter(layer, self._names.get(layer, ""))

        with writes.counted(layer):
            self._seeded(layer, finish)

    def _seeded(self, module: nn.Module, initialise: Initialise) -> None:
        key = f"{self._seed} {self._names.get(module, '')}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
        torch.manual_seed(seed)
        initialise(module)

    def _check(
        self,
        module: nn.Module,
        versions: Mapping[torch.Tensor, int],
        unit: nn.Module,
        writes: Writes,
    ) -> None:
        for name, tensor in tensors_of(module):
            why = None
            if _is_unset(tensor, versions):
                why = "was on the meta device and nothing set its values"
            elif self._initialise is None:
                why = writes.objection(tensor, unit)
            if why is not None:
                path = ".".join(part for part in (self._names.get(module, ""), name) if part)
                raise ShardError(
                    f"{path} {why}.",
                    numbers=f"Shape {tuple(tensor.shape)}, in a {type(module).__name__}.",
                    write=WRITE.format(kind=type(module).__name__),
                )


def _check_types(model: nn.Module) -> None:
    """Refuse types of a library's own that know too few operators to be given values later."""
    for name, param in model.named_parameters():
        if not param.is_meta or not kind_of(param):
            continue
        try:
            _unset(torch.empty_like(param))
        except Exception as error:  # a library's code
            raise ShardError(
                f"{name} is on the meta device, and its type makes no tensor that can be set.",
                numbers=f"{kind_of(param)}: {type(error).__name__}.",
                write="a model that was built on the CPU",
            ) from error


def _unset(value: torch.Tensor) -> torch.Tensor:
    """Mark a fresh tensor, so that a value nobody set is found out."""
    return value.fill_(float("nan")) if value.is_floating_point() else value.zero_()


def _is_unset(tensor: torch.Tensor, versions: Mapping[torch.Tensor, int]) -> bool:
    """Whether a value is left that nobody set."""
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    # No integer or bool can be a mark; but who sets it, edits or replaces the tensor.
    return versions.get(tensor) == times_written(tensor)


def _consists_of(module: nn.Module, fresh: set[int]) -> bool:
    """Whether all parameters of ``module`` are fresh, so that it may set them once more."""
    params = list(module.parameters())
    return bool(params) and all(id(param) in fresh for param in params)


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for _, tensor in tensors_of(module)]


def _own_meta(module: nn.Module) -> bool:
    return any(t.is_meta and not isinstance(t, DTensor) for t in _own(module))


def _children_first(module: nn.Module) -> list[nn.Module]:
    seen: dict[nn.Module, None] = {}

    def walk(m: nn.Module) -> None:
        for child in m.children():
            walk(child)
        seen.setdefault(m)

    walk(module)
    return list(seen)
