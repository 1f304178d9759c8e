"""Reads a source tree of mics and counts what a reader meets in it; nothing of it is imported.

The measures of `house.py`, and the rules that `tests/test_house.py` holds the tree to.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_LINES, MOST_OF_A_FUNCTION, MOST_PARAMETERS = 400, 60, 8

# Names that begin with an underscore and are nobody's secret.
NOT_PRIVATE = {
    "_exit": "os documents it",
    "_init_weights": "how a transformers model, or a user's in its style, sets its own values",
    "_no_split_modules": "how a transformers model names its blocks",
    "_attn_implementation": "the only name of this entry of a transformers configuration",
}
# Torch's, also where a file of this tree has a name of its own that is spelled so.
TORCH_PRIVATE = {
    "_backward_hooks",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_get_fsdp_state",
    "_grad_fn",
    "_local_tensor",
    "_modules",
    "_non_persistent_buffers_set",
    "_overloadpacket",
    "_parameters",
    "_schema",
    "_spec",
    "_version",
}


# -- reading a tree ------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """One file of a package.

    Attributes:
        path: where it is, from the package on.
        module: its dotted name after the package's; "" for the package itself.
        text: what it says.
        tree: the same, parsed.
    """

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The first name of its path: a folder, or the file itself when it stands loose."""
        return self.path.split("/")[0].removesuffix(".py")


def package_of(source: Path) -> Path:
    """The folder of mics in a checkout; the folder itself if it is that already."""
    return next(p for p in (source / "src" / "mics", source / "mics", source) if p.is_dir())


def read_package(package: Path) -> list[File]:
    """Every Python file of a package, in the order of their paths."""
    files = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        files.append(File(str(path.relative_to(package)), module, text, ast.parse(text)))
    return files


def first_look(package: Path) -> list[str]:
    """What `ls` shows of a package, caches left out."""
    names = (path.name for path in package.iterdir())
    return sorted(name for name in names if name[0] != "." and name != "__pycache__")


def file_map(checkout: Path) -> list[str]:
    """The rooms in the order of ARCHITECTURE's map; empty when there is none."""
    document = checkout / "ARCHITECTURE.md"
    text = document.read_text() if document.exists() else ""
    block = re.search(r"^```(?:text)?\n(src/mics/\n.*?)^```", text, re.DOTALL | re.MULTILINE)
    names = re.findall(r"^  ([\w.]+/?) ", block[1], re.MULTILINE) if block else []
    return [name.removesuffix("/").removesuffix(".py") for name in names]


# -- imports -------------------------------------------------------------------------------------

Edges = dict[str, set[str]]


def imported_names(file: File) -> set[str]:
    """The modules that a file imports or takes names from, in functions and for types too."""
    return {module for module, _ in _imports(file)}


def imports_of(file: File, modules: set[str]) -> set[str]:
    """The modules of mics that a file imports; ``from mics import compat`` imports compat."""
    parts = [[*module.split("."), name] for module, name in _imports(file)]
    return {_longest_module(names[1:], modules) for names in parts if names[0] == "mics"}


def _imports(file: File) -> Iterator[tuple[str, str]]:
    """Pairs of a module and a name taken from it; "" where the module itself is imported."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((_home(file, node), alias.name) for alias in node.names)


def _home(file: File, node: ast.ImportFrom) -> str:
    """What an import takes its names from, a relative one made absolute."""
    if not node.level:
        return node.module or ""
    above = ["mics", *file.path.split("/")][: -node.level]
    return ".".join([*above, *([node.module] if node.module else [])])


def _longest_module(parts: list[str], modules: set[str]) -> str:
    while parts and ".".join(parts) not in modules:
        parts = parts[:-1]
    return ".".join(parts)


def file_edges(files: list[File]) -> Edges:
    """Who imports whom; the package's own file, which loads names when first used, left out."""
    modules = {file.module for file in files}
    return {f.module: imports_of(f, modules) - {f.module} for f in files if f.module}


