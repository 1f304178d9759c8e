"""Rows of a table, one after the other, in the memory of some of them.

A value is read as it stands: a builder of ``datasets`` would take text that looks like a date for
one and write it another way.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from mics.errors import DataError
from mics.training.data.kinds import LONGEST_LINE, Kind, delimiter_of, text_of

_ROWS_AT_ONCE = 1024  # of a Parquet file; a row group may be larger than memory
_HEADER = 64 << 10
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_LONGEST_CELL = 2**31 - 1

_AS_TEXT = ", or --data.format text to train on the file as it stands"

Row = tuple[str, Any]
"""Where a value stands, for people, and the value."""


def rows_of(
    stream: BinaryIO,
    file: Path,
    kind: Kind,
    field: str | None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Row]:
    """What every row of an open table has in its column ``field``.

    Args:
        stream: the table.
        file: its name, for people.
        kind: what its bytes are.
        field: the column; ``None`` gives whole rows.
        start: where to begin: JSON lines that begin at that byte or later; of Parquet and Arrow the
            group of rows (``weigh``); other tables are read whole.
        stop: where to end, in the same unit.

    Raises:
        DataError: it cannot be read, or has no such column; in JSON, a row that has not.
    """
    if kind == "json lines":
        return _of_lines(stream, file, field, start, stop)
    if kind == "json":
        return _of_document(stream, file, field)
    if kind in ("csv", "tsv"):
        return _of_cells(stream, file, field)
    return _of_arrow(stream, file, kind, field, start, stop)


def no_column(field: str, columns: list[str], shown: str) -> DataError:
    """What is said of a table, or a row of it, that lacks the column."""
    near = difflib.get_close_matches(field, columns, 1, cutoff=0.4)
    names = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    chat = "messages" in columns or {"prompt", "completion"} <= {*columns}
    learn = "mics train --data.format chat for conversations, or " if chat else ""
    return DataError(
        f"{shown} has no column {field!r}" + (f"; did you mean {near[0]!r}?" if near else "."),
        numbers=f"Its columns are {names}." if columns else "A row has no columns.",
        write=f"{learn}--data.field {[*near, *columns, '<column>'][0]}{_AS_TEXT}",
    )


def unreadable(shown: str, error: BaseException, more: str = "") -> DataError:
    """What is said when a library or the system cannot read something."""
    cause = error.__cause__ or error
    words = f"{type(cause).__name__}: {cause}".splitlines()[0]
    return DataError(
        f"{shown} cannot be read.",
        numbers=words[:300],
        write=f"--data.source <a file, folder or hub data set that can>{more}",
    )


def _of_lines(
    stream: BinaryIO, file: Path, field: str | None, start: int, stop: int | None
) -> Iterator[Row]:
    number = 0
    behind = f", counted from byte {start:,}" if start else ""
    if start:
        stream.seek(start - 1)
        stream.readline()  # what is left of a line that begins before it
    while (stop is None or stream.tell() < stop) and (line := stream.readline(LONGEST_LINE)):
        number += 1
        if not line.strip():
            continue
        place = f"Line {number} of {file}{behind}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise unreadable(place, error, _AS_TEXT) from None
        yield place, _value(row, field, place, 'one {"text": "..."} a line')


def _of_document(stream: BinaryIO, file: Path, field: str | None) -> Iterator[Row]:
    """A list of objects, or one object that is a row itself."""
    data = stream.read(LONGEST_LINE + 1)
    if len(data) > LONGEST_LINE:
        raise DataError(
            f"{file} is one JSON value that is too long to be read at once.",
            numbers=f"It has more than {LONGEST_LINE:,} bytes.",
            write=f"one row a line: jq -c '.[]' {file} > rows.jsonl",
        )
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        shown = f"{file}, which is JSON by its name or its first bytes,"
        raise unreadable(shown, error, _AS_TEXT) from None
    for number, row in enumerate(found if isinstance(found, list) else [found], 1):
        place = f"Entry {number} of {file}" if isinstance(found, list) else str(file)
        yield place, _value(row, field, place, '[{"text": "..."}, ...]')


def _value(row: object, field: str | None, place: str, example: str) -> object:
    """A row's value in one column, or the row.

    Raises:
        DataError: it is no object, or has no such column.
    """
    if not isinstance(row, dict):
        raise DataError(
            f"{place} is no JSON object.",
            numbers=f"It is of type {type(row).__name__}.",
            write=f"{example}{_AS_TEXT}",
        )
    if field is None:
        return row
    if field not in row:
        raise no_column(field, list(row), place)
    return row[field]


def _of_cells(stream: BinaryIO, file: Path, field: str | None) -> Iterator[Row]:
    start = stream.tell()
    delimiter = _delimiter(stream.read(_HEADER), file, field or "")
    stream.seek(start)
    for _ in text_of(stream, file):
        pass  # all of it is text, or this has raised
    stream.seek(start)
    lines = io.TextIOWrapper(stream, "utf-8", newline="")
    try:
        with _long_cells():
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(reader, [])
            if names and field is not None and names.count(field) != 1:
                raise no_column(field, names, str(file))
            at = names.index(field) if names and field is not None else 0
            for row in reader:
                place = f"Line {reader.line_num} of {file}"
                if row and len(row) != len(names):
                    raise DataError(
                        f"{place} has another number of cells than the first.",
                        numbers=f"There are {len(row)}, and {len(names)} columns.",
                        write=f"quotes around a cell with commas or line ends{_AS_TEXT}",
                    )
                if row:
                    yield place, dict(zip(names, row, strict=True)) if field is None else row[at]
    except csv.Error as error:
        raise unreadable(f"Line {reader.line_num} of {file}", error, _AS_TEXT) from None
    finally:
        lines.detach()


def _delimiter(head: bytes, file: Path, field: str) -> str:
    """What parts the cells: what the beginning shows, else what the file's name says."""
    shown = delimiter_of(head, field)
    return shown or ("\t" if file.suffix.lower() == ".tsv" else ",")


