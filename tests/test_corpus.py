"""What a source gives: rows of a table, text of what is text, an error for anything else."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import shutil
import socket
import sqlite3
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from mics.errors import DataError
from mics.training.data import tables
from mics.training.data.corpus import Document, read_documents
from mics.training.data.finding import find_files
from mics.training.data.kinds import delimiter_of

ROWS = [{"text": f"row {n}, said \u20ac", "id": n} for n in range(4)]
WANTED = [row["text"].encode() for row in ROWS]  # type: ignore[attr-defined]
TABLE = pa.table({"text": [row["text"] for row in ROWS], "id": [row["id"] for row in ROWS]})
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
AS_TEXT = "--data.format text to train on the file as it stands"


def documents(source: object, **more: Any) -> list[tuple[str, bytes]]:
    def whole(document: Document) -> tuple[str, bytes]:
        return document.place, b"".join(document.pieces)

    return [whole(document) for document in read_documents(str(source), **more)]


def texts(source: object, **more: Any) -> list[bytes]:
    return [text for _, text in documents(source, **more)]


def refusal(source: object, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        documents(source, **more)
    assert "Write: " in str(caught.value)
    return str(caught.value)


def arrow(stream: bool) -> bytes:
    sink = io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    return sink.getvalue()


def cells(delimiter: str) -> str:
    rows = [f'{row["id"]}{delimiter}"{row["text"]}"' for row in ROWS]
    return "\r\n".join([f"id{delimiter}text", *rows])


# -- tables ----------------------------------------------------------------------------------------

TABLES: dict[str, tuple[list[str], str | bytes]] = {
    "JSON lines": ([".jsonl", ".ndjson", ".json", ".txt", ""], LINES),
    "JSON lines behind a mark": ([".jsonl", ".txt"], "\ufeff" + LINES),
    "an array on one line": ([".json", ".txt"], json.dumps(ROWS)),
    "an array over lines": ([".json", ".data"], json.dumps(ROWS, indent=2)),
    "CSV": ([".csv", ".txt", ""], cells(",")),
    "CSV behind a mark": ([".csv", ".txt"], "\ufeff" + cells(",")),
    "CSV with semicolons": ([".csv", ".txt"], cells(";")),
    "TSV": ([".tsv", ".txt"], cells("\t")),
    "Parquet": ([".parquet", ".txt", ".bin"], parquet()),
    "an Arrow file": ([".arrow", ".feather", ".txt"], arrow(stream=False)),
    "an Arrow stream": ([".arrow", ".txt"], arrow(stream=True)),
}


@pytest.mark.parametrize("what", TABLES)
def test_what_is_a_table_is_read_as_rows_whatever_it_is_called(what: str, tmp_path: Path) -> None:
    names, data = TABLES[what]
    for suffix in names:
        file = tmp_path / f"table{suffix}"
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        assert texts(file) == WANTED, suffix
        assert texts(file, field="text") == WANTED, suffix
        if what.startswith(("CSV", "TSV")):  # a cell is text, whatever it says
            assert texts(file, field="id") == [b"0", b"1", b"2", b"3"]
        else:
            assert "holds no text" in refusal(file, field="id"), suffix
        assert "has no column 'texts'; did you mean 'text'?" in refusal(file, field="texts")


def test_a_cell_and_a_row_may_be_long_and_go_over_lines(tmp_path: Path) -> None:
    long = 'a line\r\nwith \u20ac and "quotes", ' * 20_000
    quoted = long.replace('"', '""')
    (tmp_path / "c.csv").write_bytes(f'id,text\n1,"{quoted}"\n2,short\n'.encode())
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": long}) + "\n")
    assert texts(tmp_path / "c.csv") == [long.encode(), b"short"]
    assert texts(tmp_path / "c.jsonl") == [long.encode()]


def test_a_folder_saved_by_datasets_gives_its_rows_and_nothing_else(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert (tmp_path / "saved" / "state.json").is_file()
    (tmp_path / "saved" / "cache-1234.arrow").write_bytes(arrow(stream=True))  # of a map
    assert texts(tmp_path / "saved") == WANTED
    assert texts(tmp_path) == WANTED  # also from further up
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "parted"))
    said = refusal(tmp_path / "parted")
    assert "a data set of several splits that datasets has saved" in said
    assert "They are test, train." in said
    assert f"--data.source {tmp_path / 'parted' / 'train'}" in said
    assert texts(tmp_path / "parted" / "train") == WANTED
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    said = refusal(tmp_path / "saved")
    assert "some of its rows are missing" in said
    assert "lists 2 file(s), there is no data-00001-of-00002.arrow" in said
    (tmp_path / "saved" / "state.json").write_text("[")
    assert "its state.json cannot be read" in refusal(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").unlink()
    assert "has saved, but not to its end" in refusal(tmp_path / "saved")


REFUSED_TABLES: list[tuple[str, str | bytes, list[str]]] = [
    ("a.json", '{"data": [{"text": "a"}]}', ["a.json has no column 'text'", "columns are data."]),
    ("a.txt", '{\n "version": 1\n}', ["a.txt has no column 'text'", AS_TEXT]),
    ("a.json", '{"text": ["a", "b"]}', ["holds no text", "of type list"]),
    ("a.json", '["a", "b"]', ["Entry 1 of", "is no JSON object", "of type str"]),
    ("a.txt", '["a", 1]\n["b", 2]\n', ["Line 1 of", "is no JSON object", "type list", AS_TEXT]),
    ("a.txt", '[{"text": "a"}, 3]', ["Entry 2 of", "is no JSON object", "of type int"]),
    ("a.txt", '[{"text": "a"},', ["JSON by its name or its first bytes", "cannot be read"]),
    ("a.json", "no table", ["JSON by its name or its first bytes", "JSONDecodeError", AS_TEXT]),
    ("a.json", "[" * 100_000, ["cannot be read", "RecursionError"]),
    ("a.jsonl", '{"a":' * 100_000, ["Line 1 of", "cannot be read", "RecursionError"]),
    ("a.jsonl", '{"text": "a"}\n\n{"id": 1}', ["Line 3 of", "has no column 'text'", "are id."]),
    ("a.txt", '{"text": "a"}\nprose', ["Line 2 of", "cannot be read", AS_TEXT]),
    ("a.csv", "text,id\na,1,2\n", ["Line 2 of", "another number of cells", "are 3, and 2 columns"]),
    ("a.csv", 'text,id\n"a,1\n', ["Line 2 of", "cannot be read", "unexpected end of data"]),
    ("a.csv", "prose\nwithout columns\n", ["has no column 'text'", "Its columns are prose."]),
    ("a.csv", "text,text\na,b\n", ["has no column 'text'", "Its columns are text, text."]),
    ("a.csv", b"text,id\ncaf\xe9,1\n", ["is not UTF-8 text", "byte 0xe9 at offset 11"]),
    ("a.txt", "1,2\n3,4\n5,6\n", ["has no column 'text'", "Its columns are 1, 2.", AS_TEXT]),
    ("a.txt", "en\tde\nyes\tja\nno\tnein\n", ["has no column 'text'", "Its columns are en, de."]),
    ("a.parquet", "prose", ["cannot be read as parquet", "Its bytes are text."]),
    ("a.arrow", parquet(), ["cannot be read as arrow file or arrow", "Its bytes are parquet."]),
    ("a.parquet", parquet()[:-9], ["a.parquet cannot be read", "ArrowInvalid"]),
    ("a.txt", arrow(stream=True)[:-8], ["a.txt cannot be read", "it does not end as one"]),
]


@pytest.mark.parametrize(("name", "data", "words"), REFUSED_TABLES)
def test_a_table_that_gives_no_rows_is_refused(
    name: str, data: str | bytes, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    said = refusal(tmp_path / name)
    for word in words:
        assert word in said


def test_a_json_value_that_is_too_long_to_hold_says_how_to_part_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LONGEST_LINE", 64)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    said = refusal(tmp_path / "a.json")
    assert "is one JSON value that is too long to be read at once" in said
    assert f"jq -c '.[]' {tmp_path / 'a.json'} > rows.jsonl" in said


def test_a_column_is_never_ignored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.jsonl").write_text(LINES)
    (tmp_path / "c.txt").write_text("prose")
    assert texts(tmp_path) == [*WANTED, b"prose"]
    assert "1 table(s), such as " in capfd.readouterr().err
    for source in (tmp_path, tmp_path / "c.txt", "stdlib"):
        said = refusal(source, field="text")
        assert "data.field = 'text' is a column of tables" in said
        assert "is text without columns" in said
    assert "data.format = text reads no table" in refusal(tmp_path, field="text", form="text")


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"messages": []}, True),
        ({"prompt": "a", "completion": "b"}, True),
        ({"prompt": "a", "answer": "b"}, False),
    ],
)
def test_conversations_without_their_format_are_told_of_it(
    row: dict[str, object], chat: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    said = refusal(tmp_path / "a.jsonl")
    assert ("Write: mics train --data.format chat for conversations, or" in said) == chat
    assert "--data.field" in said


def test_tables_of_letters_can_be_text_as_they_stand(tmp_path: Path) -> None:
    for name, text in {"a.json": '{"a": [1]}', "b.csv": "a,b\n1\n", "c.py": "print()"}.items():
        (tmp_path / name).write_text(text)
    wanted = [b'{"a": [1]}', b"a,b\n1\n", b"print()"]
    assert texts(tmp_path, form="text") == wanted
    (tmp_path / "d.parquet").write_bytes(parquet())
    assert "cannot be read as text" in refusal(tmp_path, form="text")


def test_no_thread_but_our_own_reads_from_our_stream(tmp_path: Path) -> None:
    """Another, not done with it when the interpreter ends, would abort the process, rarely."""
    readers = set()

    class Noted(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            readers.add(threading.get_ident())
            return super().read(-1 if size is None else size)

    (tmp_path / "a.parquet").write_bytes(parquet())
    with Noted(tmp_path / "a.parquet") as stream:
        rows = tables.rows_of(stream, tmp_path / "a.parquet", "parquet", "text")  # type: ignore[arg-type]
        assert len(list(rows)) == len(ROWS)
    assert readers == {threading.get_ident()}


def test_nulls_are_left_out_and_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": null}\n')
    assert texts(tmp_path / "a.jsonl") == [b"a"]
    said = capfd.readouterr().err
    assert (
        f"2 row(s) of {tmp_path / 'a.jsonl'} have null in 'text' and are left out; Line 2" in said
    )


@pytest.mark.parametrize(
    "text",
    [
        "Hello, you\nThat is, well\nfine, fine\n",
        "[table]\nkey = 1\n",
        "[a link](there)\n{ braces }\n",
        "{ int x; }\n",
        "| a | b |\n|---|---|\n| 1 | 2 |\n",
        "\tif a;\n\tif b;\n\tif c;\n",
        "import a,b\nimport c\nimport d,e\n",
    ],
)
def test_text_that_looks_a_little_like_a_table_is_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path / "a.txt") == [text.encode()]
    assert delimiter_of(text.encode(), "text") is None


# -- what is no text -------------------------------------------------------------------------------


def a_zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a", "text")
    return sink.getvalue()


def a_tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return sink.getvalue()


def an_array() -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.arange(9))
    return sink.getvalue()


def weights(folder: Path) -> bytes:
    save_file({"a": torch.zeros(3)}, folder / "a.safetensors")
    return (folder / "a.safetensors").read_bytes()


def database(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "db")
    connection.execute("create table t(text)")
    connection.commit()
    connection.close()
    return (folder / "db").read_bytes()


@pytest.mark.parametrize("text", ['thing": { "a": 1 }\n', "t" * 257 + "ustar is a format\n"])
def test_text_that_looks_like_the_mark_of_a_format_is_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path / "a.txt") == [text.encode()]


def test_nothing_binary_is_text_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    seeded = random.Random(0)
    hello = "hello, world"
    cases: list[tuple[bytes, list[str]]] = [
        (gzip.compress(b"text " * 99), ["is compressed", "1f 8b", "gzip"]),
        (a_zip(), ["is compressed", "zip"]),
        (a_tar(), ["is compressed", "tar"]),
        (b"\x28\xb5\x2f\xfd rest", ["is compressed", "zstd"]),
        (b"\xfd7zXZ\0 rest", ["is compressed", "xz"]),
        (an_array(), ["is a numpy array, not text"]),
        (weights(tmp_path / "made"), ["is a safetensors file, not text"]),
        (database(tmp_path / "made"), ["is an SQLite database, not text"]),
        (pickle.dumps({"a": 1}), ["is a pickle, not text"]),
        (b"%PDF-1.4\n1 0 obj\n", ["is a PDF document, not text"]),
        (b"\x89PNG\r\n\x1a\n", ["is a PNG picture, not text"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["is a pointer of Git LFS, not text"]),
        (seeded.randbytes(90_000), ["is not text", "control characters, the first at offset 1."]),
        (bytes(seeded.choices(range(1, 127), k=9999)), ["is not text", "control characters"]),
        (hello.encode("utf-16"), ["is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8"]),
        (hello.encode("utf-16-le"), ["is UTF-16 (by its NULs), not UTF-8", "iconv -f UTF-16 "]),
        (hello.encode("utf-16-be"), ["is UTF-16 (by its NULs), not UTF-8"]),
        (hello.encode("utf-32"), ["is UTF-32, not UTF-8", "iconv -f UTF-32 "]),
        ("caf\xe9 au lait".encode("latin-1"), ["is not UTF-8", "byte 0xe9 at offset 3", "LATIN1"]),
        (b"a" * 99 + b"\0" + b"a" * 99, ["is not UTF-8 text", "a NUL byte at offset 99."]),
        (b"a" * (3 << 20) + b"\xff", ["is not UTF-8 text", "byte 0xff at offset 3,145,728."]),
        (b"a" * ((1 << 20) - 1) + b"\xe2\x82x", ["byte 0xe2 at offset 1,048,575."]),
        ("\u20ac".encode()[:2], ["is not UTF-8 text", "byte 0xe2 at offset 0."]),
    ]
    for data, words in cases:
        (tmp_path / "a.txt").write_bytes(data)
        for form in ("auto", "text"):
            said = refusal(tmp_path / "a.txt", form=form)
            for word in [str(tmp_path / "a.txt"), *words]:
                assert word in said, words


def test_text_is_read_as_it_stands_but_for_a_byte_order_mark(tmp_path: Path) -> None:
    long = ("\u20ac" * 9 + "\r\n\x0c\x1b[0m\ttab ") * 60_000  # pieces end inside of characters
    (tmp_path / "a.gz").write_bytes(b"\xef\xbb\xbf" + long.encode())  # a name says nothing
    assert texts(tmp_path / "a.gz") == [long.encode()]
    assert sum(len(text) for text in texts("stdlib")) > 10**6


# -- what cannot be listed, read, or shown ---------------------------------------------------------


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, for whom everything can be read."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may look into, with a text in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "a.txt").write_text("text")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("pattern", ["", "*/*.txt", "**/*.txt", "**"])
def test_a_subfolder_that_cannot_be_listed_is_named(pattern: str, open_folder: Path) -> None:
    closed = open_folder / "closed"
    closed.mkdir()
    (closed / "b.txt").write_text("more text")
    closed.chmod(0)
    with as_nobody():
        said = refusal(open_folder / pattern)
    assert f"{closed} cannot be listed: Permission denied" in said
    closed.chmod(0o755)
    assert len(texts(open_folder / "**/*.txt")) == 2


def test_a_file_that_cannot_be_read_is_named(open_folder: Path) -> None:
    (open_folder / "a.txt").chmod(0)
    with as_nobody():
        assert f"{open_folder / 'a.txt'} cannot be read: Permission denied" in refusal(open_folder)


def test_what_leads_nowhere_or_has_no_end_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    odd = folder / "odd"

    def check(*words: str) -> None:
        for source in (folder, folder / "*", folder / "**", tmp_path / "*" / "odd", odd):
            said = refusal(source)
            for word in [str(odd), *words]:
                assert word in said
        odd.unlink()

    odd.symlink_to("odd")
    check("cannot be read: Too many levels of symbolic links", "a link to odd.")
    odd.symlink_to("nothing")
    check("cannot be followed: No such file or directory", "a link to nothing.")
    os.mkfifo(odd)
    check("is a FIFO, which has no end", "Its mode is prw")
    odd.symlink_to("/dev/zero")
    check("is a device, which has no end", "Its mode is crw")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(odd))
        check("is a socket, which has no end")
    odd.symlink_to(folder)
    said = refusal(folder)
    assert f"{odd} is a link to a folder that it lies in, so there is no end of files" in said
    odd.unlink()
    (folder / ".hidden").symlink_to("nothing")  # what is not read needs no reason
    assert texts(folder) == [b"text"]


def test_links_are_followed_and_what_is_read_twice_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.txt").write_text("far")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "folder").symlink_to(tmp_path / "far")
    assert texts(tmp_path / "near") == [b"far"]
    assert "more than once" not in capfd.readouterr().err
    (tmp_path / "near" / "b.txt").hardlink_to(tmp_path / "far" / "a.txt")
    assert texts(tmp_path / "near") == [b"far", b"far"]
    said = capfd.readouterr().err
    assert "1 file(s) are read more than once, through links; " in said


def test_names_that_cannot_be_shown_are_refused(tmp_path: Path) -> None:
    for source in ("a\0b", f"{tmp_path}/\udcff"):
        said = refusal(source)
        assert "has a NUL or bytes that are no UTF-8" in said
        assert ascii(source) in said
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("text")
    assert "\\udcff.txt'" in refusal(tmp_path)
    assert "data.source is empty" in refusal("")
    assert "cannot be read: File name too long" in refusal("x" * 5000)


def test_a_file_that_is_written_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="was written while it was read") as caught:
        for document in read_documents(str(tmp_path), None):
            assert list(document.pieces) == [b"text"]
            (tmp_path / "a.txt").write_text("text and more")
    assert "It had 4 bytes and has 13." in str(caught.value)


def test_the_files_of_a_glob_are_those_of_the_standard_library(tmp_path: Path) -> None:
    """The own reading of patterns, which leaves nothing out, against ``glob`` where both can."""
    import glob

    for name in ("a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt", ".hid/e.txt", ".f.txt", "[g].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    patterns = ["*.txt", "*", "**/*.txt", "**", "sub/**/*.txt", "*/*.txt", "[ab].*", "?.md"]
    patterns += [".*/*.txt", "[[]g].txt", "su[a-c]/*.txt", "**/deep/*", "sub/c.txt", "[!a]*.md"]
    for pattern in patterns:
        path = f"{tmp_path}/{pattern}"
        wanted = {f for f in glob.glob(path, recursive=True) if Path(f).is_file()}  # noqa: PTH207
        assert {str(file) for file in find_files(path)} == wanted, pattern
