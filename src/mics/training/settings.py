"""Options from a TOML file and back: unknown keys are errors, what is printed can be read again."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import reprlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mics.errors import ConfigError
from mics.training.config import TrainConfig

_ADAPTER = TypeAdapter(TrainConfig)
_MOST = 10**15  # of anything that is counted
_MOST_BYTES = 256 << 10  # of a configuration
# The parser takes the square of their number for the parts of a key.
_DEEP = re.compile(rb"(\.[ \t]*[\w\x22\x27-]+[ \t]*){64}")


def read_settings(path: Path) -> TrainConfig:
    """Read a run's options from a TOML file; what it leaves out has its default.

    Raises:
        ConfigError: no such file, not TOML, an unknown table or key (with the nearest name), or a
            value of another type.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(
                f"The configuration {path} is too long.",
                numbers=f"It has more than {_MOST_BYTES:,} bytes.",
                write="mics train <config.toml>; `mics train --help` lists the options",
            )
        if _DEEP.search(data):
            raise RecursionError("a key has more than 64 parts")
        return _settings_in(path, tomllib.loads(data.decode()))
    except OSError as error:
        raise ConfigError(
            f"The configuration {path} cannot be read: {error.strerror}.",
            write="mics train <config.toml>; `mics train --help` lists the options",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not TOML.", numbers=f"{error}.", write='[table], then key = "value"'
        ) from None


def _settings_in(path: Path, table: dict[str, Any]) -> TrainConfig:
    _check_names(path, table)
    try:
        return _ADAPTER.validate_python(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2])
        raise _does_not_fit(path, key, first["input"], first["msg"]) from None