@contextmanager
def _long_cells() -> Iterator[None]:
    """The module's limit on a cell is 128 KiB, less than many a document."""
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def weigh(stream: BinaryIO, file: Path, kind: Kind, field: str) -> list[int]:
    """The bytes of every group of rows in an open Parquet or Arrow table, near enough.

    Raises:
        DataError: it cannot be read, or has no such column.
    """
    with _reading(file):
        table = _opened(stream, file, kind, field)
        if kind == "parquet":
            groups = [table.metadata.row_group(n) for n in range(table.num_row_groups)]
            flat = [[g.column(c) for c in range(g.num_columns)] for g in groups]
            named = [[c for c in one if c.path_in_schema.split(".")[0] == field] for one in flat]
            return [sum(c.total_uncompressed_size for c in columns) for columns in named]
        batches = list(_batches(table, kind))
        size = file.stat().st_size
        return [size // len(batches)] * len(batches) if batches else []


def _of_arrow(
    stream: BinaryIO, file: Path, kind: Kind, field: str | None, start: int, stop: int | None
) -> Iterator[Row]:
    with _reading(file):
        table = _opened(stream, file, kind, field)
        number = 0
        if kind == "parquet":
            groups = range(table.num_row_groups)[start:stop]
            number = sum(table.metadata.row_group(n).num_rows for n in range(start))
            taken = table.iter_batches(
                _ROWS_AT_ONCE,
                row_groups=list(groups),
                columns=None if field is None else [field],
                use_threads=False,
            )
        else:
            for batch in islice(_batches(table, kind), start):
                number += batch.num_rows
            taken = islice(_batches(_opened(stream, file, kind, field), kind), start, stop)
        for batch in taken:
            for value in batch.to_struct_array() if field is None else batch.column(field):
                number += 1
                yield f"Row {number} of {file}", value.as_py()


def _opened(stream: BinaryIO, file: Path, kind: Kind, field: str | None) -> Any:
    """A reader of pyarrow, once its table is known to have the column."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{file} is a table that needs pyarrow, which is not installed.",
            numbers=f"Its bytes are {kind}.",
            write="pip install 'torch-mics[train]'",
        ) from None
    if kind == "parquet":
        # Threads of Arrow would read ahead from our stream. One that has not let go of it when the
        # interpreter ends asks for its lock, and aborts the process: exit code 134.
        table = parquet.ParquetFile(stream, pre_buffer=False)
        names = table.schema_arrow.names
    elif kind == "arrow file":
        table = arrow.ipc.open_file(arrow.memory_map(str(file)))  # what is passed over is not read
        names = table.schema.names
    else:
        stream.seek(-len(_END_OF_STREAM), 2)
        if stream.read() != _END_OF_STREAM:  # Arrow itself takes what is there for all
            raise EOFError("it does not end as one")
        table = arrow.ipc.open_stream(arrow.memory_map(str(file)))
        names = table.schema.names
    if field is not None and names.count(field) != 1:
        raise no_column(field, names, str(file))
    return table


def _batches(table: Any, kind: Kind) -> Iterator[Any]:
    if kind == "arrow file":
        return map(table.get_batch, range(table.num_record_batches))
    return iter(table)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # whatever the library raises for a torn file
        raise unreadable(str(file), error) from None
