"""The rules of ARCHITECTURE and CONTRIBUTING that a program can check, checked on the source.

`EXCEPTIONS` names every place that breaks a rule, with the reason; one that is not needed any more
fails too, so that the lists can only shrink.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mics"
sys.path.append(str(ROOT / "benchmarks"))

import source as reading  # noqa: E402
from passing import rooms_of_mesh  # noqa: E402

FILES = reading.read_package(PACKAGE)
MODULES = {file.module for file in FILES}
EXCEPTIONS: dict[str, dict[str, str]] = {
    "imports": {},
    "long files": {"compat.py": "every private name of torch stands in one file"},
    "long functions": {
        "sharding/fully_shard.py:fully_shard": "public: half of it says what each argument means",
        "sharding/shard.py:shard": "public: half of it says what each argument means",
    },
    "wide functions": {
        "anatomy/attention.py:_attend": "torch's arguments of attention, which it stands in for",
        "sharding/fully_shard.py:fully_shard": "public: FSDP2's own arguments and three",
        "sharding/shard.py:shard": "public: what a user may choose, each by its name",
        "traffic.py:mics": "public: the schedule, and the form of each of its collectives",
    },
    "host or accelerator": {},
    "inheritance": {
        "commands/options/bench.py:Dilated": "options that two commands share",
        "commands/options/bench.py:Train": "options that two commands share",
        "commands/lab.py:CompareInLab": "options that two commands share",
        "commands/lab.py:RunInLab": "options that two commands share",
        "commands/lab.py:Up": "options that two commands share",
    },
    "docstrings": {},
    "optimizer hooks": {},
    "imports do nothing": {},
    "names of files": {
        "anatomy/memory.py torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py": "torch's",
        "benching/deepspeed_child.py runtime/zero/config.py": "DeepSpeed's",
        "communication/collectives.py _fsdp_collectives.py": "torch's",
    },
    "newest first": {},
}


def check(rule: str, found: Iterable[str]) -> None:
    """Fail for a place that has no exception, and for an exception that has no place."""
    allowed, seen = EXCEPTIONS[rule], set(found)
    assert sorted(seen - set(allowed)) == [], f"{rule}: broken"
    assert sorted(set(allowed) - seen) == [], f"{rule}: exceptions that are not needed any more"


# -- rooms and imports ---------------------------------------------------------------------------


def test_the_file_map_is_complete() -> None:
    rooms = [file.room for file in FILES]
    assert sorted(reading.file_map(ROOT)) == sorted(set(rooms))


def test_the_first_look_shows_at_most_27_entries() -> None:
    assert len(reading.first_look(PACKAGE)) <= 25


def test_files_import_only_what_stands_above_them_in_the_map() -> None:
    check("imports", reading.edges_up(reading.room_edges(FILES), reading.file_map(ROOT)))


def test_no_files_import_each_other_in_a_circle() -> None:
    assert reading.circles(reading.file_edges(FILES)) == []


def test_a_mesh_passes_through_at_most_6_rooms_on_its_way_to_the_collectives() -> None:
    assert "communication" in rooms_of_mesh(FILES, "fully_shard")
    assert len(rooms_of_mesh(FILES, "fully_shard")) <= 6


def pure_modules() -> list[str]:
    """What the map says to be without torch, and small records and arithmetic wherever they are."""
    map_of_files = (ROOT / "ARCHITECTURE.md").read_text()
    found = set(re.findall(r"^  (\w+)\.py .*\bno torch$", map_of_files, re.MULTILINE))
    found |= {m for m in MODULES if m.split(".")[-1] in ("quantities", "recipe", "files")}
    return sorted(found)


def test_topology_and_traffic_are_among_the_modules_without_torch() -> None:
    assert {"topology", "traffic"} <= set(pure_modules())


@pytest.mark.parametrize("module", pure_modules())
def test_a_module_without_torch_imports_nobody_who_needs_it(module: str) -> None:
    by_name = {file.module: file for file in FILES}
    edges = reading.file_edges(FILES)
    reached, open_ = set(), [module]
    while open_:
        name = open_.pop()
        if name not in reached:
            reached.add(name)
            open_ += edges.get(name, ())
    others = {
        name.split(".")[0] for m in reached if m for name in reading.imported_names(by_name[m])
    }
    assert others <= {"mics", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", pure_modules())
def test_a_module_without_torch_runs_where_there_is_none(module: str) -> None:
    run_python(f"import sys; sys.modules['torch'] = None; import mics.{module}")


# -- what an import does -------------------------------------------------------------------------


def run_python(*arguments: str) -> str:
    """What a fresh interpreter prints; it must say nothing on its second channel."""
    command = [sys.executable, *(["-c"] if len(arguments) == 1 else []), *arguments]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.slow
def test_importing_every_file_does_nothing_else() -> None:
    names = {name for file in FILES for name in reading.imported_names(file)}
    # torchtitan has an environment of its own, see the Makefile.
    but = ("mics", "__future__", "torchtitan")
    others = sorted(name for name in names if name.split(".")[0] not in but)
    ours = ["mics", *(f"mics.{name}" for name in sorted(MODULES) if name)]
    asked = json.dumps({"first": others, "then": ours})
    answer, *printed = run_python(str(ROOT / "tests" / "quiet_import.py"), asked).splitlines()[::-1]
    assert printed == []
    check("imports do nothing", json.loads(answer))


def test_mics_alone_imports_no_torch_and_its_names_no_transformers() -> None:
    heavy = "[m for m in ('torch', 'numpy', 'transformers', 'datasets') if m in sys.modules]"
    code = f"import sys, mics; print({heavy}); [getattr(mics, name) for name in mics.__all__]"
    alone, named = run_python(f"{code}; print({heavy})").splitlines()
    assert alone == "[]"
    assert set(ast.literal_eval(named)) <= {"torch", "numpy"}


# -- names ---------------------------------------------------------------------------------------


def test_private_names_of_torch_stand_in_compat_only() -> None:
    assert reading.private_names(FILES) == []


def test_a_device_is_compared_with_the_host_in_one_file() -> None:
    check("host or accelerator", {place.split(":")[0] for place in reading.host_tests(FILES)})


def test_optimizers_are_guarded_in_one_place() -> None:
    calls = [
        file.path
        for file in FILES
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Call)
        and reading.last_name(node.func).startswith("register_optimizer_step_")
    ]
    assert len(calls) == max(1, len(EXCEPTIONS["optimizer hooks"]))
    check("optimizer hooks", calls if len(calls) > 1 else [])


def test_torch_is_never_patched() -> None:
    patched = [
        f"{file.path}:{node.lineno}"
        for file in FILES
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Attribute | ast.Subscript)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and first_name(node) in names_from("torch", file)
    ]
    assert patched == []


def first_name(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def names_from(package: str, file: reading.File) -> set[str]:
    """What a file imports from a package, by the names it has there."""
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == package
    }


def test_no_class_inherits_another_for_reuse() -> None:
    """Errors are a family, and a protocol holds no code; no other class of ours has heirs."""
    classes = {
        file.path: [node for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)]
        for file in FILES
    }
    concrete = {
        node.name
        for found in classes.values()
        for node in found
        if not {reading.last_name(base) for base in node.bases} & {"Protocol", "Exception"}
    }
    heirs = []
    for file in FILES:
        known = names_from("mics", file) | {node.name for node in classes[file.path]}
        for node in classes[file.path]:
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if bases & known & concrete:
                heirs.append(f"{file.path}:{node.name}")
    check("inheritance", heirs)


def test_collectives_never_follow_the_order_of_a_set() -> None:
    loops = [
        f"{file.path}:{node.iter.lineno}"
        for file in FILES
        for node in ast.walk(file.tree)
        if isinstance(node, ast.For)
        and (
            isinstance(node.iter, ast.Set | ast.SetComp)
            or (isinstance(node.iter, ast.Call) and reading.last_name(node.iter.func) == "set")
        )
    ]
    assert loops == []


# -- sizes ---------------------------------------------------------------------------------------


def test_a_file_has_at_most_400_lines() -> None:
    check("long files", reading.long_files(FILES))


def test_a_function_has_at_most_60_lines() -> None:
    check("long functions", reading.long_functions(FILES))


def test_a_function_has_at_most_8_parameters() -> None:
    check("wide functions", reading.wide_functions(FILES))


# -- words ---------------------------------------------------------------------------------------

PREPOSITIONS = """
    about above across after against along among around as at before behind below beneath beside
    besides between beyond by down during for from in inside into near of off on onto out outside
    over past per since through till to toward towards under until up upon with within without
