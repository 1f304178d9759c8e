"""A script, read for a machine of processors: Gloo in the place of NCCL, the host of a GPU.

[Note: read otherwise]
``init_process_group("nccl")`` fails where there is no GPU, before anything can be seen. Neither the
script nor torch is changed: the text of the script, and of what it imports from its own folder, is
parsed, and the backend it asks for goes through a function of ours on its way to torch. Only a
script that has failed because it wants GPUs by name is read once more, with the host in their
place. What was read otherwise is said.
"""

from __future__ import annotations

import ast
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from mics.lab.checking.stand_ins import is_gpu, tell
from mics.ranks.device import HOST

_GROUPS = ("init_process_group", "new_group", "new_subgroups", "split_group")
_OF_GPUS = ("device_ids", "output_device")
_NAMES = {"backend": "_mics_backend", "device": "_mics_device", "processors": "_mics_processors"}


def run_script(words: Sequence[str], *, without_gpus: bool) -> None:
    """Run a script as the main program of this process.

    Args:
        words: its path, and its arguments.
        without_gpus: whether GPUs that it names are the host.

    Raises:
        BaseException: whatever the script raises.
    """
    path = Path(words[0])
    sys.argv = [str(path), *words[1:]]
    folder = path.resolve().parent
    sys.path[0] = str(folder)
    sys.meta_path.insert(0, _Finder(folder, without_gpus))
    main = types.ModuleType("__main__")
    main.__file__ = str(path)
    sys.modules["__main__"] = main
    exec(read(path.read_bytes(), str(path), without_gpus=without_gpus), vars(main))


def read(source: bytes, path: str, *, without_gpus: bool) -> types.CodeType:
    """Compile a file of a script.

    Args:
        source: what it says.
        path: where it is.
        without_gpus: whether GPUs that it names are the host.

    Raises:
        SyntaxError: it is no Python.
    """
    tree = ast.parse(source, filename=path)
    reader = _Reader(Path(path).name, without_gpus)
    tree = reader.visit(tree)
    if reader.reads:
        names = [ast.alias(name, own) for name, own in _NAMES.items()]
        at = _behind_future_imports(tree)
        tree.body.insert(at, ast.ImportFrom("mics.lab.checking.stand_ins", names, 0))
    return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


def _behind_future_imports(tree: ast.Module) -> int:
    last = 0
    for number, node in enumerate(tree.body):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if future or (text and number == 0):
            last = number + 1
    return last


class _Finder:
    """Finds modules of the script's own folder, to be read as the script is."""

    def __init__(self, folder: Path, without_gpus: bool) -> None:
        self._folder, self._without_gpus = folder, without_gpus

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """What Python finds, with a loader of ours."""
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return None
        origin = Path(spec.origin or "").resolve()
        if self._folder not in origin.parents or "site-packages" in origin.parts:
            return None
        spec.loader = _Loader(name, str(origin), self._without_gpus)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Reads a module's text; compiled code of other processes is neither used nor left."""

    def __init__(self, name: str, path: str, without_gpus: bool) -> None:
        super().__init__(name, path)
        self._without_gpus = without_gpus

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        return read(self.get_data(path), path, without_gpus=self._without_gpus)


class _Reader(ast.NodeTransformer):
    """Lets what asks for GPUs go through functions of ours."""

    def __init__(self, file: str, without_gpus: bool) -> None:
        self._file, self._without_gpus = file, without_gpus
        self.reads = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = _last_name(node.func)
        moved = name == "cuda" and isinstance(node.func, ast.Attribute) and self._without_gpus
        if moved and isinstance(node.func, ast.Attribute):
            self._say(node, ".cuda() as .cpu()")
            node.func.attr, node.args, node.keywords = HOST, [], []
        self.generic_visit(node)
        if name in _GROUPS:
            self._read_group(node, name)
        if self._without_gpus and not moved:
            self._read_devices(node, name)
        return node

    def _read_group(self, node: ast.Call, name: str) -> None:
        where = ast.Constant(f"{self._file}, line {node.lineno}")
        if name == "init_process_group" and node.args:
            node.args[0] = self._through("backend", node.args[0], where)
        for keyword in node.keywords:
            if keyword.arg == "backend":
                keyword.value = self._through("backend", keyword.value, where)
        node.keywords = [one for one in node.keywords if one.arg != "device_id"]

    def _read_devices(self, node: ast.Call, name: str) -> None:
        if name == "to" and len(node.args) >= 1:
            node.args[0] = self._through("device", node.args[0])
        if name == "device" and len(node.args) == 2:  # torch.device("cuda", 1)
            del node.args[1]
        for keyword in node.keywords:
            if keyword.arg == "device":
                keyword.value = self._through("device", keyword.value)
        node.keywords = [one for one in node.keywords if one.arg not in _OF_GPUS]

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
        if torch and node.attr == "cuda" and self._without_gpus:
            self._say(node, "torch.cuda as the host")
            self.reads = True
            return ast.Name(_NAMES["processors"], ast.Load())
        self.generic_visit(node)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if self._without_gpus and isinstance(node.value, str) and is_gpu(node.value):
            self._say(node, f'"{node.value}" as "{HOST}"')
            return ast.Constant(HOST)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        first = node.values[0] if node.values else None
        if self._without_gpus and isinstance(first, ast.Constant) and first.value == "cuda:":
            self._say(node, f'f"cuda:..." as "{HOST}"')
            return ast.Constant(HOST)
        self.generic_visit(node)
        return node

    def _through(self, function: str, *arguments: ast.expr) -> ast.expr:
        self.reads = True
        return ast.Call(ast.Name(_NAMES[function], ast.Load()), list(arguments), [])

    def _say(self, node: ast.expr, what: str) -> None:
        tell(f"{self._file}, line {node.lineno}", what)


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
