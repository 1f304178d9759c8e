"""transformers' Trainer with mics: ``with_mics`` makes a Trainer class that shards its model.

A subclass of whatever Trainer is given, because the Trainer makes its own Accelerator. Only methods
that subclasses replace anyway are replaced: making the Accelerator, one training step, and what
writes and reads a checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from mics.errors import ConfigError, naming_extras
from mics.integrations.accelerate import Accelerator, checked_options, unwrapped
from mics.integrations.meeting import meet, same_batches
from mics.integrations.states import FOLDER, has_states, load_states, no_states, save_states
from mics.integrations.whole import whole_state_dict
from mics.sharding.micro_steps import micro_step

_WHOLE_OPTIMIZER = "optimizer.pt"  # where a Trainer keeps an optimizer of whole tensors


def with_mics(trainer: Any, **options: Any) -> Any:
    """A Trainer class that trains with mics what the given one would train with DDP.

    ::

        trainer = with_mics(Trainer, partition=8)(model=model, args=arguments, ...)
        trainer.train()

    Everything else stays a setting of TrainingArguments: gradient_accumulation_steps (hop 2 runs in
    the last micro-step only), max_grad_norm, bf16, saving, resuming, evaluating. A checkpoint has
    the whole weights, as ``from_pretrained`` reads them, and a folder ``mics`` with the shards of
    the model and the optimizer, from which ``train(resume_from_checkpoint=...)`` goes on at any
    world and partition size.

    Args:
        trainer: ``transformers.Trainer`` or a class made from it, as ``trl.SFTTrainer``.
        **options: keywords of ``mics.shard``, as of ``mics.integrations.accelerate.Accelerator``.

    Returns:
        A class with the same arguments.

    Raises:
        ConfigError: it is no Trainer, or ``mics.shard`` has no such keyword.
    """
    with naming_extras("mics.integrations.transformers"):
        from transformers import Trainer  # here, because it imports much that is loud
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise ConfigError(
            f"with_mics was given {trainer!r}, which is no Trainer class.",
            write="with_mics(Trainer, partition=8)(model=model, args=arguments)",
        )
    members = {"_mics_options": checked_options(options), "__doc__": trainer.__doc__}
    return type(trainer.__name__, (_WithMics, trainer), members)


_Base: Any = object  # a Trainer behind it makes it one


class _WithMics(_Base):  # type: ignore[misc]
    """What stands in front of a Trainer class."""

    _mics_options: Mapping[str, Any]
    optimizer: Any
    model: Any
    accelerator: Accelerator
    label_smoother: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_epoch_end())

    # -- preparing -------------------------------------------------------------------------------

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        self._accelerator_args = built
        return built

    def create_accelerator_and_postprocess(self) -> None:
        """Put an Accelerator of mics in the place of the Trainer's."""
        super().create_accelerator_and_postprocess()
        if self.args.save_only_model and self.args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end needs the shards of a checkpoint, and save_only_model "
                "leaves them out.",
                write="save_only_model=False",
            )
        self.accelerator = Accelerator(**self._accelerator_args, mics=self._mics_options)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave it where it is: only shards go to the device, and a whole model may not fit."""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        model: nn.Module = self.model
        if isinstance(model, FSDPModule) and hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")
        return prepared

    # -- a step ----------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the Trainer's as one micro-step; hop 2 runs in the last one of a step."""
        with micro_step(model, last=self.accelerator.sync_gradients):
            loss: torch.Tensor = super().training_step(model, *args, **kwargs)
            return loss

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Whatever the Trainer makes of a model; smoothed labels are shifted as it shifts them."""
        smoother = self.label_smoother
        if smoother is not None and _predicts_next(self.accelerator.unwrap_model(model)):
            self.label_smoother = partial(smoother, shift_labels=True)
        try:
            return super().compute_loss(model, *args, **kwargs)
        finally:
            self.label_smoother = smoother

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        same_batches(len(batch_samples))  # before they are counted over all ranks
        return super()._get_num_items_in_batch(batch_samples, device)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's, on all ranks or on none."""
        meet("an evaluation")
        return super().evaluation_loop(*args, **kwargs)

    # -- keeping ---------------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        meet("the saving of a checkpoint")  # before the Trainer gathers, which nobody could see
        super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole weights, in the host's memory of rank 0, or adapters alone."""
        with self._whole_weights():
            super().save_model(output_dir, _internal_call)

    @contextlib.contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """Gather what ``_save`` writes, on every rank, before it is asked of the one that does."""
        self._weights = whole_state_dict(self.model, self._is_kept)
        try:
            yield
        finally:
            del self._weights

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, self._weights if state_dict is None else state_dict)

    def _is_kept(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether ``save_pretrained`` writes it: of a model with adapters, what is no base."""
        adapters = getattr(self.model, "peft_config", None)
        if not adapters or tensor.requires_grad:
            return True
        return any(f".{adapter}." in f".{name}." for adapter in adapters)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_states(output_dir, [self.model], [unwrapped(self.optimizer)])
        with self._optimizer_elsewhere():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Leave it to ``_load_optimizer_and_scheduler``, where there are shards."""
        if not has_states(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and has_states(checkpoint):
            load_states(checkpoint, [self.model], [unwrapped(self.optimizer)])
            with self._optimizer_elsewhere():
                super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None and Path(checkpoint, _WHOLE_OPTIMIZER).exists():
            raise no_states(checkpoint)

    def _load_best_model(self) -> None:
        """Load it from its shards."""
        load_states(self.state.best_model_checkpoint or "", [self.model], [])

    @contextlib.contextmanager
    def _optimizer_elsewhere(self) -> Iterator[None]:
        """Let the Trainer keep the scheduler only: it would pickle rank 0's shards alone."""
        optimizer, self.optimizer = self.optimizer, _Elsewhere()
        try:
            yield
        finally:
            self.optimizer = optimizer


def _predicts_next(model: Any) -> bool:
    """Whether a Trainer takes it for a causal language model: by a name, that FSDP2 changes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if hasattr(model, "peft_config"):
        model = model.get_base_model()
    kind = next(one for one in type(model).__mro__ if not issubclass(one, FSDPModule))
    return kind.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _epoch_end() -> Any:
    """What tells ranks that have another step of those that have none."""
    from transformers import TrainerCallback

    class EpochEnd(TrainerCallback):
        """Ranks whose epoch is over."""

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            """No more micro-batches."""
            same_batches(0)

    return EpochEnd()


class _Elsewhere:
    """Stands in for an optimizer whose state is in the folder of mics."""

    def state_dict(self) -> dict[str, str]:
        """Say where it is, to whoever reads the file."""
        return {"see": f"the folder {FOLDER}"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Leave it to mics."""
