"""Two streams of packed conversations from a run's options; rank 0 makes the tokens once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from mics.checkpoint.disk import sync, write_bytes
from mics.errors import DataError
from mics.ranks.console import ShowBytes, say
from mics.ranks.files import read_small
from mics.ranks.progress_bar import TextProgress
from mics.training.config import DataConfig
from mics.training.data.chat_template import ChatTemplate, Spoken
from mics.training.data.chats import Chats, Kept, is_intact, write_chats
from mics.training.data.conversations import Conversation, read_conversations
from mics.training.data.corpus import OUTSIDE, check_apart
from mics.training.data.finding import source_meant
from mics.training.data.prepare import Data, group_of_ranks, refuse_options_of_text
from mics.training.data.saved_tokenizer import checksums, save_tokenizer
from mics.training.data.spelling import Spelled
from mics.training.data.spool import held_out_of
from mics.training.data.text_source import build_where_needed, looks_of
from mics.training.data.tokens import known_tokenizer, saved_tokenizer

_FORMAT = 2
_META = "meta.json"  # the last that is written: with it a folder is whole
_SPLITS = ("train", "held_out")
_AT_ONCE = 256  # conversations that are tokenised together, by all cores
_OF_TEXT = ("sources", "specials", "vocabulary", "limit", "masked")  # of no use here


def prepare_chats(config: DataConfig, *, seed: int, sequence: int, folder: Path) -> Data:
    """Put conversations through the tokenizer's chat template, or find that done, and pack them.

    Collective where ``torch.distributed`` is initialised, as ``prepare_data`` is.

    Args:
        config: source, tokenizer, split, packing.
        seed: what the split and the order are drawn from.
        sequence: tokens of a row; longer conversations are cut.
        folder: tokens are kept in ``folder / "data"``.

    Raises:
        DataError: on every rank; no conversations, a row that is none, no chat template, or options
            that are for text.
    """
    _check_options(config)
    check_apart(source_meant(config.source), folder, OUTSIDE)
    made = folder / "data" / f"chats-{_key(config, seed, sequence)}"
    with group_of_ranks() as group:
        build_where_needed(made, lambda: _build(made, config, seed, sequence), group)
    meta = json.loads(read_small(made / _META))
    tokenizer = known_tokenizer(str(made / "tokenizer"))
    template = ChatTemplate(tokenizer)
    padding = tokenizer.fast.pad_token_id
    train, held_out = (
        Chats(
            made / split,
            sequence=sequence,
            seed=seed,
            padding=tokenizer.separator if padding is None else int(padding),
            packing=config.packing,
        )
        for split in _SPLITS
    )
    for note in meta["notes"]:
        say(note)
    identity = json.dumps([meta["sha256"], sequence, seed, config.packing])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Data(tokenizer, train, held_out, fingerprint, (source_meant(config.source),), template)


def _check_options(config: DataConfig) -> None:
    refuse_options_of_text(config, _OF_TEXT, "data.format is chat", "leave it out")
    if config.tokenizer in ("bytes", "bpe"):
        raise DataError(
            "Conversations need the tokenizer of a chat model, which brings its chat template.",
            numbers=f"data.tokenizer = {config.tokenizer!r}, data.format = chat.",
            write="--data.tokenizer <folder or hub name of the model>",
        )


# -- one rank's work -------------------------------------------------------------------------------


@dataclass
class _Told:
    """What was found on the way, for people."""

    spelled: Spelled
    cut: int = 0
    first_cut: str = ""
    empty: int = 0
    first_empty: str = ""

    def lines(self, sequence: int) -> list[str]:
        """Say what a person should know."""
        lines = []
        if self.cut:
            lines.append(
                f"{self.cut:,} conversation(s) are longer than data.sequence = {sequence} and end "
                f"there, first {self.first_cut}"
            )
        if self.empty:
            lines.append(
                f"{self.empty:,} conversation(s) have no answer to learn within {sequence} tokens "
                f"and are left out, first {self.first_empty}"
            )
        if self.spelled.count:
            lines.append(
                "messages spell special tokens of the tokenizer, which the chat template makes "
                f"those tokens, as in transformers: {self.spelled.words()}"
            )
        return lines


def _build(made: Path, config: DataConfig, seed: int, sequence: int) -> None:
    try:
        with TextProgress() as progress:
            sources = looks_of(config)
            if not _is_there(made, sources):
                _write(made, config, seed, sequence, sources, progress.show)
    except OSError as error:
        raise DataError(
            "The tokens of the conversations cannot be written.",
            numbers=f"{error}.",
            write="--run.folder <a writable folder with room for the tokens>",
        ) from error


def _is_there(made: Path, sources: str) -> bool:
    """Whether the conversations of these files are there, to the byte, and their tokenizer."""
    try:
        meta = json.loads(read_small(made / _META))
        kept = [Kept(**one) for one in meta["kept"]]
        return (
            bool(meta["sources"] == sources)
            and meta["sha256"] == [one.sha256 for one in kept]
            and all(is_intact(made / s, one) for s, one in zip(_SPLITS, kept, strict=True))
            and checksums(made / "tokenizer") == meta["tokenizer"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(
    made: Path, config: DataConfig, seed: int, sequence: int, sources: str, progress: ShowBytes
) -> None:
    tokenizer = saved_tokenizer(config.tokenizer)
    template = ChatTemplate(tokenizer)
    told = _Told(Spelled(tokenizer.specials))
    found = read_conversations(source_meant(config.source), config.field)
    spoken, numbers = _spoken(found, template, seed, sequence, told, progress)
    if not spoken:
        raise DataError(
            "There is no conversation with an answer to learn.",
            numbers=f"{told.empty:,} conversation(s) without one.",
            write="--data.source <conversations>, or a larger --data.sequence",
        )
    held_out = held_out_of(numbers, config.held_out)
    making = made.with_name(made.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    saved = save_tokenizer(tokenizer, making / "tokenizer")
    kept = [
        write_chats(
            making / split,
            [one for one, out in zip(spoken, held_out, strict=True) if out == side],
        )
        for split, side in zip(_SPLITS, (False, True), strict=True)
    ]
    meta = {
        "sha256": [one.sha256 for one in kept],
        "kept": [asdict(one) for one in kept],
        "tokenizer": saved,
        "sources": sources,
        "notes": told.lines(sequence),
    }
    write_bytes(making / _META, json.dumps(meta, indent=2).encode())
    sync(making)
    shutil.rmtree(made, ignore_errors=True)
    making.rename(made)
    sync(made.parent)


def _spoken(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    seed: int,
    sequence: int,
    told: _Told,
    progress: ShowBytes,
) -> tuple[list[Spoken], list[int]]:
    """The conversations with something to learn, and of each a number by which it is held out."""
    spoken: list[Spoken] = []
    numbers: list[int] = []
    size = 0
    for conversation, one in _through(template, conversations):
        size += _look(conversation, told.spelled)
        if len(one.ids) > sequence:
            told.cut += 1
            told.first_cut = told.first_cut or conversation.place
            one = Spoken(one.ids[:sequence], one.learnt[:sequence])
        if not one.learnt[1:].any():
            told.empty += 1
            told.first_empty = told.first_empty or conversation.place
            continue
        digest = hashlib.sha256(seed.to_bytes(8, "little") + one.ids.tobytes()).digest()
        spoken.append(one)
        numbers.append(int.from_bytes(digest[:8], "little"))
        progress("putting conversations through the chat template", size, 0)
    return spoken, numbers


def _through(
    template: ChatTemplate, conversations: Iterable[Conversation]
) -> Iterator[tuple[Conversation, Spoken]]:
    """Put conversations through the template, some hundred at once."""
    rest = iter(conversations)
    while some := list(islice(rest, _AT_ONCE)):
        yield from zip(some, template.spoken(some), strict=True)


def _look(conversation: Conversation, spelled: Spelled) -> int:
    """Look for special tokens in what was said; return how many bytes that is."""
    size = 0
    for message in conversation.messages:
        text = message["content"].encode("utf-8", "surrogatepass")
        spelled.begin(conversation.place)
        spelled.look(text)
        size += len(text)
    return size


def _key(config: DataConfig, seed: int, sequence: int) -> str:
    """A name for the options that the tokens follow from; their files are in ``meta.json``."""
    options: Sequence[object] = (
        config.source,
        config.field,
        config.tokenizer,
        config.held_out,
        seed,
        sequence,
    )
    return hashlib.sha256(json.dumps([_FORMAT, *options]).encode()).hexdigest()[:16]
