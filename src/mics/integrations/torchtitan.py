"""torchtitan with mics: a Trainer.Config whose trainer shards by mics in FSDP2's place.

torchtitan's own function makes the model parallel, with its meshes, tensor, context and expert
parallelism, checkpointing and compilation; where that calls torch's ``fully_shard`` mics' is called
(``calling.py``). A trainer made from torchtitan's runs each micro-batch as a micro-step.

[Note: a loss in chunks]
torchtitan's default loss runs the head and its backward once per chunk, outside of the model's
forward. Each is a backward pass of its own to FSDP2, while for hop 2 they are one with the backward
that follows. Without gradients, in a validation, no backward ends the head's last forward, and
FSDP2 takes the next one of the model for a part of it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import fully_shard as torch_fully_shard

from mics import compat
from mics.communication.forms import Collectives
from mics.errors import ConfigError, naming_extras
from mics.integrations.calling import calling
from mics.ranks.device import on_accelerator
from mics.sharding.fully_shard import fully_shard
from mics.sharding.micro_steps import micro_step
from mics.sharding.units import units_of

_Base: Any = object  # a trainer behind it makes it one


def with_mics(config: Any, *, collectives: Collectives = "auto", overlap: bool = False) -> Any:
    """A configuration of torchtitan whose run shards by mics where it would shard by FSDP2.

    ::

        def my_config():
            return with_mics(llama3_debugmodel())

    Everything else stays a setting of torchtitan: the partition is
    ``parallelism.data_parallel_shard_degree`` (times ``context_parallel_degree``), the replicas are
    ``data_parallel_replicate_degree``. Experts of ``expert_parallel_degree`` are sharded over the
    ranks of a replica that hold the same ones. Gradients are accumulated as shards, and hop 2 runs
    in the last micro-batch of a step only. Checkpoints are torchtitan's own.

    Args:
        config: ``torchtitan.trainer.Trainer.Config``, or of a trainer made from that.
        collectives: as ``mics.fully_shard``.
        overlap: as ``mics.fully_shard``.

    Returns:
        A configuration with the same fields, of a trainer made from that of ``config``.

    Raises:
        ConfigError: it is none, or has no model yet.
    """
    with naming_extras("mics.integrations.torchtitan"):
        from torchtitan.trainer import Trainer
    if not isinstance(config, Trainer.Config):
        raise ConfigError(
            f"with_mics was given {type(config).__name__}, which configures no torchtitan trainer.",
            write="with_mics(llama3_debugmodel()), whose value is a Trainer.Config",
        )
    spec = config.model_spec
    if spec is None:
        raise ConfigError(
            "with_mics was given a configuration without a model_spec.",
            write="with_mics(config) after config.model_spec was set",
        )
    ours = partial(fully_shard, collectives=collectives, overlap=overlap)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    values["model_spec"] = dataclasses.replace(
        spec, parallelize_fn=partial(_parallelised, spec.parallelize_fn, ours)
    )
    return _config_class(type(config))(**values)


def _config_class(theirs: Any) -> Any:
    """The configuration of a trainer class in front of that of another configuration."""

    class Config(theirs):  # type: ignore[misc]
        pass

    own = dataclasses.dataclass(kw_only=True, slots=True)(Config)
    trainer = _trainer_of(theirs)
    members = {"Config": own, "__doc__": trainer.__doc__}
    return type(trainer.__name__, (_WithMics, trainer), members).Config  # type: ignore[attr-defined]


def _trainer_of(config: type) -> Any:
    """The trainer class that a configuration class stands in.

    Raises:
        ConfigError: it stands in none that its module has by name.
    """
    outer: Any = sys.modules[config.__module__]
    *names, own = config.__qualname__.split(".")
    for name in names:
        outer = getattr(outer, name, None)
    if not isinstance(outer, type) or getattr(outer, own, None) is not config:
        raise ConfigError(
            f"{config.__qualname__} of {config.__module__} stands in no trainer class that can be "
            "found by its name.",
            write="with_mics once, of a configuration whose class is a module's Trainer.Config",
        )
    return outer


class _WithMics(_Base):  # type: ignore[misc]
    """What stands in front of a trainer class."""

    model_parts: list[nn.Module]
    gradient_accumulation_steps: int
    loss_fn: Any
    validator: Any

    def __init__(self, config: Any) -> None:
        _refuse(config)
        self._begun = 0  # micro-batches of the step
        super().__init__(config)
        self.loss_fn = self._in_parts(self.loss_fn)
        if config.validator.enable and hasattr(self.validator, "loss_fn"):
            self.validator.loss_fn = self._at_rest_after(self.validator.loss_fn)

    def train_step(self, *args: Any, **kwargs: Any) -> None:
        """Run torchtitan's; its first micro-batch begins a step."""
        self._begun = 0
        super().train_step(*args, **kwargs)

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        """Run torchtitan's as one micro-step; hop 2 runs in the last one of a step."""
        self._begun += 1
        (model,) = self.model_parts
        with micro_step(model, last=self._is_last):
            loss: torch.Tensor = super().forward_backward_step(**kwargs)
            return loss

    def _in_parts(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """A loss that may run backward passes of its own, before the one that hop 2 is beside.

        torchtitan's switches all reductions on in the last of them, see [Note: a loss in chunks].
        """

        def loss(*args: Any, **kwargs: Any) -> Any:
            (model,) = self.model_parts
            hops = [unit.hop_two for unit in units_of(model) if unit.hop_two is not None]
            for hop in hops:
                hop.held = True
            try:
                result = loss_fn(*args, **kwargs)
            finally:
                for hop in hops:
                    hop.held = False
            assert isinstance(model, FSDPModule)
            model.set_requires_all_reduce(self._is_last)
            return result

        return loss

    def _at_rest_after(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """A loss without gradients, after which no forward is under way.

        See [Note: a loss in chunks].
        """

        def loss(*args: Any, **kwargs: Any) -> Any:
            (model,) = self.model_parts
            result = loss_fn(*args, **kwargs)
            compat.reset_iteration(model)
            return result

        return loss

    @property
    def _is_last(self) -> bool:
        return self._begun == self.gradient_accumulation_steps


def _parallelised(function: Any, ours: Any, model: nn.Module, **kwargs: Any) -> nn.Module:
    """Run a parallelise function of torchtitan with mics in the place of ``fully_shard``.

    Raises:
        ConfigError: nothing in it calls ``fully_shard``.
    """
    copy = calling(function, torch_fully_shard, ours)
    if copy is function:
        raise ConfigError(
            f"Nothing that {getattr(function, '__name__', function)!r} calls by name is torch's "
            "fully_shard, so mics cannot stand in its place.",
            write="from torch.distributed.fsdp import fully_shard in its module, or "
            "mics.fully_shard in it",
        )
    parallel: nn.Module = copy(model, **kwargs)
    if not any(on_accelerator(unit.groups.device) for unit in units_of(parallel)):
        for module in parallel.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # Gloo has no sum of products
    return parallel


def _refuse(config: Any) -> None:
    """Refuse what mics does not do in torchtitan, before ranks meet.

    Raises:
        ConfigError: with what to write.
    """
    parallelism = config.parallelism
    pipeline = parallelism.pipeline_parallel_degree
    if pipeline > 1:
        raise ConfigError(
            "mics does not follow torchtitan's pipeline schedules, which decide themselves when "
            "gradients are reduced.",
            numbers=f"parallelism.pipeline_parallel_degree = {pipeline}.",
            write="pipeline_parallel_degree = 1",
        )
    if not config.training.disable_cuda_graphs:
        raise ConfigError(
            "torchtitan would capture forward and backward in a CUDA graph: replayed, hop 2 would "
            "run in every micro-batch or in none.",
            numbers="training.disable_cuda_graphs = False, torchtitan's default.",
            write="config.training.disable_cuda_graphs = True",
        )
    if parallelism.enable_fsdp_symm_mem:
        raise ConfigError(
            "Symmetric memory replaces the collectives that mics issues and counts.",
            numbers="parallelism.enable_fsdp_symm_mem = True.",
            write="enable_fsdp_symm_mem = False",
        )
    _refuse_unnamed_parts(parallelism)


def _refuse_unnamed_parts(parallelism: Any) -> None:
    """Refuse parts of parameters that are plain tensors: each would be saved as if it were whole.

    Raises:
        ConfigError: torchtitan's backend makes them.
    """
    degrees = {
        name: getattr(parallelism, f"{name}_parallel_degree")
        for name in ("tensor", "context", "expert")
    }
    beside = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    if parallelism.spmd_backend == "spmd_types" and beside:
        raise ConfigError(
            "With spmd_types torchtitan keeps parts of parameters as plain tensors, which mics "
            "would take for whole ones.",
            numbers=f"Degrees: {', '.join(beside)}.",
            write='parallelism.spmd_backend = "partial_dtensor"',
        )
