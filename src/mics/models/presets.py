"""Models by name: the shapes the paper trains, published families, and tiny ones for one machine.

The 10B and 15B shapes are those of MiCS section 5 (BERT: hidden, intermediate and layers as in its
table of models; vocabularies as there).
"""

from __future__ import annotations

from mics.models.by_count import preset_of_count
from mics.models.families import FAMILIES, Preset, decoder, experts


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
    **FAMILIES,
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
        decoder(128, 384, 4, 4, 2, max_position_embeddings=128),
        vocabulary_of_tokenizer=True,
    ),
    "qwen3-moe-tiny": Preset(
        "qwen3_moe",
        "Qwen3-MoE for one machine, 2 of 8 experts per token",
        decoder(128, 384, 4, 4, 2, head_dim=32, max_position_embeddings=128)
        | experts(192, 8, 2, router_aux_loss_coef=0.01),
        vocabulary_of_tokenizer=True,
    ),
}


def find_preset(name: str) -> Preset | None:
    """Find the preset of a name, or the shape of a number of parameters such as 13b.

    Raises:
        ConfigError: the number is one that no shape follows from.
    """
    return PRESETS.get(name) or preset_of_count(name)


def rule_of(name: str) -> list[str]:
    """Say by which rule a number of parameters became a shape; nothing of any other name."""
    preset = None if name in PRESETS else preset_of_count(name)
    return [] if preset is None else [preset.about]
