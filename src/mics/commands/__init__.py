"""The verbs of the command line, one module each.

A verb's module has a frozen dataclass ``Config`` (its options; the docstrings are the help) and a
function ``run(config) -> int`` that returns the exit code: 0 ok, 1 failed, 2 usage. A verb whose
options come from a file as well has ``parse(words) -> Config``. To add a verb, write that module
and add its line to ``VERBS``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One verb and its module, which is imported when the verb is run."""

    name: str
    module: str
    summary: str
    example: str


VERBS = (
    Verb("train", "train", "train a language model", "mics train examples/demo.toml"),
    Verb("plan", "plan", "which partition, how fast, what price", "mics plan --model llama-8b"),
    Verb(
        "simulate",
        "simulate",
        "scaling, engine against engine",
        "mics simulate --model bert-10b --node p3dn --nodes 2..64",
    ),
    Verb("export", "export", "a checkpoint for transformers", "mics export runs/demo exported"),
    Verb("import", "importing", "a checkpoint from transformers", "mics import folder checkpoint"),
    Verb("bench", "bench", "measure links, compare engines", "mics bench collectives"),
    Verb("lab", "lab", "a cluster on this machine", "mics lab run --nodes 4 -- script.py"),
    Verb(
        "doctor",
        "doctor",
        "check ranks, groups and links",
        "mics doctor --ranks 8",
    ),
)
