"""Command lines: read where they end with another one, and written from options."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import tyro


def parse_with_program(kind: Any, words: Sequence[str], **keywords: object) -> Any:
    """Read options before ``--``, and take what follows as it stands.

    Args:
        kind: the verb's dataclass, or a union of several.
        words: of the command line.
        keywords: for tyro.

    Raises:
        SystemExit: the options could not be parsed (2), or help was asked for (0).
    """
    options = list(words)
    program: list[str] = []
    if "--" in options:
        at = options.index("--")
        options, program = options[:at], options[at:]
        if len(program) == 1:  # nothing follows
            program = []
    return tyro.cli(kind, args=[*options, *program], **keywords)  # type: ignore[call-overload]


def parse_before_file(
    kind: Any, words: Sequence[str], endings: tuple[str, ...], **keywords: object
) -> Any:
    """Read options before ``--`` or, where there is none, before the first file of these endings.

    Arguments and errors are those of ``parse_with_program``.
    """
    options = list(words)
    at = next((n for n, word in enumerate(options) if word.endswith(endings)), None)
    if "--" not in options and at is not None:
        options.insert(at, "--")
    return parse_with_program(kind, options, **keywords)


def command_line(verb: str, config: Any) -> str:
    """Write the command that has these options; those that are as by default are left out.

    Args:
        verb: of the command line.
        config: its dataclass of options; dataclasses in it are options of the same command.
    """
    return shlex.join(["mics", verb, *_words(config, type(config)())])


def _words(config: Any, usual: Any) -> Iterator[str]:
    for field in fields(config):
        value, other = getattr(config, field.name), getattr(usual, field.name)
        name = f"--{field.name.replace('_', '-')}"
        if is_dataclass(value):
            yield from _words(value, other)
        elif value == other:
            continue
        elif isinstance(value, bool):
            yield name if value else f"--no-{name[2:]}"
        elif isinstance(value, tuple):
            yield from (name, *map(str, value))
        else:
            yield from (name, f"{value:g}" if _is_round(value) else str(value))


def _is_round(value: object) -> bool:
    return isinstance(value, float) and float(f"{value:g}") == value
