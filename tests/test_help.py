"""What a new user reads first: the help of every verb, at once and without torch."""

from __future__ import annotations

import ast
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mics.commands import VERBS
from mics.commands.completion import script
from mics.commands.options.train import parse

ROOT = Path(__file__).parents[1]
OF_VERBS = [[verb.name] for verb in VERBS]
OF_SUBCOMMANDS = [["bench", name] for name in ("collectives", "train", "dilated")]
OF_SUBCOMMANDS += [["lab", name] for name in ("up", "run", "compare", "status", "down")]
HELPS = [*OF_VERBS, *OF_SUBCOMMANDS]

ASK = """
import sys
from mics.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted({"torch", "transformers", "numpy"} & set(sys.modules)), file=sys.stderr)
"""


def helped(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    return subprocess.run(
        [sys.executable, "-c", ASK, *words, "--help"],
        env=plain | {"PYTHONPATH": str(ROOT / "src")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_a_help_loads_neither_torch_nor_what_it_brings(words: list[str]) -> None:
    done = helped(words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    assert f"usage: mics {' '.join(words)}" in done.stdout


def options_of(table: dict[str, Any], name: str = "mics") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every option of a table for completion, with the command that has it."""
    for option in table["options"]:
        yield name, option
    for verb, inside in table["subcommands"].items():
        yield from options_of(inside, f"{name} {verb}")


def test_every_option_says_what_it_does() -> None:
    found = list(options_of(table_in(script("bash"))))
    assert {name.split()[1] for name, _ in found if " " in name} == {verb.name for verb in VERBS}
    for name, option in found:
        words = option["description"].split("(default")[0].split("(required")[0]
        assert len(words.split()) > 1, (name, option["flags"])


def table_in(text: str) -> dict[str, Any]:
    table: dict[str, Any] = ast.literal_eval(text.split("COMPLETION_SPEC = ")[1].split("\n")[0])
    return table


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_a_reader_that_leaves_a_help_is_no_error(words: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "mics", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


def shown_on_a_terminal(words: list[str], **environment: str) -> bytes:
    ours, theirs = pty.openpty()
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    plain |= {"PYTHONPATH": str(ROOT / "src"), "TERM": "xterm-256color"}
    with subprocess.Popen(
        [sys.executable, "-m", "mics", *words], stdout=theirs, env=plain | environment
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the other end is closed
            pass
        process.wait()
    os.close(ours)
    return shown


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_a_help_has_signs_of_style_on_a_terminal_that_wants_them(
    environment: dict[str, str], coloured: bool
) -> None:
    shown = shown_on_a_terminal(["page", "--help"], **environment)
    assert b"usage:" in shown
    assert (b"\x1b[" in shown) == coloured


def test_a_flag_may_be_given_whatever_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[parallel]\ncompile = true\n[log]\ntensorboard = false\n")
    for compiled in (True, False):
        word = f"--parallel.{'' if compiled else 'no-'}compile"
        options = parse([str(file), word, "--log.tensorboard"]).options
        assert options.parallel.compile is compiled
        assert options.log.tensorboard


# -- completion ------------------------------------------------------------------------------------

ASK_BASH = """
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_tyro_mics
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def for_bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "mics.bash"
    file.write_text(script("bash"))
    return file


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["pl"], ["plan"]),
        (["bench", "co"], ["collectives"]),
        (["train", "--parallel.par"], ["--parallel.partition"]),
        (["plan", "--optimizer", "sg"], ["sgd-momentum", "sgd"]),
    ],
)
def test_bash_completes_verbs_options_and_values(
    typed: list[str], completed: list[str], for_bash: Path
) -> None:
    words = ["bash", "-c", ASK_BASH, "bash", str(for_bash), "mics", *typed]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.split() == completed, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_one_that_its_shell_can_read(shell: str, tmp_path: Path) -> None:
    file = tmp_path / "script"
    file.write_text(script(shell))
    for verb in VERBS:
        assert f"'{verb.name}': " in file.read_text()
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n", str(file)], check=True)
