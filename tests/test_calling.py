"""A function as it is, but for one that it calls."""

from __future__ import annotations

from functools import partial
from typing import Any

from mics.integrations.calling import calling


def _torchs(*args: Any, **kwargs: Any) -> Any:
    return "torch's", args, kwargs


def _ours(*args: Any, **kwargs: Any) -> Any:
    return "ours", args, kwargs


def _apply(model: str, *, size: int = 1) -> Any:
    return [_torchs(model, size=size)]


def _inside(model: str) -> Any:
    def each() -> Any:
        return _apply(model, size=2)

    return each()


def _counted(number: int) -> Any:
    return [_torchs(number), *(_counted(number - 1) if number else [])]


def _other(model: str) -> Any:
    return len(model)


def test_it_is_called_instead_through_other_functions_and_in_functions_inside() -> None:
    copy = calling(_inside, _torchs, _ours)
    assert copy("model") == [("ours", ("model",), {"size": 2})]
    assert calling(_apply, _torchs, _ours)("model") == [("ours", ("model",), {"size": 1})]
    assert copy.__name__ == "_inside"


def test_the_function_itself_is_left_as_it_was() -> None:
    calling(_inside, _torchs, _ours)("model")
    assert _inside("model") == [("torch's", ("model",), {"size": 2})]
    assert _apply.__globals__["_torchs"] is _torchs


def test_a_partial_keeps_its_arguments_and_a_function_that_calls_itself_stays_itself() -> None:
    copy = calling(partial(_apply, size=3), _torchs, _ours)
    assert copy("model") == [("ours", ("model",), {"size": 3})]
    told = calling(_counted, _torchs, _ours)(2)
    assert [name for name, *_ in told] == ["ours", "ours", "ours"]


def test_what_calls_neither_is_returned() -> None:
    assert calling(_other, _torchs, _ours) is _other
