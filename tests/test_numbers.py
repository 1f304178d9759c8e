"""Every option that is a number has bounds, and what is out of them is refused at once."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest

from mics.__main__ import main
from mics.commands import VERBS
from mics.commands.numbers import Number, numbers_of, out_of_bounds
from mics.errors import ConfigError
from mics.training.config import TrainConfig
from mics.training.settings import RANGES, check_settings

NEEDED: dict[str, dict[str, Any]] = {
    "Train": {"partition": 2},
    "Dilated": {"partition": 2},
    "Exec": {"node": "node0", "command": ("true",)},
    "Cut": {"node": "node0"},
    "Restore": {"node": "node0"},
}


def configurations() -> Iterator[tuple[str, type]]:
    """The options of every verb and of every verb's verbs; a trainer's are checked as TOML is."""
    for verb in VERBS:
        if verb.name == "train":
            continue
        config: Any = importlib.import_module(f"mics.commands.{verb.options}").Config
        several = get_args(config) if not isinstance(config, type) else (config,)
        for one in several:
            yield verb.name, get_args(one)[0] if get_origin(one) is Annotated else one


NUMBERS = [
    pytest.param(kind, number, id=f"{verb}-{kind.__name__}{number.option}")
    for verb, kind in configurations()
    for number in numbers_of(kind)
]


def made(kind: type, path: tuple[str, ...] = (), value: Any = None) -> Any:
    """The options with one of them changed."""
    if kind.__name__ in NEEDED:
        config = kind(**NEEDED[kind.__name__])
    elif any(f.default is f.default_factory for f in dataclasses.fields(kind)):
        config = kind(Path("a"), Path("b"))
    else:
        config = kind()
    return changed(config, path, value) if path else config


def changed(config: Any, path: tuple[str, ...], value: Any) -> Any:
    inner = value if len(path) == 1 else changed(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: inner})


def test_numbers_are_found_in_every_verb_that_has_some() -> None:
    found = [number.option for _, kind in configurations() for number in numbers_of(kind)]
    assert len(found) > 40
    for option in ("--nodes", "--workload.rows", "--dilation.block-bytes", "--timeout", "--memory"):
        assert option in found
    assert "--where.memory" not in found  # as it is written


@pytest.mark.parametrize(("kind", "number"), NUMBERS)
def test_every_number_has_bounds_and_is_refused_out_of_them(kind: type, number: Number) -> None:
    assert number.bounds is not None
    assert math.isfinite(number.bounds.most)
    default = made(kind)
    assert out_of_bounds(default) is None
    several = isinstance(value_of(default, number.path), tuple)
    bad: list[float] = [-1, number.bounds.least - 1, number.bounds.most + 1, 10**30]
    if number.bounds.most > 1e16 and not number.whole:
        bad.remove(number.bounds.most + 1)  # rounded, it is the largest
    bad += [] if number.whole else [math.nan, math.inf, -math.inf]
    for value in bad:
        config = made(kind, number.path, (value,) if several else value)
        words = out_of_bounds(config)
        assert words is not None, value
        assert words.startswith(f"{number.option} must be a ")
        assert words.endswith(f" {number.bounds}, got {value}.")
    for value in (number.bounds.least, number.bounds.most):
        assert out_of_bounds(made(kind, number.path, (value,) if several else value)) is None


def value_of(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "plan --micro-batch 1 99999999999",
            "--micro-batch must be a whole number from 1 to 65,536",
        ),
        (
            "plan --memory 80 --intra 9 --inter 9 --gpus-per-node 0",
            "--gpus-per-node must be a whole",
        ),
        ("plan --tokens inf", "--tokens must be a number from 1 to 1e+18, got inf"),
        ("simulate --micro-steps -1", "--micro-steps must be a whole number from 1 to 1,048,576"),
        ("simulate --latency -inf", "--latency must be a number from 1e-06 to 1e+06, got -inf"),
        ("bench collectives --gpus-per-node 0", "--gpus-per-node must be a whole number from 1"),
        ("bench train --partition -2", "--partition must be a whole number from 1"),
        ("bench train --partition 2 --workload.rows 0", "--workload.rows must be a whole number"),
        ("bench dilated --partition 2 --dilation.blocks 0", "--dilation.blocks must be a whole"),
        ("doctor --gpus-per-node 0", "--gpus-per-node must be a whole number from 1"),
        ("doctor --timeout nan", "--timeout must be a number from 0.001 to 86,400, got nan"),
        ("lab up --nodes 0", "--nodes must be a whole number from 1 to 250, got 0"),
        (
            "lab run --gpus-per-node 65 -- true",
            "--gpus-per-node must be a whole number from 1 to 64",
        ),
    ],
)
def test_every_verb_checks_its_numbers_first(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) in (1, 2)
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""


def test_an_option_without_bounds_is_found() -> None:
    names = [("count", int, 1), ("name", str, "a"), ("flag", bool, False)]
    (count,) = numbers_of(dataclasses.make_dataclass("Options", names))
    assert (count.option, count.bounds, count.whole) == ("--count", None, True)


@pytest.mark.parametrize("number", list(numbers_of(TrainConfig)), ids=lambda number: number.option)
def test_every_number_of_a_run_has_bounds_and_is_refused_out_of_them(number: Number) -> None:
    assert ".".join(number.path) in {name for name, *_ in RANGES}
    check_settings(TrainConfig())
    several = isinstance(value_of(TrainConfig(), number.path), tuple)
    for value in [-1, 10**30] if number.whole else [-1.0, math.nan, math.inf]:
        config = changed(TrainConfig(), number.path, (value, value) if several else value)
        with pytest.raises(ConfigError, match=rf"{'.'.join(number.path)} is out of range"):
            check_settings(config)
