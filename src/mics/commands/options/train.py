"""What ``mics train`` can be asked, and its configuration file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mics.errors import ConfigError
from mics.training.config import TrainConfig


@dataclass(frozen=True)
class Config:
    """Train a language model with MiCS: values are the defaults, then the file's, then these.

    Under torchrun, Slurm or MPI this is one rank of the job; otherwise ranks are started here.
    """

    file: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[CONFIGURATION]")]] = (
        None
    )
    """Configuration (TOML), one table per group of options below. It comes first."""

    options: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show configuration, model, batch, groups and memory, and train nothing."""

    models: tyro.conf.FlagCreatePairsOff[bool] = False
    """List the models that have a name."""


def parse(words: Sequence[str], **keywords: object) -> Config:
    """Read the file, if one is named, and the options over it.

    Raises:
        ConfigError: the file cannot be read, or does not come first.
        SystemExit: the options could not be parsed (2), or help was asked for (0).
    """
    file = Path(words[0]) if words and not words[0].startswith("-") else None
    default = Config()
    if file is not None:
        from mics.training.settings import read_settings

        default = Config(file, read_settings(file))
    config = tyro.cli(Config, args=list(words), default=default, **keywords)  # type: ignore[call-overload]
    assert isinstance(config, Config)
    if config.file != file:
        raise ConfigError(
            "The configuration file must come first.",
            numbers=f"{config.file} stands among the options.",
            write=f"mics train {config.file} --table.key value ...",
        )
    return config
