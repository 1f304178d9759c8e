"""What becomes of another tool's configuration, field by field; none is left without a word."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from mics.errors import ConfigError

Kind = Literal["truth", "count", "number", "text", "numbers", "any"]

AUTO = "auto"
"""What Hugging Face's integration of DeepSpeed fills in from its own arguments."""

_WORDS: dict[str, str] = {
    "truth": "true or false",
    "count": "a whole number",
    "number": "a number",
    "text": "a text in quotes",
    "numbers": "a list of numbers",
    "any": "anything",
}
_EMPTY = "empty: as if it were not there"
_MOST_COUNT = 10**19
_MOST_SHOWN = 60


class Verdict(Enum):
    """What became of a field."""

    CONVERTED = "converted"
    NEAREST = "nearest"
    FILLED_IN = "left to you"
    NO_COUNTERPART = "no counterpart"
    NOT_NEEDED = "not needed"
    UNKNOWN = "unknown"
    ABSENT = "not given"


@dataclass(frozen=True)
class Row:
    """A field, its value as text, and what became of it: our option, or why there is none."""

    field: str
    value: str
    verdict: Verdict
    ours: str


@dataclass(frozen=True)
class Rule:
    """What is known beforehand of a field that becomes no option of ours."""

    verdict: Verdict
    why: str
    kind: Kind = "any"


@dataclass
class Conversion:
    """Options for ``mics train``, keywords of a loop of one's own, and a row for every field.

    Args:
        source: what the configuration is of.
        ranks: ranks of the job, where they are known.
        gpus_per_node: ranks of a node, where they are known.
    """

    source: str
    ranks: int | None = None
    gpus_per_node: int | None = None
    settings: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Values by table and key of ``mics train``."""
    open: dict[tuple[str, str], str] = field(default_factory=dict)
    """Options that the user has to fill in, and from where."""
    optimizer: list[str] | None = None
    """Lines that make the optimizer in a loop of one's own, where it is not ``mics train``'s."""
    loop_keywords: dict[str, str] = field(default_factory=dict)
    """Keywords of ``mics.shard`` that are not options of ``mics train``, as source text."""
    rows: list[Row] = field(default_factory=list)

    def set(self, name: str, value: Any) -> None:
        """Set ``table.key`` of ``mics train``."""
        table, _, key = name.partition(".")
        self.settings[table, key] = value

    def leave_open(self, name: str, why: str) -> None:
        """Leave ``table.key`` to the user, who is told from where to take it."""
        table, _, key = name.partition(".")
        if (table, key) not in self.settings:
            self.open[table, key] = why

    def say(self, path: str, value: Any, verdict: Verdict, ours: str) -> None:
        """Add a row."""
        self.rows.append(Row(path, shown(value), verdict, ours))

    def absent(self, path: str, ours: str) -> None:
        """Add a row of a field that is not there, whose default matters."""
        self.rows.append(Row(path, "", Verdict.ABSENT, ours))


class Fields:
    """The fields of a configuration, each of which is taken exactly once.

    Args:
        tree: nested tables; lists and empty tables count as values.
        sections: names that have to be tables, with dots between levels.
        write: what messages say to write instead of what is wrong.
    """

    def __init__(self, tree: Mapping[str, Any], sections: Collection[str], write: str) -> None:
        self._left: dict[tuple[str, ...], Any] = dict(_leaves(tree, ()))
        self._write = write
        self.nulls: list[str] = []
        """Fields that were taken and hold null."""
        for path, value in self._left.items():
            if ".".join(path) in sections and value is not None and value != {}:
                raise self.refuse(path, value, "a table")

    def has(self, path: str) -> bool:
        """Whether a field is there, with another value than null, and was not taken yet."""
        return self._left.get(tuple(path.split("."))) is not None

    def below(self, section: str) -> list[str]:
        """The fields of a section that were not taken yet."""
        above = tuple(section.split("."))
        return [spelled(path) for path in self._left if path[: len(above)] == above]

    def take(self, path: str, kind: Kind) -> Any:
        """The value of a field, of the right kind, ``AUTO`` or ``None``.

        Raises:
            ConfigError: it is of another kind.
        """
        key = tuple(path.split("."))
        self._check_no_table(key)
        there = key in self._left
        value = self._left.pop(key, None)
        if there and value is None:
            self.nulls.append(path)
        return self._checked(key, value, kind)

    def rest(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Whatever was not taken, path and value."""
        while self._left:
            key = next(iter(self._left))
            yield key, self._left.pop(key)

    def rest_of(self, section: str) -> Iterator[tuple[str, Any]]:
        """Whatever was not taken of a section, path and value."""
        above = tuple(section.split("."))
        for key in [path for path in self._left if path[: len(above)] == above]:
            yield spelled(key), self._left.pop(key)

    def peek(self, path: str) -> Any:
        """The value of a field that stays to be taken."""
        return self._left.get(tuple(path.split(".")))

    def check(self, path: tuple[str, ...], value: Any, kind: Kind) -> None:
        """Raise where a value is of another kind."""
        self._checked(path, value, kind)

    def _check_no_table(self, key: tuple[str, ...]) -> None:
        for path, value in self._left.items():
            if path[: len(key)] == key and len(path) > len(key):
                raise self.refuse(key, {path[len(key)]: value}, "a value, no table")

    def _checked(self, path: tuple[str, ...], value: Any, kind: Kind) -> Any:
        if value is None or kind == "any" or (isinstance(value, str) and value == AUTO):
            return value
        if kind == "count" and isinstance(value, float) and value.is_integer():
            value = int(value)  # 5e8 is a usual way to write a size
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = {
            "truth": isinstance(value, bool),
            "count": number and isinstance(value, int) and abs(value) <= _MOST_COUNT,
            "number": number,
            "text": isinstance(value, str),
            "numbers": isinstance(value, list)
            and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value),
        }[kind]
        if not fits:
            raise self.refuse(path, value, _WORDS[kind])
        return value

    def refuse(self, path: tuple[str, ...] | str, value: Any, words: str) -> ConfigError:
        """The error for a value that does not fit."""
        name = path if isinstance(path, str) else spelled(path)
        return ConfigError(
            f"{name} has a value that does not fit.",
            numbers=f"{name} = {shown(value)}.",
            write=f"{name}: {words}; {self._write}",
        )


