"""What is planned for: a preset, a config.json, a transformers configuration or any module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mics import compat
from mics.anatomy.anatomy import Anatomy, Loss, cast
from mics.anatomy.blocks import Blocks
from mics.anatomy.trace_cache import TraceCache
from mics.errors import PlanError, naming_extras


def subject(
    model: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    blocks: Blocks = None,
    loss: Loss | None = None,
    vocabulary: int | None = None,
) -> Anatomy:
    """Take a model apart without making a weight of it.

    It is built on the meta device, once; ``Anatomy.hand_on`` gives it to who trains it.

    Args:
        model: a preset's name, a path to config.json, a hub name, a transformers configuration, or
            a module (copied to the meta device).
        dtype: what is computed in.
        blocks: as in ``mics.shard``.
        loss: ``loss(model, micro_batch, sequence)`` runs it on inputs it makes on the meta device;
            by default as transformers' language models are, ids in and labels beside them.
        vocabulary: for presets that take their tokenizer's; by default that of a run for which
            nobody names a tokenizer.

    Raises:
        ConfigError: there is no such model.
        ShardError: it has no blocks.
        PlanError: a module without ``loss`` that is none of transformers'.
    """
    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)
        if loss is None and not hasattr(config, "to_json_string"):
            raise PlanError(
                f"How {type(model).__name__} is run is not known.",
                write="loss=lambda model, micro_batch, sequence: model(torch.zeros(micro_batch, "
                f'sequence, width, dtype={dtype}, device="meta")).sum()',
            )
        return Anatomy(
            cast(_on_meta(model), dtype),
            loss or language_model_loss,
            blocks,
            positions=_positions(config) if loss is None else None,
            hooked=sum(p.numel() for p in model.parameters() if compat.has_gather_hook(p)),
        )
    with naming_extras("A model by its name"):
        from mics.models.building import BYTE_IDS, build, load_config
    config = model
    if not hasattr(config, "to_json_string"):
        config = load_config(str(model), vocabulary=vocabulary or BYTE_IDS, separator=0)
    # The configuration's own text leaves out which attention and products of experts are run.
    kernels = [getattr(config, f"_{of}_implementation", None) for of in ("attn", "experts")]
    identity = "\n".join([config.to_json_string(), f"{kernels} {dtype} {torch.__version__}"])
    module = cast(build(config).train(), dtype)
    store = TraceCache(identity) if loss is None and blocks is None else None
    return Anatomy(
        module,
        loss or language_model_loss,
        blocks,
        store,
        positions=_positions(config),
        name=None if config is model else str(model),
    )


def _positions(config: Any) -> int | None:
    from mics.models.building import num_positions

    return num_positions(config)


def language_model_loss(model: Callable[..., Any], micro_batch: int, sequence: int) -> torch.Tensor:
    """Run a language model of transformers' on ids and labels."""
    ids = torch.zeros(micro_batch, sequence, dtype=torch.long, device="meta")
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _on_meta(model: nn.Module) -> nn.Module:
    """Copy a model without values; ``model`` keeps its own."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in memo:
            # A tensor that says itself what is gathered of it is planned as what it stands for.
            if compat.has_gather_hook(tensor):
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            else:
                empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = (
                nn.Parameter(empty, requires_grad=tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else empty
            )
    return copy.deepcopy(model, memo).train()
