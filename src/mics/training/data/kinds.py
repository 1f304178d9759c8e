"""What a file holds, decided by its bytes: text, or rows of a table; anything else is refused.

A name only adds to that: what is called a table must be one. Tokens of an archive, a picture or
weights look like tokens of text, and a run on them like any other.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from mics.errors import DataError

Kind = Literal["text", "json lines", "json", "csv", "tsv", "parquet", "arrow file", "arrow stream"]

LONGEST_LINE = 1 << 30
"""Bytes of a row of JSON or of a JSON document: they are held in memory whole."""

_HEAD = 64 << 10
_PIECE = 1 << 20
_BOM = codecs.BOM_UTF8

_BY_NAME: dict[str, tuple[Kind, ...]] = {
    ".jsonl": ("json lines",),
    ".ndjson": ("json lines",),
    ".json": ("json lines", "json"),
    ".csv": ("csv",),
    ".tsv": ("tsv",),
    ".parquet": ("parquet",),
    ".arrow": ("arrow file", "arrow stream"),
    ".feather": ("arrow file",),
}
_TABLES: tuple[tuple[bytes, Kind], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1\0\0", "arrow file"),
    (b"\xff\xff\xff\xff", "arrow stream"),
)
_COMPRESSED = (
    (rb"\x1f\x8b\x08", "gzip"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2"),
    (rb"\xfd7zXZ\0", "xz"),
    (rb"\x28\xb5\x2f\xfd", "zstd"),
    (rb"\x1f\x9d", "compress (.Z)"),
    (rb"\x04\x22\x4d\x18", "lz4"),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "zip; .npz, .docx and .xlsx are too"),
    (rb"7z\xbc\xaf\x27\x1c", "7z"),
    (rb"Rar!\x1a\x07", "rar"),
    (rb".{257}ustar(  )?\0", "tar"),
)
_OTHERS = (
    (rb"SQLite format 3\0", "an SQLite database"),
    (rb"[\x88\xa1][\xd8\xd9]\x34\x01", "a token file of llm.c, which is a source of its own"),
    (rb"MMIDIDX\0\0", "a token index of Megatron, which is a source of its own"),
    (rb"\x93NUMPY", "a numpy array"),
    (rb"FEA1\0", "a Feather table of version 1"),
    (rb"GGUF.\0\0\0", "weights in GGUF"),
    (rb"ID3[\x02-\x04]\0", "an MP3 file"),
    (rb"\0\0\0.ftyp", "an MP4 or HEIC file"),
    (rb"\0asm", "a WebAssembly program"),
    (rb"\xca\xfe\xba\xbe", "a Java class or a program"),
    (rb"PACK\0\0\0[\x02\x03]", "a pack of git"),
    (rb".{4}\0{4}\{\s*\"", "a safetensors file"),  # a header of less than 4 GiB
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (rb"Obj\x01", "an Avro file"),
    (rb"\x80[\x02-\x05]", "a pickle"),
    (rb"%PDF-", "a PDF document"),
    (rb"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (rb"\xff\xd8\xff", "a JPEG picture"),
    (rb"GIF8[79]a", "a GIF picture"),
    (rb"RIFF.{4}(WEBP|WAVE|AVI )", "a RIFF file (WebP, WAV, AVI)"),
    (rb"II\*\0|MM\0\*", "a TIFF picture"),
    (rb"\x7fELF", "a program or library"),
    (rb"\{\\rtf", "an RTF document"),
    (rb"version https://git-lfs\.github\.com/spec/", "a pointer of Git LFS"),
)
_WIDE = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_JSON = re.compile(rb'\s*(\{|\[\s*\{)\s*["}]')
_CONTROL = bytes({*range(1, 32), 127} - {*b"\t\n\v\f\r\x08\x1b"})
_DELIMITERS = "\t,;|"
_NAME = re.compile(r"\S.{0,63}")


def kind_of(
    stream: BinaryIO, file: Path, field: str, form: Literal["auto", "text"] = "auto"
) -> Kind | None:
    """What an open file holds; it is left at its beginning, behind a byte order mark.

    ``None`` is a file without a byte, or a table without a letter.

    Args:
        stream: the file, from which one can read twice.
        file: its name, for what is said of it.
        field: the column that holds the text, which makes a table of lines that may be one.
        form: "text" takes a table of letters for the text that it is.

    Raises:
        DataError: it is neither text nor a table, or no table although it is called one.
    """
    head = stream.read(_HEAD)
    claimed = _BY_NAME.get(file.suffix.lower(), ())
    kind: Kind | None = next((kind for magic, kind in _TABLES if head.startswith(magic)), None)
    start = 0
    if not head or (claimed and not head.strip()):
        return None
    if kind is None:
        _refuse_binary(head, file)
        start = len(_BOM) if head.startswith(_BOM) else 0
        if form == "text":
            kind, claimed = "text", ()
        else:
            kind = _kind_of_text(stream, head[start:], start, claimed, field)
    elif form == "text":
        claimed = ("text",)
    stream.seek(start)
    if claimed and kind not in claimed:
        raise DataError(
            f"{file} cannot be read as {' or '.join(claimed)}, as its name or data.format says.",
            numbers=f"Its bytes are {kind}.",
            write="a name that fits, or a --data.source without it",
        )
    return kind


def text_of(stream: BinaryIO, file: Path, stop: int | None = None) -> Iterator[bytes]:
    """The text of an open file in pieces, from where it is to its end, or to an offset.

    Raises:
        DataError: it is not UTF-8, or has a NUL; with the offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        at = stream.tell()
        try:
            piece = stream.read(_PIECE if stop is None else min(_PIECE, stop - at))
        except OSError as error:
            raise DataError(
                f"{file} cannot be read: {error.strerror}.",
                numbers=f"The first {at:,} bytes could.",
                write="--data.source <readable files>",
            ) from None
        nul = piece.find(b"\0")
        if nul >= 0:
            raise _no_text(file, "a NUL byte", at + nul)
        kept = len(decoder.getstate()[0])
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            where = at - kept + error.start
            raise _no_text(file, f"byte 0x{error.object[error.start]:02x}", where) from None
        if not piece:
            return
        yield piece


