"""A source that is tokens already: a folder of ``mics tokenize``, or files of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mics.errors import DataError
from mics.training.config import DataConfig
from mics.training.data.foreign import find_token_files, fingerprint_of, held_out_files
from mics.training.data.opened import Opened
from mics.training.data.saved_tokenizer import checksums_of
from mics.training.data.shards import Shards, Stretch
from mics.training.data.token_folder import TOKENIZER, is_token_folder, read_token_folder
from mics.training.data.tokens import Tokenizer, byte_tokenizer, saved_tokenizer


def is_tokens(source: str) -> bool:
    """Whether a source is tokens, by what is there and by its first bytes.

    Raises:
        DataError: it cannot be read, or is a half of it.
    """
    return is_token_folder(Path(source).expanduser()) or find_token_files(source) is not None


def open_tokens(source: str, config: DataConfig) -> Opened:
    """Open a source of tokens; no more of it is read than says what it is.

    Args:
        source: a folder of tokens, or token files.
        config: the share that is held out of what has no split of its own, and the tokenizer of
            what brings none.

    Raises:
        DataError: it is damaged, its tokenizer is missing or another one, or an option would have
            no effect.
    """
    folder = Path(source).expanduser()
    if is_token_folder(folder):
        return _own(source, folder, config)
    stretches = find_token_files(source)
    assert stretches is not None
    return _of_others(source, stretches, config)


def named_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that the options name, for tokens that bring none.

    Raises:
        DataError: there is none, or it would have to be trained.
    """
    if config.tokenizer == "bpe":
        raise DataError(
            "data.tokenizer = bpe is trained on text, and data.source is tokens.",
            write="--data.tokenizer <the one that made the tokens: folder or tokenizer.json>",
        )
    return byte_tokenizer() if config.tokenizer == "bytes" else saved_tokenizer(config.tokenizer)


def _own(source: str, folder: Path, config: DataConfig) -> Opened:
    found = read_token_folder(folder)
    tokenizer = saved_tokenizer(str(folder / TOKENIZER))
    tokenizer.reads_specials = found.made_from.get("specials") == "ids"
    if tokenizer.size != found.vocabulary:
        raise DataError(
            f"The tokenizer in {folder} is not the one that made the tokens.",
            numbers=f"It has {tokenizer.size:,} ids, the tokens are of {found.vocabulary:,}.",
            write="a whole copy of the folder",
        )
    _check_named(config, found.tokenizer, source, folder)
    whole = found.opened(folder, "train")
    sizes: tuple[int | None, int | None]
    if found.splits["held_out"].tokens:
        _check_share(config, found.made_from.get("held_out"), source)
        train, held_out = whole, found.opened(folder, "held_out")
        sizes = (found.splits["train"].text_bytes, found.splits["held_out"].text_bytes)
    else:
        train, held_out = _tail_held_out(whole, config.held_out)
        rate = found.splits["train"].text_bytes / max(1, len(whole))
        sizes = (round(rate * len(train)), round(rate * len(held_out)))
    return Opened(
        source=source,
        tokenizer=tokenizer,
        tokenizer_sha256=found.tokenizer.get("tokenizer.json", ""),
        train=train,
        held_out=held_out,
        text_bytes=sizes,
        identity=[found.checksums, len(train)],
        notes=found.notes,
    )


def _of_others(source: str, stretches: Sequence[Stretch], config: DataConfig) -> Opened:
    tokenizer = named_tokenizer(config)
    to_train, apart = held_out_files(stretches)
    _check_apart(config, apart, source)
    train, held_out = (Shards(part, tokenizer.size) for part in (to_train, apart))
    train.check()
    held_out.check()
    identity: list[object] = [fingerprint_of(to_train), fingerprint_of(apart)]
    notes = [
        f"{source}: {len(apart)} of {len(stretches)} token files are held out by their names, "
        f"first {one.path.name}; the others, first {to_train[0].path.name}, are trained on"
        for one in apart[:1]
    ]
    if not apart:
        train, held_out = _tail_held_out(train, config.held_out)
        identity[1] = config.held_out
    return Opened(
        source=source,
        tokenizer=tokenizer,
        tokenizer_sha256="",
        train=train,
        held_out=held_out,
        text_bytes=(None, None),
        identity=identity,
        notes=tuple(notes),
    )


def _check_apart(config: DataConfig, apart: Sequence[Stretch], source: str) -> None:
    if apart and config.held_out != DataConfig().held_out:
        raise DataError(
            f"{source} has token files that are held out by their names.",
            numbers=f"There are {len(apart)}, first {apart[0].path.name}, and data.held_out = "
            f"{config.held_out}, which is 0 for evaluation.sets, as all of each is measured.",
            write="a glob of the files that are meant, or leave --data.held-out out",
        )


def _check_named(config: DataConfig, saved: dict[str, str], source: str, folder: Path) -> None:
    """Raises DataError where the options name another tokenizer than that of a folder."""
    if config.tokenizer == DataConfig().tokenizer:
        return
    if checksums_of(named_tokenizer(config)).get("tokenizer.json") != saved.get("tokenizer.json"):
        raise DataError(
            f"data.tokenizer is not the tokenizer of {source}.",
            numbers=f"It is {config.tokenizer!r}, and its tokenizer.json differs.",
            write=f"leave --data.tokenizer out, or --data.tokenizer {folder / TOKENIZER}",
        )


def _check_share(config: DataConfig, share: object, source: str) -> None:
    if config.held_out not in (DataConfig().held_out, share):
        raise DataError(
            f"{source} has its own share of documents that are held out.",
            numbers=f"It is {share}, and data.held_out = {config.held_out}, which is 0 for "
            "evaluation.sets, as all of each is measured.",
            write=f"mics tokenize --held-out {config.held_out} <source> <a new folder>, or leave "
            "--data.held-out out; --evaluation.sequences 0 evaluates nothing",
        )


def _tail_held_out(ids: Shards, share: float) -> tuple[Shards, Shards]:
    """The last tokens are held out of what has no split of its own."""
    cut = round(len(ids) * (1 - share))
    return ids.part(0, cut), ids.part(cut, len(ids))
