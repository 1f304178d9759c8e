"""A pickle read as data: what it would call stays a record of the call.

DeepSpeed's files name classes of DeepSpeed, of the user and of torch; torch's own restricted loader
takes them only if they are imported, and then makes objects of them. Here no name is ever looked
up: opcodes are read by ``pickletools``, which executes none, lists and tables become lists and
tables, and a call becomes ``Made``. Names outside of ``_KNOWN`` are refused all the same, because
whoever wrote them meant something to happen.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 32 << 20
_MOST_OPCODES = 5_000_000
_MOST_DIMS = 16

_KNOWN = re.compile(
    r"(torch|deepspeed|numpy|transformers|megatron|datetime|pathlib)(\.\w+)* \w+"
    r"|collections (OrderedDict|defaultdict)|argparse Namespace|_codecs encode"
    r"|(copyreg|copy_reg) _reconstructor"
    r"|(builtins|__builtin__) (set|frozenset|object|complex|bytearray|list|dict|tuple)",
    re.ASCII,
)


@dataclass(frozen=True, eq=False)
class Named:
    """A class or function by its name, "module name", which is not looked up."""

    name: str


@dataclass(eq=False, repr=False)
class Made:
    """What a call of something named would have made, and what would have been set on it."""

    named: Named
    arguments: Any
    state: Any = None


@dataclass(frozen=True, eq=False)
class Stored:
    """A storage of a file: the class that names its dtype, its key and its number of values."""

    kind: str
    key: str
    numel: int


@dataclass(frozen=True, eq=False)
class TensorAt:
    """A tensor by its place: values of a storage from ``offset`` on, in row-major order."""

    storage: Stored
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(data: bytes) -> Any:
    """The value of a pickle, its calls as records.

    Raises:
        ValueError: it is no pickle, is too long, or names what no checkpoint needs.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"a pickle of {len(data):,} bytes, {MOST_BYTES:,} at most")
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > _MOST_OPCODES:
                raise ValueError(f"a pickle of more than {_MOST_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return machine.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                raise ValueError(f"the opcode {opcode.name}, which checkpoints do not need")
            step(machine, argument)
    except (IndexError, KeyError, TypeError, OverflowError, UnicodeError) as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__})") from None
    raise ValueError("a pickle without an end")


