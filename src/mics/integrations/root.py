"""A module around a model, which Lightning sends every step through.

Lightning calls ``training_step`` and not ``forward``. Around a model that it finds wrapped it
redirects such calls through the wrapper, as it does for DistributedDataParallel. The wrapper is
what mics shards: its forward gathers the root unit for whatever a step uses, and the model inside
keeps its class and the names of its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from mics.errors import ConfigError
from mics.integrations.following import followed
from mics.sharding.shard import shard
from mics.sharding.units import units_of

BF16 = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
)
_ROOT = "_mics_root"


class Root(nn.Module):
    """Calls a model.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the model returns."""
        return self.module(*args, **kwargs)


def sharded(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    options: Mapping[str, Any],
    strategy: Any,
) -> nn.Module:
    """Shard a model, unless it or a part of it is sharded by mics already.

    Args:
        model: what a tool was given.
        optimizers: made before; they follow it.
        options: keywords of ``mics.shard``.
        strategy: Lightning's. Ranks per node are its processes per node. With precision bf16-mixed
            a model computes in bf16 and reduces in fp32, with others parameters keep their dtype.

    Returns:
        A ``Root`` around it, or the model itself where it was sharded before.

    Raises:
        ShardError: an optimizer has state of it, or see ``mics.shard``.
        ConfigError: the precision has a loss scaler.
    """
    known: nn.Module | None = model.__dict__.get(_ROOT)
    if known is not None:
        return known
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        units_of(model)  # refuses what FSDP2 alone has sharded
        return model
    precision = getattr(strategy, "precision_plugin", None) or strategy.precision
    if getattr(precision, "scaler", None) is not None:
        raise ConfigError(
            f"precision = {precision.precision!r} is not supported with mics: its loss scaler "
            "would skip steps on some ranks only.",
            write='precision="bf16-mixed", "bf16-true" or "32-true"',
        )
    mixed = getattr(precision, "precision", None) == "bf16-mixed"
    defaults: dict[str, Any] = {
        "mp_policy": BF16 if mixed else MixedPrecisionPolicy(),
        "blocks": _named_blocks(model) or None,
    }
    if "mesh" not in options:
        defaults["gpus_per_node"] = strategy.num_processes  # its launcher tells nobody else
    root = Root(model)
    with followed(model, optimizers):
        shard(root, **{**defaults, **options})
    model.__dict__[_ROOT] = root  # no submodule of it; the next run finds it
    return root


def inner(model: nn.Module) -> nn.Module:
    """The model that a tool was given."""
    return model.module if isinstance(model, Root) else model


def _named_blocks(model: nn.Module) -> list[type[nn.Module]]:
    """The classes of blocks that a transformers model names, also one inside of another module."""
    names = {
        n for module in model.modules() for n in getattr(module, "_no_split_modules", ()) or ()
    }
    classes = {type(module) for module in model.modules() if type(module).__name__ in names}
    return sorted(classes, key=lambda one: f"{one.__module__}.{one.__qualname__}")
