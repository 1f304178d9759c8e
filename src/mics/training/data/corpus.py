"""Where text comes from: an iterator over documents, whatever form they are kept in.

A document is the bytes of its text: a file, or a row of a table.
"""

from __future__ import annotations

import difflib
import glob
import json
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mics.errors import DataError

# Installed packages and tests are not the library itself.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tgz"}
_ROWS_AT_ONCE = 1024  # of a Parquet file; a row group may be larger than memory
_HUB = "hub:"


def find_files(source: str) -> list[Path]:
    """The files of a local source, sorted; a hub source has none.

    Raises:
        DataError: there is no such file, or nothing in that folder or glob.
    """
    if source.startswith(_HUB):
        return []
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [
            file
            for file in root.rglob("*.py")
            if not _NOT_LIBRARY.intersection(file.relative_to(root).parts)
        ]
        return sorted(files)
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = path.rglob("*")
        files = [f for f in found if f.is_file() and not _hidden(f.relative_to(path))]
    else:
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = [Path(match) for match in matches if Path(match).is_file()]
    if not files:
        raise DataError(
            f"There is no text in data.source {source!r}.",
            numbers="It is a folder without files."
            if path.is_dir()
            else "No file, folder or glob of that name has files.",
            write='--data.source <file, folder, glob, hub:owner/name or "stdlib">',
        )
    return sorted(files)


def check_apart(source: str, run: Path) -> None:
    """Check that a run does not write into the folder that it reads.

    Raises:
        DataError: what it writes would be text of the next start.
    """
    path, run = Path(source).expanduser().resolve(), run.resolve()
    if path.is_dir() and run.is_relative_to(path) and not _hidden(run.relative_to(path)):
        raise DataError(
            "The folder of the run lies in data.source, which would be read with what it holds.",
            numbers=f"run.folder is {run}, data.source {path}.",
            write="--run.folder <a folder outside of it>, or a glob of files as --data.source",
        )


def read_documents(source: str, field: str) -> Iterator[bytes]:
    """Yield the documents of a source in a fixed order.

    Args:
        source: what ``data.source`` is in the run's options.
        field: the column that holds the text, in tables.

    Raises:
        DataError: no such source, no such column, a file that cannot be read as what it claims.
    """
    if source.startswith(_HUB):
        yield from _hub_rows(source, field)
        return
    for file in find_files(source):
        kind = file.suffix.lower()
        if kind == ".jsonl":
            yield from _texts(_json_rows(file), field, str(file))
        elif kind == ".parquet":
            yield from _texts(_parquet_rows(file), field, str(file))
        elif kind in _COMPRESSED:
            raise DataError(
                f"{file} is compressed, and would be read as if its bytes were text.",
                numbers=f"Its name ends in {kind}.",
                write="--data.source <what it unpacks to>",
            )
        else:
            yield _read(file)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}.", write="--data.source <readable files>"
        ) from None


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """One object a line.

    The json builder of datasets reads columns with Arrow, which takes text that looks like a date
    for one and writes it another way; a stream must have the text as it stands.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _unreadable(f"Line {number} of {file}", error) from None
            if not isinstance(row, dict):
                raise DataError(
                    f"Line {number} of {file} is no JSON object.",
                    numbers=f"It is of type {type(row).__name__}.",
                    write='one {"text": "..."} a line',
                )
            yield row


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:  # streaming takes a lock, at home if not here
        yield from _load(
            "parquet",
            str(file),
            data_files=glob.escape(str(file)),  # every name is taken for a pattern
            split="train",
            batch_size=_ROWS_AT_ONCE,
            cache_dir=scratch,
        )


def _hub_rows(source: str, field: str) -> Iterator[bytes]:
    name, _, split = source.removeprefix(_HUB).partition("@")
    name, _, config = name.partition(":")
    rows = _load(name, source, name=config or None, split=split or "train")
    yield from _texts(rows, field, source)


def _load(path: str, shown: str, **options: Any) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        rows: Iterable[dict[str, Any]] = load_dataset(path, streaming=True, **options)
    except Exception as error:  # whatever the library, the network or a builder raises
        raise _unreadable(shown, error) from error
    return rows


def _texts(rows: Iterable[dict[str, Any]], field: str, shown: str) -> Iterator[bytes]:
    try:
        for row in rows:
            if field not in row:
                raise _no_column(field, list(row), shown)
            text = row[field]
            if text is None:
                continue
            if not isinstance(text, str):
                raise DataError(
                    f"Column {field!r} of {shown} holds no text.",
                    numbers=f"It has a value of type {type(text).__name__}.",
                    write="--data.field <a column of strings>",
                )
            yield text.encode("utf-8", "surrogatepass")
    except DataError:
        raise
    except Exception as error:  # raised while the rows are read: a torn file, a lost connection
        raise _unreadable(shown, error) from error


def _no_column(field: str, columns: list[str], shown: str) -> DataError:
    near = difflib.get_close_matches(field, columns, 1, cutoff=0.4)
    return DataError(
        f"{shown} has no column {field!r}" + (f"; did you mean {near[0]!r}?" if near else "."),
        numbers=f"Its columns are {', '.join(columns)}." if columns else "A row has no columns.",
        write=f"--data.field {[*near, *columns, '<column>'][0]}",
    )


def _unreadable(shown: str, error: Exception) -> DataError:
    cause = error.__cause__ or error
    return DataError(
        f"{shown} cannot be read.",
        numbers=f"{type(cause).__name__}: {cause}".splitlines()[0],
        write="--data.source <a file, folder or hub data set that can>",
    )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
