"""Names inside a checkpoint: kinds of tensors and values, keys of chunks, files.

Every name of a tensor or a value begins with its kind. A chunk is the tensor ``NAME@0,0`` of a
file, the numbers being where in the whole tensor it begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

MODEL = "model/"
OPTIMIZER = "optimizer/"
AVERAGE = "average/"
AVERAGE_UPDATES = "averaging/updates"
HELD_BACK = "held_back/"
"""What hop 2 in few bits has not sent yet, by the names of parameters."""

ASSETS = "assets/"
"""Names of assets are those of files too, in the checkpoint's folder."""

ADAPTERS = f"{ASSETS}adapters.json"
MODEL_FILES = f"{ASSETS}model/"
MODEL_CONFIG = f"{MODEL_FILES}config.json"
TOKENIZER = f"{ASSETS}tokenizer/"

Value = TypeVar("Value")


def of_kind(kind: str, named: Mapping[str, Value]) -> dict[str, Value]:
    """The entries of one kind, by their names without it."""
    return {
        name.removeprefix(kind): value for name, value in named.items() if name.startswith(kind)
    }


def random_state_of(rank: int) -> str:
    """What the names of a rank's random states begin with."""
    return f"random/rank-{rank:05d}/"


def file_of(rank: int) -> str:
    """The file that a rank writes its tensors to."""
    return f"rank-{rank:05d}.safetensors"


def chunk_key(name: str, offset: tuple[int, ...]) -> str:
    """The name that a chunk of a tensor has in its file."""
    return f"{name}@{','.join(map(str, offset))}"
