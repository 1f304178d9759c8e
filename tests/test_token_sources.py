"""Tokens that are there already: read as they lie, checked, never written to."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import errors_of_ranks, run_ranks

from mics.errors import DataError
from mics.training.config import DataConfig, SourceConfig
from mics.training.data import Data, prepare_data, shards
from mics.training.data.foreign import find_token_files
from mics.training.data.shards import Shards, Stretch
from mics.training.data.tokenizing.making import make_token_folder
from mics.training.data.tokenizing.plan import Job
from mics.training.data.tokenizing.share import Share

TEXTS = [f"Document {n}: " + "the cat sat on the mat. " * (n % 5 + 1) for n in range(30)]
IDS = np.random.default_rng(0).integers(0, 259, 3000)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03}.txt").write_text(text)
    return folder


def tokenize(source: Path, folder: Path, **more: Any) -> Path:
    make_token_folder(Job(str(source), **more), folder, Share(), 1, lambda *_: None)
    return folder


def prepare(source: object, folder: Path, **more: Any) -> Data:
    config = DataConfig(**{"source": None if source is None else str(source), **more})
    return prepare_data(config, seed=3, sequence=16, masked=False, folder=folder)


def ids_in(data: Data) -> list[list[int]]:
    """Every sequence of both splits, in the order of the run."""
    found = []
    for one in (data.train, data.held_out):
        batch = one.batch(0, one.num_sequences) if one.num_sequences else None
        found.append([] if batch is None else torch.cat([batch.inputs, batch.labels]).tolist())
    return found


# -- a folder of mics tokenize ---------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "saved"])
def test_prepared_tokens_give_the_batches_of_the_text(
    tokenizer: str, texts: Path, tmp_path: Path
) -> None:
    if tokenizer == "saved":
        bpe = {"tokenizer": "bpe", "vocabulary": 300}
        tokenizer = str(tokenize(texts, tmp_path / "first", **bpe) / "tokenizer")
    more = {"tokenizer": tokenizer, "held_out": 0.2}
    folder = tokenize(texts, tmp_path / "tokens", seed=3, **more)
    as_text = prepare(texts, tmp_path / "run", **more)
    as_tokens = prepare(folder, tmp_path / "other")
    assert ids_in(as_tokens) == ids_in(as_text)
    assert ids_in(as_tokens)[1]  # something is held out
    assert as_tokens.tokenizer.size == as_text.tokenizer.size
    assert as_tokens.train.bytes_per_token == as_text.train.bytes_per_token
    assert not (tmp_path / "other").exists()  # nothing is written beside them


def test_a_folder_without_a_split_has_its_end_held_out(texts: Path, tmp_path: Path) -> None:
    (texts / "one").mkdir()
    (texts / "one" / "a.txt").write_text("".join(TEXTS))
    folder = tokenize(texts / "one", tmp_path / "tokens", held_out=0.5)
    data = prepare(folder, tmp_path / "run", held_out=0.1)
    size = len("".join(TEXTS)) + 1
    assert data.train.num_tokens == round(0.9 * size)
    assert data.train.num_tokens + data.held_out.num_tokens == size
    assert data.held_out.bytes_per_token == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"field": "body"}, "data.field is for text"),
        ({"specials": "ids"}, "data.specials is for text"),
        ({"vocabulary": 999}, "data.vocabulary is for text"),
        ({"limit": 10}, "data.limit is for text"),
        ({"format": "text"}, "data.format is for text"),
        ({"held_out": 0.3}, "has its own share of documents"),
        ({"held_out": 0.0}, "0 for evaluation.sets"),
        ({"tokenizer": "bpe"}, "bpe is trained on text"),
    ],
)
def test_options_that_tokens_have_no_use_for_are_refused(
    more: dict[str, Any], words: str, texts: Path, tmp_path: Path
) -> None:
    folder = tokenize(texts, tmp_path / "tokens", held_out=0.2)
    with pytest.raises(DataError, match=words) as caught:
        prepare(folder, tmp_path / "run", **more)
    assert "Write: " in str(caught.value)


def test_another_tokenizer_than_that_of_the_tokens_is_refused(texts: Path, tmp_path: Path) -> None:
    folder = tokenize(texts, tmp_path / "tokens", tokenizer="bpe", vocabulary=300)
    other = tokenize(texts, tmp_path / "other", tokenizer="bpe", vocabulary=290)
    prepare(folder, tmp_path / "run", tokenizer=str(folder / "tokenizer"))
    with pytest.raises(DataError, match="is not the tokenizer of"):
        prepare(folder, tmp_path / "run", tokenizer=str(other / "tokenizer"))
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(other / "tokenizer", folder / "tokenizer")
    with pytest.raises(DataError, match="is not the one that made the tokens"):
        prepare(folder, tmp_path / "run")


def test_sources_of_different_tokenizers_are_refused(texts: Path, tmp_path: Path) -> None:
    folder = tokenize(texts, tmp_path / "tokens", tokenizer="bpe", vocabulary=300)
    sources = (SourceConfig(str(folder)), SourceConfig(str(texts)))
    with pytest.raises(DataError, match="different tokenizers"):
        prepare(None, tmp_path / "run", sources=sources)
    data = prepare(None, tmp_path / "run", sources=sources, tokenizer=str(folder / "tokenizer"))
    assert "cat" in data.tokenizer.decode(data.train.batch(0, 4).inputs.flatten().tolist())


def test_an_id_that_the_tokenizer_does_not_have_is_named(texts: Path, tmp_path: Path) -> None:
    folder = tokenize(texts, tmp_path / "tokens", held_out=0)
    data = np.memmap(folder / "train-00000.bin", "<u2", "r+")
    data[700] = 259
    stream = prepare(folder, tmp_path / "run").train
    with pytest.raises(DataError, match="has an id that its tokenizer does not have") as caught:
        stream.batch(0, stream.num_sequences)
    assert "Id 259 stands 700 tokens behind byte 0, and there are 259 ids" in str(caught.value)


# -- shards ----------------------------------------------------------------------------------------


def test_shards_are_one_array_of_which_few_files_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MOST_OPEN", 3)
    sizes = [5, 1, 0, 17, 2, 8, 30, 4]
    stretches, at = [], 0
    for number, size in enumerate(sizes):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(b"head" + IDS[at : at + size].astype("<u4").tobytes())
        stretches.append(Stretch(path, 4, size, "<u4"))
        at += size
    before = len(list(Path("/proc/self/fd").iterdir()))
    array = Shards(stretches, 259)
    assert len(array) == sum(sizes)
    places = np.random.default_rng(1).integers(0, len(array), (40, 7))
    assert np.array_equal(array[places], IDS[places])
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    for start, stop in ((0, 67), (3, 30), (6, 6), (23, 24)):
        part = array.part(start, stop)
        assert np.array_equal(part[np.arange(len(part))], IDS[start:stop])


# -- files of other programs -----------------------------------------------------------------------


def llm_c(path: Path, ids: Any, magic: int = 20240520, version: int = 1, **more: Any) -> Path:
    head = np.zeros(256, "<i4")
    head[:3] = magic, version, more.get("tokens", len(ids))
    dtype = "<u2" if magic == 20240520 else "<u4"
    path.write_bytes(head.tobytes() + np.asarray(ids).astype(dtype).tobytes())
    return path


def megatron(prefix: Path, documents: list[Any], code: int = 8, **more: Any) -> Path:
    """An index and its data as Megatron's IndexedDatasetBuilder writes them."""
    dtype = {1: "<u1", 4: "<i4", 8: "<u2"}[code]
    sizes = np.array([len(one) for one in documents], "<i4")
    starts = (np.cumsum(sizes, dtype=np.int64) - sizes) * np.dtype(dtype).itemsize
    head = struct.pack("<9sQB", b"MMIDIDX\0\0", more.get("version", 1), more.get("told", code))
    counts = struct.pack("<QQ", more.get("sequences", len(sizes)), len(sizes) + 1)
    ends = np.arange(len(sizes) + 1, dtype="<i8")
    starts = more.get("change", lambda x: x)(starts.astype("<i8"))
    index = head + counts + sizes.tobytes() + starts.tobytes() + ends.tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(index + more.get("rest", b""))
    data = b"".join(np.asarray(one).astype(dtype).tobytes() for one in documents)
    prefix.with_name(prefix.name + ".bin").write_bytes(data + more.get("tail", b""))
    return prefix


