"""Two streams of sequences from a run's options: to train on, and to measure with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mics.errors import DataError
from mics.quantities import count
from mics.ranks.console import say
from mics.training.config import DataConfig, SourceConfig
from mics.training.data.chat_template import ChatTemplate
from mics.training.data.chats import Chats
from mics.training.data.corpus import OUTSIDE, check_apart
from mics.training.data.finding import source_meant
from mics.training.data.mixture import Mixture, whole_weights
from mics.training.data.opened import Group, Opened, on_all
from mics.training.data.stream import Masking, Stream, Tokens
from mics.training.data.text_source import open_text
from mics.training.data.token_source import is_tokens, open_tokens
from mics.training.data.tokens import Tokenizer

Sequences = Stream | Mixture | Chats
"""What gives batches by their position in an endless order."""

_LONGEST = timedelta(days=2)  # ranks wait for the one that tokenises
_OF_TEXT = ("field", "format", "specials", "vocabulary", "limit")  # options of no use to tokens
_APART = 0x9E3779B97F4A7C15  # between the seeds of sources, so that equal ones are not in step


@dataclass(frozen=True)
class Prompt:
    """The ``ids`` that a model goes on from, and which ones end what it writes, if any do."""

    ids: list[int]
    ends: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured with.

    ``fingerprint`` names tokens, order and masks: equal ones give equal batches at every position.
    ``sources`` are those of the training stream, by the names that the options have for them.
    ``template`` is that of conversations; text has none.
    """

    tokenizer: Tokenizer
    train: Sequences
    held_out: Sequences
    fingerprint: str
    sources: tuple[str, ...]
    template: ChatTemplate | None = None

    def start_of(self, text: str) -> Prompt:
        """Where a sample goes on from: the end of a text, or what a user says.

        Raises:
            DataError: the chat template does not take it.
        """
        if self.template is not None:
            ids = self.template.prompt([{"role": "user", "content": text}])
            return Prompt(ids, self.tokenizer.special_ids)
        return Prompt(self.tokenizer.encode(text) or [self.tokenizer.separator])

    def lines(self, position: int) -> list[str]:
        """What there is, for people, and how often a run that ends at ``position`` has seen it."""
        train, ids = self.train, f"{self.tokenizer.size:,} ids"
        if isinstance(train, Chats):
            return [
                f"{self.sources[0]}: {train.num_conversations:,} conversations in "
                f"{train.num_sequences:,} sequences, {self.held_out.num_sequences:,} held out, "
                f"{train.filled:.1%} full; {count(train.num_learnt)} of {count(train.num_tokens)} "
                f"tokens are learnt, {ids}"
            ]
        rate = "n/a" if train.bytes_per_token is None else f"{train.bytes_per_token:.2f}"
        held_out = f"{self.held_out.num_sequences:,} held out; {rate} bytes per token, {ids}"
        if isinstance(train, Stream):
            return [
                f"{self.sources[0]}: {count(train.num_tokens)} tokens in "
                f"{train.num_sequences:,} sequences, {held_out}"
            ]
        lines = [
            f"{name}: {part.share:.4g} of the sequences, {count(part.stream.num_tokens)} tokens in "
            f"{part.stream.num_sequences:,} sequences, {part.share * position / n:.2f} epochs"
            for name, part in zip(self.sources, train.parts, strict=True)
            for n in [part.stream.num_sequences]
        ]
        return [*lines, f"together {count(train.num_tokens)} tokens, {held_out}"]


def prepare_data(
    config: DataConfig, *, seed: int, sequence: int, masked: bool, folder: Path
) -> Data:
    """Open the sources, tokenising those of text where they are not yet, and mix them.

    Collective where ``torch.distributed`` is initialised. Rank 0 tokenises while the others wait;
    tokens that are prepared every rank opens for itself.

    Args:
        config: sources, tokenizer, split.
        seed: what the split, the order and the masks are drawn from.
        sequence: tokens per sequence.
        masked: labels for a masked language model, else the next token.
        folder: tokens of text are kept in ``folder / "data"``.

    Raises:
        DataError: on every rank; no text, no such tokenizer or column, too little text, sources
            that do not go together, or the text is where the run writes.
    """
    sources = sources_of(config)
    if config.source is None and not config.sources:
        say("no data.source is named, so this trains on the source of Python's standard library")
    for one in sources:
        check_apart(one.source, folder, OUTSIDE)
    weights = whole_weights([one.weight for one in sources])
    with group_of_ranks() as group:
        opened = _open(config, sources, seed, folder, group)
    tokenizer = opened[0].tokenizer
    masking = None
    if masked:
        masking = Masking(config.masked, _mask_of(tokenizer, config), tokenizer.size)

    def stream(number: int, tokens: Tokens, num_bytes: int | None) -> Stream:
        own = (seed + number * _APART) % 2**63
        return Stream(tokens, num_bytes=num_bytes, sequence=sequence, seed=own, masking=masking)

    train = [stream(n, each.train, each.text_bytes[0]) for n, each in enumerate(opened)]
    for source, found in zip(opened, train, strict=True):
        if found.num_sequences == 0:
            raise DataError(
                "The corpus is shorter than one sequence.",
                numbers=f"{found.num_tokens} tokens to train on, data.sequence = {sequence}"
                + (f", in {source.source}." if len(opened) > 1 else "."),
                write="more text, or a smaller --data.sequence",
            )
    held_out = [stream(n, each.held_out, each.text_bytes[1]) for n, each in enumerate(opened)]
    for note in (note for each in opened for note in each.notes):
        say(note)
    measured = _mixed(held_out, weights)
    if config.held_out and measured.num_sequences == 0:
        say(f"the held-out text ({measured.num_tokens} tokens) is shorter than a sequence: no loss")
    return Data(
        tokenizer,
        _mixed(train, weights),
        measured,
        _fingerprint(opened, weights, sequence, seed, config.masked if masked else None),
        tuple(one.source for one in sources),
    )


