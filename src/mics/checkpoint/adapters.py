"""Which tensors of a model are an adapter's, and by which names: peft says so itself."""

from __future__ import annotations

import copy
import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mics.checkpoint.layout import ADAPTERS, ASSETS
from mics.checkpoint.names import parameter_names, plain_names, unwrapped
from mics.errors import CheckpointError

CONFIG = "adapter_config.json"
_INSIDE = "base_model.model."  # what names have in front where a PeftModel is around the model


def adapter_config(model: nn.Module, adapter: str) -> Any:
    """peft's configuration of an adapter.

    Raises:
        CheckpointError: the model has no such adapter.
    """
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        raise CheckpointError(
            f"{type(model).__name__} has no adapters of peft.",
            write="the model that peft.get_peft_model returned; mics.save keeps any other",
        )
    if adapter not in configs:
        raise CheckpointError(
            f"The model has no adapter {adapter!r}.",
            numbers=f"It has {', '.join(map(repr, configs))}.",
            write=f"adapter={next(iter(configs), 'default')!r}",
        )
    return configs[adapter]


def adapter_tensors(
    model: nn.Module, adapter: str, *, embeddings: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors in use of an adapter, sharded or whole, by peft's names for them.

    Args:
        model: one with adapters.
        adapter: the name of one.
        embeddings: whether those of the base belong to it, as peft has it where they were resized.

    Raises:
        CheckpointError: the model has no such adapter.
    """
    adapter_config(model, adapter)
    peft = importlib.import_module("peft")  # of no extra: who has such a model has it
    state = model.state_dict(keep_vars=True)
    # "auto" asks a server for the vocabulary of the base.
    tensors: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter, save_embedding_layers=embeddings
    )
    inside = "" if isinstance(model, peft.PeftModel) else _INSIDE
    return {inside + name: tensor for name, tensor in tensors.items()}


def write_adapter_config(folder: Path, config: Any) -> None:
    """Write the configuration of an adapter as peft keeps it."""
    kept = copy.deepcopy(config)
    kept.inference_mode = True
    kept.save_pretrained(str(folder))


def adapters_of(model: nn.Module) -> dict[str, bytes]:
    """The asset that says which tensors of a checkpoint are adapters of peft, if there are any.

    It is ``{"adapters": {ADAPTER: {"config": peft's, "tensors": {NAME: the checkpoint's name}}},
    "others": the names of what trains and is no adapter's}``. What peft computes anew when it keeps
    an adapter, as prompts, is in no such table.
    """
    if isinstance(model, DistributedDataParallel | DataParallel):
        model = model.module
    model = [module for name, module in model.named_modules() if not unwrapped(name)][-1]
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return {}
    state = model.state_dict(keep_vars=True)
    first_of = parameter_names(model)[0]
    plain = plain_names(model, state)
    name_of = {id(value): first_of.get(plain[key], plain[key]) for key, value in state.items()}
    table: dict[str, Any] = {}
    for adapter, config in configs.items():
        if config.is_prompt_learning:
            continue
        tensors = adapter_tensors(model, adapter)
        names = {unwrapped(name): name_of.get(id(value)) for name, value in tensors.items()}
        if None not in names.values():
            with tempfile.TemporaryDirectory() as folder:
                write_adapter_config(Path(folder), config)
                kept = json.loads((Path(folder) / CONFIG).read_bytes())
                table[adapter] = {"config": kept, "tensors": names}
    of_adapters = {name for one in table.values() for name in one["tensors"].values()}
    trained = [name_of.get(id(p)) for p in model.parameters() if p.requires_grad]
    others = [name for name in trained if name is not None and name not in of_adapters]
    text = json.dumps({"adapters": table, "others": others}, indent=2, sort_keys=True)
    return {ADAPTERS.removeprefix(ASSETS): text.encode()}
