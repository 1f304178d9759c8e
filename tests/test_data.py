"""Text to tokens to sequences: the same stream whatever it came from, one integer of state."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from ranks import errors_of_ranks, run_ranks
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from mics.errors import DataError
from mics.ranks.progress_bar import TextProgress
from mics.training.config import DataConfig
from mics.training.data import IGNORED, Data, cache, cutting, prepare_data, spelling, tokens
from mics.training.data import spool as spooling
from mics.training.data.corpus import read_documents
from mics.training.data.finding import find_files
from mics.training.data.order import sequence_at
from mics.training.data.stream import Masking, Stream
from mics.training.data.tokens import SEPARATOR, byte_tokenizer, saved_tokenizer, train_bpe

TEXTS = [f"Document {n}: " + "the cat sat on the mat. " * (n % 5 + 1) for n in range(30)]


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03}.txt").write_text(text)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def prepare(source: object, folder: Path, **more: Any) -> Data:
    keywords = {"seed": 0, "sequence": 16, "masked": False} | {
        name: more.pop(name) for name in ("seed", "sequence", "masked") if name in more
    }
    config = DataConfig(source=str(source), **{"held_out": 0.2, **more})
    return prepare_data(config, folder=folder, **keywords)  # type: ignore[arg-type]


def everything(data: Data) -> list[torch.Tensor]:
    out = []
    for stream in (data.train, data.held_out):
        batch = stream.batch(0, 2 * stream.num_sequences)
        out += [batch.inputs, batch.labels]
    return out


def same(one: Data, other: Data) -> bool:
    pairs = zip(everything(one), everything(other), strict=True)
    return one.fingerprint == other.fingerprint and all(torch.equal(a, b) for a, b in pairs)


def texts_of(source: object, **more: Any) -> list[bytes]:
    """The documents of a source, each whole."""
    return [b"".join(document.pieces) for document in read_documents(str(source), **more)]


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of memory a call takes at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- sources ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "is_said"), [(None, True), ("stdlib", False)])
def test_a_run_that_names_no_source_says_what_it_takes(
    source: str | None,
    is_said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("print('a library of one file')\n" * 9)
    paths = "mics.training.data.finding.sysconfig.get_paths"
    monkeypatch.setattr(paths, lambda: {"stdlib": str(tmp_path / "lib")})
    config = DataConfig(source=source, held_out=0.0)
    data = prepare_data(config, seed=0, sequence=16, masked=False, folder=tmp_path / "run")
    assert data.sources == ("stdlib",) and data.train.num_sequences > 9
    said = "no data.source is named, so this trains on the source of Python's standard library"
    assert (said in " ".join(capsys.readouterr().err.split())) is is_said


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_jsonl_and_parquet_give_the_stream_of_the_text_they_came_from(
    tokenizer: str, texts: Path, tmp_path: Path
) -> None:
    rows = [{"text": text, "other": number} for number, text in enumerate(TEXTS)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    more = {"tokenizer": tokenizer, "vocabulary": 300}
    plain, jsonl, parquet = (
        prepare(source, tmp_path / f"run{number}", **more)
        for number, source in enumerate([texts, tmp_path / "c.jsonl", tmp_path / "c.parquet"])
    )
    assert same(plain, jsonl)
    assert same(plain, parquet)


# It leaves at once: a thread of Arrow, once in a whole suite, aborts an interpreter that ends.
_READ_OFFLINE = """
import os, socket, sys
def refuse(*_):
    raise AssertionError("a local file was looked up on the network")
