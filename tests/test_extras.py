"""Without an extra, what needs it says which one to install; what does not need it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mics.errors import EXTRAS, MissingError, naming_extras

HIDING = """
import contextlib, io, json, sys, types

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else self.finder.find_spec(name, path, target)

HIDDEN = set(json.loads(sys.argv[1]))
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
import mics
from mics.__main__ import main
"""

VERBS = """
said = {}
for words in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words.split())
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    said[words] = [code, err.getvalue()]
"""

PYTHON = """
def attempt(name, call):
    try:
        said[name] = [0, str(call())]
    except mics.MicsError as error:
        said[name] = [1, str(error), isinstance(error, ImportError)]
    except BaseException as error:
        said[name] = [f"{type(error).__name__}: {error}", ""]

def loss(model, micro_batch, sequence):
    return model(torch.zeros(micro_batch, sequence, 8, dtype=torch.bfloat16, device="meta")).sum()

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
own = dict(sequence=8, loss=loss, blocks=torch.nn.Linear, micro_batches=[1])
attempt("mics.plan of a name", lambda: mics.plan("gpt2-tiny", "p4d:2"))
attempt("mics.plan of a module", lambda: mics.plan(model, "p4d:2", **own))
attempt("mics.simulate", lambda: mics.simulate(mics.plan(model, "p4d:2", **own)).seconds)
attempt("mics.save", lambda: mics.save)
attempt("mics.load", lambda: mics.load)
attempt("mics.shard", lambda: mics.shard)
attempt("integrations", lambda: __import__("mics.integrations.transformers"))
print(json.dumps(said))
"""


def without(packages: tuple[str, ...], *commands: str) -> dict[str, Any]:
    """What commands and calls say in a process that does not find these packages."""
    words = [sys.executable, "-c", HIDING + VERBS + PYTHON]
    words += [json.dumps(packages), json.dumps(commands)]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return said


def test_what_needs_an_extra_says_which_and_all_else_runs() -> None:
    needing = [
        "train --models",
        "plan --model gpt2-tiny",
        "simulate --model gpt2-tiny",
        "export a b",
        "import a b",
        "bench collectives",
        "bench train --partition 2",
        "bench dilated --partition 2 --link 200mbit",
    ]
    free = ["plan --list", "doctor --help", "lab --help", "--version"]
    said = without(EXTRAS["train"], *needing, *free)
    for words in needing:
        code, err = said[words]
        assert code in (1, 2), (words, said[words])
        assert re.search(
            r"needs \w+, which is not installed\.\n  Write: pip install 'torch-mics\[train\]'", err
        ), (words, err)
    for words in free:
        assert said[words][0] == 0, (words, said[words])
    for call in ("mics.plan of a name", "mics.save", "mics.load"):
        code, text, is_import_error = said[call]
        assert code == 1, said[call]
        assert is_import_error
        assert text.endswith("Write: pip install 'torch-mics[train]'")
    assert said["mics.save"][1].startswith("mics.save needs ")
    for call in ("mics.plan of a module", "mics.simulate", "mics.shard"):
        assert said[call][0] == 0, said[call]


def test_without_its_parser_the_command_line_names_the_extra() -> None:
    said = without(EXTRAS["cli"], "plan --list", "doctor")
    for words in ("plan --list", "doctor"):
        assert said[words] == [
            2,
            "mics: the command line needs tyro: pip install 'torch-mics[cli]'\n",
        ]
    assert said["mics.plan of a module"][0] == 0


def test_without_its_tool_an_integration_names_the_extra() -> None:
    code, text, is_import_error = without(EXTRAS["accelerate"])["integrations"]
    assert (code, is_import_error) == (1, True)
    assert text == (
        "mics.integrations.accelerate needs accelerate, which is not installed.\n"
        "  Write: pip install 'torch-mics[accelerate]'"
    )


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for extra, brings in EXTRAS.items():
        needed = project["optional-dependencies"][extra]
        names = [re.split(r"[>=\[]", one)[0] for one in needed]
        assert sorted(brings) == sorted(name for name in names if name != project["name"])


def test_a_package_of_nobodys_extra_is_its_owners_business() -> None:
    with (
        pytest.raises(ModuleNotFoundError, match="No module named 'theirs'") as caught,
        naming_extras("mics plan"),
    ):
        raise ModuleNotFoundError("No module named 'theirs'", name="theirs")
    assert not isinstance(caught.value, MissingError)


@pytest.mark.slow
def test_the_extra_of_lightning_brings_what_keeps_shards() -> None:
    pytest.importorskip("lightning")
    others = {name for brings in EXTRAS.values() for name in brings}
    hidden = sorted(others - {*EXTRAS["lightning"], "numpy"})
    done = subprocess.run(
        [sys.executable, "-c", f"{HIDING}\nimport mics.integrations.lightning", json.dumps(hidden)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
