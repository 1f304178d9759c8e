"""Conversations packed in a row never see each other: the loss is that of each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chatting import CONVERSATIONS, saved, written
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from mics.errors import ConfigError
from mics.models.building import build
from mics.models.packing import PACKED, check_packed
from mics.training.config import DataConfig
from mics.training.data import Batch, open_data
from mics.training.step import token_loss

_SEQUENCE = 64
_SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": _SEQUENCE,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": _SEQUENCE}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_EXPERTS = ("num_experts", "num_local_experts")


def small(family: str) -> PretrainedConfig:
    """A model of a family; windows of attention are shorter than a conversation."""
    settings = _GPT2 | _NO_DROPOUT if family == "gpt2" else dict(_SIZES)
    settings["vocab_size"] = _SIZES["vocab_size"]
    config: PretrainedConfig = AutoConfig.for_model(family, **settings)
    for name in _EXPERTS:
        if hasattr(config, name):
            setattr(config, name, 4)
            config.num_experts_per_tok = 2
    if getattr(config, "sliding_window", None):
        config.sliding_window = 6
    return config


def drawn(family: str) -> nn.Module:
    return loud(build(small(family), device="cpu").eval())


def loud(model: nn.Module) -> nn.Module:
    """Draw weights so large that everything that is seen makes a difference."""
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Batch, Batch]:
    """The same conversations packed, and one in a row."""
    folder = tmp_path_factory.mktemp("chats")
    own, source = saved(folder / "tokenizer"), written(folder / "a.jsonl", CONVERSATIONS)
    found = []
    for packing in (True, False):
        config = DataConfig(
            source=str(source), format="chat", tokenizer=str(own), held_out=0.0, packing=packing
        )
        data = open_data(config, seed=0, sequence=_SEQUENCE, masked=False, folder=folder / "run")
        found.append(data.train.batch(0, data.train.num_sequences))
    assert len(found[0].inputs) < len(found[1].inputs)
    return found[0], found[1]


@torch.no_grad()
def loss(model: nn.Module, batch: Batch) -> float:
    return float(token_loss(model, batch)) / batch.num_targets


@pytest.mark.parametrize("family", PACKED)
def test_loss_of_packed_conversations_equals_that_of_each(
    family: str, batches: tuple[Batch, Batch]
) -> None:
    model = drawn(family)
    packed, apart = batches
    check_packed(model.config)  # type: ignore[arg-type]
    assert loss(model, packed) == pytest.approx(loss(model, apart), abs=1e-5, rel=0)
    unaware = Batch(packed.inputs, packed.labels)  # seen, the others would make a difference
    assert abs(loss(model, unaware) - loss(model, apart)) > 3e-5


@pytest.mark.parametrize("family", PACKED)
def test_a_conversation_has_no_gradient_by_another(
    family: str, batches: tuple[Batch, Batch]
) -> None:
    model = drawn(family)
    batch = batches[0]
    assert batch.positions is not None
    begin = int((batch.positions[0] == 0).nonzero()[1])
    changed = batch.inputs[:1].clone()
    changed[0, :begin] = (changed[0, :begin] + 7) % 390
    with torch.no_grad():
        logits = [
            model(input_ids=ids, position_ids=batch.positions[:1], use_cache=False).logits
            for ids in (batch.inputs[:1], changed)
        ]
    difference = (logits[0] - logits[1]).abs()[0]
    assert difference[:begin].max() > 1e-3
    assert difference[begin:].max() < 1e-5


@pytest.mark.parametrize("family", ["opt", "bloom", "mamba"])
def test_families_that_let_conversations_see_each_other_are_refused(
    family: str, batches: tuple[Batch, Batch]
) -> None:
    settings = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}.get(family, {})
    config = AutoConfig.for_model(family, **(_SIZES | settings))
    with pytest.raises(ConfigError, match="no-packing"):
        check_packed(config)
    packed, apart = batches
    model = loud(build(config, device="cpu").eval())
    if family == "opt":  # the others know no positions
        assert abs(loss(model, packed) - loss(model, apart)) > 1e-4
    else:
        unaware = Batch(packed.inputs, packed.labels)
        assert abs(loss(model, unaware) - loss(model, apart)) > 3e-5


def test_attention_that_nobody_compared_is_refused() -> None:
    config = small("llama")
    config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match="eager and sdpa"):
        check_packed(config)