socket.getaddrinfo = refuse
from mics.training.data.corpus import read_documents
print([len(list(read_documents(source, "text"))) for source in sys.argv[1:]], flush=True)
os._exit(0)
"""


def test_local_tables_need_no_network_and_leave_nothing_behind(tmp_path: Path) -> None:
    jsonl, parquet = tmp_path / "c.jsonl", tmp_path / "c.parquet"
    jsonl.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    pq.write_table(pa.table({"text": TEXTS}), parquet)
    homes = {name: tmp_path / name for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME")}
    for home in homes.values():
        home.mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", _READ_OFFLINE, jsonl, parquet],
        env=os.environ | {name: str(home) for name, home in homes.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.stdout, ran.stderr) == ("[30, 30]\n", "")
    assert [file for home in homes.values() for file in home.rglob("*")] == []


def test_jsonl_text_is_read_as_it_stands(tmp_path: Path) -> None:
    texts = [
        "2020-01-01T00:00:00Z",
        "2021-01-01",
        "7",
        "a\u2028b\r\nc\x00",
        "lone \ud800",
        "caf\xe9",
    ]
    rows = [{"text": text} | {f"extra{n}": [n]} for n, text in enumerate(texts)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "c.JSONL").write_text("\n\n".join([*lines, '{"text": null}']))
    assert texts_of(tmp_path / "c.JSONL") == [
        text.encode("utf-8", "surrogatepass") for text in texts
    ]


@pytest.mark.parametrize("name", ["c[1]", "c*", "c?"])
def test_the_name_of_a_table_is_no_pattern(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "c1.parquet")
    assert texts_of(tmp_path / f"{name}.jsonl") == [b"a"]
    assert texts_of(tmp_path / f"{name}.parquet") == [b"b"]


def test_tables_without_rows_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("text")
    assert texts_of(tmp_path) == [b"text"]


def test_the_standard_library_is_the_source_without_its_tests() -> None:
    names = [file.as_posix() for file in find_files("stdlib")]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("/test/" in name or "/site-packages/" in name for name in names)
    assert names == sorted(names)


def test_files_folders_and_globs(texts: Path) -> None:
    (texts / ".hidden").write_text("no")
    (texts / "deep").mkdir()
    (texts / "deep" / "more.txt").write_text("yes")
    assert len(find_files(str(texts))) == 31
    assert len(find_files(f"{texts}/*.txt")) == 30
    assert len(find_files(f"{texts}/**/*.txt")) == 31
    assert find_files(f"{texts}/000.txt") == [texts / "000.txt"]


def test_limit_takes_so_many_bytes(texts: Path, tmp_path: Path) -> None:
    data = prepare(texts, tmp_path / "run", limit=100, held_out=0.0)
    assert data.train.num_tokens * data.train.bytes_per_token == pytest.approx(100)


# -- the split -------------------------------------------------------------------------------------


def test_held_out_is_chosen_by_content_and_by_seed(texts: Path, tmp_path: Path) -> None:
    one = prepare(texts, tmp_path / "a")
    for file in sorted(texts.iterdir()):
        file.rename(texts / f"x{file.name}")  # other names, the same order
    assert same(one, prepare(texts, tmp_path / "b"))
    prepare(texts, tmp_path / "c", seed=1)
    kept = [(cache_of(tmp_path / run) / "held_out.bin").read_bytes() for run in "abc"]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_no_split_is_empty_however_small(share: float, texts: Path, tmp_path: Path) -> None:
    data = prepare(texts, tmp_path / "run", held_out=share)
    assert data.train.num_tokens > 0
    assert data.held_out.num_tokens > 0
    total = data.train.num_tokens + data.held_out.num_tokens
    assert total == sum(map(len, TEXTS)) + len(TEXTS)  # and a separator each


def test_a_single_document_keeps_its_tail_for_evaluation(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("".join(f"line {n}\n" for n in range(100)))
    data = prepare(tmp_path / "one", tmp_path / "run", sequence=8)
    assert data.held_out.num_tokens == pytest.approx(0.2 * data.train.num_tokens / 0.8, rel=0.1)


def test_a_single_document_is_cut_between_characters(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("\u20ac" * 101)
    held_out = prepare(tmp_path / "one", tmp_path / "run", sequence=8).held_out
    order = sequence_at(np.arange(held_out.num_sequences), held_out.num_sequences, 0)
    start = held_out.batch(int(np.flatnonzero(order == 0)[0]), 1).inputs[0]
    assert bytes(start[:3].tolist()).decode() == "\u20ac"


def test_a_held_out_text_shorter_than_a_sequence_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one").write_text("a line\n" * 20)
    data = prepare(tmp_path / "one", tmp_path / "run", sequence=64)
    assert data.held_out.num_sequences == 0
    said = "".join(capfd.readouterr())
    assert f"the held-out text ({data.held_out.num_tokens} tokens) is shorter than" in said


def test_nothing_is_held_out_if_nothing_is_wanted(texts: Path, tmp_path: Path) -> None:
    data = prepare(texts, tmp_path / "run", held_out=0.0)
    assert data.held_out.num_sequences == 0
    assert data.held_out.num_tokens == 0


# -- tokenizers ------------------------------------------------------------------------------------


def test_byte_ids_are_bytes_and_the_saved_tokenizer_agrees(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = "caf\xe9 \u20ac\n\ttab \x00\x7f"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == list(text.encode())
    assert (loaded.eos_token_id, len(loaded)) == (tokenizer.separator, tokenizer.size)


def test_bpe_is_the_same_every_time_and_saved_as_it_is(tmp_path: Path) -> None:
    documents = [text.encode() for text in TEXTS]
    one, other = train_bpe(documents, 300), train_bpe(documents, 300)
    assert one.size <= 300
    assert one.encode(TEXTS[7]) == other.encode(TEXTS[7])
    assert len(one.encode(TEXTS[7])) < len(TEXTS[7]) / 2
    one.save(tmp_path)
    assert saved_tokenizer(str(tmp_path)).encode(TEXTS[7]) == one.encode(TEXTS[7])
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[7]).input_ids == one.encode(TEXTS[7])
    assert saved_tokenizer(str(tmp_path / "tokenizer.json")).separator == one.separator


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe([b"ab" * 99], 260)])
def test_text_that_spells_a_special_token_is_text(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode(f"a{SEPARATOR}b")
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == f"a{SEPARATOR}b"


def test_a_bare_tokenizer_json_and_a_folder_in_the_home_are_found(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train_bpe([text.encode() for text in TEXTS], 300).save(tmp_path / "saved")
    folder, file = (
        prepare(texts, tmp_path / f"run{n}", tokenizer=name)
        for n, name in enumerate(["~/saved", str(tmp_path / "saved" / "tokenizer.json")])
    )
    assert same(folder, file)
    ids = folder.train.batch(0, 1).inputs[0].tolist()
    assert folder.tokenizer.decode(ids) == file.tokenizer.decode(ids)


def test_a_document_is_neither_cut_nor_padded_whatever_the_tokenizers_file_says(
    texts: Path, tmp_path: Path
) -> None:
    train_bpe([text.encode() for text in TEXTS], 300).save(tmp_path / "plain")
    backend = Backend.from_file(str(tmp_path / "plain" / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "odd.json"))
    plain, odd = (
        prepare(texts, tmp_path / f"run{n}", tokenizer=str(tmp_path / name))
        for n, name in enumerate(["plain/tokenizer.json", "odd.json"])
    )
    assert plain.train.num_tokens == odd.train.num_tokens
    assert same(plain, odd)


def test_ids_with_gaps_are_kept_whole(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "</s>": 2, "b": 70_000}
    backend = Backend(backends.WordLevel(vocabulary, "a"))
    gaps = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    gaps.save_pretrained(tmp_path / "gaps")
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("b")
    data = prepare(
        tmp_path / "*.txt",
        tmp_path / "run",
        tokenizer=str(tmp_path / "gaps"),
        sequence=5,
        held_out=0,
    )
    assert data.tokenizer.size == 70_001
    assert data.train.batch(0, 1).inputs.tolist() == [[70_000, 2, 70_000, 2, 70_000]]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_pieces_of_a_long_document_are_its_text(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\u20ac" * 50 + "a line\n" * 20 + "\U0001f600" * 40
    (tmp_path / "long").write_text(text)
    monkeypatch.setattr(cutting, "PIECE", 32)
    data = prepare(
        tmp_path / "long",
        tmp_path / "run",
        tokenizer=tokenizer,
        vocabulary=270,
        held_out=0,
        sequence=2,
    )
    tokens = np.fromfile(cache_of(tmp_path / "run") / "train.bin", dtype=np.uint16).tolist()
    assert data.tokenizer.decode(tokens) == text + SEPARATOR


def test_a_long_document_is_tokenised_in_the_memory_of_its_pieces(tmp_path: Path) -> None:
    text = np.full(40 << 20, ord("a"), dtype=np.uint8)
    spooled = spooling.Spool(text, [len(text)], [False])
    peak = peak_of(
        lambda: cache.write(tmp_path / "cache", spooled, byte_tokenizer(), "", lambda *_: None)
    )
    assert peak < 24 << 20


def test_a_word_that_has_no_end_neither_trains_nor_encodes_for_ever(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A BPE compares all pairs of a word for each merge: the square of a mebibyte is a day."""
    letters = np.random.default_rng(0).integers(97, 107, 1 << 20, dtype=np.uint8).tobytes()
    (tmp_path / "one").write_bytes(letters[: 1 << 18] + b" " * (1 << 18) + letters[1 << 18 :])
    begun = time.monotonic()
    data = prepare(
        tmp_path / "one", tmp_path / "run", tokenizer="bpe", vocabulary=300, held_out=0.1
    )
    assert time.monotonic() - begun < 60, "it was 20 minutes"
    said = capfd.readouterr().err
    assert "cut(s) in text without a blank for 8 KiB: tokens of a word that goes over a cut" in said
    tokens = np.fromfile(cache_of(tmp_path / "run") / "train.bin", dtype=np.uint16)
    text = data.tokenizer.decode(tokens.tolist()).removesuffix(SEPARATOR)
    assert text.encode() == (tmp_path / "one").read_bytes()[: len(text)]
    prepare(tmp_path / "one", tmp_path / "run", tokenizer="bpe", vocabulary=300, held_out=0.1)
    assert "cut(s) in text without a blank" in capfd.readouterr().err, "at every start"


