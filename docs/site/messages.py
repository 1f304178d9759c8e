"""Every message that mics raises on purpose, read from the source: what is wrong, numbers, fix.

    python docs/site/messages.py      # prints them

A message is a call of one of the kinds of ``errors.py``. What is put into it at run time is shown
by its name, ``<partition>``. Calls that pass on the words of another error are no messages.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "mics"
PLAIN = ("str", "repr", "sorted", "list", "tuple", "set", "map", "max", "min", "sum", "abs")
Names = dict[str, list[ast.expr]]


@dataclass(frozen=True)
class Message:
    """One error, as the source has it.

    Args:
        kind: the class that is raised.
        what: what is wrong.
        numbers: the values that show it; may be empty.
        write: what to write instead; may be empty.
        place: the file, below ``src/mics``, and the line.
    """

    kind: str
    what: str
    numbers: str
    write: str
    place: str


def kinds(package: Path = PACKAGE) -> dict[str, str]:
    """Return the kinds of errors, each with the first line of its documentation."""
    classes = [
        node
        for path in (package / "errors.py", *sorted(package.rglob("*.py")))
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef)
    ]
    found: dict[str, str] = {"MicsError": ""}
    for node in classes:
        if node.name in found or found.keys() & {_last(base) for base in node.bases}:
            found[node.name] = (ast.get_docstring(node) or "").splitlines()[0]
    return found


def messages(package: Path = PACKAGE) -> list[Message]:
    """Return all messages, in the order of the files."""
    return [one for call in calls(package) if (one := message(*call)) is not None]


def calls(package: Path = PACKAGE) -> Iterator[tuple[str, ast.Call, Names]]:
    """Yield every call of a kind: its place, itself, and what the names in it may stand for."""
    known = kinds(package)
    for path in sorted(package.rglob("*.py")):
        tree = parse(path)
        callers = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call, names in _calls_below(tree, {}, callers):
            if _last(call.func) in known:
                yield f"{path.relative_to(package)}:{call.lineno}", call, names


def message(place: str, call: ast.Call, names: Names) -> Message | None:
    """Put a message together; None where the words are those of another error."""
    given = {word.arg: word.value for word in call.keywords if word.arg}
    what = text(call.args[0], names) if call.args else ""
    if re.fullmatch(r"<[^<>]*>|", what):
        return None
    numbers, write = (text(given[n], names) if n in given else "" for n in ("numbers", "write"))
    return Message(_last(call.func), what, numbers, write, place)


def text(node: ast.expr, names: Names) -> str:
    """Write an expression as the words it makes, with names in <> for what is not known."""
    match node:
        case ast.Constant(value=value):
            return "" if value is None else str(value)
        case ast.JoinedStr(values=values):
            return "".join(text(value, names) for value in values)
        case ast.FormattedValue(value=value):
            return text(value, names)
        case ast.BinOp(left=left, op=ast.Add(), right=right) if _words(left) or _words(right):
            return text(left, names) + text(right, names)
        case ast.IfExp(body=body, orelse=orelse):
            both = [text(body, names), text(orelse, names)]
            return "/".join(part for part in both if part)
        case ast.Name(id=name) if name in names:
            rest = {n: v for n, v in names.items() if n != name}
            return " / ".join(dict.fromkeys(text(value, rest) for value in names[name]))
    return f"<{_called(node)}>"


def parse(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _calls_below(
    scope: ast.AST, names: Names, callers: list[ast.Call]
) -> Iterator[tuple[ast.Call, Names]]:
    """Yield calls with the sentences that the names around them were assigned or given."""
    names = names | _given(scope, callers) | _assigned(scope)
    for node in _inside(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _calls_below(node, names, callers)
        elif isinstance(node, ast.Call):
            yield node, names


def _given(scope: ast.AST, callers: list[ast.Call]) -> Names:
    """Find the sentences that a function's parameters are given in its own file."""
    if not isinstance(scope, ast.FunctionDef):
        return {}
    found: Names = {}
    for call in (call for call in callers if _last(call.func) == scope.name):
        places = [arg.arg for arg in scope.args.args]
        pairs = [*zip(places, call.args, strict=False), *((w.arg, w.value) for w in call.keywords)]
        for name, value in pairs:
            if name and _words(value):
                found.setdefault(name, []).append(value)
    return found


def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield what stands in a scope, but not what stands in the scopes inside of it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _inside(child)


def _assigned(scope: ast.AST) -> Names:
    found: Names = {}
    for node in _inside(scope):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name) and _words(value):
                    found.setdefault(name.id, []).append(value)
    return found


def _words(node: ast.expr) -> bool:
    """Whether an expression makes words by itself."""
    match node:
        case ast.Constant(value=str()) | ast.JoinedStr():
            return True
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _words(left) or _words(right)
        case ast.IfExp(body=body, orelse=orelse):
            return _words(body) or _words(orelse)
    return False


def _called(node: ast.expr) -> str:
    """What an expression is called, in a word or two."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").replace("_", " ")
        case ast.Call(func=ast.Attribute(attr="join"), args=[what, *_]):
            return _called(what)
        case ast.Call(func=ast.Name(id="len"), args=[what]):
            return f"number of {_called(what)}"
        case ast.Call(func=ast.Name(id=name), args=[*_, what]) if name in PLAIN:
            return _called(what)
        case ast.Call(func=func):
            return _called(func)
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return _called(value)
        case ast.GeneratorExp(generators=[one, *_]) | ast.ListComp(generators=[one, *_]):
            return _called(one.iter)
        case ast.BinOp(left=left) | ast.BoolOp(values=[left, *_]):
            return _called(left)
    return "..."


def _last(node: ast.expr) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def main() -> None:
    """Print all messages."""
    for one in messages():
        print(f"{one.kind} ({one.place})\n  {one.what}")
        print("".join(f"    {line}\n" for line in (one.numbers, one.write) if line))


if __name__ == "__main__":
    main()
