"""``mics completion``: what a shell needs to complete verbs, options and their values."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from mics import commands
from mics.ranks.console import show

# The table of options in a script; a description of two lines would be offered as two words.
_TABLE = re.compile(r"^COMPLETION_SPEC = .*$", re.MULTILINE)
_LINE_END = re.compile(r"\\+n")


@dataclass(frozen=True)
class Config:
    """Print a script that lets a shell complete what is typed after mics.

    bash: mics completion bash > ~/.local/share/bash-completion/completions/mics

    zsh: mics completion zsh > ~/.zfunc/_mics, where ~/.zfunc is in fpath before compinit

    fish: mics completion fish > ~/.config/fish/completions/mics.fish
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Whose completion: the script is in its language."""


def run(config: Config) -> int:
    """Print the script.

    Returns:
        0.
    """
    show(script(config.shell).rstrip("\n"))
    return 0


def script(shell: str) -> str:
    """Write the script of a shell: tyro's own, of all verbs as subcommands of one command."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(_all_verbs(), prog="mics", args=["--tyro-write-completion", shell, "-"])
    return _TABLE.sub(lambda table: _LINE_END.sub(" ", table[0]), written.getvalue())


def _all_verbs() -> Any:
    """Join the options of all verbs, each the subcommand of its name."""
    kinds = []
    for verb in commands.VERBS:
        options: Any = importlib.import_module(f"mics.commands.{verb.options}").Config
        about = tyro.conf.subcommand(verb.name, description=verb.summary)
        kinds.append(Annotated[options, about])
    return Union[tuple(kinds)]  # noqa: UP007 -- of as many as there are