@pytest.mark.parametrize("text", ["x" * 99, "\u20ac" * 50, " " * 99, "ab{cd;" * 20, "a b" * 50])
def test_parts_of_a_text_are_the_text_and_break_no_character(text: str) -> None:
    parts = cutting.broken(text.encode(), 16)
    assert b"".join(parts) == text.encode()
    assert "".join(part.decode() for part in parts) == text
    assert all(0 < len(part) <= 48 for part in parts) or " b" in text
    assert (len(parts) == 1) == (" b" in text)


def test_a_text_without_blanks_is_cut_where_its_tokens_stay(tmp_path: Path) -> None:
    """Minified code has no blank and many signs, at which every tokenizer's words end."""
    tokenizer = train_bpe([b"function(alpha){return beta;} " * 9], 300)
    text = b"function(alpha){return_beta;}" * 2000
    parts = cutting.broken(text, cutting.BLOCK)
    assert len(parts) > 5
    ids = [token for part in tokenizer.encode_all(parts) for token in part]
    assert ids == tokenizer.encode(text.decode())


def test_lines_are_parted_where_the_tokens_of_a_long_document_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = "def one():\n    return 1\n\n\n    more\nlast = 2\n" * 40
    tokenizer = train_bpe([lines.encode()], 300)
    monkeypatch.setattr(cutting, "PIECE", 128)
    text = np.frombuffer(lines.encode(), np.uint8)
    pieces = [
        piece for piece, _ in spooling.Spool(text, [len(text)], [False]).pieces(held_out=False)
    ]
    assert len(pieces) > 5
    ids = [token for piece in tokenizer.encode_all(pieces) for token in piece]
    assert ids == tokenizer.encode(lines)