"""


def docstrings(file: reading.File) -> Iterator[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(file.tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def test_a_docstring_begins_with_no_preposition() -> None:
    check(
        "docstrings",
        [
            file.path
            for file in FILES
            if any(
                text.split()[0].strip(",:").lower() in PREPOSITIONS.split()
                for text in docstrings(file)
            )
        ],
    )


def text_files() -> list[Path]:
    folders = ("src", "tests", "benchmarks", "examples", "docs")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*")] + [*ROOT.glob("*.*")]
    return [p for p in found if p.suffix in (".py", ".md", ".toml", ".txt") and p.is_file()]


def test_every_text_is_ascii() -> None:
    assert [path for path in text_files() if not path.read_bytes().isascii()] == []


def test_files_that_are_named_exist() -> None:
    """A document names them in backticks, a docstring or a comment in double ones."""
    names = {path.name for path in text_files()}
    texts = {name: (ROOT / name).read_text() for name in ("ARCHITECTURE.md", "CONTRIBUTING.md")}
    texts |= {file.path: file.text for file in FILES}
    check(
        "names of files",
        [
            f"{place} {path}"
            for place, text in texts.items()
            for path in re.findall(r"`([\w/]+\.py)`", text)
            if Path(path).name not in names
            or ("/" in path and not any((ROOT / home / path).exists() for home in HOMES))
        ],
    )


HOMES = (".", "src", "src/mics")


def test_switches_are_named_as_they_are_given() -> None:
    """An option that is on or off takes no word: --data.no-packing."""
    texts = {path: path.read_text() for path in text_files() if path.suffix == ".md"}
    texts |= {PACKAGE / file.path: file.text for file in FILES}
    pattern = re.compile(r"--[a-z][\w.-]* (?:True|False)\b")
    assert [(path, found) for path, text in texts.items() if (found := pattern.findall(text))] == []


def test_every_note_that_is_cited_exists() -> None:
    texts = [file.text for file in FILES] + [(ROOT / "ARCHITECTURE.md").read_text()]
    cited = {note for text in texts for note in re.findall(r"\[Note: ([^\]]+)\]", text)}
    written = {
        note
        for file in FILES
        for note in re.findall(r"^\s*\[Note: ([^\]]+)\]$", file.text, re.MULTILINE)
    }
    assert cited - {"..."} == written


def test_the_log_begins_with_the_newest() -> None:
    titles = re.findall(r"^## (\d.*)", (ROOT / "docs" / "log.md").read_text(), re.MULTILINE)
    dates = [title.split(":")[0] for title in titles]
    pairs = zip(dates, dates[1:], titles[1:], strict=False)
    check("newest first", [title for above, date, title in pairs if date > above])


def test_types_are_checked_strictly_on_all_of_src() -> None:
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert (mypy["strict"], mypy["files"]) == (True, ["src"])
