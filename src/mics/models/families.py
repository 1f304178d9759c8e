"""Published families of models, one line per size, with the figures of their ``config.json``.

What is stated is what decides parameters, FLOPs and bytes, and what a checkpoint of the same name
needs to load: shapes, vocabulary, ties, positions and the base of the rotary embedding.
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


def decoder(
    hidden: int, feed_forward: int, layers: int, heads: int, groups: int, **more: Any
) -> dict[str, Any]:
    """Write down the shape of a decoder of Llama's kind.

    Args:
        hidden: width.
        feed_forward: width of the feed-forward layer.
        layers: blocks.
        heads: of attention.
        groups: heads of keys and values.
        more: other settings.
    """
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        **more,
    }


def experts(feed_forward: int, experts: int, chosen: int, **more: Any) -> dict[str, Any]:
    """Write down experts of Qwen's kind: their width, how many, and how many a token is sent to."""
    return {
        "moe_intermediate_size": feed_forward,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "norm_topk_prob": True,
        **more,
    }


def _rotary(base: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base, **more}}


def _llama_3(
    version: str, size: str, shape: dict[str, Any], *, stretched: float, tied: bool = False
) -> Preset:
    """Llama 3.1 and 3.2: the positions of Llama 3, 8192, stretched to 131072."""
    rotary = _rotary(
        500000.0,
        rope_type="llama3",
        factor=stretched,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    own = {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    own |= {"bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": tied}
    return Preset("llama", f"Llama {version} {size}", shape | own | rotary)


_QWEN_3 = {
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    **_rotary(1e6),
}


def _qwen_3(size: str, shape: dict[str, Any], *, tied: bool = False) -> Preset:
    return Preset("qwen3", f"Qwen3 {size}", shape | _QWEN_3 | {"tie_word_embeddings": tied})


def _qwen_3_experts(size: str, shape: dict[str, Any]) -> Preset:
    about = f"Qwen3 {size}, 8 of 128 experts per token"
    return Preset("qwen3_moe", about, shape | _QWEN_3 | {"router_aux_loss_coef": 0.001})


def _olmo_2(size: str, shape: dict[str, Any]) -> Preset:
    own: dict[str, Any] = {
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
    }
    own |= {"bos_token_id": None, "eos_token_id": 100257, "pad_token_id": 100277}
    return Preset("olmo2", f"OLMo 2 {size}", shape | own | _rotary(500000.0))


FAMILIES: dict[str, Preset] = {
    "llama-8b": Preset(
        "llama",
        "Llama 3 8B",
        decoder(4096, 14336, 32, 32, 8, vocab_size=128256, max_position_embeddings=8192)
        | {"rms_norm_eps": 1e-5, **_rotary(500000.0)},
    ),
    "llama-3.2-1b": _llama_3(
        "3.2", "1B", decoder(2048, 8192, 16, 32, 8, head_dim=64), stretched=32.0, tied=True
    ),
    "llama-3.2-3b": _llama_3(
        "3.2", "3B", decoder(3072, 8192, 28, 24, 8, head_dim=128), stretched=32.0, tied=True
    ),
    "llama-3.1-8b": _llama_3("3.1", "8B", decoder(4096, 14336, 32, 32, 8), stretched=8.0),
    "llama-3.1-70b": _llama_3("3.1", "70B", decoder(8192, 28672, 80, 64, 8), stretched=8.0),
    "qwen3-0.6b": _qwen_3("0.6B", decoder(1024, 3072, 28, 16, 8), tied=True),
    "qwen3-1.7b": _qwen_3("1.7B", decoder(2048, 6144, 28, 16, 8), tied=True),
    "qwen3-4b": _qwen_3("4B", decoder(2560, 9728, 36, 32, 8), tied=True),
    "qwen3-8b": _qwen_3("8B", decoder(4096, 12288, 36, 32, 8)),
    "qwen3-14b": _qwen_3("14B", decoder(5120, 17408, 40, 40, 8)),
    "qwen3-32b": _qwen_3("32B", decoder(5120, 25600, 64, 64, 8)),
    "mistral-7b": Preset(
        "mistral",
        "Mistral 7B v0.3",
        decoder(4096, 14336, 32, 32, 8, vocab_size=32768, max_position_embeddings=32768)
        | {"rms_norm_eps": 1e-5, "sliding_window": None, **_rotary(1e6)},
    ),
    "olmo2-1b": _olmo_2("1B", decoder(2048, 8192, 16, 16, 16)),
    "olmo2-7b": _olmo_2("7B", decoder(4096, 11008, 32, 32, 32)),
    "olmo2-13b": _olmo_2("13B", decoder(5120, 13824, 40, 40, 40)),
    "olmo2-32b": _olmo_2("32B", decoder(5120, 27648, 64, 40, 8)),
    "mixtral-8x7b": Preset(
        "mixtral",
        "Mixtral 8x7B, 2 of 8 experts per token",
        decoder(4096, 14336, 32, 32, 8, vocab_size=32000, max_position_embeddings=32768)
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
        | {"rms_norm_eps": 1e-5, **_rotary(1e6)},
    ),
    "qwen3-30b-a3b": _qwen_3_experts(
        "30B-A3B", decoder(2048, 6144, 48, 32, 4) | experts(768, 128, 8)
    ),
    "qwen3-235b-a22b": _qwen_3_experts(
        "235B-A22B", decoder(4096, 12288, 94, 64, 4) | experts(1536, 128, 8)
    ),
}
"""By the names that ``--model.name`` takes."""
