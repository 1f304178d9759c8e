"""A model with LoRA matrices of peft beside its weights, which stay."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from mics.anatomy.anatomy import Anatomy
from mics.errors import ConfigError
from mics.models.building import build
from mics.planning.subject import subject
from mics.training.config import LoraConfig, TrainConfig
from mics.training.expectation import compute_dtype


def check_lora(config: TrainConfig) -> None:
    """Check options of LoRA against the others.

    Raises:
        ConfigError: some are given although all weights train, there are no weights to stay, or
            peft is not installed.
    """
    lora = config.lora
    if lora.rank == 0:
        if lora != LoraConfig():
            raise ConfigError(
                "Options of lora are given, and all weights train.",
                numbers="lora.rank = 0.",
                write="--lora.rank 16, or leave them out",
            )
        return
    if config.model.weights is None:
        raise ConfigError(
            "LoRA trains beside weights that stay, and there are none.",
            numbers=f"lora.rank = {lora.rank}, model.weights is not given.",
            write="--model.weights <folder with the safetensors of the model>",
        )
    try:
        importlib.import_module("peft")
    except ImportError:
        raise ConfigError(
            "LoRA needs peft, which is not installed.",
            numbers=f"lora.rank = {lora.rank}.",
            write="pip install 'torch-mics[train,peft]'",
        ) from None


def _with_lora(shape: PretrainedConfig, config: LoraConfig, weights: Path | None) -> nn.Module:
    """Build a model on the meta device, with LoRA matrices, which alone train.

    Raises:
        ConfigError: the model has no layers of these names, or none that peft knows.
    """
    peft = importlib.import_module("peft")
    model = build(shape)
    adapted: Any = model
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        adapted.add_adapter(settings)
    except ValueError as error:
        raise ConfigError(
            f"{type(model).__name__} does not take these LoRA matrices.",
            numbers=str(error).splitlines()[0][:300],
            write="--lora.targets <names of its linear layers>, or none for all of them",
        ) from None
    settings.base_model_name_or_path = None if weights is None else str(weights)
    return model


def anatomy_of(config: TrainConfig, shape: PretrainedConfig) -> Anatomy:
    """Take the model of a run apart, with the LoRA matrices that it asks for.

    Raises:
        ConfigError: transformers cannot build it, or peft not adapt it.
    """
    model = _with_lora(shape, config.lora, config.model.weights) if config.lora.rank else shape
    return subject(model, dtype=compute_dtype(config))
