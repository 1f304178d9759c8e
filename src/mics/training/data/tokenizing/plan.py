"""How the work is cut: into parts that follow from the source alone, not from who works.

[Note: parts]
A part is some spans of files, and becomes one shard of each split. Where parts begin is the same
for every process and node, so each takes its own without asking, and who has done what, in which
order, killed how often, leaves no trace in the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mics.errors import DataError
from mics.ranks.console import ShowBytes
from mics.training.data.corpus import FIELD, opened
from mics.training.data.finding import HUB, LIBRARY, find_files
from mics.training.data.foreign import find_token_files
from mics.training.data.kinds import Kind, kind_of
from mics.training.data.tables import weigh

_LEAST, _MOST = 1 << 20, 256 << 20  # bytes of a part
_PARTS = 4096  # wanted, where that leaves them between the two

_BY_BYTES: tuple[Kind, ...] = ("text", "json lines")
_BY_ROWS: tuple[Kind, ...] = ("parquet", "arrow file", "arrow stream")


@dataclass(frozen=True)
class Span:
    """A stretch of a file.

    Args:
        file: its path.
        kind: what its bytes are.
        start: where it begins: a byte of text and JSON lines, a group of rows of other tables.
        stop: where the next one begins; of files that are read as a whole, their size.
        weight: bytes that it counts for.
    """

    file: str
    kind: Kind
    start: int
    stop: int
    weight: int


Part = tuple[Span, ...]


@dataclass(frozen=True)
class Job:
    """What is made of what: the options that the ids follow from.

    Args:
        source: file, folder or glob, or "stdlib".
        field: the column that holds the text, in tables; ``None`` is "text".
        format: "text" takes tables of letters as they stand.
        tokenizer: "bytes", "bpe", or a saved one.
        vocabulary: ids that "bpe" trains.
        specials: "ids" reads special tokens that the text spells as those.
        held_out: share of the documents.
        seed: what the documents that are held out are drawn from.
    """

    source: str
    field: str | None = None
    format: Literal["auto", "text"] = "auto"
    tokenizer: str = "bytes"
    vocabulary: int = 4096
    specials: Literal["text", "ids"] = "text"
    held_out: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The parts of a job, in the order of their shards.

    ``share`` of the documents are held out: none where there is one alone, whose end training
    holds out. ``weight`` is that of all parts, in bytes.
    """

    parts: tuple[Part, ...]
    files: int
    share: float
    weight: int

    def digest(self, job: Job, tokenizer: dict[str, str]) -> str:
        """Equal for equal work: the same files, cut alike, by the same tokenizer and options."""
        told: dict[str, Any] = {"job": asdict(job), "tokenizer": tokenizer}
        told["parts"] = [[tuple(vars(span).values()) for span in part] for part in self.parts]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def make_plan(job: Job, progress: ShowBytes) -> Plan:
    """Look at every file of a source, and cut it into parts.

    Raises:
        DataError: there is nothing, or something that is no text and no table.
    """
    if job.source.startswith(HUB):
        name = job.source.removeprefix(HUB)
        raise DataError(
            "mics tokenize reads files, and a data set of the hub is a stream.",
            numbers=f"It is {job.source}.",
            write=f"hf download {name} --repo-type dataset --local-dir <folder>, and that folder",
        )
    if find_token_files(job.source) is not None:
        raise DataError(
            f"{job.source} is tokens already.", write=f"mics train --data.source {job.source}"
        )
    whole = list(_whole_files(job, progress))
    weight = sum(span.weight for spans in whole for span in spans)
    if not weight:
        raise DataError(
            "The corpus is empty.", numbers="0 bytes of text.", write="a source with text in it"
        )
    size = min(_MOST, max(_LEAST, weight // _PARTS))
    parts = tuple(_parts((span for spans in whole for span in spans), size))
    alone = len(whole) == 1 and whole[0][0].kind == "text"
    return Plan(parts, len(whole), 0.0 if alone else job.held_out, weight)


def _whole_files(job: Job, progress: ShowBytes) -> Iterator[list[Span]]:
    """Every file, of tables with groups of rows one span for each of them."""
    field = job.field or FIELD
    form = "text" if job.source == LIBRARY and job.field is None else job.format
    for number, file in enumerate(find_files(job.source)):
        with opened(file) as stream:
            kind = kind_of(stream, file, field, form)
            if kind is None:
                continue
            if kind == "text" and job.field is not None:
                raise DataError(
                    f"--field {job.field} is a column of tables, and not all of the source is one.",
                    numbers=f"{file} is text without columns.",
                    write="leave --field out, or a source of tables alone",
                )
            if kind in _BY_ROWS:
                weights = weigh(stream, file, kind, field)
                if weights:
                    yield [Span(str(file), kind, n, n + 1, w) for n, w in enumerate(weights)]
            else:
                size = stream.seek(0, 2)
                yield [Span(str(file), kind, 0, size, size)]
        progress("looking at the files", number, 0)


def _parts(spans: Iterable[Span], size: int) -> Iterator[Part]:
    """Spans one behind the other, cut and put together to about a size."""
    part: list[Span] = []
    weight = 0
    for span in (piece for whole in spans for piece in _cut(whole, size)):
        if part and weight + span.weight > size:
            yield tuple(part)
            part, weight = [], 0
        part.append(span)
        weight += span.weight
    yield tuple(part)


def _cut(span: Span, size: int) -> Iterator[Span]:
    """A span of bytes in pieces of a size; others as they are."""
    if span.kind not in _BY_BYTES:
        yield span
        return
    for start in range(span.start, span.stop, size):
        stop = min(start + size, span.stop)
        yield Span(span.file, span.kind, start, stop, stop - start)
