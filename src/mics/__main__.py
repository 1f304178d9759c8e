"""The command line: ``mics <verb> [options]``, also ``python -m mics``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from mics.commands import VERBS, Verb
from mics.errors import MicsError, naming_extras
from mics.ranks.console import outliving, progress
from mics.ranks.launcher import is_first_rank, read_launch
from mics.version import __version__

# transformers imports torchao where it is installed; what that says of its kernels, and torch of
# how it registers its types, is no matter of any verb.
_BESIDE_THE_MATTER = ("torchao", "torch.utils._pytree")
_PATIENCE_SECONDS = 10.0  # longer than rank 0 takes to leave on a machine that is busy


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
        with outliving(sys.stdout):
            print(_overview(), flush=True)
        return 0
    if words[0] == "--version":
        print(f"mics {__version__}")
        return 0
    name, *options = words
    verb = next((verb for verb in VERBS if verb.name == name), None)
    if verb is None:
        close = difflib.get_close_matches(name, [verb.name for verb in VERBS], 1)
        hint = f"did you mean {close[0]!r}?" if close else "`mics` alone lists the verbs."
        return _refuse(f"there is no verb {name!r}; {hint}")
    return _run_verb(verb, options)


def _run_verb(verb: Verb, words: list[str]) -> int:
    if os.environ.get("NO_COLOR"):  # which tyro does not ask for
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    import tyro

    for logger in _BESIDE_THE_MATTER:
        logging.getLogger(logger).setLevel(logging.ERROR)
    keywords: dict[str, Any] = {
        "prog": f"mics {verb.name}",
        "console_outputs": is_first_rank(),
    }
    config = None
    try:
        with naming_extras(f"mics {verb.name}"):
            options = importlib.import_module(f"mics.commands.{verb.options}")
            with outliving(sys.stdout):  # a help may be long, and its reader leave
                if hasattr(options, "parse"):
                    config = options.parse(words, **keywords)
                else:
                    config = tyro.cli(options.Config, args=words, **keywords)
            if config is None:
                return 0
            if verb.takes and "torch" not in sys.modules:
                progress(f"mics {verb.name}: loading PyTorch")
            work = importlib.import_module(f"mics.commands.{verb.module}")
    except MicsError as error:
        return _refuse(str(error))
    try:
        with naming_extras(f"mics {verb.name}"):
            code: int = work.run(config)
    except KeyboardInterrupt:
        _complain("mics: interrupted")
        return 1
    except MicsError as error:
        return _fail(verb.name, error)
    return code


def _fail(name: str, error: MicsError) -> int:
    """Say what went wrong, once per job.

    Most errors are every rank's, and rank 0 says them: the launcher ends the others when it leaves.
    A rank that is still here after a while has something of its own to say.
    """
    if is_first_rank():
        _complain(f"mics {name}: {error}")
        return 1
    launch = read_launch()
    assert launch is not None
    time.sleep(_PATIENCE_SECONDS)
    _complain(f"mics {name}: rank {launch.rank}: {error}")
    return 1


def _overview() -> str:
    width = max(len(verb.name) for verb in VERBS)
    lines = [f"mics {__version__}: MiCS for PyTorch FSDP2", ""]
    for verb in VERBS:
        lines += [f"  {verb.name:<{width}}  {verb.summary}", f"  {'':<{width}}  $ {verb.example}"]
    return "\n".join([*lines, "", "`mics <verb> --help` lists a verb's options."])


def _refuse(text: str) -> int:
    if is_first_rank():
        _complain(f"mics: {text}")
    return 2


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
