"""Options from a TOML file and back: unknown keys are errors, what is printed can be read again."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mics.errors import ConfigError
from mics.ranks.files import read_small
from mics.training.config import TrainConfig

_ADAPTER = TypeAdapter(TrainConfig)


def read_settings(path: Path) -> TrainConfig:
    """Read a run's options from a TOML file; what it leaves out has its default.

    Raises:
        ConfigError: no such file, not TOML, an unknown table or key (with the nearest name), or a
            value of another type.
    """
    try:
        table = tomllib.loads(read_small(path).decode())
    except OSError as error:
        raise ConfigError(
            f"The configuration {path} cannot be read: {error.strerror}.",
            write="mics train <config.toml>; `mics train --help` lists the options",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not TOML.", numbers=f"{error}.", write='[table], then key = "value"'
        ) from None
    _check_names(path, table)
    try:
        return _ADAPTER.validate_python(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2])
        raise ConfigError(
            f"{path}: {key} has a value that does not fit.",
            numbers=f"{key} = {_plain(first['input'])!r}: {first['msg']}.",
            write=f"{key} as `mics train --help` describes it",
        ) from None


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
    run, data, optimizer = config.run, config.data, config.optimizer
    share, at_least_0 = "a share of at least 0 and below 1", "0 or more"
    wrong = [
        ("run.steps", run.steps, run.steps >= 1, "1 or more"),
        ("run.seed", run.seed, 0 <= run.seed < 2**63, "0 or more"),
        ("data.sequence", data.sequence, data.sequence == 0 or data.sequence > 1, "0, or 2 up"),
        ("data.held_out", data.held_out, 0 <= data.held_out < 1, share),
        ("data.limit", data.limit, data.limit >= 0, at_least_0),
        ("data.masked", data.masked, 0 < data.masked < 1, "a share between 0 and 1"),
        ("data.vocabulary", data.vocabulary, data.vocabulary >= 260, "260 (256 bytes) or more"),
        (
            "optimizer.learning_rate",
            optimizer.learning_rate,
            0 < optimizer.learning_rate < math.inf,
            "above 0",
        ),
        ("optimizer.warmup", optimizer.warmup, optimizer.warmup >= 0, at_least_0),
        ("optimizer.final", optimizer.final, 0 <= optimizer.final <= 1, "0 to 1"),
        ("optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0, at_least_0),
        ("optimizer.betas", optimizer.betas, all(0 <= b < 1 for b in optimizer.betas), share),
        ("optimizer.eps", optimizer.eps, optimizer.eps > 0, "above 0"),
        ("optimizer.clip", optimizer.clip, optimizer.clip >= 0, "0 (off) or more"),
        ("optimizer.bad_steps", optimizer.bad_steps, optimizer.bad_steps >= 1, "1 or more"),
        ("evaluation.every", config.evaluation.every, config.evaluation.every >= 0, at_least_0),
        (
            "evaluation.sequences",
            config.evaluation.sequences,
            config.evaluation.sequences >= 0,
            at_least_0,
        ),
        ("evaluation.sample", config.evaluation.sample, config.evaluation.sample >= 0, at_least_0),
        ("checkpoint.every", config.checkpoint.every, config.checkpoint.every >= 0, at_least_0),
        ("checkpoint.keep", config.checkpoint.keep, config.checkpoint.keep >= 0, at_least_0),
        ("log.every", config.log.every, config.log.every >= 1, "1 or more"),
    ]
    for name, value, fits, allowed in wrong:
        if not fits:
            raise ConfigError(
                f"{name} is out of range.",
                numbers=f"{name} = {value}.",
                write=f"{name}: {allowed}",
            )


def _check_names(path: Path, table: dict[str, Any]) -> None:
    tables = get_type_hints(TrainConfig)
    for name, keys in table.items():
        if name not in tables:
            raise _unknown(path, f"table [{name}]", name, list(tables))
        if not isinstance(keys, dict):
            raise ConfigError(
                f"{path}: {name} is a table, not a value.",
                numbers=f"{name} = {keys!r}.",
                write=f"[{name}] on a line of its own, its keys below",
            )
        known = [field.name for field in dataclasses.fields(tables[name])]
        for key in keys:
            if key not in known:
                raise _unknown(path, f"key {name}.{key}", key, known)


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
    return list(value) if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    """A TOML value. JSON's strings, numbers, booleans and arrays of them are TOML's too."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
