"""Text to tokens to sequences: the same stream whatever it came from, one integer of state."""

from __future__ import annotations

import json
import os
from pathlib import Path
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
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mics.errors import DataError
from mics.training.config import DataConfig
from mics.training.data import IGNORED, Data, prepare_data
from mics.training.data.corpus import find_files, read_documents
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


# -- sources ---------------------------------------------------------------------------------------


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


def test_local_tables_need_no_network_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import socket

    def refuse(*_: Any) -> Any:
        raise AssertionError("a local file was looked up on the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    assert list(read_documents(str(tmp_path / "c.jsonl"), "text")) == [t.encode() for t in TEXTS]
    assert not list(home.iterdir())
    assert capfd.readouterr() == ("", "")


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


def test_bytes_that_are_no_utf_8_survive(tmp_path: Path) -> None:
    raw = bytes(range(256)) * 3
    (tmp_path / "raw").write_bytes(raw)
    data = prepare(tmp_path / "raw", tmp_path / "run", held_out=0.0, sequence=len(raw))
    assert bytes(data.train.batch(0, 1).inputs[0].tolist()) == raw


def test_limit_takes_so_many_bytes(texts: Path, tmp_path: Path) -> None:
    data = prepare(texts, tmp_path / "run", limit=100, held_out=0.0)
    assert data.train.num_tokens * data.train.bytes_per_token == pytest.approx(100)


# -- the split -------------------------------------------------------------------------------------


def test_held_out_is_chosen_by_content_and_by_seed(texts: Path, tmp_path: Path) -> None:
    one = prepare(texts, tmp_path / "a")
    for file in sorted(texts.iterdir()):
        file.rename(texts / f"x{file.name}")  # other names, the same order
    assert same(one, prepare(texts, tmp_path / "b"))
    assert one.fingerprint != prepare(texts, tmp_path / "c", seed=1).fingerprint


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


def test_the_order_has_no_more_neighbours_than_chance() -> None:
    order = sequence_at(np.arange(4096), 4096, 0)
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # expected: 2
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.1


def test_position_is_the_whole_state(texts: Path, tmp_path: Path) -> None:
    data = prepare(texts, tmp_path / "run")
    whole = data.train.batch(5, 6)
    parts = [data.train.batch(5 + n, 1) for n in range(6)]
    assert torch.equal(whole.inputs, torch.cat([part.inputs for part in parts]))
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))


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
    keywords = {"sequence": 8, "masking": Masking(0.3, 99, 50)}
    one, again = stream(range(80), **keywords), stream(range(80), **keywords)
    other = stream(range(80), **keywords, seed=1)
    assert torch.equal(one.batch(3, 20).labels, again.batch(3, 20).labels)
    assert torch.equal(one.batch(3, 20).inputs[4:], again.batch(7, 16).inputs)
    assert not torch.equal(one.batch(3, 20).labels, other.batch(3, 20).labels)
    assert not torch.equal(one.batch(0, 10).labels, one.batch(10, 10).labels)  # another epoch


def test_a_stream_of_a_large_file_takes_no_memory_of_its_size(tmp_path: Path) -> None:
    import tracemalloc

    tokens = np.memmap(tmp_path / "t", dtype=np.uint16, mode="w+", shape=(50_000_000,))
    tracemalloc.start()
    long = Stream(tokens, num_bytes=1, sequence=128, seed=0, masking=None)
    long.batch(10**9, 8)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# -- the cache -------------------------------------------------------------------------------------


def cache_of(folder: Path) -> Path:
    found = [path for path in (folder / "data").iterdir() if path.is_dir()]
    assert len(found) == 1
    return found[0]


def test_tokens_are_written_once(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "run")
    file = cache_of(tmp_path / "run") / "train.bin"
    before = file.stat()
    prepare(texts, tmp_path / "run", sequence=8)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [f.name for f in (tmp_path / "run" / "data").iterdir()] == [file.parent.name]


def test_other_text_is_tokenised_anew(texts: Path, tmp_path: Path) -> None:
    one = prepare(texts, tmp_path / "run")
    (texts / "000.txt").write_text("something else")
    assert prepare(texts, tmp_path / "run").fingerprint != one.fingerprint


@pytest.mark.parametrize("damage", ["bit", "truncated", "meta", "half"])
def test_a_damaged_cache_is_written_anew(damage: str, texts: Path, tmp_path: Path) -> None:
    one = prepare(texts, tmp_path / "run")
    kept = everything(one)
    cached = cache_of(tmp_path / "run")
    data = bytearray((cached / "train.bin").read_bytes())
    if damage == "bit":
        data[100] ^= 4
        (cached / "train.bin").write_bytes(data)
    elif damage == "truncated":
        (cached / "train.bin").write_bytes(data[:-2])
    elif damage == "meta":
        (cached / "meta.json").write_text("{")
    else:
        cached.rename(cached.with_name(cached.name + ".making"))  # killed before the end
    again = everything(prepare(texts, tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
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
    results = run_ranks(_prepare_as_rank, 3, texts, tmp_path / "run", shared)
    for fingerprint, tensors in results:
        assert fingerprint == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(tensors, results[0][1], strict=True))


def test_an_error_of_the_rank_that_works_is_every_ranks(tmp_path: Path) -> None:
    for text in errors_of_ranks(_prepare_as_rank, 3, tmp_path / "none", tmp_path / "run", True):
        assert "DataError: There is no text in data.source" in text


# -- what is refused -------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_errors_name_what_is_wrong_and_what_to_write(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "empty").mkdir()
    rows = write(tmp_path / "rows.jsonl", '{"texts": "a", "id": 1}\n')
    torn = write(tmp_path / "torn.jsonl", '{"text": "a"}\n{"text": \n')
    fake = write(tmp_path / "fake.parquet", "no table")
    bare = PreTrainedTokenizerFast(tokenizer_object=Backend(backends.WordLevel({"a": 0}, "a")))
    bare.save_pretrained(tmp_path / "bare")
    bare.add_special_tokens({"eos_token": "</s>"})
    bare.save_pretrained(tmp_path / "unmasked")
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"source": tmp_path / "none"}, ["There is no text in data.source", "No file, folder"]),
        ({"source": tmp_path / "empty"}, ["a folder without files"]),
        ({"source": write(tmp_path / "nil", "")}, ["The corpus is empty"]),
        ({"source": rows}, ["has no column 'text'; did you mean 'texts'?", "texts, id"]),
        ({"source": torn}, ["torn.jsonl cannot be read"]),
        ({"source": fake}, ["fake.parquet cannot be read"]),
        ({"source": texts, "sequence": 10**6}, ["shorter than one sequence", "1000000"]),
        ({"source": texts, "tokenizer": "nosuch"}, ["There is no tokenizer 'nosuch'"]),
        ({"source": texts, "tokenizer": str(rows)}, ["There is no tokenizer"]),
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
            prepare(options.pop("source"), tmp_path / f"run{number}", **options)
        for word in words:
            assert word in str(caught.value)
        assert "Write: " in str(caught.value)


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


def test_a_hub_name_says_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return [{"text": "a"}, {"text": None}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_documents("hub:owner/name:small@test", "text")) == [b"a", b"b"]
    assert asked == [("owner/name", {"streaming": True, "name": "small", "split": "test"})]