# -- special tokens --------------------------------------------------------------------------------


CHAT = "<|im_start|>user\nhello<|im_end|>\n"


def chat_tokenizer(folder: Path) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Backend(
            backends.BPE(vocab={c: n for n, c in enumerate(sorted(set(CHAT)))}, merges=[])
        ),
        eos_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_text_that_spells_special_tokens_is_said_and_can_be_read_as_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "hello"}, {"text": CHAT}, {"text": CHAT}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"tokenizer": chat_tokenizer(tmp_path / "chat"), "sequence": 4, "held_out": 0}
    for _ in range(2):  # the second time from the tokens that are there
        letters = prepare(tmp_path / "c.jsonl", tmp_path / "run", **more)
        said = capfd.readouterr().err
        assert (
            "the text spells special tokens of its tokenizer, 4 time(s), first <|im_start|>" in said
        )
        assert f"in Line 2 of {tmp_path / 'c.jsonl'}: they are read as letters; " in said
        assert "--data.specials ids reads them as tokens" in said
    ids = prepare(tmp_path / "c.jsonl", tmp_path / "ids", specials="ids", **more)
    assert "they are read as those tokens (data.specials = ids)" in capfd.readouterr().err
    assert ids.train.num_tokens == letters.train.num_tokens - 2 * (
        len("<|im_start|><|im_end|>") - 2
    )
    start = AutoTokenizer.from_pretrained(tmp_path / "chat").convert_tokens_to_ids("<|im_start|>")
    assert ids.tokenizer.encode(CHAT)[0] == start != letters.tokenizer.encode(CHAT)[0]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_own_tokenizers_read_special_tokens_too(
    tokenizer: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.txt", f"one{SEPARATOR}two")
    more = {"tokenizer": tokenizer, "vocabulary": 270, "sequence": 2, "held_out": 0}
    letters, ids = (
        prepare(tmp_path / "a.txt", tmp_path / how, specials=how, **more) for how in ("text", "ids")
    )
    assert f"1 time(s), first {SEPARATOR} in {tmp_path / 'a.txt'}" in capfd.readouterr().err
    tokens = [
        np.fromfile(cache_of(tmp_path / how) / "train.bin", np.uint16)
        .tolist()
        .count(data.tokenizer.separator)
        for how, data in (("text", letters), ("ids", ids))
    ]
    assert tokens == [1, 2]


def test_a_token_that_is_spelled_over_two_pieces_is_counted_once() -> None:
    found = spelling.Spelled(["<|a|>", "<|ab|>"])
    found.begin("here")
    for piece in ("x<|a", "|><|", "ab|>", "<|a|>", "y"):
        found.look(piece.encode())
    found.begin("there")
    found.look(b"|><|a|>")
    assert (found.count, found.words()) == (4, "4 time(s), first <|a|> in here")
    assert spelling.Spelled([]).words() == ""


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 100, 1001])
def test_every_epoch_is_another_permutation(count: int) -> None:
    epochs = sequence_at(np.arange(3 * count), count, 5).reshape(3, count)
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    if count > 16:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], np.arange(count))
        other = sequence_at(np.arange(count), count, 6)
        assert not np.array_equal(epochs[0], other)


def test_no_bit_of_the_order_follows_a_bit_of_the_position() -> None:
    order = sequence_at(np.arange(4096), 4096, 0)
    bits_in, bits_out = (
        (values[:, None] >> np.arange(12) & 1).T for values in (np.arange(4096), order)
    )
    correlation = np.corrcoef(bits_in, bits_out)[:12, 12:]
    assert np.abs(correlation).max() < 5 / 4096**0.5  # five standard deviations
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # expected: 2


def test_an_order_of_nothing_is_refused_not_walked_for_ever() -> None:
    with pytest.raises(AssertionError, match="never end"):
        sequence_at(np.arange(3), 0, 0)


def test_position_is_the_whole_state(texts: Path, tmp_path: Path) -> None:
    data = prepare(texts, tmp_path / "run")
    whole = data.train.batch(5, 6)
    parts = [data.train.batch(5 + n, 1) for n in range(6)]
    assert torch.equal(whole.inputs, torch.cat([part.inputs for part in parts]))
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))


def test_labels_that_are_written_to_leave_inputs_alone() -> None:
    """Also those of one row, of which both would be views of the same tokens."""
    causal = stream(list(range(40)))
    for rows in (1, 2):
        batch = causal.batch(0, rows)
        batch.labels.fill_(-100)
        assert batch.inputs.min() >= 0


# -- sequences -------------------------------------------------------------------------------------


def stream(tokens: Any, **more: Any) -> Stream:
    keywords: dict[str, Any] = {"num_bytes": 1, "sequence": 4, "seed": 0, "masking": None}
    return Stream(np.asarray(tokens, dtype=np.uint16), **keywords | more)


def test_a_causal_label_is_the_next_token_and_each_is_predicted_once() -> None:
    causal = stream(range(23))
    batch = causal.batch(0, causal.num_sequences)
    assert torch.equal(batch.labels, batch.inputs + 1)
    assert sorted(batch.labels.flatten().tolist()) == list(range(1, 21))
    assert batch.num_targets == 20


