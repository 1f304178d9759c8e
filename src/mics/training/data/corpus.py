"""Where text comes from: an iterator over documents, whatever form they are kept in.

A document is a file of text, or what a row of a table has in one column.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mics.errors import DataError
from mics.ranks.console import say
from mics.training.data.finding import HUB, LIBRARY, check_name, find_files, is_hidden
from mics.training.data.kinds import kind_of, text_of
from mics.training.data.tables import no_column, rows_of, unreadable

FIELD = "text"
"""The column that holds the text, unless another is named."""


@dataclass(frozen=True)
class Document:
    """The bytes of a text, in pieces, and where it stands, for people."""

    place: str
    pieces: Iterable[bytes]


def check_apart(source: str, written: Path, write: str) -> None:
    """Check that nobody writes into the folder that is read.

    Args:
        source: what is read.
        written: the folder that is written.
        write: how another one is named.

    Raises:
        DataError: what is written would be text of the next start.
    """
    check_name(source)
    path, folder = Path(source).expanduser().resolve(), written.resolve()
    if path.is_dir() and folder.is_relative_to(path) and not is_hidden(folder.relative_to(path)):
        raise DataError(
            "The folder that is written lies in the source, which is read with what it holds.",
            numbers=f"{folder} lies in {path}.",
            write=f"{write}, or a glob of files as the source",
        )


OUTSIDE = "--run.folder <a folder outside of it>"
"""How the folder of a run is named, for ``check_apart``."""


def read_documents(
    source: str, field: str | None = None, form: Literal["auto", "text"] = "auto"
) -> Iterator[Document]:
    """Yield the documents of a source in a fixed order. The pieces of one are read before the next.

    Args:
        source: what ``data.source`` is in the run's options.
        field: the column that holds the text, in tables; ``None`` is "text", where there are any.
        form: "text" takes tables of letters as they stand.

    Raises:
        DataError: no such source, no such column, a column although there is no table, or a file
            that is neither text nor a table, or that is written meanwhile.
    """
    if field is not None and form == "text":
        raise _no_table(field, "data.format = text reads no table.")
    if source.startswith(HUB):
        yield from texts(hub_rows(source, field or FIELD), field or FIELD, source)
        return
    plain: list[Path] = []
    tables: list[Path] = []
    read: dict[tuple[int, int], Path] = {}
    form = "text" if source == LIBRARY and field is None else form
    for file in find_files(source):
        with opened(file) as stream:
            kind = kind_of(stream, file, field or FIELD, form)
            if kind is None:
                continue
            found = os.fstat(stream.fileno())
            read.setdefault((found.st_dev, found.st_ino), file)
            if kind == "text":
                if field is not None:
                    raise _no_table(field, f"{file} is text without columns.")
                plain.append(file)
                yield Document(str(file), text_of(stream, file))
            else:
                tables.append(file)
                rows = rows_of(stream, file, kind, field or FIELD)
                yield from texts(rows, field or FIELD, str(file))
    if again := len(plain) + len(tables) - len(read):
        once = set(read.values())
        first = next(file for file in [*plain, *tables] if file not in once)
        say(f"{again} file(s) are read more than once, through links; {first} is one")
    if plain and tables:
        say(
            f"data.source has {len(tables)} table(s), such as {tables[0]}, and {len(plain)} "
            f"file(s) of text, such as {plain[0]}: all of them are read"
        )


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """Open a file that must not change until it is closed.

    Raises:
        DataError: it cannot be read, or has changed.
    """
    try:
        with file.open("rb") as stream:
            before = _state(stream)
            yield stream
            if _state(stream) != before:
                raise DataError(
                    f"{file} was written while it was read.",
                    numbers=f"It had {before[0]:,} bytes and has {_state(stream)[0]:,}.",
                    write="--data.source <a copy that nobody writes to>",
                )
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}.", write="--data.source <readable files>"
        ) from None


def _state(stream: BinaryIO) -> tuple[int, int, int]:
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _no_table(field: str, numbers: str) -> DataError:
    return DataError(
        f"data.field = {field!r} is a column of tables, and not all of the source is a table.",
        numbers=numbers,
        write="leave --data.field out, or --data.source <tables alone>",
    )


def hub_rows(source: str, field: str | None) -> Iterator[tuple[str, Any]]:
    """What every row of a data set of the hub has in a column; ``None`` gives whole rows.

    Raises:
        DataError: it cannot be read, or has no such column.
    """
    from datasets import load_dataset

    name, _, split = source.removeprefix(HUB).partition("@")
    name, _, config = name.partition(":")
    try:
        rows: Iterable[dict[str, Any]] = load_dataset(
            name, streaming=True, name=config or None, split=split or "train"
        )
        for number, row in enumerate(rows, 1):
            place = f"Row {number} of {source}"
            if field is not None and field not in row:
                raise no_column(field, list(row), place)
            yield place, row if field is None else row[field]
    except DataError:
        raise
    except Exception as error:  # whatever the library, the network or a builder raises
        raise unreadable(source, error) from error


def texts(rows: Iterator[tuple[str, Any]], field: str, shown: str) -> Iterator[Document]:
    """The documents that rows of a table are; a null is left out, counted and said.

    Args:
        rows: where each stands, and its value.
        field: the column.
        shown: the table's name, for people.

    Raises:
        DataError: a value is no text.
    """
    empty = 0
    first = ""
    for place, text in rows:
        if text is None:
            empty += 1
            first = first or place
            continue
        if not isinstance(text, str):
            raise DataError(
                f"Column {field!r} of {shown} holds no text.",
                numbers=f"{place} has a value of type {type(text).__name__}.",
                write="--data.field <a column of strings>",
            )
        yield Document(place, [text.encode("utf-8", "surrogatepass")])
    if empty:
        say(f"{empty} row(s) of {shown} have null in {field!r} and are left out; {first} is one")
