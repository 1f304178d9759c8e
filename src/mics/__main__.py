"""The command line: ``mics <verb> [options]``, also ``python -m mics``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from mics.commands import VERBS
from mics.errors import MicsError
from mics.ranks.launcher import read_launch
from mics.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 ok, 1 failed, 2 usage.

    Args:
        arguments: the words after ``mics``; by default those of this process.

    Raises:
        SystemExit: the verb's options could not be parsed (2), or its help was asked for (0).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if importlib.util.find_spec("tyro") is None:
        return _refuse("the command line needs tyro: pip install 'torch-mics[cli]'")
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"mics {__version__}")
        return 0
    name, *options = words
    if name not in [verb.name for verb in VERBS]:
        close = difflib.get_close_matches(name, [verb.name for verb in VERBS], 1)
        hint = f"did you mean {close[0]!r}?" if close else "`mics` alone lists the verbs."
        return _refuse(f"there is no verb {name!r}; {hint}")
    return _run_verb(name, options)


def _run_verb(name: str, options: list[str]) -> int:
    import tyro

    verb = importlib.import_module(f"mics.commands.{_module(name)}")
    keywords: dict[str, Any] = {
        "prog": f"mics {name}",
        "console_outputs": _speaks(),
        "config": (tyro.conf.FlagCreatePairsOff,),
    }
    try:
        if hasattr(verb, "parse"):
            config = verb.parse(options, **keywords)
        else:
            config = tyro.cli(verb.Config, args=options, **keywords)
    except MicsError as error:
        return _refuse(str(error))
    try:
        code: int = verb.run(config)
    except KeyboardInterrupt:
        print("mics: interrupted", file=sys.stderr)
        return 1
    return code


def _module(name: str) -> str:
    return next(verb.module for verb in VERBS if verb.name == name)


def _overview() -> str:
    width = max(len(verb.name) for verb in VERBS)
    lines = [f"mics {__version__}: MiCS for PyTorch FSDP2", ""]
    for verb in VERBS:
        lines += [f"  {verb.name:<{width}}  {verb.summary}", f"  {'':<{width}}  $ {verb.example}"]
    return "\n".join([*lines, "", "`mics <verb> --help` lists a verb's options."])


def _refuse(text: str) -> int:
    if _speaks():
        print(f"mics: {text}", file=sys.stderr)
    return 2


def _speaks() -> bool:
    """Whether this process is rank 0, or no rank at all: a usage error is said once per job."""
    try:
        launch = read_launch()
    except MicsError:
        return True
    return launch is None or launch.rank == 0


if __name__ == "__main__":
    sys.exit(main())
