"""JSON as people write configurations in: comments and last commas pass, nothing else does.

A configuration comes from somebody else: its size and depth are bounded, a key that stands twice
is refused, and so is a number that is none.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from mics.errors import ConfigError
from mics.ranks.files import read_small

MOST_BYTES = 1 << 20
_MOST_DEEP = 24
_MOST_DIGITS = 40
_WRITE = "JSON, with every key and every text in double quotes"

_SIGN = re.compile(r'["#,]|//|/\*')
_TEXT = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_BLANKS = re.compile(r"\s*")


def read_json_file(path: Path) -> dict[str, Any]:
    """The object that a file of JSON holds; comments and commas behind the last item are allowed.

    Raises:
        ConfigError: the file cannot be read, is too long, or does not hold one object of JSON.
    """
    try:
        data = read_small(path, MOST_BYTES)
    except OSError as error:
        raise ConfigError(
            f"The configuration {path} cannot be read: {error.strerror or error}.",
            write="mics import-config ds_config.json",
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no text (UTF-8).", numbers=f"{error}.", write=_WRITE
        ) from None
    return parse_json(str(path), text)


def parse_json(name: str, text: str) -> dict[str, Any]:
    """The object that a text of JSON holds.

    Args:
        name: what it is called in messages.
        text: JSON, perhaps with comments and commas behind the last item.

    Raises:
        ConfigError: it is no JSON, no object, nested too deep, has a key twice or a number that is
            not finite.
    """
    try:
        table = json.loads(
            _without_last_commas(_without_comments(text)),
            object_pairs_hook=_without_doubles,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
        _check_depth(table)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{name} is not JSON.", numbers=f"{why}.", write=_WRITE) from None
    if not isinstance(table, dict):
        raise ConfigError(
            f"{name} holds no table.", numbers=f"It holds a {type(table).__name__}.", write=_WRITE
        )
    return table


def _without_comments(text: str) -> str:
    """A text with a blank for every comment; once through it, however it is meant."""
    parts, at = [], 0
    while sign := _SIGN.search(text, at):
        parts.append(text[at : sign.start()])
        at = sign.end()
        if sign[0] == '"':
            end = _end_of_text(text, sign.start())
            parts.append(text[sign.start() : end])
            at = end
        elif sign[0] == ",":
            parts.append(",")
        else:
            closing = "*/" if sign[0] == "/*" else "\n"
            end = text.find(closing, at)
            if end < 0 and sign[0] == "/*":
                raise ValueError("a comment does not end")
            at = len(text) if end < 0 else end + (2 if sign[0] == "/*" else 0)
            parts.append(" ")
    return "".join([*parts, text[at:]])


def _without_last_commas(text: str) -> str:
    """A text without the commas that stand before a closing bracket."""
    parts, at = [], 0
    while sign := _SIGN.search(text, at):
        parts.append(text[at : sign.start()])
        at = sign.end()
        if sign[0] == '"':
            at = _end_of_text(text, sign.start())
            parts.append(text[sign.start() : at])
            continue
        blanks = _BLANKS.match(text, at)
        assert blanks is not None
        if sign[0] != "," or text[blanks.end() : blanks.end() + 1] not in ("}", "]"):
            parts.append(sign[0])
    return "".join([*parts, text[at:]])


def _end_of_text(text: str, start: int) -> int:
    found = _TEXT.match(text, start)
    if found is None:
        raise ValueError("a text in quotes does not end on its line")
    return found.end()


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {ascii(key)[:80]} stands twice in one table")
        table[key] = value
    return table


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:_MOST_DIGITS]} is no number that a computer holds")
    return value


def _bounded(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits")
    return int(digits)


def _check_depth(table: Any) -> None:
    level, depth = [table], 0
    while level:
        if depth > _MOST_DEEP:
            raise ValueError(f"it is nested deeper than {_MOST_DEEP} levels")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list):
                below += value
        level, depth = below, depth + 1
