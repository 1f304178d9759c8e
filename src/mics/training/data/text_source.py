"""A source of text: rank 0 tokenises it once, everybody maps the result."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from mics.errors import DataError
from mics.ranks.agreement import check_agreement
from mics.ranks.progress_bar import TextProgress
from mics.ranks.together import gather_json
from mics.training.config import DataConfig
from mics.training.data import cache
from mics.training.data.corpus import read_documents
from mics.training.data.finding import find_files, source_meant
from mics.training.data.opened import Group, Opened, on_all
from mics.training.data.saved_tokenizer import checksums_of
from mics.training.data.spool import spool
from mics.training.data.tokens import (
    OWN_SPECIALS,
    Tokenizer,
    byte_tokenizer,
    known_tokenizer,
    saved_tokenizer,
    train_bpe,
)

_FORMAT = 4


def open_text(config: DataConfig, seed: int, folder: Path, group: Group) -> Opened:
    """Tokenise a corpus, or find it tokenised, and open it.

    Collective over ``group``. Rank 0 works while the others wait; a node that does not see rank 0's
    files works for itself.

    Args:
        config: source, tokenizer, split.
        seed: what the split is drawn from.
        folder: of the run; tokens are kept in ``folder / "data"``.
        group: of all ranks; ``None`` for a process alone.

    Raises:
        DataError: on every rank; no text, no such tokenizer or column.
    """
    cached = folder / "data" / _cache_key(config, seed)
    build_where_needed(cached, lambda: _build(cached, config, seed), group)
    meta = cache.read_meta(cached)
    assert meta is not None
    # The one that wrote the tokens, whatever a hub has under its name by now.
    is_bytes = config.tokenizer == "bytes"
    tokenizer = byte_tokenizer() if is_bytes else known_tokenizer(str(cached / "tokenizer"))
    tokenizer.reads_specials = config.specials == "ids"
    return Opened(
        source=source_meant(config.source),
        tokenizer=tokenizer,
        tokenizer_sha256=meta.tokenizer.get("tokenizer.json", ""),
        train=cache.open_tokens(cached, meta, "train"),
        held_out=cache.open_tokens(cached, meta, "held_out"),
        text_bytes=(meta.text_bytes["train"], meta.text_bytes["held_out"]),
        identity=meta.sha256,
        notes=tuple(meta.notes),
    )


# -- who works, who waits --------------------------------------------------------------------------


def build_where_needed(cached: Path, build: Callable[[], None], group: Group) -> None:
    """Build a folder on rank 0, and on the nodes that do not see it there. Collective.

    Args:
        cached: the folder; its ``meta.json`` says what is in it, by checksums.
        build: makes it, where it is not there yet.
        group: of all ranks; ``None`` for a process alone.

    Raises:
        DataError: on every rank, what one of them raised.
    """
    if group is None:
        build()
        return
    on_all(build if dist.get_rank() == 0 else None, group)
    marks = gather_json(_mark(cached), group)
    sees = marks[dist.get_rank()] == marks[0]
    first_here = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
    on_all(build if first_here and not sees else None, group)
    facts = {"data": [cache.checksums_in(cached)]}
    check_agreement(facts, [group], torch.device("cpu"))


def _mark(cached: Path) -> str:
    """Equal for those who see the same folder, and not for a copy of it on another disk."""
    try:
        stat = (cached / "meta.json").stat()
    except OSError:
        return "none"
    return f"{stat.st_ino} {stat.st_mtime_ns}"


# -- one rank's work -------------------------------------------------------------------------------


def _build(cached: Path, config: DataConfig, seed: int) -> None:
    try:
        _tokenise(cached, config, seed)
    except OSError as error:
        raise DataError(
            "The tokens of the corpus cannot be written.",
            numbers=f"{error}.",
            write="--run.folder <a writable folder with room for the tokens>",
        ) from error


def _tokenise(cached: Path, config: DataConfig, seed: int) -> None:
    """Bring the tokens up to date: where files look otherwise their text is read and compared."""
    form: Literal["auto", "text"] = "text" if config.format == "text" else "auto"
    with TextProgress() as progress:
        sources = looks_of(config)
        meta = cache.read_meta(cached)
        whole = meta is not None and cache.is_intact(cached, progress.show)
        if meta is not None and whole and meta.sources == sources:
            return
        tokenizer = _tokenizer(config)  # before the text, which takes long to read
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cached.parent) as file:  # nameless: gone if we are killed
            spooled = spool(
                read_documents(source_meant(config.source), config.field, form),
                file,
                share=config.held_out,
                limit=config.limit,
                seed=seed,
                specials=tokenizer.specials if tokenizer else OWN_SPECIALS,
                progress=progress.show,
            )
            same_text = meta is not None and whole and meta.text == spooled.digest
            if (
                meta is not None
                and same_text
                and (not tokenizer or checksums_of(tokenizer) == meta.tokenizer)
            ):
                cache.renew(cached, meta, sources)
                return
            if tokenizer is None:
                progress.show("training the tokenizer", 0, 0)
                texts = (text for text, _ in spooled.pieces(held_out=False))
                tokenizer = train_bpe(texts, config.vocabulary)
            tokenizer.reads_specials = config.specials == "ids"
            cache.write(cached, spooled, tokenizer, sources, progress.show)


def _tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that is named; ``None`` for the one that is trained on the text."""
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    return None if config.tokenizer == "bpe" else saved_tokenizer(config.tokenizer)


def _cache_key(config: DataConfig, seed: int) -> str:
    """A name for the options that the tokens follow from; their files are in ``meta.json``."""
    options = asdict(config)
    del options["sources"], options["packing"]  # it is one of them; conversations are packed
    facts = {
        "format": _FORMAT,
        "config": {**options, "masked": None, "sequence": None},
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def looks_of(config: DataConfig) -> str:
    """Equal as long as nobody has written to the files of text and tokenizer, or replaced them.

    Size and time of a file can be kept when its content changes; the time at which the kernel saw
    the last change (ctime) can not.
    """
    looks = []
    for file in [*find_files(source_meant(config.source)), *_tokenizer_files(config.tokenizer)]:
        try:
            seen = file.stat()
        except OSError as error:
            raise DataError(
                f"{file} cannot be read: {error.strerror}.", write="--data.source <readable files>"
            ) from None
        times = [seen.st_mtime_ns, seen.st_ctime_ns]
        looks.append([str(file), seen.st_size, seen.st_ino, *times])
    return hashlib.sha256(json.dumps(looks).encode()).hexdigest()


def _tokenizer_files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    files = path.iterdir() if path.is_dir() else [path]
    return sorted(file for file in files if file.is_file())
