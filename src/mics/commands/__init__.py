"""The verbs of the command line, one module each.

To add a verb, write its module and add a line to ``VERBS``. The module has

- a frozen dataclass ``Config``: the options; its docstrings are the help. Where options come from
  elsewhere too, a function ``parse(words, **keywords) -> Config`` reads them. Nobody waits for
  torch to read a help: where the work needs it, these two are in a module of ``options/``;
- a function ``run(config) -> int``, which returns the exit code: 0 all is well; 1 the work was
  done, but its outcome is bad (logits that differ, a figure that is missed); 2 the options make no
  sense together.

``run`` raises a ``MicsError`` for whatever else goes wrong and catches none: ``__main__`` says it,
once for all ranks of a job, and the process exits with 1 (with 2 when ``parse`` raised it). A verb
reads options and shows results; the work itself belongs into the room that knows it. Results go to
standard output, everything else to standard error, both through ``ranks/console.py``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One verb and its module, which is imported when the verb is run.

    Args:
        name: as it is typed.
        module: with ``run``.
        summary: what it is for, a few words.
        example: a command.
        takes: the module with ``Config``, which loads no torch; where empty, ``module``.
    """

    name: str
    module: str
    summary: str
    example: str
    takes: str = ""

    @property
    def options(self) -> str:
        """The module with the options."""
        return self.takes or self.module


VERBS = (
    Verb(
        "train",
        "train",
        "train a language model",
        "mics train examples/demo.toml",
        takes="options.train",
    ),
    Verb(
        "run",
        "run",
        "ranks that survive lost ranks and nodes",
        "mics run --ranks-per-node 4 -- train.py",
    ),
    Verb(
        "new",
        "new",
        "job files for Slurm, Kubernetes, SkyPilot, Ray",
        "mics new slurm --nodes 8 --node p5",
    ),
    Verb(
        "plan",
        "plan",
        "which partition, how fast, what price",
        "mics plan --model llama-3.1-8b --node p4d --nodes 8",
        takes="options.plan",
    ),
    Verb(
        "simulate",
        "simulate",
        "scaling, engine against engine",
        "mics simulate --model bert-10b --node p3dn --nodes 2..64",
        takes="options.simulate",
    ),
    Verb("page", "page", "a run as one page of HTML", "mics page runs/demo"),
    Verb("export", "export", "a checkpoint for transformers", "mics export runs/demo exported"),
    Verb("import", "importing", "a checkpoint from transformers", "mics import folder checkpoint"),
    Verb(
        "import-config",
        "importing_config",
        "options from DeepSpeed's or SageMaker's",
        "mics import-config ds_config.json",
    ),
    Verb(
        "bench",
        "bench",
        "measure links, compare engines",
        "mics bench collectives",
        takes="options.bench",
    ),
    Verb("check", "check", "what any training script sends", "mics check train.py"),
    Verb("trace", "trace", "steps of all ranks, for Perfetto", "mics trace --ranks 4 train.py"),
    Verb("lab", "lab", "a cluster on this machine", "mics lab run --nodes 4 -- script.py"),
    Verb(
        "doctor",
        "doctor",
        "check ranks, groups and links",
        "mics doctor --ranks 8",
        takes="examining.options",
    ),
    Verb(
        "completion",
        "completion",
        "tab completion for bash, zsh and fish",
        "mics completion bash",
    ),
)
