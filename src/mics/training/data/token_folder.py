"""The token format of mics: a folder of raw ids, of which one manifest says what they are.

``tokens.json`` is the manifest. The shards that it lists, such as ``train-00000.bin``, hold ids and
nothing else, little-endian uint16 or uint32; one split is its shards one behind the other, each
document followed by the separator. ``tokenizer/`` is the tokenizer, as transformers saves it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mics.checkpoint.disk import facts_of
from mics.errors import DataError
from mics.ranks.console import ShowBytes
from mics.ranks.files import read_small
from mics.training.data.shards import Shards, Stretch

MANIFEST = "tokens.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "held_out")
FORMAT = "mics tokens"
VERSION = 1

_MOST_SHARDS = 10**6
_MOST_TOKENS = 2**48
_DTYPES = {"uint16": "<u2", "uint32": "<u4"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """A file of ids: its name in the folder, how many there are, the checksum of its bytes."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of a split in their order, and the documents and bytes of text in them."""

    documents: int
    text_bytes: int
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """How many ids it has, separators counted."""
        return sum(shard.tokens for shard in self.shards)


@dataclass(frozen=True)
class TokenFolder:
    """What ``tokens.json`` says.

    Args:
        dtype: of an id, "uint16" or "uint32".
        vocabulary: ids are below it.
        separator: the id behind every document.
        tokenizer: checksums of the files in ``tokenizer/``, by name.
        splits: "train" and "held_out".
        made_from: the options of ``mics tokenize``, for people; empty for others' folders.
        notes: what a person should know.
    """

    dtype: str
    vocabulary: int
    separator: int
    tokenizer: dict[str, str]
    splits: dict[str, Split]
    made_from: dict[str, Any]
    notes: tuple[str, ...]

    def as_text(self) -> str:
        """The manifest; equal for equal folders."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    def opened(self, folder: Path, split: str) -> Shards:
        """The ids of a split, memory-mapped."""
        dtype = _DTYPES[self.dtype]
        shards = self.splits[split].shards
        stretches = [Stretch(folder / shard.file, 0, shard.tokens, dtype) for shard in shards]
        return Shards(stretches, self.vocabulary)

    @property
    def num_shards(self) -> int:
        """How many files of ids there are."""
        return sum(len(split.shards) for split in self.splits.values())

    @property
    def checksums(self) -> list[list[str]]:
        """Those of every shard of every split: equal for equal ids."""
        return [[shard.sha256 for shard in self.splits[split].shards] for split in SPLITS]


def is_token_folder(path: Path) -> bool:
    """Whether a path is a folder with a manifest."""
    return (path / MANIFEST).is_file()


def read_token_folder(folder: Path) -> TokenFolder:
    """Read a manifest, and check that every shard is there and as long as it says.

    Checksums are not compared, which would take as long as reading all tokens; ``mics tokenize
    --check`` does.

    Raises:
        DataError: there is none, it is no such manifest, or a shard is missing or of another size.
    """
    try:
        told = json.loads(read_small(folder / MANIFEST))
        found = _read(told)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _damaged(folder, f"{MANIFEST}: {words[:200]}.") from None
    itemsize = np.dtype(_DTYPES[found.dtype]).itemsize
    for split in SPLITS:
        for shard in found.splits[split].shards:
            _check_size(folder / shard.file, shard.tokens * itemsize, folder)
    return found


def damaged_files(folder: Path, found: TokenFolder, progress: ShowBytes) -> list[str]:
    """The names of shards and tokenizer files whose bytes are not what was written.

    Args:
        folder: of tokens.
        found: its manifest.
        progress: is shown the bytes that are read.
    """
    itemsize = np.dtype(_DTYPES[found.dtype]).itemsize
    shards = [shard for split in SPLITS for shard in found.splits[split].shards]
    total, done, bad = sum(shard.tokens for shard in shards) * itemsize, 0, []
    for shard in shards:
        if facts_of(folder / shard.file).sha256 != shard.sha256:
            bad.append(shard.file)
        done += shard.tokens * itemsize
        progress("checking", done, total)
    for name, wanted in found.tokenizer.items():
        file = folder / TOKENIZER / name
        if not file.is_file() or facts_of(file).sha256 != wanted:
            bad.append(f"{TOKENIZER}/{name}")
    return bad


def _read(told: Any) -> TokenFolder:
    """Raises ValueError, TypeError or KeyError for what is no manifest."""
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ValueError(f'it has no "format": "{FORMAT}"')
    if told.get("version") != VERSION:
        raise ValueError(f"its version is {told.get('version')!r}, not {VERSION}")
    if told["dtype"] not in _DTYPES:
        raise ValueError(f"dtype is {told['dtype']!r}, not one of {', '.join(_DTYPES)}")
    most = 2 ** (8 * np.dtype(_DTYPES[told["dtype"]]).itemsize)
    vocabulary = _whole(told, "vocabulary", 1, most)
    return TokenFolder(
        dtype=told["dtype"],
        vocabulary=vocabulary,
        separator=_whole(told, "separator", 0, vocabulary - 1),
        tokenizer={_name(name): _sum(value) for name, value in told["tokenizer"].items()},
        splits={split: _read_split(told["splits"][split]) for split in SPLITS},
        made_from=dict(told.get("made_from", {})),
        notes=tuple(str(note)[:1000] for note in told.get("notes", [])[:20]),
    )


def _read_split(told: Mapping[str, Any]) -> Split:
    if not isinstance(told["shards"], list) or len(told["shards"]) > _MOST_SHARDS:
        raise ValueError(f"shards are no list of at most {_MOST_SHARDS:,}")
    shards = tuple(
        Shard(_name(one["file"]), _whole(one, "tokens", 0, _MOST_TOKENS), _sum(one["sha256"]))
        for one in told["shards"]
    )
    documents = _whole(told, "documents", 0, _MOST_TOKENS)
    return Split(documents, _whole(told, "text_bytes", 0, _MOST_TOKENS), shards)


def _whole(told: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = told[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least} to {most}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} is no plain name of a file")
    return value


def _sum(value: Any) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{value!r} is no SHA-256")
    return value


def _check_size(file: Path, wanted: int, folder: Path) -> None:
    try:
        seen = os.stat(file)  # noqa: PTH116 - a million Paths take seconds
    except OSError as error:
        raise _damaged(folder, f"{file.name}: {error.strerror}.") from None
    if not stat.S_ISREG(seen.st_mode) or seen.st_size != wanted:
        raise _damaged(folder, f"{file.name} has {seen.st_size:,} bytes, not {wanted:,}.")


def _damaged(folder: Path, numbers: str) -> DataError:
    return DataError(
        f"{folder} is no whole folder of tokens.",
        numbers=numbers,
        write="mics tokenize <source> <a new folder>, or a whole copy of it",
    )
