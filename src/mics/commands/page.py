"""``mics page``: a run as one page of HTML, also while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mics.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """Write the page of a run: loss, speed, memory, bytes, predictions, a timeline.

    The file needs nothing else, no network either. `mics train` writes it when it ends; this may
    be called while it trains, or after it was killed.
    """

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """The run's folder."""

    out: Path | None = None
    """File to write; run.html in the folder by default."""


def run(config: Config) -> int:
    """Write the page, and say where it is.

    Returns:
        0; 1 when the run has taken no step, and there is nothing to show.

    Raises:
        ConfigError: the folder is not that of a run, or the file cannot be written.
    """
    from mics.ranks.console import progress, show
    from mics.training.page.writing import PAGE, write_page

    page = config.out or config.folder / PAGE
    try:
        written = write_page(config.folder, page)
    except OSError as error:
        raise ConfigError(f"{page} cannot be written: {error}.", write="--out <file>") from None
    if not written:
        progress(f"{config.folder} has no step to show")
        return 1
    show(f"{page}")
    return 0