class _Machine:
    """Stack and memo of the pickle machine."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._marks: list[list[Any]] = []
        self._copied = 0

    def copy(self, number: int) -> None:
        """Count items that are copied, or hashed: a short pickle may ask for it again and again."""
        self._copied += number
        if self._copied > _MOST_OPCODES:
            raise ValueError(f"a pickle that copies more than {_MOST_OPCODES:,} items")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self) -> None:
        self._marks.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        """What stands above the last mark, which goes."""
        items, self.stack = self.stack, self._marks.pop()
        return items

    def remember(self, number: Any) -> None:
        self.memo[int(number)] = self.stack[-1]


# -- steps -----------------------------------------------------------------------------------------


def _append(machine: _Machine, items: Sequence[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Made):
        raise ValueError("items added to what is no list")


def _set_items(machine: _Machine, items: Sequence[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, dict):
        target.update(_table(items))
    elif not isinstance(target, Made):
        raise ValueError("items set in what is no table")


def _add_items(machine: _Machine, items: Sequence[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, set):
        raise ValueError("items added to what is no set")
    target.update(map(_key, items))


def _table(items: Sequence[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _key(value: Any) -> Any:
    """A key of a table; nested tuples are refused, whose hash can take for ever."""
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > _MOST_DIMS or not all(
        isinstance(p, str | bytes | int | float | Named | Made | None) for p in parts
    ):
        raise ValueError(f"a {type(value).__name__} as a key")
    return value


def _name(machine: _Machine, name: str) -> Named:
    if not _KNOWN.fullmatch(name):
        raise ValueError(
            f"the name {ascii(name.replace(' ', '.', 1))[:100]}, which no checkpoint needs"
        )
    return Named(name)


def _push_global(machine: _Machine, name: str) -> None:
    machine.push(_name(machine, name))


def _push_stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
        raise ValueError("a name that is no text")
    machine.push(_name(machine, f"{module} {name}"))


def _call(machine: _Machine, named: Any, arguments: Any) -> None:
    if not isinstance(named, Named):
        raise ValueError(f"a call of a {type(named).__name__}")
    if isinstance(arguments, tuple):
        machine.copy(sum(len(one) for one in arguments if isinstance(one, list | tuple)))
    machine.push(made(named, arguments))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, named = machine.pop(), machine.pop()
    _call(machine, named, arguments)


def _new_with_keywords(machine: _Machine, _: Any) -> None:
    keywords, arguments, named = machine.pop(), machine.pop(), machine.pop()
    _call(machine, named, (arguments, keywords))


def _instance(machine: _Machine, name: str) -> None:
    arguments = tuple(machine.items())
    _call(machine, _name(machine, name), arguments)


def _object(machine: _Machine, _: Any) -> None:
    named, *arguments = machine.items()
    _call(machine, named, tuple(arguments))


def _build(machine: _Machine, _: Any) -> None:
    state, target = machine.pop(), machine.stack[-1]
    if isinstance(target, Made):
        target.state = state
    elif not isinstance(target, dict | TensorAt):
        raise ValueError(f"a state of a {type(target).__name__}")


def _persistent(machine: _Machine, _: Any) -> None:
    """A storage: ("storage", class, key, device, number of values)."""
    parts = machine.pop()
    if not (isinstance(parts, tuple) and len(parts) == 5 and parts[0] == "storage"):
        raise ValueError("a reference to what is no storage")
    _, kind, key, _, numel = parts
    if not isinstance(kind, Named) or not isinstance(key, str) or not _is_size(numel):
        raise ValueError("a storage without class, key or size")
    machine.push(Stored(kind.name, key, numel))


def _pop_mark(machine: _Machine, _: Any) -> None:
    machine.items()


def _drop(machine: _Machine, _: Any) -> None:
    machine.pop()


def _get(machine: _Machine, number: Any) -> None:
    machine.push(machine.memo[int(number)])


def _tuple(length: int) -> Callable[[_Machine, Any], None]:
    def make(machine: _Machine, _: Any) -> None:
        if len(machine.stack) < length:
            raise ValueError("a tuple of what is not there")
        items = tuple(machine.stack[len(machine.stack) - length :])
        del machine.stack[len(machine.stack) - length :]
        machine.push(items)

    return make


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _nothing(machine: _Machine, _: Any) -> None:
    pass


def _argument(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "MARK": lambda machine, _: machine.mark(),
    "POP": _drop,
    "POP_MARK": _pop_mark,
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_LIST": _constant(list),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_SET": _constant(set),
    "EMPTY_TUPLE": _constant(tuple),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.items())),
    "LIST": lambda machine, _: machine.push(machine.items()),
    "DICT": lambda machine, _: machine.push(_table(machine.items())),
    "FROZENSET": lambda machine, _: machine.push(frozenset(map(_key, machine.items()))),
    "APPEND": lambda machine, _: _append(machine, [machine.pop()]),
    "APPENDS": lambda machine, _: _append(machine, machine.items()),
    "SETITEM": lambda machine, _: _set_items(machine, [machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.items()),
    "ADDITEMS": lambda machine, _: _add_items(machine, machine.items()),
    "GLOBAL": _push_global,
    "STACK_GLOBAL": _push_stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "INST": _instance,
    "OBJ": _object,
    "BUILD": _build,
    "BINPERSID": _persistent,
    "PUT": lambda machine, number: machine.remember(number),
    "BINPUT": lambda machine, number: machine.remember(number),
    "LONG_BINPUT": lambda machine, number: machine.remember(number),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
} | dict.fromkeys(
    (
        *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE", "STRING", "BINSTRING"),
        *("SHORT_BINSTRING", "BINBYTES", "BINBYTES8", "SHORT_BINBYTES"),
    ),
    _argument,
)


# -- calls that are understood ---------------------------------------------------------------------


def made(named: Named, arguments: Any) -> Any:
    """Tables, tensors and sizes for the calls that make them; a record for any other."""
    if not isinstance(arguments, tuple):
        raise ValueError("a call without a tuple of arguments")
    if named.name in ("collections OrderedDict", "collections defaultdict"):
        return _ordered(arguments if named.name.endswith("OrderedDict") else ())
    if named.name == "torch Size" and len(arguments) == 1 and _are_sizes(arguments[0]):
        return tuple(arguments[0])
    if named.name == "torch._utils _rebuild_tensor_v2":
        return _tensor(arguments)
    if named.name in ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_v2"):
        if not arguments or not isinstance(arguments[0], TensorAt):
            raise ValueError("a parameter without a tensor")
        return arguments[0]
    if named.name == "torch._tensor _rebuild_from_type_v2":
        if len(arguments) < 3 or not isinstance(arguments[0], Named):
            raise ValueError("a tensor of a type without its values")
        return made(arguments[0], arguments[2])
    return Made(named, arguments)


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if not arguments:
        return {}
    pairs = arguments[0]
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError("an ordered table of no pairs")
    return {_key(key): value for key, value in pairs}


def _tensor(arguments: tuple[Any, ...]) -> TensorAt:
    if len(arguments) < 4:
        raise ValueError("a tensor without its place")
    storage, offset, shape, stride = arguments[:4]
    fits = isinstance(storage, Stored) and _is_size(offset)
    if not fits or not _are_sizes(shape) or not _are_sizes(stride) or len(shape) != len(stride):
        raise ValueError("a tensor whose place is no place")
    return TensorAt(storage, offset, tuple(shape), tuple(stride))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, tuple | list)
        and len(values) <= _MOST_DIMS
        and all(_is_size(value) for value in values)
    )
