"""``mics import-config``: a configuration of DeepSpeed or SageMaker as one of ``mics train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mics.commands.numbers import check_numbers
from mics.quantities import Within


@dataclass(frozen=True)
class Config:
    """Convert a configuration of DeepSpeed (ZeRO, MiCS) or SageMaker's model parallelism.

    Prints TOML for `mics train`. Its comments say what became of every field, what has no
    counterpart and why, and the lines of a loop of your own.
    """

    file: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CONFIGURATION")]]
    """ds_config.json, or the parameters of smdistributed.modelparallel as JSON."""

    ranks: Annotated[int | None, Within(1, 1_000_000)] = None
    """Ranks of the job, to check sizes against."""

    gpus_per_node: Annotated[int | None, Within(1, 1024)] = None
    """Ranks of a node."""

    out: Path | None = None
    """File to write instead of printing."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print options, fields and lines as JSON."""


def run(config: Config) -> int:
    """Convert, and say which fields are unknown.

    Returns:
        0.

    Raises:
        ConfigError: a number is out of bounds, the file cannot be read, or its values contradict
            each other.
    """
    check_numbers(config)
    import json

    from mics.ranks.console import alarm, show
    from mics.training.migrating.conversion import Verdict
    from mics.training.migrating.reading import read_json_file
    from mics.training.migrating.writing import as_document, as_record, convert, write_document

    tree = read_json_file(config.file)
    conversion = convert(
        ascii(str(config.file))[1:-1],
        tree,
        ranks=config.ranks,
        gpus_per_node=config.gpus_per_node,
    )
    if config.json:
        text = json.dumps(as_record(conversion), indent=2) + "\n"
    else:
        text = as_document(conversion, ascii(config.file.name)[1:-1])
    if config.out is None:
        show(text.rstrip("\n"))
    else:
        write_document(config.out, text)
        show(f"{config.file} -> {config.out}")
    unknown = [row.field for row in conversion.rows if row.verdict is Verdict.UNKNOWN]
    if unknown:
        alarm(f"Unknown fields, which were left out: {', '.join(unknown)}.")
    return 0
