"""The model of a run: a transformers configuration, and a module built on the meta device."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
)

from mics.errors import ConfigError
from mics.models.configurations import check_language_alone, read_configuration
from mics.models.presets import find_preset

Task = Literal["causal", "masked"]

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
BYTE_IDS = 259
"""Ids of the tokenizer that a run has where nobody names one: bytes, and three special ones."""

_PAD_VOCABULARY_TO = 8  # so that the largest matrix keeps an even shape


def load_config(name: str, *, vocabulary: int, separator: int) -> PretrainedConfig:
    """The configuration of a preset, a size, a ``config.json``, a folder with one, or a hub name.

    Args:
        name: what ``model.name`` is in the run's options.
        vocabulary: ids of the tokenizer; presets without a vocabulary of their own take it, rounded
            up to a multiple of 8.
        separator: the tokenizer's id between documents, their beginning and end of text.

    Raises:
        ConfigError: there is no such model; names the nearest preset.
    """
    preset = find_preset(name)
    if preset is not None:
        own = dict(preset.settings)
        if preset.vocabulary_of_tokenizer:
            own["vocab_size"] = -(-vocabulary // _PAD_VOCABULARY_TO) * _PAD_VOCABULARY_TO
            own["bos_token_id"] = own["eos_token_id"] = separator
        config: PretrainedConfig = AutoConfig.for_model(preset.model_type, **own)
    else:
        config = read_configuration(name)
    return config


def task_of(config: PretrainedConfig) -> Task:
    """What the model is trained for: the next token, or masked ones.

    ``architectures`` decides where it is given (a saved model knows what it is), else the family:
    one that transformers can only build as one of the two, or an encoder by nature.

    Raises:
        ConfigError: transformers has neither form of it.
    """
    for architecture in config.architectures or ():
        if architecture.endswith("ForMaskedLM"):
            return "masked"
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal"
    kind = type(config)
    # Encoders such as BERT have a causal form too, which nobody means by their name.
    if kind in MODEL_FOR_MASKED_LM_MAPPING:
        return "masked"
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "causal"
    raise ConfigError(
        f"Models of type {config.model_type!r} are not language models that transformers can build "
        "as causal or masked.",
        numbers=f"Its configuration is {kind.__name__}.",
        write="the name of a causal or masked language model",
    )


def build(config: PretrainedConfig, *, device: str = "meta") -> nn.Module:
    """The model in fp32, by default on the meta device, without memory for a single weight.

    ``config`` is told which class it became, for those who load what is saved.

    Raises:
        ConfigError: transformers cannot build a language model of it.
    """
    check_language_alone(config)
    auto: Any = AutoModelForMaskedLM if task_of(config) == "masked" else AutoModelForCausalLM
    for_training = copy.deepcopy(config)
    for_training.use_cache = False  # a cache is for generation; in training it only costs memory
    try:
        with torch.device(device):
            model: nn.Module = auto.from_config(
                for_training, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # whatever sizes that do not fit make transformers do
        raise ConfigError(
            f"transformers cannot build a {config.model_type} of this configuration.",
            numbers=f"{type(error).__name__}: {error}".split("\n")[0],
            write="sizes that fit each other in the model's config.json",
        ) from None
    config.architectures = [type(model).__name__]
    return model


def num_positions(config: PretrainedConfig) -> int | None:
    """Longest sequence the model takes; ``None`` where it has no limit.

    RoBERTa counts positions from its padding id on, so that the first two are never used.
    """
    for name in _POSITIONS:
        positions = getattr(config, name, None)
        if isinstance(positions, int):
            offset = config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0
            return positions - offset
    return None


_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")


def check_fits(config: PretrainedConfig, *, sequence: int, vocabulary: int) -> None:
    """Check that the model can take such sequences of such ids.

    Raises:
        ConfigError: too long, or ids the model has no embedding for.
    """
    positions = num_positions(config)
    if positions is not None and sequence > positions:
        raise ConfigError(
            "A sequence is longer than the model has positions.",
            numbers=f"data.sequence = {sequence}, the model has {positions}.",
            write=f"--data.sequence {positions}",
        )
    if vocabulary > config.vocab_size:
        raise ConfigError(
            "The tokenizer has ids that the model has no embedding for.",
            numbers=f"The tokenizer has {vocabulary} ids, the model's vocabulary is "
            f"{config.vocab_size}.",
            write=f"a tokenizer of at most {config.vocab_size} ids, or vocab_size in the model's "
            "config.json",
        )


def check_mask(config: PretrainedConfig, mask: int | None) -> None:
    """Check that a masked model learns an embedding for the tokenizer's mask.

    Padding's is zero and has no gradient, and RoBERTa counts no position for it.

    Raises:
        ConfigError: the mask is what the model knows as padding.
    """
    if mask is not None and mask == config.pad_token_id:
        raise ConfigError(
            "The model takes the tokenizer's mask for padding.",
            numbers=f"mask_token has id {mask}, pad_token_id = {config.pad_token_id}.",
            write="another pad_token_id in the model's config.json, or another tokenizer",
        )


def num_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(param.numel() for param in model.parameters())