def all_ids(data: Data) -> list[int]:
    """The ids of both splits in their order in the files."""
    out: list[int] = []
    for one in (data.train, data.held_out):
        by_place = dict(zip(one.sequences(0, n := one.num_sequences), range(n), strict=True))
        rows = one.batch(0, n).inputs
        out += [token for place in sorted(by_place) for token in rows[by_place[place]].tolist()]
    return out


@pytest.mark.parametrize("magic", [20240520, 20240801])
def test_files_of_llm_c_are_read_in_order(magic: int, tmp_path: Path) -> None:
    version = {20240520: 1, 20240801: 7}[magic]
    (tmp_path / "data").mkdir()
    for number in range(3):
        ids = IDS[1000 * number : 1000 * (number + 1)]
        llm_c(tmp_path / "data" / f"train_{number}.bin", ids, magic, version)
    before = {file: file.read_bytes() for file in (tmp_path / "data").iterdir()}
    for source in (tmp_path / "data", tmp_path / "data" / "*.bin"):
        data = prepare(source, tmp_path / "run", held_out=0.5)
        # 1,500 tokens are 93 sequences of 16 with a label behind each, and some that are left.
        assert all_ids(data) == [*IDS[: 93 * 16], *IDS[1500 : 1500 + 93 * 16]]
        assert data.train.bytes_per_token is None
        assert "n/a bytes per token" in data.lines(0)[0]
    assert {file: file.read_bytes() for file in (tmp_path / "data").iterdir()} == before