def _refuse_binary(head: bytes, file: Path) -> None:
    shown = f"It begins with {head[:8].hex(' ')}"
    for pattern, what in _COMPRESSED:
        if re.match(pattern, head, re.DOTALL):
            raise DataError(
                f"{file} is compressed, and would be read as if its bytes were text.",
                numbers=f"{shown}: {what}.",
                write="--data.source <what it unpacks to>",
            )
    for pattern, what in _OTHERS:
        if re.match(pattern, head, re.DOTALL):
            raise DataError(
                f"{file} is {what}, not text.",
                numbers=f"{shown}.",
                write="--data.source <the text or table in it>, or a glob without it",
            )
    wide = next((name for mark, name in _WIDE if head.startswith(mark)), None)
    if wide is None and head.count(0) > 0.2 * len(head):
        even, odd = head[::2].count(0), head[1::2].count(0)
        wide = "UTF-16 (by its NULs)" if max(even, odd) > 8 * min(even, odd) else None
    if wide is not None:
        raise DataError(
            f"{file} is {wide}, not UTF-8.",
            numbers=f"{shown}.",
            write=f"iconv -f {wide[:6]} -t UTF-8 {file} > <a new file>, and that as --data.source",
        )
    controls = len(head) - len(head.translate(None, _CONTROL))
    if controls > 0.05 * len(head):
        first = next(at for at, byte in enumerate(head) if byte in _CONTROL)
        raise DataError(
            f"{file} is not text.",
            numbers=f"{controls:,} of its first {len(head):,} bytes are control characters, the "
            f"first at offset {first:,}.",
            write="--data.source <the text or table in it>, or a glob without it",
        )


def _kind_of_text(
    stream: BinaryIO, head: bytes, start: int, claimed: tuple[Kind, ...], field: str
) -> Kind:
    if "csv" in claimed or "tsv" in claimed:
        return claimed[0]
    if _JSON.match(head) or "json lines" in claimed:
        if claimed == ("json lines",):
            return "json lines"
        stream.seek(start)
        return "json lines" if isinstance(_first_value(stream), dict) else "json"
    if _are_arrays(head):
        return "json lines"  # whose rows are no objects, which is said where they are read
    delimiter = delimiter_of(head, field)
    if delimiter is not None:
        return "tsv" if delimiter == "\t" else "csv"
    return "text"


def _first_value(stream: BinaryIO) -> object:
    """The value that the first line is, if it is one."""
    line = b"\n"
    while line and not line.strip():
        line = stream.readline(LONGEST_LINE)
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _are_arrays(head: bytes) -> bool:
    """Whether every line of a beginning, two or more, is an array of JSON."""
    lines = [line for line in head.split(b"\n") if line.strip()]
    lines = lines[:-1] if len(head) >= _HEAD - len(_BOM) else lines
    if len(lines) < 2 or any(line.lstrip()[:1] != b"[" for line in lines):
        return False
    try:
        return all(isinstance(json.loads(line), list) for line in lines)
    except (ValueError, RecursionError):
        return False


def delimiter_of(head: bytes, field: str) -> str | None:
    """What parts the columns, where the beginning of a text is that of a table; else ``None``.

    It is one when every line has as many cells as the first, two or more, and the first names
    ``field``, or the names of columns alone in three lines or more.
    """
    text = head.decode("utf-8", "ignore")
    part = len(head) >= _HEAD - len(_BOM)
    for delimiter in _DELIMITERS:
        if delimiter not in text.partition("\n")[0]:
            continue
        try:
            lines = io.StringIO(text, newline="")
            rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        except csv.Error:
            continue
        rows = rows[:-1] if part else rows
        names = rows[0] if rows else []
        if len(names) < 2 or {len(row) for row in rows} != {len(names)}:
            continue
        named = all(_NAME.fullmatch(name) for name in names) and len({*names}) == len(names)
        if field in names or (named and len(rows) >= 3):
            return delimiter
    return None


def _no_text(file: Path, what: str, offset: int) -> DataError:
    return DataError(
        f"{file} is not UTF-8 text.",
        numbers=f"There is {what} at offset {offset:,}.",
        write=f"iconv -f <its encoding, such as LATIN1> -t UTF-8 {file} > <a new file>, and that "
        "as --data.source, or a glob without it",
    )
