"""Which rooms a mesh passes through, from the function that takes it on.

Followed are calls of functions, and makers of classes, that the imports of the caller's file
resolve and that have a parameter for the mesh, for a process group of it, or for a record with one
of these in a field. Who makes an object of a class reaches its methods. Calls of an object's
methods and of functions in variables are not followed: what is found is a lower bound.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

import source as reading

TYPES = {"DeviceMesh", "ProcessGroup"}
Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Place:
    """A function or a class at the top of a file."""

    module: str
    name: str


def rooms_of_mesh(files: list[reading.File], start: str) -> list[str]:
    """The rooms of the functions reached from the function named ``start``, its own included."""
    by_module = {file.module: file for file in files}
    definitions = {
        Place(file.module, node.name): node
        for file in files
        for node in file.tree.body
        if isinstance(node, Definition)
    }
    carriers = TYPES | {
        place.name
        for place, node in definitions.items()
        if isinstance(node, ast.ClassDef) and _fields(node) & TYPES
    }
    open_ = [place for place, node in definitions.items() if place.name == start]
    seen: set[Place] = set()
    while open_:
        place = open_.pop()
        if place in seen:
            continue
        seen.add(place)
        names = _names(by_module[place.module])
        for node in ast.walk(definitions[place]):
            called = _called(node, names, place.module, set(by_module))
            if called in definitions and _parameters(definitions[called]) & carriers:
                open_.append(called)
    return sorted({by_module[place.module].room for place in seen})


def _called(node: ast.AST, names: dict[str, Place], module: str, modules: set[str]) -> Place | None:
    """What a call calls: a name of the file, or a name in a module that the file has imported."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name):
        return names.get(node.func.id, Place(module, node.func.id))
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        home = names.get(node.func.value.id)
        if home is not None:
            inner = f"{home.module}.{home.name}".strip(".")
            return Place(inner, node.func.attr) if inner in modules else None
    return None


def _names(file: reading.File) -> dict[str, Place]:
    """What a file imports from mics, by the names it has there."""
    found = {}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mics":
            home = str(node.module).removeprefix("mics").removeprefix(".")
            for alias in node.names:
                found[alias.asname or alias.name] = Place(home, alias.name)
    return found


def _parameters(node: Definition) -> set[str]:
    """The names of types in the parameters of a function, or of what makes an object of a class."""
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return _types([argument.annotation for argument in arguments])
    makers = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    return _parameters(makers[0]) if makers else _fields(node)


def _fields(node: ast.ClassDef) -> set[str]:
    return _types([entry.annotation for entry in node.body if isinstance(entry, ast.AnnAssign)])


def _types(annotations: list[ast.expr | None]) -> set[str]:
    return {reading.last_name(n) for a in annotations if a is not None for n in ast.walk(a)}