@pytest.mark.parametrize(("tokens", "sequences"), [(4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_sequence_needs_one_token_more_than_its_length(tokens: int, sequences: int) -> None:
    assert stream(range(tokens)).num_sequences == sequences


def test_masking_is_80_10_10_of_15_percent() -> None:
    ones = stream([1] * 40_000, sequence=100, masking=Masking(0.15, mask=9, vocabulary=1000))
    batch = ones.batch(0, 400)
    chosen = batch.labels != IGNORED
    assert torch.equal(batch.labels[chosen], torch.ones_like(batch.labels[chosen]))
    assert (batch.inputs[~chosen] == 1).all()
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.006)
    seen = batch.inputs[chosen]
    assert (seen == 9).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (seen == 1).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert batch.num_targets == int(chosen.sum())


def test_masks_are_a_function_of_seed_and_position() -> None:
    keywords = {"sequence": 32, "masking": Masking(0.3, 99, 50)}
    ones = stream([1] * 320, **keywords).batch(0, 40)  # all alike but for their masks
    other = stream([1] * 320, **keywords, seed=1).batch(0, 40)
    assert len(torch.unique(ones.labels, dim=0)) == 40  # four epochs
    assert not torch.equal(ones.labels, other.labels)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_masks_are_the_same_for_every_number_of_ranks(world: int) -> None:
    keywords = {"sequence": 8, "masking": Masking(0.3, 99, 50)}
    whole = stream(range(80), **keywords).batch(3, 8)
    each = 8 // world
    parts = [stream(range(80), **keywords).batch(3 + rank * each, each) for rank in range(world)]
    assert torch.equal(whole.inputs, torch.cat([part.inputs for part in parts]))
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))


def test_a_stream_of_a_large_file_takes_no_memory_of_its_size(tmp_path: Path) -> None:
    tokens = np.memmap(tmp_path / "t", dtype=np.uint16, mode="w+", shape=(50_000_000,))
    long = Stream(tokens, num_bytes=1, sequence=128, seed=0, masking=None)
    assert peak_of(lambda: long.batch(10**9, 8)) < 2**20


# -- the cache -------------------------------------------------------------------------------------


def cache_of(folder: Path) -> Path:
    (found,) = (folder / "data").iterdir()  # and nothing beside it
    return found


def test_tokens_are_written_once(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "run")
    file = cache_of(tmp_path / "run") / "train.bin"
    before = file.stat()
    prepare(texts, tmp_path / "run", sequence=8)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert cache_of(tmp_path / "run") == file.parent


def test_other_text_is_tokenised_anew(texts: Path, tmp_path: Path) -> None:
    one = prepare(texts, tmp_path / "run")
    (texts / "000.txt").write_text("something else")
    assert prepare(texts, tmp_path / "run").fingerprint != one.fingerprint


