"""``mics tokenize``: a corpus as tokens, once, by all cores of any number of nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mics.errors import ConfigError
from mics.quantities import Within


@dataclass(frozen=True)
class Config:
    """Tokenise a corpus into a folder that `mics train --data.source FOLDER` reads directly.

    Killed at any moment, the same command goes on, to the same bytes. Under srun, torchrun, MPI or
    in an array of Slurm every task takes its share; the folder is then one that all of them see.
    """

    source: tyro.conf.Positional[str]
    """Files of text or tables, a folder or glob of them, or "stdlib", as --data.source of `mics
    train`; with --check, the folder of tokens."""

    out: tyro.conf.Positional[Path | None] = None
    """Folder to make."""

    tokenizer: str = "bytes"
    """"bytes", "bpe" (trained on a sample of the corpus), or a saved tokenizer: folder,
    tokenizer.json, hub name."""

    vocabulary: Annotated[int, Within(260, 2**24)] = 4096
    """Size of the vocabulary that "bpe" trains."""

    field: str | None = None
    """Column of the tables that holds the text; default: "text"."""

    format: Literal["auto", "text"] = "auto"
    """"text": tables of letters (JSON, CSV) are text as they stand."""

    specials: Literal["text", "ids"] = "text"
    """Special tokens that the text spells: "text" reads them as letters, "ids" as those tokens."""

    held_out: Annotated[float, Within(0, 0.999)] = 0.05
    """Share of the documents kept for evaluation."""

    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """What the documents that are held out are drawn from."""

    processes: Annotated[int, Within(0, 4096)] = 0
    """Processes on this machine; 0 is one for each core."""

    share: str = ""
    """This task's share of the work, such as 0/4; default: what the launcher says."""

    check: bool = False
    """Read a folder of tokens and compare its checksums; make nothing."""


def run(config: Config) -> int:
    """Tokenise, or compare checksums.

    Returns:
        0; 1 where --check finds a damaged file.

    Raises:
        MicsError: an option, the source, the tokenizer or the folder is not right.
    """
    from mics.commands.checks import refuse_others
    from mics.commands.numbers import check_numbers
    from mics.ranks.console import say, show
    from mics.ranks.progress_bar import TextProgress

    check_numbers(config)
    if config.check:
        refuse_others(config, "check", "source")
        return _check(Path(config.source).expanduser())
    if config.out is None:
        raise ConfigError(
            "mics tokenize needs a folder to make.", write=f"mics tokenize {config.source} <folder>"
        )
    from mics.training.data.tokenizing.making import make_token_folder
    from mics.training.data.tokenizing.plan import Job
    from mics.training.data.tokenizing.share import find_share

    job = Job(
        source=config.source,
        field=config.field,
        format=config.format,
        tokenizer=config.tokenizer,
        vocabulary=config.vocabulary,
        specials=config.specials,
        held_out=config.held_out,
        seed=config.seed,
    )
    share = find_share(config.share)
    with TextProgress() as progress:
        done = make_token_folder(job, config.out, share, config.processes, progress.show)
    for note in done.notes():
        say(note)
    show(f"{config.out}: {done}")
    return 0


def _check(folder: Path) -> int:
    from mics.ranks.console import show
    from mics.ranks.progress_bar import TextProgress
    from mics.training.data.token_folder import damaged_files, read_token_folder

    found = read_token_folder(folder)
    with TextProgress() as progress:
        bad = damaged_files(folder, found, progress.show)
    if bad:
        show(f"{folder}: {len(bad)} damaged file(s), such as {bad[0]}")
        return 1
    show(f"{folder}: {found.num_shards:,} file(s) of tokens and the tokenizer are what was written")
    return 0
