"""Lightning Fabric with mics: a strategy that shards what it sets up.

Subclass of Fabric's strategy for DDP, which starts processes and talks between them; what put
DistributedDataParallel around a model is replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mics.errors import CheckpointError, MicroStepError, naming_extras
from mics.integrations.lightning_files import REST, is_folder, spread, write_folder
from mics.integrations.meeting import meet
from mics.integrations.options import split_options
from mics.integrations.pickled import refuse_shards
from mics.integrations.root import inner, sharded
from mics.integrations.states import has_states, load_states, no_states, optimizers_of
from mics.sharding.clipping import clip_grad_norm_
from mics.sharding.micro_steps import micro_step
from mics.sharding.open_step import open_step

with naming_extras("mics.integrations.fabric"):
    from lightning.fabric.strategies import DDPStrategy

_LIGHTNINGS = (
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "checkpoint_io",
    "precision",
    "process_group_backend",
    "timeout",
    "start_method",
)


class MicsStrategy(DDPStrategy):  # type: ignore[misc]
    """Trains with mics what Fabric would train with ``strategy="ddp"``.

    ::

        fabric = Fabric(strategy=MicsStrategy(partition=8))
        model, optimizer = fabric.setup(model, optimizer)
        for i, batch in enumerate(loader):
            last = (i + 1) % 4 == 0
            with fabric.no_backward_sync(model, enabled=not last):  # hop 2 in the last one only
                fabric.backward(loss(model(batch)))
            if last:
                optimizer.step()
                optimizer.zero_grad()

    Args:
        **options: keywords of ``mics.shard``: partition, blocks, activation_checkpointing and so
            on. ``mp_policy`` follows from Fabric's ``precision``, see ``root.sharded``. Also those
            of Fabric's DDPStrategy that are not about DistributedDataParallel:
            process_group_backend, timeout, start_method and so on.

    Raises:
        ConfigError: neither has such a keyword.
    """

    def __init__(self, **options: Any) -> None:
        self._options, lightnings = split_options(options, _LIGHTNINGS)
        super().__init__(**lightnings)
        self._backward_sync_control = _MicroSteps()
        self._models: list[weakref.ref[nn.Module]] = []  # in one order on every rank

    # -- setting up ------------------------------------------------------------------------------

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shard a model in place; its optimizer is made of ``parameters()`` afterwards.

        Raises:
            ShardError: see ``mics.shard``.
            ConfigError: 16-mixed precision.
        """
        return self._sharded(module, [])

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[torch.optim.Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[torch.optim.Optimizer], Any]:
        """Shard a model in place; optimizers made before follow it.

        Raises:
            ShardError: an optimizer has state of it; see ``mics.shard``.
            ConfigError: 16-mixed precision.
        """
        return self._sharded(module, optimizers), optimizers, scheduler

    def _sharded(self, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> nn.Module:
        model = sharded(module, optimizers, self._options, self)
        if not any(known() is model for known in self._models):
            self._models.append(weakref.ref(model))
        return model

    def module_to_device(self, module: nn.Module) -> None:
        """Leave it where it is: only shards go to the device, and a whole model may not fit."""

    # -- a step ----------------------------------------------------------------------------------

    def optimizer_step(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> Any:
        """Step, where the gradients are complete.

        Raises:
            MicroStepError: the last micro-step was outside of ``no_backward_sync``.
        """
        for known in self._models if kwargs.get("closure") is None else ():
            model = known()
            if model is not None and optimizers_of(model, [optimizer]):
                _complete(model, "optimizer.step()")
        return super().optimizer_step(optimizer, **kwargs)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> torch.Tensor:
        """Clip by the norm over all shards; see ``mics.clip_grad_norm_``.

        Returns:
            The norm before clipping, the same on every rank. Shape ().

        Raises:
            MicroStepError: gradients are not complete yet.
            NormError: the norm is not finite, with ``error_if_nonfinite``.
        """
        _complete(module, "fabric.clip_gradients")
        parameters = list(self.precision.main_params(optimizer))
        return clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)

    def clip_gradients_value(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, clip_val: float
    ) -> None:
        """Clip every value of every shard.

        Raises:
            MicroStepError: gradients are not complete yet.
        """
        _complete(module, "fabric.clip_gradients")
        super().clip_gradients_value(module, optimizer, clip_val)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; those that wait for each other in different places are told so.

        Raises:
            RankError: on every rank: another one has ended, or waits elsewhere.
        """
        meet("a barrier")
        super().barrier(*args, **kwargs)

    # -- keeping ---------------------------------------------------------------------------------

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The state of the model itself, in shards."""
        return inner(module).state_dict()

    def load_module_state_dict(
        self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True
    ) -> None:
        """Load whole weights, which every rank has, or shards."""
        model = inner(module)
        model.load_state_dict(spread(model, state_dict), strict=strict)

    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Any],
        storage_options: Any = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write a folder: models and their optimizers as shards, all else as Fabric does.

        It loads at any world and partition size. Collective; all ranks must see the folder.

        Raises:
            CheckpointError: on every rank: it cannot be written; a filter of a sharded model or its
                optimizer; an optimizer without its model; shards in anything else.
            MicroStepError: between micro-steps.
        """
        meet("fabric.save")
        models, optimizers, rest = _sorted(state)
        refuse_shards(
            {
                name: one.state_dict() if hasattr(one, "state_dict") else one
                for name, one in rest.items()
            },
            what="The state that fabric.save was given",
            write='the objects themselves, {"model": model, "optimizer": optimizer}, or '
            "whole_state_dict(model.module) of mics.integrations.whole",
        )
        for name in models:
            state[name].state_dict()  # refuses a step that has not ended
        for name in filter or {}:
            if name not in rest:
                raise CheckpointError(
                    f"There is a filter of {name!r}, which is kept in shards.",
                    write="fabric.save(path, state) without it",
                )
        place = self.broadcast(path)
        write = partial(
            super().save_checkpoint, state=rest, storage_options=storage_options, filter=filter
        )
        write_folder(place, models, [*optimizers.values()], write)

    def load_checkpoint(
        self,
        path: Any,
        state: Any = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load what ``save_checkpoint`` wrote, in place, or whole weights of another strategy.

        Collective. Models may be asked for without their optimizers.

        Raises:
            CheckpointError: on every rank: an optimizer's state is of whole tensors, a folder was
                asked for one object, or see ``mics.load``.
        """
        meet("fabric.load")
        place = Path(self.broadcast(path))
        given = state if isinstance(state, dict) else {"state": state} if state is not None else {}
        models, optimizers, rest = _sorted(given)
        if not is_folder(place):
            if optimizers:
                raise no_states(place)
            found: dict[str, Any] = super().load_checkpoint(place, state, strict, weights_only)
            return found
        if given is not state and given:
            raise CheckpointError(
                f"{place} is a folder of several objects, and one was given.",
                write='fabric.load(path, {"model": model})',
            )
        for name, model in models.items():
            if strict or has_states(place / name):
                load_states(place / name, [model], [*optimizers.values()])
        left: dict[str, Any] = super().load_checkpoint(place / REST, rest, strict, weights_only)
        given.update(rest)
        return left


