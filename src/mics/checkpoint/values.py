"""Values that are no tensors as JSON, and containers of values with tensors in them.

Text, numbers, booleans, ``None`` and lists are JSON's own. The others are objects of one key::

    {"tuple": [...]}            a tuple
    {"dict": [[key, value]]}    a dictionary; its keys may be numbers
    {"bytes": "..."}            bytes, in base 64
    {"tensor": "NAME"}          the tensor of that name in the manifest
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from mics.checkpoint.manifest import Json
from mics.errors import CheckpointError

_MOST_DEEP = 32


def encode(name: str, value: Any, tensors: dict[str, torch.Tensor] | None = None) -> Json:
    """A value as JSON.

    Args:
        name: its name in the manifest, the first part of the names of tensors in it.
        value: what is to be kept.
        tensors: gets the tensors in it by name; ``None`` where there must not be any.

    Raises:
        CheckpointError: something in it cannot be kept.
    """
    if isinstance(value, torch.Tensor) and tensors is not None:
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        items = [encode(f"{name}.{at}", item, tensors) for at, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, bool | int | float | str):
                raise _not_kept(f"A key of {name}", key)
        pairs: list[Json] = [[key, encode(f"{name}.{key}", v, tensors)] for key, v in value.items()]
        return {"dict": pairs}
    raise _not_kept(name, value)


def decode(value: Json, tensor_of: Callable[[str], torch.Tensor] | None = None) -> Any:
    """The reverse of ``encode``; ``tensor_of`` gives the tensor of a name.

    Raises:
        ValueError: it is not what ``encode`` writes.
    """
    return _decode(value, tensor_of, 0)


def _decode(value: Json, tensor_of: Callable[[str], torch.Tensor] | None, depth: int) -> Any:
    if depth > _MOST_DEEP:
        raise ValueError("it is nested too deep")
    if isinstance(value, list):
        return [_decode(item, tensor_of, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"an object of {len(value)} keys")
    ((kind, inner),) = value.items()
    if kind == "tuple" and isinstance(inner, list):
        return tuple(_decode(item, tensor_of, depth + 1) for item in inner)
    if kind == "bytes" and isinstance(inner, str):
        return base64.b64decode(inner, validate=True)
    if kind == "tensor" and isinstance(inner, str) and tensor_of is not None:
        return tensor_of(inner)
    if kind == "dict" and isinstance(inner, list):
        return {key: _decode(item, tensor_of, depth + 1) for key, item in map(_pair, inner)}
    raise ValueError(f"an object {{{kind!r}: {type(inner).__name__}}}")


def _pair(value: Json) -> tuple[Any, Json]:
    if not isinstance(value, list) or len(value) != 2 or isinstance(value[0], list | dict):
        raise ValueError("a dict whose entries are no pairs")
    return value[0], value[1]


def tensors_in(value: Json) -> Iterator[str]:
    """The names of the tensors in an encoded value."""
    if isinstance(value, list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for kind, inner in value.items():
            if kind == "tensor" and isinstance(inner, str):
                yield inner
            else:
                yield from tensors_in(inner)


def _not_kept(name: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{name} cannot be kept: checkpoints hold tensors, numbers, text, bytes, lists, tuples "
        "and dictionaries.",
        numbers=f"It is a {type(value).__name__}.",
        write="it as a buffer, a number, or not at all",
    )