def test_another_tokenizer_of_the_same_name_is_used_anew(texts: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    byte_tokenizer().save(saved)
    one = prepare(texts, tmp_path / "run", tokenizer=str(saved))
    train_bpe([text.encode() for text in TEXTS], 300).save(saved)
    two = prepare(texts, tmp_path / "run", tokenizer=str(saved))
    assert one.fingerprint != two.fingerprint
    assert two.tokenizer.size == saved_tokenizer(str(saved)).size
    ids = two.train.batch(0, two.train.num_sequences).inputs.flatten().tolist()
    assert "the cat sat on the mat." in two.tokenizer.decode(ids)


def test_other_text_of_the_same_size_and_time_is_noticed(texts: Path, tmp_path: Path) -> None:
    one = prepare(texts, tmp_path / "run")
    for change in (lambda file, text: file.write_text(text), replace_by):
        file = texts / "007.txt"
        before, text = file.stat(), file.read_text()
        change(file, text.replace("cat", "dog") if "cat" in text else text.replace("dog", "cow"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = file.stat()
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        two = prepare(texts, tmp_path / "run")
        assert two.fingerprint != one.fingerprint
        one = two


def replace_by(file: Path, text: str) -> None:
    write(file.with_name(".other"), text).replace(file)


def test_a_tokenizer_of_the_same_size_and_time_is_noticed(texts: Path, tmp_path: Path) -> None:
    train_bpe([text.encode() for text in TEXTS], 300).save(tmp_path / "saved")
    more = {"tokenizer": str(tmp_path / "saved")}
    one = prepare(texts, tmp_path / "run", **more)
    file = tmp_path / "saved" / "tokenizer.json"
    before, told = file.stat(), json.loads(file.read_text())
    vocabulary = told["model"]["vocab"]
    one_word, other = (
        word for word, token in vocabulary.items() if token in one.tokenizer.encode(TEXTS[10])[:2]
    )
    vocabulary[one_word], vocabulary[other] = vocabulary[other], vocabulary[one_word]
    file.write_text(json.dumps(told, indent=2, ensure_ascii=False))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert prepare(texts, tmp_path / "run", **more).fingerprint != one.fingerprint


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "saved"])
def test_files_that_only_look_otherwise_are_not_tokenised_anew(
    tokenizer: str, texts: Path, tmp_path: Path
) -> None:
    """A copy, an archive that was unpacked, or ``chmod``: read again, which is cheap."""
    if tokenizer == "saved":
        train_bpe([text.encode() for text in TEXTS], 300).save(tmp_path / "saved")
        tokenizer = str(tmp_path / "saved")
    one = prepare(texts, tmp_path / "run", tokenizer=tokenizer, vocabulary=300)
    file = cache_of(tmp_path / "run") / "train.bin"
    before = file.stat()
    for text in [*texts.iterdir(), *tmp_path.glob("saved/*")]:
        text.write_bytes(text.read_bytes())
    for _ in range(2):
        again = prepare(texts, tmp_path / "run", tokenizer=tokenizer, vocabulary=300)
        assert same(one, again)
        assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def flip_bit(file: Path, at: int = 100) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def overstate(file: Path) -> None:
    told = json.loads(file.read_text())
    told["facts"]["text_bytes"]["train"] += 1
    file.write_text(json.dumps(told))


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: flip_bit(folder / "train.bin"),
    "a flipped bit of the held-out": lambda folder: flip_bit(folder / "held_out.bin"),
    "truncated": lambda folder: shorten(folder / "train.bin"),
    "a byte too many": lambda folder: grow(folder / "train.bin"),
    "a file gone": lambda folder: (folder / "held_out.bin").unlink(),
    "no facts": lambda folder: (folder / "meta.json").write_text("{"),
    "facts of another kind": lambda folder: (folder / "meta.json").write_text("[]"),
    "a wrong fact": lambda folder: overstate(folder / "meta.json"),
    "no tokenizer": lambda folder: shutil.rmtree(folder / "tokenizer"),
    "a torn tokenizer": lambda folder: shorten(folder / "tokenizer" / "tokenizer.json"),
    "another letter": lambda folder: flip_bit(folder / "tokenizer" / "tokenizer.json", -20),
    "unfinished": lambda folder: folder.rename(folder.with_name(folder.name + ".making")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_written_anew(damage: str, texts: Path, tmp_path: Path) -> None:
    more = {"tokenizer": "bpe", "vocabulary": 300}
    one = prepare(texts, tmp_path / "run", **more)
    kept, rate, size = everything(one), one.train.bytes_per_token, one.tokenizer.size
    DAMAGE[damage](cache_of(tmp_path / "run"))
    two = prepare(texts, tmp_path / "run", **more)
    assert all(torch.equal(a, b) for a, b in zip(kept, everything(two), strict=True))
    assert (two.train.bytes_per_token, two.tokenizer.size) == (rate, size)
    assert cache.is_intact(cache_of(tmp_path / "run"), lambda *_: None)


def _killed_while(what: str, texts: Path, folder: Path) -> None:
    def show(_: object, doing: str, *__: int) -> None:
        if doing == what:
            os.kill(os.getpid(), signal.SIGKILL)

    TextProgress.show = show  # type: ignore[method-assign]  # of this process alone
    prepare(texts, folder)


@pytest.mark.parametrize("what", ["reading", "tokenising"])
def test_a_process_killed_half_way_leaves_no_cache_and_no_text(
    what: str, texts: Path, tmp_path: Path
) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=_killed_while, args=(what, texts, tmp_path / "run")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads (3.12)
        child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = list((tmp_path / "run" / "data").iterdir())
    assert all(path.name.endswith(".making") for path in left)
    data = prepare(texts, tmp_path / "run")
    assert same(data, prepare(texts, tmp_path / "other"))
    cache_of(tmp_path / "run")


# -- ranks -----------------------------------------------------------------------------------------


def _prepare_as_rank(source: Path, folder: Path, shared: bool) -> tuple[str, list[torch.Tensor]]:
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(rank % 2) if shared else "0"
    data = prepare(source, folder if shared else folder / f"disk{rank}")
    return data.fingerprint, everything(data)


@pytest.mark.parametrize("shared", [True, False])
def test_all_ranks_have_one_stream_with_and_without_a_shared_disk(
    shared: bool, texts: Path, tmp_path: Path
) -> None:
    results = run_ranks(_prepare_as_rank, 2, texts, tmp_path / "run", shared)
    for fingerprint, tensors in results:
        assert fingerprint == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(tensors, results[0][1], strict=True))


def test_a_copy_on_another_disk_is_checked_there(texts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = run_ranks(_prepare_as_rank, 2, texts, run, False)
    shutil.rmtree(run / "disk1")
    shutil.copytree(run / "disk0", run / "disk1")
    flip_bit(cache_of(run / "disk1") / "train.bin")
    again = run_ranks(_prepare_as_rank, 2, texts, run, False)
    for tensors in (again[0][1], again[1][1]):
        assert all(torch.equal(a, b) for a, b in zip(tensors, first[0][1], strict=True))


def _prepare_own_text(folder: Path) -> None:
    rank = dist.get_rank()
    source = write(folder / f"text{rank}", f"the text of rank {rank} alone\n" * 20)
    _prepare_as_rank(source, folder, shared=False)


def test_nodes_with_different_texts_disagree_on_all_ranks(tmp_path: Path) -> None:
    for text in errors_of_ranks(_prepare_own_text, 2, tmp_path):
        assert "DisagreementError: Ranks disagree on data: rank(s) 1 differ from rank 0." in text


def _prepare_late_text(folder: Path) -> None:
    if dist.get_rank() == 0:
        write(folder / "text0", "enough\n" * 20)
    _prepare_as_rank(folder / f"text{dist.get_rank()}", folder, shared=False)


def test_a_text_that_one_node_lacks_is_every_ranks_error(tmp_path: Path) -> None:
    for text in errors_of_ranks(_prepare_late_text, 2, tmp_path):
        assert "DataError: There is no text in data.source" in text
        assert "text1" in text


def test_an_error_of_the_rank_that_works_is_every_ranks(tmp_path: Path) -> None:
    for text in errors_of_ranks(_prepare_as_rank, 2, tmp_path / "none", tmp_path / "run", True):
        assert "DataError: There is no text in data.source" in text


def test_a_folder_that_cannot_be_written_is_every_ranks_error(texts: Path, tmp_path: Path) -> None:
    blocked = write(tmp_path / "run", "a file, not a folder")
    for text in errors_of_ranks(_prepare_as_rank, 2, texts, blocked, True):
        assert "DataError: The tokens of the corpus cannot be written." in text
        assert "Write: --run.folder" in text


# -- what is refused -------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_errors_name_what_is_wrong_and_what_to_write(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "empty").mkdir()
    rows = write(tmp_path / "rows.jsonl", '{"texts": "a", "id": 1}\n')
    torn = write(tmp_path / "torn.jsonl", '{"text": "a"}\n{"text": \n')
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
    bare_row = write(tmp_path / "bare.jsonl", '"a"\n')
    no_columns = write(tmp_path / "none.jsonl", "{}\n")
    table = tmp_path / "c.parquet"
    pq.write_table(pa.table({"x": [["a"]]}), table)
    fake = write(tmp_path / "fake.parquet", "no table")
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    bare = PreTrainedTokenizerFast(tokenizer_object=Backend(backends.WordLevel({"a": 0}, "a")))
    bare.save_pretrained(tmp_path / "bare")
    bare.add_special_tokens({"eos_token": "</s>"})
    bare.save_pretrained(tmp_path / "unmasked")
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"source": tmp_path / "none"}, ["There is no text in data.source", "No file, folder"]),
        ({"source": tmp_path / "empty"}, ["a folder without files"]),
        ({"source": write(tmp_path / "nil", "")}, ["The corpus is empty"]),
        ({"source": rows}, ["has no column 'text'; did you mean 'texts'?", "texts, id"]),
        ({"source": torn}, ["Line 2 of ", "torn.jsonl cannot be read", "JSONDecodeError"]),
        ({"source": latin}, ["Line 1 of ", "cannot be read", "UnicodeDecodeError"]),
        ({"source": bare_row}, ["Line 1 of ", "is no JSON object", "of type str"]),
        ({"source": no_columns}, ["has no column 'text'", "A row has no columns", "<column>"]),
        ({"source": rows, "field": "id"}, ["Column 'id' of", "holds no text", "of type int"]),
        ({"source": table, "field": "x"}, ["Column 'x' of", "holds no text", "of type list"]),
        ({"source": table}, ["c.parquet has no column 'text'", "Its columns are x."]),
        ({"source": "/proc/self/mem"}, ["/proc/self/mem cannot be read: Input/output error"]),
        ({"source": fake}, ["fake.parquet cannot be read"]),
        ({"source": texts, "sequence": 10**6}, ["shorter than one sequence", "1000000"]),
        ({"source": texts, "tokenizer": "nosuch"}, ["There is no tokenizer 'nosuch'"]),
        ({"source": texts, "tokenizer": str(rows)}, ["There is no tokenizer"]),
        (
            {"source": texts, "tokenizer": str(tmp_path / "slow")},
            ["has no fast form (tokenizer.json)", "It is a ByT5Tokenizer."],
        ),
        (
            {"source": texts, "folder": rows},
            ["The tokens of the corpus cannot be written.", "Not a directory", "--run.folder"],
        ),
        (
            {"source": texts, "tokenizer": str(tmp_path / "bare")},
            ["no token to put between documents"],
        ),
        (
            {"source": texts, "tokenizer": str(tmp_path / "unmasked"), "masked": True},
            ["needs a tokenizer with a mask token"],
        ),
    ]
    for number, (options, words) in enumerate(cases):
        with pytest.raises(DataError) as caught:
            folder = options.pop("folder", tmp_path / f"run{number}")
            prepare(options.pop("source"), folder, **options)
        for word in words:
            assert word in str(caught.value)
        assert "Write: " in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", lambda told: told["model"]["vocab"].update(a=4_000_000_000)),
        ("tokenizer.json", lambda told: told["added_tokens"][0].update(id=4_000_000_000)),
        (
            "tokenizer_config.json",
            lambda told: told.update(added_tokens_decoder={"4000000000": {"content": "<x>"}}),
        ),
        ("added_tokens.json", lambda told: told.update({"<x>": 4_000_000_000})),
    ],
)
def test_ids_far_above_their_number_are_refused_before_a_table_is_made(
    file: str, change: Callable[[Any], Any], texts: Path, tmp_path: Path
) -> None:
    byte_tokenizer().save(tmp_path / "saved")
    path = tmp_path / "saved" / file
    told = json.loads(path.read_text()) if path.exists() else {}
    change(told)
    path.write_text(json.dumps(told))
    names = [str(tmp_path / "saved")] + ([str(path)] if file == "tokenizer.json" else [])
    for name in names:
        with pytest.raises(DataError, match="an id far above the number of its ids") as caught:
            prepare(texts, tmp_path / "run", tokenizer=name)
        assert "ids and 4,000,000,000 as the largest" in str(caught.value)
        assert f"{file} has " in str(caught.value)


