"""Lightning's Trainer with mics: a strategy that shards the LightningModule it trains.

Subclass of the Trainer's strategy for DDP, which starts processes and talks between them; what put
DistributedDataParallel around a model is replaced.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from mics.errors import ConfigError, MicsWarning, ShardError, naming_extras
from mics.integrations.lightning_files import REST, is_folder, spread, write_file, write_folder
from mics.integrations.meeting import meet, same_batches
from mics.integrations.options import split_options
from mics.integrations.pickled import refuse_shards
from mics.integrations.root import sharded
from mics.integrations.states import load_states, no_states
from mics.integrations.whole import whole_state_dict
from mics.sharding.clipping import clip_grad_norm_
from mics.sharding.micro_steps import micro_step
from mics.sharding.open_step import open_step

with naming_extras("mics.integrations.lightning"):
    from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.trainer.states import TrainerFn

_LIGHTNINGS = (
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "checkpoint_io",
    "precision_plugin",
    "process_group_backend",
    "timeout",
    "start_method",
)
_LAYER_SYNC = "_layer_sync"  # where the Trainer puts what sync_batchnorm=True makes
_EVEN = (
    "loaders of one length: a map-style dataset, which Lightning pads, or limit_train_batches; "
    "what stops a run (trainer.should_stop) stops it on every rank"
)

_PADDED = (
    "Trainer(use_distributed_sampler=False) and a DistributedSampler, which pads (Lightning's own "
    "does not where it predicts), or limit_predict_batches"
)


class MicsStrategy(DDPStrategy):  # type: ignore[misc]
    """Trains with mics what a Trainer would train with ``strategy="ddp"``.

    ::

        trainer = Trainer(strategy=MicsStrategy(partition=8), accumulate_grad_batches=4)
        trainer.fit(module, loader)

    All else stays a setting of the Trainer: accumulate_grad_batches (hop 2 runs in the last
    micro-step only), gradient_clip_val, precision, checkpoints. A checkpoint is a folder, from
    which ``fit(ckpt_path=...)`` goes on at any world and partition size; with weights only it is
    the file of whole weights that Lightning writes with DDP.

    Args:
        **options: keywords of ``mics.shard``: partition, blocks, activation_checkpointing and so
            on. ``mp_policy`` follows from the Trainer's ``precision``, see ``root.sharded``. Also
            those of Lightning's DDPStrategy that are not about DistributedDataParallel:
            process_group_backend, timeout, start_method and so on.

    Raises:
        ConfigError: neither has such a keyword.
    """

    model: Any

    def __init__(self, **options: Any) -> None:
        self._options, lightnings = split_options(options, _LIGHTNINGS)
        super().__init__(**lightnings)
        self._reads_whole = False

    # -- setting up ------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Any:
        """Lightning's, which clips by the norm over all shards."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        DDPStrategy.precision_plugin.fset(self, None if plugin is None else _clipping(plugin))

    def setup(self, trainer: Any) -> None:
        """Shard the module in place, unless its ``configure_model`` did, and make optimizers.

        Raises:
            ShardError: manual optimization of a module that is not sharded; see ``mics.shard``.
            ConfigError: 16-mixed precision; a callback that averages whole weights;
                AsyncCheckpointIO.
        """
        module = self.lightning_module
        assert self.accelerator is not None and module is not None
        self.accelerator.setup(trainer)
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits:
            self._refuse_others(trainer)
        layer_sync = vars(self).get(_LAYER_SYNC)
        if fits and layer_sync:
            layer_sync.apply(module)
        self.precision_plugin.convert_module(module)
        self.model = sharded(module, [], self._options, self)
        if fits and not module.automatic_optimization and self.model is not module:
            raise ShardError(
                "With manual optimization backward passes run inside of training_step, so the "
                "module cannot be one unit.",
                write="def configure_model(self): mics.shard(self.generator, partition=...), for "
                "each part that is called by itself",
            )
        if fits:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _refuse_others(self, trainer: Any) -> None:
        """Refuse what is made for whole weights, or writes when the folder has its name already."""
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ConfigError(
                    f"{type(callback).__name__} has copied the whole module before it was sharded, "
                    "and cannot average shards into that.",
                    write="a Callback of your own with ema = mics.EMA(module) in on_fit_start and "
                    "ema.update() after each optimizer step",
                )
        if isinstance(self.checkpoint_io, AsyncCheckpointIO):
            raise ConfigError(
                "AsyncCheckpointIO writes when save_checkpoint has returned, and shards and "
                "Lightning's file take their name together.",
                write="no AsyncCheckpointIO among the plugins",
            )

    def teardown(self) -> None:
        """Leave shards on their devices."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # -- a step ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave hop 2 to a later backward pass: a micro-step that is not the last."""
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:
            with micro_step(self.model, last=False):
                yield
            return
        parts = [part for part in self.model.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_requires_all_reduce(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_all_reduce(True, recurse=False)

    def optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the last micro-step of a step, with hop 2, and step.

        Raises:
            MicroStepError: ranks have different numbers of micro-batches.
            ConfigError: the optimizer wants more than one loss per step.
        """
        module = self.lightning_module
        assert module is not None
        if module.automatic_optimization:
            with micro_step(self.model, last=True):
                result = closure()
            same_batches(0 if module.trainer.is_last_batch else 1, _EVEN)
        else:
            result = closure()
        return super().optimizer_step(optimizer, _Once(result), model, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one, outside of inference mode: what is gathered in it cannot be trained with."""
        return self._evaluated(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one, as ``validation_step``."""
        return self._evaluated(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one, as ``validation_step``."""
        return self._evaluated(super().predict_step, *args, write=_PADDED, **kwargs)

    def _evaluated(
        self, step: Callable[..., Any], *args: Any, write: str = _EVEN, **kwargs: Any
    ) -> Any:
        same_batches(1, write)
        with torch.inference_mode(False), torch.no_grad():
            return step(*args, **kwargs)

    def on_validation_end(self) -> None:
        """No more batches."""
        same_batches(0, _EVEN)

    def on_test_end(self) -> None:
        """No more batches."""
        same_batches(0, _EVEN)

    def on_predict_end(self) -> None:
        """No more batches."""
        same_batches(0, _PADDED)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; those that wait for each other in different places are told so.

        Raises:
            RankError: on every rank: another one has ended, or waits elsewhere.
        """
        meet("a barrier")
        super().barrier(*args, **kwargs)

    # -- keeping ---------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Only then are there shards to load."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Not Lightning's to load: ``load_checkpoint`` has."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, in shards; ``save_checkpoint`` makes it whole where that is asked."""
        assert self.lightning_module is not None
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: ``save_checkpoint`` keeps it in shards."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a folder of shards and Lightning's own file, or whole weights only. Collective.

        Between micro-steps it warns: gradients are in no checkpoint, Lightning's have none either.

        Args:
            checkpoint: Lightning's; the optimizers' states are in it, or weights are kept only.
            filepath: on a disk that all ranks see.
            storage_options: passed on to Lightning's CheckpointIO.

        Raises:
            CheckpointError: on every rank: it cannot be written, or has shards of somebody else.
        """
        module = self.lightning_module
        assert module is not None
        meet("the saving of a checkpoint")  # before Lightning broadcasts, which nobody could see
        path = Path(self.broadcast(filepath))
        weights = checkpoint.pop("state_dict")
        keeps_weights_only = checkpoint.pop("optimizer_states", None) is None
        refuse_shards(
            checkpoint,
            what="What a callback or on_save_checkpoint added to the checkpoint",
            write="whole tensors (full_tensor(), on every rank), or nothing of what the module has",
        )
        write = partial(self._write, checkpoint, storage_options)
        if keeps_weights_only:
            checkpoint["state_dict"] = whole_state_dict(module, lambda name, _: name in weights)
            write_file(path, write)
        else:
            self._warn_of_gradients()
            write_folder(path, {"": module}, [*self.optimizers], write)

    def _warn_of_gradients(self) -> None:
        step = open_step(self.model)
        if step is not None and not step.was_left:
            warnings.warn(
                f"A checkpoint was asked for inside of a step, after {step.index} of its "
                "micro-steps. It has no gradients, as Lightning's never have: a run resumed from "
                "it goes on without those. Lightning asks for one when it has just resumed from a "
                "ModelCheckpoint(every_n_train_steps=...).",
                MicsWarning,
                stacklevel=2,
            )

    def _write(self, checkpoint: dict[str, Any], storage_options: Any, path: Path) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a folder of ``save_checkpoint``, or a file of whole weights. Collective.

        Raises:
            CheckpointError: on every rank: the file has an optimizer of whole tensors to go on
                with, or see ``mics.load``.
        """
        module = self.lightning_module
        assert module is not None
        meet("the loading of a checkpoint")
        path = Path(self.broadcast(checkpoint_path))
        fits = module.trainer.state.fn == TrainerFn.FITTING
        self._reads_whole = not is_folder(path)
        if self._reads_whole:
            found: dict[str, Any] = super().load_checkpoint(path, weights_only)
            if fits and "optimizer_states" in found:
                raise no_states(path)
            return found
        found = super().load_checkpoint(path / REST, weights_only)
        load_states(path, [module], [*self.optimizers] if fits else [])
        return {**found, "state_dict": {}, "optimizer_states": []}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights; shards are loaded already."""
        module = self.lightning_module
        assert module is not None
        if self._reads_whole:
            module.load_state_dict(spread(module, checkpoint["state_dict"]), strict=strict)


class _Once:
    """The closure of a step that has run before the optimizer asks for it.

    mics refuses an optimizer that begins to step before the last micro-step has ended, and torch's
    call the closure when they have begun.

    Args:
        result: what the closure returned.
    """

    def __init__(self, result: Any) -> None:
        self._result = result
        self._asked = False

    def __call__(self) -> Any:
        if self._asked:
            raise ConfigError(
                "The optimizer asked for a second loss in one step.",
                write="an optimizer that needs one, as AdamW; not LBFGS",
            )
        self._asked = True
        return self._result


class _Clips:
    """Stands in front of a precision plugin of Lightning's."""

    main_params: Any

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Clip by the norm over all shards."""
        clip_grad_norm_(list(self.main_params(optimizer)), clip_val)


def _clipping(plugin: Any) -> Any:
    """A copy of a precision plugin that clips by the norm over all shards."""
    if isinstance(plugin, _Clips):
        return plugin
    made = copy.copy(plugin)
    made.__class__ = type(type(plugin).__name__, (_Clips, type(plugin)), {})
    return made
