"""The small files that transformers loads beside the weights: which, and how they are read.

A folder comes from somebody else. What is read of it is a regular file (links are followed, as the
hub's cache is made of them) of bounded size, and code is left where it is.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from mics.errors import ConfigError
from mics.ranks import files

CONFIG = "config.json"
_MOST_BYTES = 128 << 20  # the largest tokenizers in use have 35 MB

# Of transformers 5: utils/__init__.py, utils/hub.py, tokenization_utils_base.py, and the
# vocab_files_names of its tokenizers.
OF_MODELS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "audio_tokenizer_config.json",
)
OF_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "entity_vocab.json",
    "emoji.json",
    "normalizer.json",
    "byte_maps.json",
    "dict.txt",
    "bpe.codes",
    "tekken.json",
    "prophetnet.tokenizer",
    "*.model",
    "*.spm",
    "*.tiktoken",
)
_USUAL = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
_CODE = ("*.py", "*.pyc", "*.so")


def is_named(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the name of a file, relative to its folder, is one of some."""
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


def small_files(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """What a folder has of some files, by name, without the code that they name.

    Raises:
        ConfigError: one is no regular file, too large, or cannot be read.
    """
    found = {
        name: folder / name
        for name in _names(folder)
        if is_named(name, patterns) and not (folder / name).is_dir()
    }
    return {name: without_code(name, read_small(path)) for name, path in found.items()}


def left_behind(folder: Path) -> list[str]:
    """What of a folder is code, and is never brought along: files, and entries that name it."""
    code = [name for name in _names(folder) if is_named(name, _CODE)]
    naming = [
        f"auto_map of {name}"
        for name in _names(folder)
        if is_named(name, (CONFIG, *OF_MODELS, *OF_TOKENIZERS)) and name.endswith(".json")
        if b'"auto_map"' in read_small(folder / name)
    ]
    return code + naming


def usual_that_lack(names: Container[str]) -> list[str]:
    """Files that most models come with and this one does not."""
    return [name for name in _USUAL if name not in names]


def read_small(path: Path) -> bytes:
    """Read a small file whole.

    Raises:
        ConfigError: it is no regular file, too large, or cannot be read.
    """
    try:
        return files.read_small(path, _MOST_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}.",
            write="a folder that transformers' save_pretrained wrote",
        ) from None


def read_table(path: Path) -> dict[str, Any]:
    """Read a small file that holds one JSON object.

    Raises:
        ConfigError: it holds something else, or is no small file.
    """
    data = read_small(path)
    try:
        table = json.loads(data)
        why = "" if isinstance(table, dict) else f"It holds a {type(table).__name__}."
    except (ValueError, RecursionError) as error:
        table, why = {}, f"{type(error).__name__}: {error}"
    if why:
        raise ConfigError(
            f"{path} is no table of JSON.",
            numbers=why,
            write="a folder that transformers' save_pretrained wrote",
        )
    assert isinstance(table, dict)
    return table


def without_code(name: str, data: bytes) -> bytes:
    """A small file without its ``auto_map``, which names code that is left behind."""
    if not name.endswith(".json") or b'"auto_map"' not in data:
        return data
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(table, dict) or "auto_map" not in table:
        return data
    del table["auto_map"]
    return json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _names(folder: Path) -> list[str]:
    templates = folder / "additional_chat_templates"
    return sorted(
        path.relative_to(folder).as_posix()
        for place in (folder, templates)
        if place.is_dir()
        for path in place.iterdir()
    )