@pytest.mark.parametrize("what", ["nested", "endless", "long"])
def test_a_tokenizer_without_end_is_refused_at_once(
    what: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer().save(tmp_path / "saved")
    file = tmp_path / "saved" / "tokenizer.json"
    monkeypatch.setattr(tokens, "_MOST_BYTES", 1 << 20)
    words = {"nested": "RecursionError", "endless": "it is no file", "long": "more than 1,048,576"}
    if what == "nested":
        file.write_text("[" * 100_000)
    elif what == "endless":
        file.unlink()
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(b" " * (2 << 20))
    with pytest.raises(DataError, match="There is no tokenizer") as caught:
        prepare(texts, tmp_path / "run", tokenizer=str(tmp_path / "saved"))
    assert words[what] in str(caught.value)


def test_a_tokenizer_of_the_hub_is_checked_before_it_is_loaded(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tokenizer.json", "{}")
    write(tmp_path / "added_tokens.json", '{"<x>": 4000000000}')

    def cached(name: str, file: str) -> str:
        assert name == "owner/name"
        if not (tmp_path / file).exists():
            raise OSError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(tokens, "cached_file", cached)
    with pytest.raises(DataError, match="an id far above the number of its ids"):
        prepare(texts, tmp_path / "run", tokenizer="owner/name")


def test_an_unreachable_hub_keeps_the_librarys_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="hub:owner/name cannot be read") as caught:
        prepare("hub:owner/name", tmp_path / "run")
    assert "ConnectionError: Couldn't reach 'owner/name' on the Hub" in str(caught.value)


@pytest.mark.parametrize("inside", ["", "runs/default"])
def test_a_run_does_not_read_what_it_writes(texts: Path, inside: str) -> None:
    """Its own metrics and checkpoints would be another corpus at every start."""
    with pytest.raises(DataError, match="lies in the source") as caught:
        prepare(texts, texts / inside)
    assert "--run.folder <a folder outside of it>" in str(caught.value)
    prepare(texts, texts / ".runs" / "default")  # hidden folders are not read


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "a.txt.zst", "all.ZIP"])
def test_compressed_text_is_not_taken_for_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"text " * 999))
    with pytest.raises(DataError, match="is compressed") as caught:
        prepare(tmp_path / name, tmp_path / "run")
    assert name in str(caught.value)


