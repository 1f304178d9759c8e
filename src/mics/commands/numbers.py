"""The numbers of a command line: every one has bounds, and is checked before anything else is done.

An option that is a number says which ones it may have beside its type, with ``Within``. A verb
calls ``check_numbers`` first.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from mics.errors import ConfigError
from mics.quantities import Within


@dataclass(frozen=True)
class Number:
    """An option that is a number, or several.

    Args:
        option: as it is written: --gpus-per-node.
        path: of fields that lead to it.
        bounds: of each number; ``None`` where the option states none.
        whole: whether each must be a whole number.
    """

    option: str
    path: tuple[str, ...]
    bounds: Within | None
    whole: bool


def check_numbers(config: object) -> None:
    """Check every number of a verb's options.

    Args:
        config: the verb's dataclass.

    Raises:
        ConfigError: one is out of its bounds; names the option and the bounds.
    """
    words = out_of_bounds(config)
    if words is not None:
        raise ConfigError(words)


def out_of_bounds(config: object) -> str | None:
    """Say which number is out of its bounds; ``None`` if none is."""
    for number in numbers_of(type(config)):
        value: Any = config
        for name in number.path:
            value = getattr(value, name)
        for one in value if isinstance(value, tuple) else (value,):
            counts = isinstance(one, int | float) and not isinstance(one, bool)
            if counts and number.bounds is not None and one not in number.bounds:
                kind = "a whole number" if number.whole else "a number"
                return f"{number.option} must be {kind} {number.bounds}, got {one}."
    return None


def numbers_of(kind: type, prefix: str = "", path: tuple[str, ...] = ()) -> Iterator[Number]:
    """List the options of a dataclass that are numbers, those of nested ones too.

    Args:
        kind: the dataclass.
        prefix: what its options begin with.
        path: of fields that lead to it.
    """
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint: Any = hints[field.name]
        marks: Sequence[Any] = ()
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
        name = field.name.replace("_", "-")
        if isinstance(hint, type) and is_dataclass(hint):
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            inside = prefix if unnamed else f"{prefix}{name}."
            yield from numbers_of(hint, inside, (*path, field.name))
            continue
        kinds = set(_kinds(hint))
        if kinds & {int, float}:
            bounds = next((mark for mark in marks if isinstance(mark, Within)), None)
            whole = float not in kinds
            yield Number(f"--{prefix}{name}", (*path, field.name), bounds, whole)


def _kinds(hint: Any) -> Iterator[Any]:
    """List the plain types that an option may have: those of a union, and of a tuple's items."""
    if get_origin(hint) in (Union, types.UnionType, tuple):
        for part in get_args(hint):
            yield from _kinds(part)
    else:
        yield hint