def sources_of(config: DataConfig) -> tuple[SourceConfig, ...]:
    """The sources of a run: those of data.sources, or data.source alone.

    Raises:
        DataError: both are given, or a tokenizer would be trained on each of several.
    """
    if not config.sources:
        return (SourceConfig(source_meant(config.source), field=config.field),)
    if config.source is not None or config.field is not None:
        raise DataError(
            "data.source, or data.field, stands beside data.sources.",
            numbers=f"data.source = {config.source!r}, and there are {len(config.sources)} others.",
            write="[[data.sources]] for each of them, with source, field and weight",
        )
    if config.tokenizer == "bpe":
        raise DataError(
            "data.tokenizer = bpe would be trained on each of data.sources for itself.",
            numbers=f"There are {len(config.sources)}.",
            write="mics tokenize --tokenizer bpe <one of them> <folder>, and "
            "--data.tokenizer <folder>/tokenizer for the others",
        )
    return config.sources


# -- opening ---------------------------------------------------------------------------------------


@contextmanager
def group_of_ranks() -> Iterator[Group]:
    """A Gloo group of all ranks that waits long, while one of them tokenises."""
    if not dist.is_initialized():
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=_LONGEST)
    assert group is not None
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _open(
    config: DataConfig, sources: Sequence[SourceConfig], seed: int, folder: Path, group: Group
) -> list[Opened]:
    """Open every source; tokens first, which is soon done and may refuse them all."""
    told = on_all(lambda: [is_tokens(one.source) for one in sources], group)
    _check_alike(told, "tells tokens from text otherwise, or does not see the same files")
    ready = told[0]
    if all(ready):
        refuse_options_of_text(
            config,
            _OF_TEXT,
            "data.source is tokens",
            "mics tokenize with --{name}, or leave it out",
        )
    opened: dict[int, Opened] = {}

    def open_ready() -> list[object]:
        numbers = [number for number, is_ready in enumerate(ready) if is_ready]
        opened.update({n: open_tokens(sources[n].source, config) for n in numbers})
        return [opened[n].identity for n in numbers]

    _check_alike(on_all(open_ready, group), "sees other tokens")
    for number, one in enumerate(sources):
        if not ready[number]:
            own = replace(config, source=one.source, field=one.field, sources=())
            opened[number] = open_text(own, seed, folder, group)
    found = [opened[number] for number in range(len(sources))]
    _check_tokenizers(found)
    return found


def _check_alike(told: list[object], what: str) -> None:
    """Raises DataError on all ranks where one has found something else than the first."""
    others = [rank for rank, one in enumerate(told) if one != told[0]]
    if others:
        raise DataError(
            f"Rank {others[0]} {what} in data.source.",
            numbers=f"{len(others)} of {len(told)} ranks differ from rank 0.",
            write="a folder that all nodes share, or the same copy on each",
        )


def refuse_options_of_text(
    config: DataConfig, names: Sequence[str], instead: str, write: str
) -> None:
    """Refuse options that have no effect on what is no text.

    Args:
        config: the options.
        names: of those that have none.
        instead: what there is, as the end of a sentence.
        write: what to write, with ``{name}`` for the option's.

    Raises:
        DataError: one of them has another value than its default.
    """
    plain = DataConfig()
    for name in names:
        if getattr(config, name) != getattr(plain, name):
            raise DataError(
                f"data.{name} is for text, and {instead}.",
                numbers=f"data.{name} = {getattr(config, name)!r}.",
                write=write.format(name=name),
            )


def _check_tokenizers(opened: Sequence[Opened]) -> None:
    """Raises DataError where ids of two sources do not mean the same."""
    first = opened[0]
    for one in opened[1:]:
        kept = first.tokenizer_sha256 and one.tokenizer_sha256
        if one.tokenizer.size != first.tokenizer.size or (
            kept and one.tokenizer_sha256 != first.tokenizer_sha256
        ):
            raise DataError(
                "The sources are tokens of different tokenizers.",
                numbers=f"{first.source} has {first.tokenizer.size:,} ids, {one.source} "
                f"{one.tokenizer.size:,}; their tokenizer.json differ.",
                write="--data.tokenizer <folder of tokens>/tokenizer, or mics tokenize them alike",
            )


def _mask_of(tokenizer: Tokenizer, config: DataConfig) -> int:
    if tokenizer.mask is None:
        raise DataError(
            "A masked language model needs a tokenizer with a mask token.",
            numbers=f"data.tokenizer = {config.tokenizer!r} has {tokenizer.size} ids and none.",
            write="a tokenizer with a mask_token, or bytes, or bpe",
        )
    return tokenizer.mask


# -- mixing ----------------------------------------------------------------------------------------


def _mixed(streams: Sequence[Stream], weights: Sequence[int]) -> Stream | Mixture:
    return streams[0] if len(streams) == 1 else Mixture(streams, weights)


def _fingerprint(
    opened: Sequence[Opened],
    weights: Sequence[int],
    sequence: int,
    seed: int,
    masked: float | None,
) -> str:
    told = [one.identity for one in opened]
    what = told[0] if len(told) == 1 else [told, list(weights)]
    identity = json.dumps([what, sequence, seed, masked])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
