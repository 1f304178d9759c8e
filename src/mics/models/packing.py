"""Which families keep texts apart that stand in one row, told by positions that begin anew.

Transformers (5 and later) makes attention block-diagonal where positions begin anew, and a model is
called without a cache. It does so for no models with a recurrent state (Mamba, RWKV, Jamba), and
not for all others: OPT, Bloom, Falcon, MPT, MiniMax and gpt-oss let a text see the one before it.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from mics.errors import ConfigError

PACKED = (
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)
"""Types of models whose loss of packed texts was compared with that of each alone, to 1e-5."""

_ATTENTION = (None, "eager", "sdpa")


def check_packed(config: PretrainedConfig) -> None:
    """Check that a model never lets one text of a row see another.

    Raises:
        ConfigError: nobody has compared it, or its attention is another one.
    """
    write = "--data.no-packing: a conversation per row"
    if config.model_type not in PACKED:
        raise ConfigError(
            f"Nobody knows that models of type {config.model_type!r} keep the conversations of a "
            "row apart.",
            numbers=f"Compared with each conversation alone were {', '.join(PACKED)}.",
            write=write,
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in _ATTENTION:
        raise ConfigError(
            "Conversations of a row were kept apart with eager and sdpa attention alone.",
            numbers=f"The model's configuration has attn_implementation = {attention!r}.",
            write=f"{write}, or a configuration without it",
        )
