"""Accelerate with mics: an ``Accelerator`` that shards what it prepares.

A subclass, because Accelerate chooses how a model is distributed inside of its own class. Only
public methods and its documented hooks are used, and one mark of its own, which says that a model
is not to be wrapped any more.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from mics.errors import CheckpointError, ConfigError, MicroStepError, naming_extras
from mics.integrations.following import followed
from mics.integrations.meeting import meet
from mics.integrations.options import checked_options as checked_options
from mics.integrations.pickled import refuse_shards
from mics.integrations.states import load_states, save_states
from mics.integrations.whole import whole_state_dict
from mics.sharding.clipping import clip_grad_norm_
from mics.sharding.micro_steps import micro_step
from mics.sharding.open_step import open_step
from mics.sharding.shard import shard
from mics.sharding.units import units_of

with naming_extras("mics.integrations.accelerate"):
    import accelerate

_PREPARED = "_is_accelerate_prepared"  # Accelerate's own mark
_PRECISIONS = {
    "no": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    ),
}
_OTHERS = {
    "deepspeed_plugin": "DeepSpeed",
    "fsdp_plugin": "FSDP",
    "megatron_lm_plugin": "Megatron-LM",
    "parallelism_config": "parallelism_config",
}


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """``accelerate.Accelerator`` that trains with mics what it would train with DDP.

    ::

        accelerator = Accelerator(gradient_accumulation_steps=4, mics={"partition": 8})
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            with accelerator.accumulate(model):     # hop 2 in the last micro-step only
                accelerator.backward(loss(model, batch))
                optimizer.step()
                optimizer.zero_grad()

    Args:
        *args: as ``accelerate.Accelerator``'s.
        mics: keywords of ``mics.shard``: partition, blocks, activation_checkpointing and so on.
            ``mp_policy`` follows from ``mixed_precision`` if it is not given: bf16 computes in
            bf16 and reduces in fp32, "no" keeps the model's dtype.
        **kwargs: as ``accelerate.Accelerator``'s.

    Raises:
        ConfigError: ``mics`` has keywords that ``mics.shard`` has not; fp16 or fp8; DeepSpeed,
            FSDP, Megatron-LM, a parallelism_config, torch.compile or a hook of
            DistributedDataParallel are switched on beside it.
    """

    _optimizers: list[Any]
    _models: list[nn.Module]
    _custom_objects: list[Any]

    def __init__(self, *args: Any, mics: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._shard_options = checked_options(mics or {})
        super().__init__(*args, **kwargs)
        self._refuse_others()
        self._saved_optimizers: list[torch.optim.Optimizer] | None = None  # inside save and load
        self._sharded: list[weakref.ref[nn.Module]] = []  # in one order on every rank
        self.register_save_state_pre_hook(self._save_models)
        self.register_load_state_pre_hook(self._load_models)

    # -- preparing -------------------------------------------------------------------------------

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Accelerate's own; models are sharded in place, optimizers made before follow them.

        Raises:
            ShardError: an optimizer has state of a model that was not sharded; see ``mics.shard``.
        """
        optimizers = [one for one in args if isinstance(one, torch.optim.Optimizer)]
        for model in args:
            if isinstance(model, nn.Module):
                self._shard(model, optimizers)
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(
        self,
        model: nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> nn.Module:
        """Accelerate's own; the model is sharded in place, also to be evaluated only."""
        self._shard(model, [])
        prepared: nn.Module = super().prepare_model(model, device_placement, evaluation_mode)
        return prepared

    def _shard(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Shard a model, unless it is sharded, and mark it as one that needs no wrapper."""
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            units_of(model)  # refuses what FSDP2 alone has sharded
        else:
            options = {"mp_policy": _PRECISIONS[str(self.mixed_precision)], **self._shard_options}
            known = [*optimizers, *self._optimizers]
            with followed(model, [unwrapped(optimizer) for optimizer in known]):
                shard(model, **options)
        if not any(known() is model for known in self._sharded):
            self._sharded.append(weakref.ref(model))
        setattr(model, _PREPARED, True)

    # -- a step ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """Accelerate's own; hop 2 runs in the micro-step that the optimizer steps in, only.

        Gradients stay sharded in the others. Ranks whose loaders differ in length are told so.

        Raises:
            MicroStepError: ranks that run different numbers of micro-steps; see
                ``mics.micro_step``.
        """
        with super().accumulate(*models), contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(micro_step(model, last=self.sync_gradients))
            yield

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Leave hop 2 to a later backward pass; hop 1 keeps gradients sharded, as ever."""
        set_all_reduce = getattr(model, "set_requires_all_reduce", None)
        if set_all_reduce is None:
            yield
            return
        set_all_reduce(False)
        try:
            yield
        finally:
            set_all_reduce(True)

    @contextlib.contextmanager
    def join_uneven_inputs(
        self, joinables: list[Any], even_batches: bool | None = None
    ) -> Iterator[None]:
        """Refuse it: ranks without data have no part in gathering what the others need.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "join_uneven_inputs lets ranks without data rest, but each holds a part of the model "
            "that the others need.",
            write="even_batches=True (Accelerate's default), or a loop over mics.steps(loader), "
            "which ends on every rank with the first one that has no more",
        )
        yield

    def clip_grad_norm_(
        self, parameters: Any, max_norm: float, norm_type: float = 2
    ) -> torch.Tensor:
        """Clip by the norm over all shards; see ``mics.clip_grad_norm_``.

        Returns:
            The norm before clipping, the same on every rank. Shape ().

        Raises:
            MicroStepError: gradients are not complete yet.
        """
        self._complete("clip_grad_norm_")
        return clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clip every value of every shard.

        Raises:
            MicroStepError: gradients are not complete yet.
        """
        self._complete("clip_grad_value_")
        super().clip_grad_value_(parameters, clip_value)

    def wait_for_everyone(self) -> None:
        """Wait for all ranks; those that wait for each other in different places are told so.

        Raises:
            RankError: on every rank: another one has ended, or waits elsewhere.
        """
        meet("wait_for_everyone")
        super().wait_for_everyone()

    def _complete(self, caller: str) -> None:
        """End the last micro-step, which a loop calls this inside of."""
        for known in self._sharded:
            model = known()
            step = None if model is None else open_step(model)
            if model is None or step is None or step.was_left:
                continue
            if not self.sync_gradients:
                raise MicroStepError(
                    f"{caller} was called before the last micro-step: gradients are not complete.",
                    numbers=f"{step.index + 1} micro-step(s) of this step have run, of "
                    f"gradient_accumulation_steps = {self.gradient_accumulation_steps}.",
                    write=f"if accelerator.sync_gradients: accelerator.{caller}(...)",
                )
            step.check_optimizer({id(param) for param in model.parameters()})

    # -- keeping ---------------------------------------------------------------------------------

    def save_state(
        self, output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any
    ) -> Any:
        """Save what Accelerate saves, models and optimizers as a checkpoint of mics inside.

        It loads at any world and partition size. All else is Accelerate's own: schedulers, random
        states, loaders. Collective; the folder must be one that all ranks see.

        Raises:
            CheckpointError: on every rank: a registered object has shards, an optimizer has
                parameters of no prepared model, or see ``mics.save``.
        """
        for one in self._custom_objects:
            refuse_shards(
                one.state_dict(),
                what=f"The state of the registered {type(one).__name__}",
                write="whole tensors in it (full_tensor()); models and optimizers go to "
                "accelerator.prepare instead, a mics.EMA to mics.save(..., ema=ema)",
            )
        self._refuse_strangers()
        with self._keeping_optimizers():
            return super().save_state(output_dir, safe_serialization, **kwargs)

    def load_state(
        self, input_dir: str | None = None, load_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Load all of it from a folder of ``save_state``. Collective.

        Raises:
            CheckpointError: on every rank: it was saved without mics, is damaged, or is of another
                model.
        """
        with self._keeping_optimizers():
            super().load_state(input_dir, load_kwargs, **kwargs)

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Accelerate's own, which pickles on rank 0, of what is whole.

        Raises:
            CheckpointError: it has shards.
        """
        refuse_shards(
            obj,
            what="What accelerator.save was given",
            write="accelerator.get_state_dict(model) on every rank for the whole weights (also as "
            "state_dict= of save_pretrained), accelerator.save_state(folder) to go on from",
        )
        super().save(obj, f, safe_serialization)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, torch.Tensor]:
        """The whole weights, on rank 0; the other ranks get none. Collective."""
        if self._saved_optimizers is not None:  # of save_state, which drops it, see _save_models
            return {}
        return whole_state_dict(model)

    @contextlib.contextmanager
    def _keeping_optimizers(self) -> Iterator[None]:
        """Take optimizers out of what Accelerate saves: it would keep rank 0's shards alone."""
        kept = self._optimizers
        self._saved_optimizers, self._optimizers = kept, []
        try:
            yield
        finally:
            self._saved_optimizers, self._optimizers = None, kept

    def _refuse_strangers(self) -> None:
        """Refuse to save optimizers of which nothing would be saved, or a part."""
        known = {id(param) for model in self._models for param in model.parameters()}
        for optimizer in self._optimizers:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            strange = sum(id(param) not in known for param in params)
            if strange:
                raise CheckpointError(
                    f"{type(unwrapped(optimizer)).__name__} steps parameters of a model that "
                    "accelerator.prepare was not given: neither would be saved.",
                    numbers=f"{strange} of its {len(params)} parameters are in no prepared model.",
                    write="model, optimizer = accelerator.prepare(model, optimizer)",
                )

    def _save_models(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()  # what Accelerate would write itself
        save_states(folder, models, [unwrapped(one) for one in self._saved_optimizers or ()])

    def _load_models(self, models: list[nn.Module], folder: str) -> None:
        kept = list(models)
        models.clear()  # what Accelerate would read itself
        load_states(folder, kept, [unwrapped(one) for one in self._saved_optimizers or ()])

    def _refuse_others(self) -> None:
        for name, title in _OTHERS.items():
            if getattr(self.state, name, None) is not None:
                raise ConfigError(
                    f"{title} and mics were both asked for: each would distribute the model.",
                    write="mics={...} without it, or accelerate.Accelerator with it",
                )
        if str(self.mixed_precision) not in _PRECISIONS:
            raise ConfigError(
                f"mixed_precision = {str(self.mixed_precision)!r} is not supported with mics: its "
                "loss scaler would skip steps on some ranks only.",
                write='mixed_precision="bf16", or "no"; TrainingArguments(bf16=True)',
            )
        if self.state.dynamo_plugin.backend != accelerate.utils.DynamoBackend.NO:
            raise ConfigError(
                "torch.compile around a model that mics shards was asked for.",
                numbers=f"The backend is {self.state.dynamo_plugin.backend}.",
                write='mics={"compile": True}, or with_mics(Trainer, compile=True), which compiles '
                "block by block",
            )
        handler = self.ddp_handler
        if handler is not None and handler.comm_hook != accelerate.DDPCommunicationHookType.NO:
            raise ConfigError(
                "A communication hook of DistributedDataParallel was asked for, and mics has no "
                "such wrapper around the model.",
                numbers=f"comm_hook = {handler.comm_hook}.",
                write='mics={"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)} to '
                "reduce gradients in 16 bits",
            )


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside of Accelerate's."""
    while isinstance(optimizer, accelerate.optimizer.AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