def test_files_that_are_named_for_it_are_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in {"val_000000": IDS[:300], "train_000001": IDS[300:1500]}.items():
        llm_c(folder / f"fineweb_{name}.bin", part)
    megatron(folder / "more-train_text_document", [IDS[1500:]])
    data = prepare(folder, tmp_path / "run")
    assert (data.train.num_tokens, data.held_out.num_tokens) == (2700, 300)
    assert all_ids(data) == [*IDS[300 : 300 + 168 * 16], *IDS[: 18 * 16]]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 3 token files are held out by their names, first fineweb_val_000000.bin" in said
    alone = prepare(folder / "*val*", tmp_path / "run")
    assert alone.train.num_tokens == 285  # 5 % of its end
    with pytest.raises(DataError, match="has token files that are held out by their names"):
        prepare(folder, tmp_path / "run", held_out=0.0)
    llm_c(folder / "fineweb_test_0.bin", IDS)
    with pytest.raises(DataError, match="has files for a test beside others"):
        prepare(folder, tmp_path / "run")


@pytest.mark.parametrize("code", [1, 4, 8])
@pytest.mark.parametrize("name", ["", ".idx", ".bin"])
def test_an_index_of_megatron_leads_to_its_ids(code: int, name: str, tmp_path: Path) -> None:
    ids = IDS % 256
    megatron(tmp_path / "corpus_text_document", [ids[:1000], ids[1000:1001], ids[1001:]], code)
    data = prepare(tmp_path / f"corpus_text_document{name}", tmp_path / "run", held_out=0.5)
    assert all_ids(data) == [*ids[: 93 * 16], *ids[1500 : 1500 + 93 * 16]]