def test_an_error_without_words_is_named_by_its_type(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def silent(*_: Any, **__: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(datasets, "load_dataset", silent)
    monkeypatch.setattr(tokens, "cached_file", silent)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", silent)
    with pytest.raises(DataError, match="cannot be read") as of_text:
        prepare("hub:owner/name", tmp_path / "run")
    with pytest.raises(DataError, match="There is no tokenizer") as of_tokenizer:
        prepare(texts, tmp_path / "run", tokenizer="owner/name")
    assert "RuntimeError" in of_text.value.numbers
    assert "RuntimeError" in of_tokenizer.value.numbers


def test_a_hub_name_says_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return [{"text": "a"}, {"text": None}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts_of("hub:owner/name:small@test") == [b"a", b"b"]
    assert asked == [("owner/name", {"streaming": True, "name": "small", "split": "test"})]


# -- waiting ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, error: io.StringIO, *calls: tuple[Any, ...]) -> str:
    """What standard error gets from calls of ``show``, each after so many seconds."""
    seconds = iter([0.0, *(call[0] for call in calls)])
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("mics.ranks.progress_bar.time", clock)
    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setenv("TERM", "xterm")
    with TextProgress() as progress:
        for _, *what in calls:
            progress.show(*what)
    return error.getvalue()


def test_short_work_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [(0.1, "reading", 1, 2), (1.9, "reading", 2, 2)]
    assert shown(monkeypatch, Terminal(), *calls) == ""


def test_long_work_says_a_line_every_half_minute_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = shown(
        monkeypatch,
        io.StringIO(),
        (29, "reading", 10**6, 0),
        (31, "reading", 2 * 10**6, 0),
        (32, "tokenising", 10**6, 4 * 10**9),
        (62, "tokenising", 2 * 10**9, 4 * 10**9),
        (93, "training the tokenizer", 0, 0),
    )
    assert said.splitlines() == [
        "mics: reading, 2 MB",
        "mics: tokenising, 2,000 of 4,000 MB, 66.63 MB/s, 0:30 left",
        "mics: training the tokenizer",
    ]


def test_long_work_shows_a_bar_on_a_terminal_and_takes_it_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = [(3, "reading", 10**6, 0), (4, "tokenising", 10**6, 2 * 10**6)]
    said = shown(monkeypatch, Terminal(), *calls)
    assert "tokenising" in said
    assert "1.0/2.0 MB" in said
    assert said.endswith("\x1b[2K")  # the line is erased
