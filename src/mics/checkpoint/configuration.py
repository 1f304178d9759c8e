"""The configuration of a transformers model, kept so that its checkpoints can be exported."""

from __future__ import annotations

import json
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mics.checkpoint.layout import ASSETS, MODEL_CONFIG


def config_of(model: nn.Module) -> dict[str, bytes]:
    """The asset that says which transformers model this is; none for other models, or adapters."""
    if isinstance(model, DistributedDataParallel | DataParallel):
        model = model.module
    config: Any = getattr(model, "config", None)
    # transformers is not imported: a configuration is known by what it can do.
    if not hasattr(config, "to_json_string") or not hasattr(config, "model_type"):
        return {}
    if hasattr(model, "peft_config"):
        return {}  # its names are not those of the model that the configuration is of
    table = json.loads(config.to_json_string(use_diff=False))
    if not table.get("architectures"):
        # A compiled model hands out the configuration of the one inside of it.
        owners = (module for module in model.modules() if vars(module).get("config") is config)
        table["architectures"] = [_class_name(next(owners, model))]
    text = json.dumps(table, indent=2, sort_keys=True)
    return {MODEL_CONFIG.removeprefix(ASSETS): text.encode()}


def _class_name(model: nn.Module) -> str:
    """The name of its class before it was sharded."""
    return next(each.__name__ for each in type(model).__mro__ if not issubclass(each, FSDPModule))