def account_for_rest(
    conversion: Conversion, fields: Fields, rules: Mapping[str, Rule], known: Collection[str]
) -> None:
    """Give every field that was not taken its row: by a rule, or as unknown.

    Args:
        conversion: gets the rows.
        fields: what is left of them.
        rules: by path; ``section.*`` is for whatever stands in a section.
        known: further names that a misspelt one may have meant.

    Raises:
        ConfigError: a value is of another kind than its rule says.
    """
    for name in fields.nulls:
        conversion.say(name, None, Verdict.NOT_NEEDED, _EMPTY)
    for path, value in fields.rest():
        name = spelled(path)
        rule = _rule_for(path, rules)
        if value is None or value == {}:
            conversion.say(name, value, Verdict.NOT_NEEDED, _EMPTY)
        elif rule is not None:
            fields.check(path, value, rule.kind)
            conversion.say(name, value, rule.verdict, rule.why)
        else:
            names = [*known, *(name for name in rules if not name.endswith("*"))]
            near = difflib.get_close_matches(".".join(path), names, 1, cutoff=0.8)
            hint = f"; did you mean {near[0]}?" if near else ""
            words = f"{conversion.source} has no such field that mics knows of{hint}"
            conversion.say(name, value, Verdict.UNKNOWN, words)


def _rule_for(path: tuple[str, ...], rules: Mapping[str, Rule]) -> Rule | None:
    if any("." in part or "*" in part for part in path):
        return None
    name = ".".join(path)
    if name in rules:
        return rules[name]
    for length in range(len(path) - 1, 0, -1):
        rule = rules.get(".".join(path[:length]) + ".*")
        if rule is not None:
            return rule
    return rules.get(f"{name}.*")


def _leaves(
    table: Mapping[str, Any], above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def spelled(path: tuple[str, ...]) -> str:
    """A path as text that stays on its line, whatever its keys are."""
    parts = [part if part.isidentifier() and part.isascii() else ascii(part) for part in path]
    name = ".".join(parts)
    return name if len(name) <= 2 * _MOST_SHOWN else name[: 2 * _MOST_SHOWN] + "..."


def shown(value: Any) -> str:
    """A value as JSON that stays on its line and is not too long to be read."""
    text = json.dumps(value).replace("\x7f", "\\u007f")
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."