def room_edges(files: list[File]) -> Edges:
    """The same between rooms."""
    found: Edges = {file.room: set() for file in files if file.module}
    for importer, imported in file_edges(files).items():
        room = importer.split(".")[0]
        found[room] |= {name.split(".")[0] or "__init__" for name in imported} - {room}
    return found


def edges_up(edges: Edges, order: list[str]) -> list[str]:
    """The edges to what does not stand above the importer; what has no place is above nobody."""
    place = {room: position for position, room in enumerate(order)}
    last = len(order)
    return [
        f"{importer} -> {name}"
        for importer, imported in edges.items()
        for name in sorted(imported)
        if place.get(name, last) >= place.get(importer, last)
    ]


def circles(edges: Edges) -> list[list[str]]:
    """The largest sets of at least two that all reach each other (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in edges:
        if node not in index:
            visit(node)
    return found


# -- what stands in the files --------------------------------------------------------------------


def functions(file: File) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The functions of a file with their names, `path:Class.name`."""

    def walk(node: ast.AST, prefix: str) -> Iterator[Any]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}."
                if not isinstance(child, ast.ClassDef):
                    yield f"{file.path}:{prefix}{child.name}", child
            yield from walk(child, name)

    yield from walk(file.tree, "")


def long_functions(files: list[File]) -> dict[str, int]:
    """The functions of more than 60 lines, docstring included, and their lines."""
    lines = {name: node.end_lineno - node.lineno + 1 for f in files for name, node in functions(f)}
    return {name: count for name, count in lines.items() if count > MOST_OF_A_FUNCTION}


def wide_functions(files: list[File]) -> dict[str, int]:
    """The functions of more than 8 parameters, `self` not counted, and their parameters."""
    counts = {name: _num_parameters(node.args) for f in files for name, node in functions(f)}
    return {name: count for name, count in counts.items() if count > MOST_PARAMETERS}


def _num_parameters(arguments: ast.arguments) -> int:
    named = [*arguments.posonlyargs, *arguments.args]
    own = bool(named) and named[0].arg in ("self", "cls")
    stars = [star for star in (arguments.vararg, arguments.kwarg) if star]
    return len(named) - own + len(arguments.kwonlyargs) + len(stars)


def long_files(files: list[File]) -> dict[str, int]:
    """The files of more than 400 lines, and their lines."""
    lines = {file.path: len(file.text.splitlines()) for file in files}
    return {path: count for path, count in lines.items() if count > MOST_LINES}


def host_tests(files: list[File]) -> list[str]:
    """Where a device's type is compared with "cpu", however it is spelled."""
    return [
        f"{file.path}:{node.lineno}"
        for file in files
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Compare) and _compares_device(node)
    ]


def _compares_device(node: ast.Compare) -> bool:
    parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
    words = {part.value for part in parts if isinstance(part, ast.Constant)}
    names = {last_name(part) for part in parts}
    of_device = any(name == "type" or name.endswith("device_type") for name in names)
    return of_device and ("cpu" in words or "HOST" in names)


def last_name(node: ast.AST) -> str:
    """The name after the last dot of an expression; "" when it ends in something else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def private_names(files: list[File]) -> list[str]:
    """The places outside compat.py that use a private name which is not their own file's."""
    return [
        f"{file.path}:{line} {name}"
        for file in files
        if file.path != "compat.py"
        for line, name in sorted(set(_foreign(file)))
    ]


def _foreign(file: File) -> Iterator[tuple[int, str]]:
    own = _names_made_in(file)
    for node in ast.walk(file.tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr not in own or (node.attr in TORCH_PRIVATE and not of_self):
                names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and last_name(node.func) in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value not in own:
                names = [str(name.value)]
        yield from ((node.lineno, n) for n in names if _is_private(n) and n not in NOT_PRIVATE)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def _names_made_in(file: File) -> set[str]:
    """What a file defines: functions, classes, and attributes and names that it assigns."""
    found = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found
