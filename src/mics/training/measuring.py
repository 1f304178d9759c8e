"""What a run is measured with beside the share of its data that is held out: sets by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from mics.errors import ConfigError
from mics.training.config import TrainConfig
from mics.training.data import Sequences, open_data
from mics.training.record import HELD_OUT

_NAME = re.compile(r"[A-Za-z][\w-]{0,31}")
_MOST = 64


def sources_by_name(config: TrainConfig) -> dict[str, str]:
    """The sources of ``evaluation.sets``, by their names.

    Raises:
        ConfigError: one is not NAME=SOURCE, two have one name, or they would need several
            tokenizers.
    """
    sets = config.evaluation.sets
    found: dict[str, str] = {}
    for given in sets:
        name, _, source = given.partition("=")
        if not _NAME.fullmatch(name) or not source or name in (*found, HELD_OUT, "train"):
            raise ConfigError(
                "evaluation.sets has an entry that is no NAME=SOURCE.",
                numbers=f"{given!r}; names are letters, digits, _ and -, each once, and not "
                f"{HELD_OUT} or train.",
                write="--evaluation.sets code=eval/code.jsonl prose=eval/prose.txt",
            )
        found[name] = source
    if len(found) > _MOST:
        raise ConfigError(
            "evaluation.sets has too many entries.",
            numbers=f"There are {len(found)}, {_MOST} at most.",
            write="one folder or glob for several files",
        )
    if found and config.data.tokenizer == "bpe":
        raise ConfigError(
            "data.tokenizer = bpe would be trained on each of evaluation.sets for itself.",
            numbers=f"There are {len(found)}.",
            write="--data.tokenizer <a saved one>, such as that of a run's checkpoint",
        )
    return found


def open_sets(config: TrainConfig, *, sequence: int, masked: bool) -> Mapping[str, Sequences]:
    """Open ``evaluation.sets``: all of each, with the tokenizer of the run. Collective.

    Raises:
        MicsError: an entry does not fit (``sources_by_name``), or its source (``open_data``).
    """
    return {
        name: open_data(
            replace(config.data, source=source, sources=(), held_out=0.0),
            seed=config.run.seed,
            sequence=sequence,
            masked=masked,
            folder=config.run.folder,
        ).train
        for name, source in sources_by_name(config).items()
    }
