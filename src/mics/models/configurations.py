"""A model's configuration from a file, a folder or the hub: what of it is taken, what is refused.

Nothing that it names is followed: no code (``auto_map``), no kernel of the hub
(``attn_implementation``), no other model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from mics.errors import ConfigError
from mics.models.presets import PRESETS
from mics.models.small_files import CONFIG, read_table

_ATTENTION = (
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)
_KERNELS = {
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "_attn_implementation_internal": _ATTENTION,
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
    "_experts_implementation": ("eager", "batched_mm", "grouped_mm"),
    "_experts_implementation_internal": ("eager", "batched_mm", "grouped_mm"),
}
_HEADS, _GROUPS = "num_attention_heads", "num_key_value_heads"
_MOST = {
    "vocab_size": 2**31 - 1,
    "hidden_size": 2**31 - 1,
    "num_hidden_layers": 10_000,
    _HEADS: 2**31 - 1,
}
_OTHER_SENSES = ("vision", "audio", "image", "speech")


def read_configuration(name: str) -> PretrainedConfig:
    """The configuration of a ``config.json``, a folder with one, or a hub name.

    Raises:
        ConfigError: there is none, transformers cannot read it, or mics would not take it.
    """
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".json":
        path = path / CONFIG if path.is_dir() else path
        if not path.exists():
            raise ConfigError(
                f"There is no {path}.",
                write="<config.json>, or a folder that holds one",
            )
        _check_settings(name, read_table(path))
    elif name.count("/") != 1:
        near = difflib.get_close_matches(name.lower(), PRESETS, 1)
        raise ConfigError(
            f"There is no model {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."),
            numbers=f"Presets: {', '.join(PRESETS)}.",
            write="<preset, size such as 13b, config.json, folder or hub name such as owner/model>",
        )
    try:
        where = str(path) if path.exists() else name
        settings, _ = PretrainedConfig.get_config_dict(where)
        _check_settings(name, settings)
        config: PretrainedConfig = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:  # whatever a setting of the wrong kind makes transformers do
        raise ConfigError(
            f"transformers cannot read the configuration of {name!r}.",
            numbers=f"{type(error).__name__}: {error}".split("\n")[0],
            write="<preset, config.json, folder or hub name>",
        ) from None
    if hasattr(config, "auto_map"):
        del config.auto_map
    check_language_alone(config)
    return config


def check_language_alone(config: PretrainedConfig) -> None:
    """Check that a configuration is of one language model, not of several models in one.

    Raises:
        ConfigError: it has parts for images or sound, or text parts of its own; names them.
    """
    parts = list(getattr(config, "sub_configs", {}))
    try:
        whole = config.get_text_config() is config
    except ValueError:  # several, of which none is meant
        whole = False
    if whole and not any(sense in part for part in parts for sense in _OTHER_SENSES):
        return
    raise ConfigError(
        f"Models of type {config.model_type!r} are made of several; mics takes language models "
        "alone.",
        numbers=f"Its parts are {', '.join(parts)}.",
        write='the text part: AutoConfig.from_pretrained("<folder>").get_text_config()'
        '.save_pretrained("<new folder>"), then --model.name "<new folder>"',
    )


def _check_settings(name: str, settings: dict[str, Any]) -> None:
    """Check what transformers would follow, or stumble over without naming it.

    Raises:
        ConfigError: names the setting and its value.
    """
    for key, value in _nested(settings):
        known = _KERNELS.get(key)
        values = value.values() if isinstance(value, dict) else [value]
        if known and any(each is not None and each not in known for each in values):
            raise _refused(
                name,
                f"{key} = {value!r}, which would load code from the hub",
                f"{key} of {', '.join(known)}, or none",
            )
        if key == "quantization_config" and value:
            raise _refused(
                name,
                "a quantization_config: the weights are whole numbers with scales, which do not "
                "train",
                "a folder of the model before it was quantised",
            )
    architectures = settings.get("architectures")
    is_list = isinstance(architectures, list) and all(isinstance(a, str) for a in architectures)
    if architectures is not None and not is_list:
        raise _refused(name, f"architectures = {architectures!r}", "a list of class names")
    for key, most in _limits(settings.get("model_type")).items():
        size = settings.get(key)
        # A list is one size per layer, of the few families that have them.
        is_size = type(size) is list or (type(size) is int and 0 < size <= most)
        if key in settings and not is_size:
            raise _refused(name, f"{key} = {size!r}", f"a whole number from 1 to {most}")
    heads, groups = settings.get(_HEADS), settings.get(_GROUPS)
    if type(heads) is int and type(groups) is int and (groups < 1 or heads % groups):
        raise _refused(
            name, f"{_GROUPS} = {groups} for {heads} heads", f"{_GROUPS} that divides {_HEADS}"
        )
    for key in ("dtype", "torch_dtype"):
        dtype = settings.get(key)
        named = getattr(torch, str(dtype).removeprefix("torch."), None)
        if dtype is not None and not isinstance(named, torch.dtype):
            raise _refused(name, f"{key} = {dtype!r}", "float32, bfloat16 or float16")


def _limits(model_type: Any) -> dict[str, int]:
    """The largest sizes, also under names that a kind of model has, as GPT-2's ``n_layer``."""
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    own = CONFIG_MAPPING[model_type].attribute_map if known else {}
    return _MOST | {own.get(key, key): most for key, most in _MOST.items()}


def _refused(name: str, what: str, write: str) -> ConfigError:
    return ConfigError(f"The configuration of {name!r} has {what}.", write=write)


def _nested(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting, those of parts too."""
    for key, value in settings.items():
        yield key, value
        if isinstance(value, dict):
            yield from _nested(value)
