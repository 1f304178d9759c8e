"""A folder of tokens made: gone on with where it was left, and finished by whoever comes last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mics.errors import DataError
from mics.quantities import clock, count
from mics.ranks.console import ShowBytes, say
from mics.ranks.files import read_small, write_whole
from mics.training.data.corpus import check_apart
from mics.training.data.saved_tokenizer import checksums, checksums_of
from mics.training.data.spelling import note_on, spelled_words
from mics.training.data.token_folder import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Shard,
    Split,
    TokenFolder,
    is_token_folder,
    read_token_folder,
)
from mics.training.data.tokenizing.plan import Job, Plan, make_plan
from mics.training.data.tokenizing.pool import Task, make_parts
from mics.training.data.tokenizing.share import Share
from mics.training.data.tokenizing.vocabulary import tokenizer_of
from mics.training.data.tokenizing.work import PROGRESS, looks_of, read_record, shard_name
from mics.training.data.tokens import Tokenizer, known_tokenizer

_PLAN = "plan.json"


@dataclass(frozen=True)
class Outcome:
    """What a command has done.

    Args:
        found: the finished folder; ``None`` while parts of other tasks are missing.
        missing: how many parts are.
        parts: how many there are.
        num_bytes: tokenised by this command.
        seconds: that it took.
    """

    found: TokenFolder | None
    missing: int
    parts: int
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.missing:,} of {self.parts:,} part(s) are left to other tasks"
        found = self.found
        train, held_out = found.splits["train"], found.splits["held_out"]
        return (
            f"{count(train.tokens)} tokens of {train.documents:,} document(s) to train on, "
            f"{count(held_out.tokens)} of {held_out.documents:,} held out; "
            f"{found.vocabulary:,} ids, {found.num_shards:,} file(s) of {found.dtype}"
        )

    def notes(self) -> list[str]:
        """What a person should know: the pace, and what the text is like."""
        notes = list(self.found.notes) if self.found else []
        if self.num_bytes:
            amount, pace = self.num_bytes / 1e6, self.num_bytes / 1e6 / max(self.seconds, 1e-9)
            notes.append(f"{amount:,.1f} MB in {clock(self.seconds)}, {pace:.2f} MB/s")
        return notes


def make_token_folder(
    job: Job, folder: Path, share: Share, processes: int, progress: ShowBytes
) -> Outcome:
    """Tokenise this task's share of a corpus, or what is left of it.

    Args:
        job: what is made of what.
        folder: that is made, or gone on with.
        share: which parts are this task's.
        processes: that tokenise; 0: one for each core that this process may use.
        progress: is shown bytes of the share.

    Raises:
        DataError: the source or the tokenizer cannot be read, or the folder is of something else.
    """
    check_apart(job.source, folder, "mics tokenize <source> <a folder outside of it>")
    _check_free(folder)
    plan = make_plan(job, progress)
    try:
        if not is_token_folder(folder):
            (folder / PROGRESS).mkdir(parents=True, exist_ok=True)
        return _make(job, plan, folder, share, processes or _cores(share), progress)
    except OSError as error:
        raise _not_written(folder, error) from None


def _make(
    job: Job, plan: Plan, folder: Path, share: Share, processes: int, progress: ShowBytes
) -> Outcome:
    tokenizer = _tokenizer(job, plan, folder, progress)
    made_from = {
        **asdict(job),
        "files": plan.files,
        "parts": len(plan.parts),
        "digest": plan.digest(job, checksums(folder / TOKENIZER)),
    }
    if is_token_folder(folder):
        shutil.rmtree(folder / PROGRESS, ignore_errors=True)
        return _finished(read_token_folder(folder), made_from, plan, folder)
    _agree(folder, made_from)
    mine = [number for number in range(len(plan.parts)) if share.has(number)]
    left = [number for number in mine if not _is_made(folder, number, plan, tokenizer.dtype)]
    weights = [sum(span.weight for span in part) for part in plan.parts]
    total, todo = sum(weights[n] for n in mine), sum(weights[n] for n in left)
    if len(left) < len(mine):
        say(f"{len(mine) - len(left)} of {len(mine)} part(s) are made already")
    begun = time.monotonic()
    if left:
        make_parts(
            Task(folder, job, plan, left, tokenizer), processes, total - todo, total, progress
        )
    seconds = time.monotonic() - begun
    dtype = tokenizer.dtype
    missing = [n for n in range(len(plan.parts)) if not _is_made(folder, n, plan, dtype)]
    found = None
    if not missing or is_token_folder(folder):  # another task may have finished it meanwhile
        found, missing = _finish(folder, plan, made_from, tokenizer), []
    return Outcome(found, len(missing), len(plan.parts), todo, seconds)


def _check_free(folder: Path) -> None:
    """Check that there is nothing in the folder but tokens.

    Raises:
        DataError: there is something else.
    """
    if not folder.exists() or is_token_folder(folder) or (folder / PROGRESS).is_dir():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise DataError(
            f"{folder} is no new folder.",
            numbers="It is a file." if not folder.is_dir() else "There is something in it.",
            write="mics tokenize <source> <a new folder>",
        )


def _tokenizer(job: Job, plan: Plan, folder: Path, progress: ShowBytes) -> Tokenizer:
    """The tokenizer of the folder, which the first task has written.

    Raises:
        DataError: it cannot be read, or is another one than the folder's.
    """
    saved = folder / TOKENIZER
    if job.tokenizer == "bpe" and saved.is_dir():  # trained before, on the same sample
        tokenizer = known_tokenizer(str(saved))
    else:
        tokenizer = tokenizer_of(job, plan, progress)
        if not saved.is_dir():
            _appear(tokenizer, saved)
        if checksums_of(tokenizer) != checksums(saved):
            raise DataError(
                f"{folder} is made by another tokenizer.",
                numbers=f"Its files differ from those of {job.tokenizer}.",
                write="mics tokenize <source> <a new folder>",
            )
    tokenizer.reads_specials = job.specials == "ids"
    return tokenizer


def _appear(tokenizer: Tokenizer, saved: Path) -> None:
    unfinished = saved.parent / PROGRESS / f"{TOKENIZER}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save(unfinished)
    try:
        unfinished.rename(saved)
    except OSError:  # another task was first
        if not saved.is_dir():
            raise
        shutil.rmtree(unfinished, ignore_errors=True)


def _agree(folder: Path, made_from: dict[str, Any]) -> None:
    """Write down what is made, or compare it with what is written."""
    file = folder / PROGRESS / _PLAN
    if not file.exists():
        write_whole(file, json.dumps(made_from))
    try:
        told = json.loads(read_small(file))
    except ValueError:
        told = None
    _check_same(told, made_from, folder)


def _check_same(told: Any, made_from: dict[str, Any], folder: Path) -> None:
    """Raises DataError where a folder is made from something else; names what."""
    if told == made_from:
        return
    told = told if isinstance(told, dict) else {}
    others = [name for name in made_from if told.get(name) != made_from[name]]
    first = others[0]
    numbers = f"{first} is {told.get(first)!r} there and {made_from[first]!r} here."
    if first == "digest":
        numbers = "Names, sizes or kinds of the files differ, or what is cut where."
    raise DataError(
        f"{folder} holds tokens of something else.",
        numbers=numbers,
        write="mics tokenize <source> <a new folder>, or the source and options of before",
    )


def _is_made(folder: Path, number: int, plan: Plan, dtype: str) -> bool:
    """Whether a part is on the disk, of files that nobody has written to since."""
    record = read_record(folder, number)
    if record is None or record.looks != looks_of(plan.parts[number]):
        return False
    itemsize = np.dtype(dtype).itemsize
    for split, made in record.splits.items():
        file = folder / shard_name(split, number)
        if made.tokens and not (file.is_file() and file.stat().st_size == made.tokens * itemsize):
            return False
    return True


def _finished(found: TokenFolder, made_from: dict[str, Any], plan: Plan, folder: Path) -> Outcome:
    """Nothing is to be done for a folder that is whole.

    Raises:
        DataError: it is of something else, or files have been written to since.
    """
    told = dict(found.made_from)
    looks = told.pop("looks", None)
    _check_same(told, made_from, folder)
    if looks != _looks(plan):
        raise DataError(
            f"{folder} is whole, but files of its source have been written to since.",
            numbers="Their names and sizes are the same, their times are not.",
            write="mics tokenize <source> <a new folder>",
        )
    return Outcome(found, 0, len(plan.parts), 0, 0.0)


def _finish(
    folder: Path, plan: Plan, made_from: dict[str, Any], tokenizer: Tokenizer
) -> TokenFolder:
    """Write the manifest; tasks that do so at once write the same."""
    numbers = range(len(plan.parts))
    records = [record for n in numbers if (record := read_record(folder, n)) is not None]
    if len(records) < len(plan.parts):  # another task has cleaned up
        return read_token_folder(folder)
    splits = {}
    for split in SPLITS:
        made = [(n, record.splits[split]) for n, record in enumerate(records)]
        splits[split] = Split(
            documents=sum(one.documents for _, one in made),
            text_bytes=sum(one.text_bytes for _, one in made),
            shards=tuple(
                Shard(shard_name(split, n), one.tokens, one.sha256) for n, one in made if one.tokens
            ),
        )
    if not splits["train"].tokens:
        splits = {"train": splits["held_out"], "held_out": splits["train"]}
    if not splits["train"].tokens:
        raise DataError("The corpus is empty.", numbers="0 bytes of text.", write="another source")
    found = TokenFolder(
        dtype="uint16" if tokenizer.dtype == "<u2" else "uint32",
        vocabulary=tokenizer.size,
        separator=tokenizer.separator,
        tokenizer=checksums(folder / TOKENIZER),
        splits=splits,
        made_from={**made_from, "looks": _looks(plan)},
        notes=tuple(_notes(records, tokenizer)),
    )
    write_whole(folder / MANIFEST, found.as_text())
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    return found


def _notes(records: list[Any], tokenizer: Tokenizer) -> list[str]:
    notes = []
    spelled = [record for record in records if record.spelled]
    if spelled:
        words = spelled_words(sum(record.spelled for record in spelled), spelled[0].first)
        notes.append(note_on(words, tokenizer.reads_specials, "--specials"))
    cuts = sum(record.seen_cuts for record in records)
    if cuts:
        notes.append(
            f"{cuts:,} cut(s) of documents above 1 MiB, or without a blank for 8 KiB, are seen by "
            "the tokenizer: ids beside them differ from those of the whole"
        )
    return notes


def _looks(plan: Plan) -> str:
    return hashlib.sha256("".join(map(looks_of, plan.parts)).encode()).hexdigest()


def _cores(share: Share) -> int:
    linux = hasattr(os, "sched_getaffinity")  # which knows what a scheduler has given this task
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return max(1, cores // share.here)


def _not_written(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{folder} cannot be written.",
        numbers=f"{error}.",
        write="a folder with room for the tokens: a half of the text's bytes, or all of them",
    )
