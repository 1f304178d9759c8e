"""Models by name: the shapes the paper trains, standard ones, and tiny ones for one machine.

The 10B and 15B shapes are those of MiCS section 5 (BERT: hidden, intermediate and layers as in its
table of models; vocabularies as there). The shapes of GPT-2, Llama, Mixtral and Qwen3 are their
authors' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A transformers configuration: its ``model_type`` and what differs from the defaults.

    ``vocabulary_of_tokenizer`` says that the vocabulary is the tokenizer's, rounded up, instead of
    one of the configuration.
    """

    model_type: str
    about: str
    settings: dict[str, Any]
    vocabulary_of_tokenizer: bool = False


def _encoder(
    hidden: int, feed_forward: int, layers: int, heads: int, **more: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


def _gpt2(hidden: int, layers: int, heads: int, positions: int, **more: int) -> dict[str, int]:
    return {
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
        **more,
    }


def _experts(feed_forward: int, experts: int, chosen: int, **more: int) -> dict[str, int]:
    return {
        "moe_intermediate_size": feed_forward,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        **more,
    }


# Tiny models train for a few hundred steps: dropout would only slow them down.
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NO_GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

PRESETS: dict[str, Preset] = {
    "bert-10b": Preset(
        "bert",
        "BERT 10B of the MiCS paper",
        _encoder(2560, 10240, 127, 40, vocab_size=32008, max_position_embeddings=512),
    ),
    "bert-15b": Preset(
        "bert",
        "BERT 15B of the MiCS paper",
        _encoder(2560, 10240, 190, 40, vocab_size=32008, max_position_embeddings=512),
    ),
    "roberta-10b": Preset(
        "roberta",
        "RoBERTa 10B of the MiCS paper",
        _encoder(5120, 20480, 31, 40, vocab_size=50265, max_position_embeddings=514),
    ),
    "gpt2-10b": Preset(
        "gpt2",
        "GPT-2 10B of the MiCS paper",
        _gpt2(5120, 31, 40, 514, n_inner=20480, vocab_size=50265),
    ),
    "bert-large": Preset(
        "bert",
        "BERT large",
        _encoder(1024, 4096, 24, 16, vocab_size=30522, max_position_embeddings=512),
    ),
    "gpt2-xl": Preset("gpt2", "GPT-2 XL", _gpt2(1600, 48, 25, 1024, vocab_size=50257)),
    "llama-8b": Preset(
        "llama",
        "Llama 3 8B",
        _encoder(
            4096,
            14336,
            32,
            32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=8192,
        )
        | {"rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    ),
    "mixtral-8x7b": Preset(
        "mixtral",
        "Mixtral 8x7B, 2 of 8 experts per token",
        _encoder(
            4096,
            14336,
            32,
            32,
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
            vocab_size=32000,
            max_position_embeddings=32768,
        )
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.02},
    ),
    "qwen3-30b-a3b": Preset(
        "qwen3_moe",
        "Qwen3 30B-A3B, 8 of 128 experts per token",
        _encoder(
            2048,
            6144,
            48,
            32,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=40960,
            bos_token_id=151643,
            eos_token_id=151645,
        )
        | _experts(768, 128, 8)
        | {"norm_topk_prob": True, "rope_theta": 1e6, "router_aux_loss_coef": 0.001},
    ),
    "bert-tiny": Preset(
        "bert",
        "BERT for one machine",
        # Padding is 1 in a vocabulary that is trained here, and BERT's own 0 the separator.
        _encoder(128, 512, 4, 4, max_position_embeddings=128, pad_token_id=1) | _NO_DROPOUT,
        vocabulary_of_tokenizer=True,
    ),
    "roberta-tiny": Preset(
        "roberta",
        "RoBERTa for one machine",
        _encoder(128, 512, 4, 4, max_position_embeddings=130) | _NO_DROPOUT,
        vocabulary_of_tokenizer=True,
    ),
    "gpt2-tiny": Preset(
        "gpt2",
        "GPT-2 for one machine",
        _gpt2(128, 4, 4, 128) | _NO_GPT2_DROPOUT,
        vocabulary_of_tokenizer=True,
    ),
    "llama-tiny": Preset(
        "llama",
        "Llama for one machine",
        _encoder(128, 384, 4, 4, num_key_value_heads=2, max_position_embeddings=128),
        vocabulary_of_tokenizer=True,
    ),
    "qwen3-moe-tiny": Preset(
        "qwen3_moe",
        "Qwen3-MoE for one machine, 2 of 8 experts per token",
        _encoder(128, 384, 4, 4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128)
        | _experts(192, 8, 2)
        | {"norm_topk_prob": True, "router_aux_loss_coef": 0.01},
        vocabulary_of_tokenizer=True,
    ),
}
