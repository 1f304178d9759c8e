"""Two streams of tokens from a run's options: rank 0 tokenises once, everybody maps the result."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mics.errors import DataError
from mics.ranks.agreement import check_agreement
from mics.ranks.console import say
from mics.ranks.progress_bar import TextProgress
from mics.ranks.together import gather_json, together
from mics.training.config import DataConfig
from mics.training.data import cache
from mics.training.data.corpus import check_apart, read_documents
from mics.training.data.finding import find_files
from mics.training.data.saved_tokenizer import checksums_of
from mics.training.data.spool import spool
from mics.training.data.stream import Masking, Stream
from mics.training.data.tokens import (
    OWN_SPECIALS,
    Tokenizer,
    byte_tokenizer,
    known_tokenizer,
    saved_tokenizer,
    train_bpe,
)

_FORMAT = 4
_LONGEST = timedelta(days=2)  # ranks wait for the one that tokenises


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured with.

    ``fingerprint`` names tokens, order and masks: equal ones give equal batches at every position.
    """

    tokenizer: Tokenizer
    train: Stream
    held_out: Stream
    fingerprint: str


def prepare_data(
    config: DataConfig, *, seed: int, sequence: int, masked: bool, folder: Path
) -> Data:
    """Tokenise the corpus, or find it tokenised, and open its two splits.

    Collective where ``torch.distributed`` is initialised. Rank 0 works while the others wait; a
    node that does not see rank 0's files works for itself.

    Args:
        config: source, tokenizer, split.
        seed: what the split, the order and the masks are drawn from.
        sequence: tokens per sequence.
        masked: labels for a masked language model, else the next token.
        folder: tokens are kept in ``folder / "data"``.

    Raises:
        DataError: on every rank; no text, no such tokenizer or column, too little text, or the text
            is where the run writes.
    """
    check_apart(config.source, folder)
    cached = folder / "data" / _cache_key(config, seed)
    _build_where_needed(cached, lambda: _build(cached, config, seed))
    meta = cache.read_meta(cached)
    assert meta is not None
    # The one that wrote the tokens, whatever a hub has under its name by now.
    is_bytes = config.tokenizer == "bytes"
    tokenizer = byte_tokenizer() if is_bytes else known_tokenizer(str(cached / "tokenizer"))
    tokenizer.reads_specials = config.specials == "ids"
    masking = None
    if masked:
        masking = Masking(config.masked, _mask_of(tokenizer, config), tokenizer.size)
    train, held_out = (
        Stream(
            cache.open_tokens(cached, meta, split),
            num_bytes=meta.text_bytes[split],
            sequence=sequence,
            seed=seed,
            masking=masking,
        )
        for split in ("train", "held_out")
    )
    if train.num_sequences == 0:
        raise DataError(
            "The corpus is shorter than one sequence.",
            numbers=f"{train.num_tokens} tokens to train on, data.sequence = {sequence}.",
            write="more text, or a smaller --data.sequence",
        )
    for note in meta.notes:
        say(note)
    if config.held_out and held_out.num_sequences == 0:
        say(f"the held-out text ({held_out.num_tokens} tokens) is shorter than a sequence: no loss")
    identity = json.dumps([meta.sha256, sequence, seed, config.masked if masked else None])
    return Data(tokenizer, train, held_out, hashlib.sha256(identity.encode()).hexdigest()[:16])


# -- who works, who waits --------------------------------------------------------------------------


def _build_where_needed(cached: Path, build: Callable[[], None]) -> None:
    if not dist.is_initialized():
        build()
        return
    group = dist.new_group(backend="gloo", timeout=_LONGEST)
    assert group is not None
    try:
        _on_all(build if dist.get_rank() == 0 else None, group)
        marks = gather_json(_mark(cached), group)
        sees = marks[dist.get_rank()] == marks[0]
        first_here = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
        _on_all(build if first_here and not sees else None, group)
        meta = cache.read_meta(cached)
        facts = {"data": ["none" if meta is None else json.dumps(meta.sha256)]}
        check_agreement(facts, [group], torch.device("cpu"))
    finally:
        dist.destroy_process_group(group)


def _on_all(build: Callable[[], None] | None, group: dist.ProcessGroup) -> None:
    """Build, where there is something to, and raise one rank's error on all."""

    def explain(error: Exception) -> DataError:
        return DataError(
            f"Rank {dist.get_rank()} failed at the data.",
            numbers=f"{type(error).__name__}: {error}",
        )

    together(build, group, kind=DataError, explain=explain)


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
    with TextProgress() as progress:
        sources = _sources(config)
        meta = cache.read_meta(cached)
        whole = meta is not None and cache.is_intact(cached, progress.show)
        if meta is not None and whole and meta.sources == sources:
            return
        tokenizer = _tokenizer(config)  # before the text, which takes long to read
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cached.parent) as file:  # nameless: gone if we are killed
            spooled = spool(
                read_documents(config.source, config.field, config.format),
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


def _mask_of(tokenizer: Tokenizer, config: DataConfig) -> int:
    if tokenizer.mask is None:
        raise DataError(
            "A masked language model needs a tokenizer with a mask token.",
            numbers=f"data.tokenizer = {config.tokenizer!r} has {tokenizer.size} ids and none.",
            write="a tokenizer with a mask_token, or bytes, or bpe",
        )
    return tokenizer.mask


def _cache_key(config: DataConfig, seed: int) -> str:
    """A name for the options that the tokens follow from; their files are in ``meta.json``."""
    facts = {
        "format": _FORMAT,
        "config": asdict(config) | {"masked": None, "sequence": None},
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _sources(config: DataConfig) -> str:
    """Equal as long as nobody has written to the files of text and tokenizer, or replaced them.

    Size and time of a file can be kept when its content changes; the time at which the kernel saw
    the last change (ctime) can not.
    """
    looks = []
    for file in [*find_files(config.source), *_tokenizer_files(config.tokenizer)]:
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