def _sorted(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sharded models, optimizers of theirs, and all else, by their names.

    Raises:
        CheckpointError: an optimizer without its model; a model whose name is no name of a folder.
    """
    models = {name: inner(one) for name, one in state.items() if _is_sharded(one)}
    stepping = {name: one for name, one in state.items() if isinstance(one, torch.optim.Optimizer)}
    optimizers = {name: one for name, one in stepping.items() if _steps_shards(one)}
    for name in models:
        if Path(name).name != name:
            raise CheckpointError(f"{name!r} is no name of a folder.", write='{"model": model}')
    for name, one in optimizers.items():
        if not any(optimizers_of(model, [one]) for model in models.values()):
            raise CheckpointError(
                f"The optimizer {name!r} was given without the model that it steps.",
                write='{"model": model, "optimizer": optimizer}',
            )
    rest = {name: one for name, one in state.items() if name not in {**models, **optimizers}}
    return models, optimizers, rest


def _is_sharded(one: Any) -> bool:
    return isinstance(one, nn.Module) and any(isinstance(m, FSDPModule) for m in one.modules())


def _steps_shards(optimizer: torch.optim.Optimizer) -> bool:
    return any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])


def _complete(model: nn.Module, caller: str) -> None:
    """Refuse gradients that are not complete, and end a last micro-step that is left afterwards."""
    step = open_step(model)
    if step is None or step.was_left:
        return
    try:
        step.check_optimizer({id(param) for param in model.parameters()})
    except MicroStepError as error:
        raise MicroStepError(
            f"{caller} was called before the last micro-step: gradients are not complete.",
            numbers=f"{step.index} micro-step(s) of this step have ended, each with enabled=True.",
            write="with fabric.no_backward_sync(model, enabled=is_accumulating): around every "
            "forward and backward, the last one of a step too",
        ) from error


class _MicroSteps:
    """Makes of what Fabric leaves to a later backward pass the micro-steps of one step."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """One micro-step, the last one if not ``enabled``; gradients stay sharded in all."""
        return micro_step(module, last=not enabled)
