"""A function as it is, but for one that it calls.

Tools that shard inside of their own functions give no place for another ``fully_shard``. Their
function is copied with other globals, so its own lines run, and neither it nor the module it is
from is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import CodeType, FunctionType
from typing import Any


def calling(function: Callable[..., Any], other: Any, instead: Any) -> Callable[..., Any]:
    """A copy of a function that calls one thing where it would call another.

    Functions of the same package that it calls by name are copied too, where they call it.

    Args:
        function: plain, or a ``functools.partial`` of one.
        other: what it calls, found in its globals by identity.
        instead: what is called.

    Returns:
        ``function`` itself where nothing in it calls ``other`` by a name.
    """
    if isinstance(function, partial):
        inner = calling(function.func, other, instead)
        if inner is function.func:
            return function
        return partial(inner, *function.args, **function.keywords)
    called = _called(function, other)
    reaching: set[Any] = {other}
    while more := {one for one, names in called.items() if reaching & {*names.values()}} - reaching:
        reaching |= more
    copies = {one: _copy(one) for one in called if one in reaching}
    for one, copy in copies.items():
        for name, value in called[one].items():
            if value is other or value in copies:
                copy.__globals__[name] = instead if value is other else copies[value]
    return copies.get(function, function)


def _called(function: Any, other: Any) -> dict[Any, dict[str, Any]]:
    """Functions of one package that call each other, and what each calls by a global name."""
    found: dict[Any, dict[str, Any]] = {}
    coming = [function]
    while coming:
        one = coming.pop()
        if one in found or not isinstance(one, FunctionType):
            continue
        package = one.__module__.partition(".")[0]
        values = {name: one.__globals__.get(name) for name in _names(one.__code__)}
        found[one] = {
            name: value
            for name, value in values.items()
            if value is other
            or (isinstance(value, FunctionType) and value.__module__.partition(".")[0] == package)
        }
        coming += [value for value in found[one].values() if value is not other]
    return found


def _copy(function: Any) -> FunctionType:
    """A function with globals of its own."""
    copy = FunctionType(
        function.__code__,
        dict(function.__globals__),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__, copy.__doc__ = function.__qualname__, function.__doc__
    copy.__module__ = function.__module__
    return copy


def _names(code: CodeType) -> set[str]:
    """The global names and attributes in a function, and in those defined in it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