def test_a_folder_of_megatrons_files_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    megatron(tmp_path / "data" / "a", [IDS[:50]])
    megatron(tmp_path / "data" / "b.c", [IDS[50:80]])
    found = find_token_files(str(tmp_path / "data"))
    assert found is not None
    assert [(one.path.name, one.tokens) for one in found] == [("a.bin", 50), ("b.c.bin", 30)]


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a version": (lambda p: llm_c(p / "a.bin", IDS, version=2), "Its version is 2, and 1 is known"),
    "too few": (lambda p: llm_c(p / "a.bin", IDS, tokens=9), "says 9 ids, and it has 7,024 bytes"),
    "too many": (lambda p: llm_c(p / "a.bin", IDS, tokens=2**31 - 1), "says 2,147,483,647 ids"),
    "negative": (lambda p: llm_c(p / "a.bin", IDS, tokens=-1), "says -1 ids"),
    "a head alone": (
        lambda p: (p / "a.bin").write_bytes(llm_c(p / "a.bin", IDS).read_bytes()[:99]),
        "says 3,000 ids, and it has 99 bytes",
    ),
    "another dtype": (lambda p: megatron(p / "a", [IDS], told=7), "dtype of number"),
    "another index": (lambda p: megatron(p / "a", [IDS], version=2), "Its version is 2"),
    "an endless index": (lambda p: megatron(p / "a", [IDS], sequences=2**60), "says 1,152,921,504"),
    "a longer index": (lambda p: megatron(p / "a", [IDS], rest=b"12345"), "and has 67 bytes"),
    "gaps": (
        lambda p: megatron(p / "a", [IDS[:9], IDS[9:]], change=lambda x: x + 2),
        "Sequence 0 is not where the one before it ends",
    ),
    "more data": (
        lambda p: megatron(p / "a", [IDS], tail=b"xx"),
        "6,000 bytes, and a.bin has 6,002",
    ),
    "no data": (
        lambda p: megatron(p / "a", [IDS]).with_name("a.bin").unlink(),
        "there is no a.bin",
    ),
    "something beside": (
        lambda p: (llm_c(p / "a.bin", IDS), (p / "b.txt").write_text("text")),
        "b.txt is none",
    ),
    "ids of a larger vocabulary": (lambda p: llm_c(p / "a.bin", IDS + 1), "Id 259 stands"),
    "negative ids": (lambda p: megatron(p / "a", [IDS - 1], code=4), "Id -1 stands"),
    "a tokenizer that would be trained": (lambda p: llm_c(p / "a.bin", IDS), "bpe is trained"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_token_files_that_are_not_right_are_refused_in_words(what: str, tmp_path: Path) -> None:
    make, words = REFUSED[what]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    tokenizer = "bpe" if "trained" in what else "bytes"
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "data", tmp_path / "run", tokenizer=tokenizer)
    assert words in str(caught.value)
    assert "Write: " in str(caught.value)


def test_other_ids_are_another_run(tmp_path: Path) -> None:
    file = llm_c(tmp_path / "a.bin", IDS)
    one = prepare(file, tmp_path / "run").fingerprint
    assert prepare(file, tmp_path / "run").fingerprint == one
    llm_c(file, np.roll(IDS, 1))
    assert prepare(file, tmp_path / "run").fingerprint != one


def test_a_token_file_among_text_says_what_it_is(texts: Path, tmp_path: Path) -> None:
    llm_c(texts / "zz.bin", IDS)
    with pytest.raises(DataError, match=r"is a token file of llm\.c, which is a source of its own"):
        prepare(texts, tmp_path / "run")


# -- ranks -----------------------------------------------------------------------------------------


def _prepare_as_rank(folder: Path, run: Path) -> tuple[str, list[int]]:
    data = prepare(folder / f"node{dist.get_rank()}", run)
    return data.fingerprint, data.train.batch(0, 4).inputs.flatten().tolist()


def test_every_rank_opens_tokens_for_itself(texts: Path, tmp_path: Path) -> None:
    for rank in range(2):
        tokenize(texts, tmp_path / f"node{rank}", held_out=0.2)
    first, second = run_ranks(_prepare_as_rank, 2, tmp_path, tmp_path / "run")
    assert first == second


@pytest.mark.parametrize("what", ["missing", "other", "damaged"])
def test_a_node_that_sees_something_else_is_every_ranks_error(
    what: str, texts: Path, tmp_path: Path
) -> None:
    tokenize(texts, tmp_path / "node0", held_out=0.2)
    words = {"missing": "no text", "other": "sees other tokens", "damaged": "no whole folder"}
    if what != "missing":
        other = tokenize(texts, tmp_path / "node1", held_out=0.2, seed=int(what == "other"))
        if what == "damaged":
            told = json.loads((other / "tokens.json").read_text())
            (other / "tokens.json").write_text(json.dumps(told | {"version": 3}))
    for error in errors_of_ranks(_prepare_as_rank, 2, tmp_path, tmp_path / "run"):
        assert words[what] in str(error)
