"""The load-balancing loss of a mixture of experts: who asks for it, and with what weight.

Transformers' models add it to their loss where ``output_router_logits`` is set, times
``router_aux_loss_coef`` (Switch Transformer, Fedus et al., 2021, equations 4 to 6). It is the
number of experts times the sum over experts of (tokens sent there) x (mean probability), both per
token of one forward pass: ``num_experts_per_tok`` where all experts get the same, more otherwise.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from transformers import PretrainedConfig

from mics.errors import ConfigError

_ASKED, _WEIGHT = "output_router_logits", "router_aux_loss_coef"


def ask_for_router_loss(config: PretrainedConfig, weight: float | None) -> None:
    """Write the weight that was asked for into the configuration; 0 is no such loss.

    Args:
        config: of a model; changed in place.
        weight: ``None`` leaves the configuration as it is.

    Raises:
        ConfigError: the weight is no weight, or the model has no such loss.
    """
    if weight is None:
        return
    if not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(
            "The weight of the router's loss is a number from 0 on.",
            numbers=f"model.router_loss = {weight}.",
            write="--model.router-loss 0.01",
        )
    if not hasattr(config, _WEIGHT):
        raise ConfigError(
            f"Models of type {config.model_type!r} have no loss that balances experts.",
            numbers=f"model.router_loss = {weight}; their configuration has no {_WEIGHT}.",
            write="no --model.router-loss, or a mixture of experts such as qwen3-moe-tiny",
        )
    settings: Any = config
    setattr(settings, _ASKED, weight > 0)
    if weight > 0:
        setattr(settings, _WEIGHT, weight)


def as_asked_by(config: PretrainedConfig, own: PretrainedConfig) -> PretrainedConfig:
    """A configuration that asks for the router's loss only if another one does.

    Whoever loads a model that was trained with it would get it in the loss of an evaluation, and
    the routers' output of every token, without having asked.

    Args:
        config: of a model that trains; it stays as it is.
        own: of the same model, as it was found.
    """
    kept: Any = copy.deepcopy(config)
    if hasattr(kept, _ASKED):
        setattr(kept, _ASKED, getattr(own, _ASKED, False))
    return kept  # type: ignore[no-any-return]


def router_loss_weight(config: PretrainedConfig) -> float | None:
    """The weight of the loss that balances experts; ``None`` where nobody asks for it."""
    weight = getattr(config, _WEIGHT, None)
    return float(weight) if weight and getattr(config, _ASKED, False) else None