def as_plain(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The options as nested plain values; those left to be found out (None) are left out."""
    return {
        table.name: {
            key: _plain(value)
            for key, value in dataclasses.asdict(getattr(config, table.name)).items()
            if value is not None
        }
        for table in dataclasses.fields(config)
    }


def as_toml(config: TrainConfig) -> str:
    """The options as TOML that ``read_settings`` reads back to the same."""
    tables = [
        "\n".join([f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in keys.items())])
        for name, keys in as_plain(config).items()
    ]
    return "\n\n".join(tables) + "\n"


def check_settings(config: TrainConfig) -> None:
    """Check values that no type describes, before anything starts.

    Raises:
        ConfigError: names the option, its value and what it may be.
    """
    values = {
        f"{table}.{key}": value
        for table, keys in as_plain(config).items()
        for key, value in keys.items()
    }
    for name in ("source", "weight", "field"):
        values[f"data.sources.{name}"] = [
            one[name] for one in values["data.sources"] if name in one
        ]
    del values["data.sources"]
    for name, value in values.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, float) and not math.isfinite(part):
                raise _out_of_range(name, value, "a number that is finite")
            if isinstance(part, str) and not _can_be_written(part):
                raise _out_of_range(name, ascii(value), "letters, no NUL")
    for name, fits, allowed in RANGES:
        if name in values and not fits(values[name]):
            raise _out_of_range(name, values[name], allowed)


def check_source(config: TrainConfig, *, must_be_named: bool = False) -> None:
    """Check that a run says what it trains on.

    Args:
        config: of the run.
        must_be_named: the default, Python's own source, is refused too.

    Raises:
        ConfigError: it does not, or leaves it to be filled in, as what ``mics plan --toml`` writes.
    """
    source = config.data.source
    if source or config.data.sources or (source is None and not must_be_named):
        return
    raise ConfigError(
        "The run does not say what it trains on.",
        numbers="data.source is empty."
        if source == ""
        else "There is no data.source: the source of Python itself would be trained on.",
        write='source = "<files, folder, glob, hub:owner/name, or tokens of mics tokenize>" in '
        '[data], or source = "stdlib" to try the run on the source of Python',
    )


def _out_of_range(name: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(
        f"{name} is out of range.",
        numbers=f"{name} = {tuple(value) if isinstance(value, list) else value}.",
        write=f"{name}: {allowed}",
    )


def _within(low: int, high: int = _MOST) -> tuple[Callable[[Any], bool], str]:
    words = f"{low} or more" if high == _MOST else f"{low:,} to {high:,}"
    return lambda value: low <= value <= high, words


_SHARE = (lambda value: 0 <= value < 1, "a share of at least 0 and below 1")
_SPIKE = (lambda value: value == 0 or value > 1, "0 (off) or above 1")
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("run.steps", *_within(1)),
    ("run.epochs", lambda value: 0 < value <= 10**6, "above 0, 10^6 at most"),
    ("run.seed", lambda value: 0 <= value < 2**63, "0 to 2^63 - 1"),
    ("model.router_loss", lambda value: value >= 0, "0 or more"),
    (
        "data.sources.weight",
        lambda weights: all(0 < weight <= _MOST for weight in weights),
        "above 0",
    ),
    ("data.sequence", lambda value: value == 0 or 2 <= value <= 2**24, "0, or 2 to 2^24"),
    ("data.held_out", *_SHARE),
    ("data.limit", *_within(0)),
    ("data.masked", lambda value: 0 < value < 1, "a share between 0 and 1"),
    ("data.vocabulary", lambda value: 260 <= value <= 2**24, "260 (256 bytes) to 2^24"),
    ("lora.rank", *_within(0, 2**16)),
    ("lora.alpha", lambda value: value > 0, "above 0"),
    ("lora.dropout", *_SHARE),
    ("batch.global_batch", *_within(1, 2**31)),
    ("batch.micro_batch", *_within(1, 2**20)),
    ("batch.micro_steps", *_within(1, 2**31)),
    ("optimizer.learning_rate", lambda value: value > 0, "above 0"),
    ("optimizer.warmup", *_within(0)),
    ("optimizer.decayed", lambda value: 0 < value <= 1, "above 0, 1 at most"),
    ("optimizer.final", lambda value: 0 <= value <= 1, "0 to 1"),
    ("optimizer.weight_decay", lambda value: value >= 0, "0 or more"),
    ("optimizer.betas", lambda value: all(0 <= beta < 1 for beta in value), _SHARE[1]),
    ("optimizer.eps", lambda value: value > 0, "above 0"),
    ("optimizer.clip", lambda value: value >= 0, "0 (off) or more"),
    ("optimizer.spike_loss", *_SPIKE),
    ("optimizer.spike_norm", *_SPIKE),
    ("optimizer.bad_steps", *_within(1)),
    ("optimizer.rollbacks", *_within(0)),
    ("parallel.ranks", *_within(1, 2**20)),
    ("parallel.partition", lambda v: v == "auto" or 1 <= v <= 2**20, "auto, or 1 to 1,048,576"),
    ("parallel.gpus_per_node", *_within(1, 2**20)),
    ("evaluation.every", *_within(0)),
    ("evaluation.sequences", *_within(0)),
    ("evaluation.sample", *_within(0)),
    ("checkpoint.every", *_within(0)),
    ("checkpoint.keep", *_within(0)),
    ("checkpoint.memory_every", *_within(1)),
    ("log.every", *_within(1)),
)
"""What every option that is a number may be: its name, a test, and the same in words."""


def _can_be_written(text: str) -> bool:
    """Whether it may be a name of a file, and be printed."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _check_names(path: Path, table: dict[str, Any]) -> None:
    tables = get_type_hints(TrainConfig)
    for name, keys in table.items():
        if name not in tables:
            raise _unknown(path, f"table [{name}]", name, list(tables))
        if not isinstance(keys, dict):
            raise ConfigError(
                f"{path}: {name} is a table, not a value.",
                numbers=f"{name} = {reprlib.repr(keys)}.",
                write=f"[{name}] on a line of its own, its keys below",
            )
        known = [field.name for field in dataclasses.fields(tables[name])]
        for key in keys:
            if key not in known:
                raise _unknown(path, f"key {name}.{key}", key, known)
            hint = get_type_hints(tables[name])[key]
            if dataclasses.is_dataclass(inner := (*get_args(hint), None)[0]):
                _check_entries(path, f"{name}.{key}", keys[key], inner)
            else:
                _check_kind(path, f"{name}.{key}", keys[key], hint)


def _check_entries(path: Path, name: str, entries: Any, kind: Any) -> None:
    """The tables of an array of tables have the keys of their dataclass."""
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise ConfigError(
            f"{path}: {name} is an array of tables.",
            numbers=f"{name} = {reprlib.repr(entries)}.",
            write=f"[[{name}]] on a line of its own for each, its keys below",
        )
    known, hints = [field.name for field in dataclasses.fields(kind)], get_type_hints(kind)
    for one in entries:
        for key in one:
            if key not in known:
                raise _unknown(path, f"key {name}.{key}", key, known)
            _check_kind(path, f"{name}.{key}", one[key], hints[key])


def _check_kind(path: Path, key: str, value: Any, hint: Any) -> None:
    """A truth value is no number, and a text of digits is none: pydantic would take them."""
    kinds = _kinds(hint)
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, bool) and bool not in kinds:
            raise _does_not_fit(path, key, value, "A truth value stands where none belongs")
        if isinstance(part, str) and kinds <= {int, float, bool, type(None)}:
            why = "Input should be a valid integer, number or truth value, without quotes"
            raise _does_not_fit(path, key, value, why)
        if isinstance(part, int | float) and not isinstance(part, bool) and kinds == {bool}:
            raise _does_not_fit(path, key, value, "A number stands where true or false belongs")


def _kinds(hint: Any) -> set[type]:
    """The types that a hint is made of."""
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    parts = [part for part in get_args(hint) if part is not Ellipsis]
    return set().union(*map(_kinds, parts)) if parts else {hint}


def _does_not_fit(path: Path, key: str, value: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: {key} has a value that does not fit.",
        numbers=f"{key} = {reprlib.repr(_plain(value))}: {why}.",
        write=f"{key} as `mics train --help` describes it",
    )


def _unknown(path: Path, what: str, name: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.4)
    return ConfigError(
        f"{path}: there is no {what}" + (f"; did you mean {near[0]!r}?" if near else "."),
        numbers=f"There are {', '.join(known)}.",
        write=near[0] if near else "one of these",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    """A TOML value. JSON's strings, numbers, booleans and arrays of them are TOML's too."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
