"""mics tokenize: the ids of `tokenizers` alone, whoever works, killed whenever."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mics.__main__ import main
from mics.errors import ConfigError, DataError
from mics.training.data import cutting, splitting
from mics.training.data.splitting import OF_ALL, number_of
from mics.training.data.token_folder import MANIFEST, TokenFolder, read_token_folder
from mics.training.data.tokenizing import plan, pool, spans, work
from mics.training.data.tokenizing.making import Outcome, make_token_folder
from mics.training.data.tokenizing.plan import Job, make_plan
from mics.training.data.tokenizing.share import Share, find_share
from mics.training.data.tokens import byte_tokenizer

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat,", "and", "3", "dogs'", "tails", "wagged;"),
    *("caf\u00e9", "\u20ac5", "def", "f(x):", "return", "x"),
)


def document(number: int) -> str:
    draw = random.Random(number)
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 60))) + "\n" * (number % 3)


def make(job: Job, folder: Path, **more: Any) -> Outcome:
    share, processes = more.get("share", Share()), more.get("processes", 1)
    return make_token_folder(job, folder, share, processes, lambda *_: None)


def ids_of(folder: Path, split: str) -> list[int]:
    found = read_token_folder(folder)
    tokens = found.opened(folder, split)
    return tokens[np.arange(len(tokens))].tolist()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Text, JSON lines, CSV and Parquet, one document of some length among them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(10):
        (folder / f"a{number}.txt").write_text(document(number))
    (folder / "b-long.txt").write_text("\n".join(document(n).strip() for n in range(300)))
    rows = [document(100 + n) for n in range(150)]
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    table = pa.table({"text": [document(400 + n) for n in range(100)]})
    pq.write_table(table, folder / "d.parquet", row_group_size=17)
    cells = ["text,n", *(f'"{document(600 + n)}",{n}' for n in range(30))]
    (folder / "e.csv").write_text("\n".join(cells))
    return folder


def documents(corpus: Path) -> list[str]:
    texts = [file.read_text() for file in sorted(corpus.glob("*.txt"))]
    texts += [document(100 + n) for n in range(150)]
    texts += [document(400 + n) for n in range(100)]
    return texts + [document(600 + n) for n in range(30)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and pieces of some kilobytes, so that a small corpus has many."""
    monkeypatch.setattr(plan, "_LEAST", 4096)
    monkeypatch.setattr(cutting, "PIECE", 2048)

    for module in (spans, splitting, work):
        monkeypatch.setattr(module, "PIECE", 2048)


# -- the ids ---------------------------------------------------------------------------------------


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([document(n) for n in range(200)], trainer)
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[SEP]", "[MASK]"], show_progress=False
    )
    backend.train_from_iterator([document(n) for n in range(200)], trainer)
    return backend


def unigram(prepend: Literal["always", "never"] = "never") -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([document(n) for n in range(200)], trainer)
    return backend


@pytest.mark.parametrize("kind", [byte_level, word_piece, unigram])
def test_the_ids_are_those_of_tokenizers_alone(
    kind: Callable[[], Backend], corpus: Path, tmp_path: Path, small_parts: None
) -> None:
    backend = kind()
    backend.save(str(tmp_path / "tokenizer.json"))
    job = Job(str(corpus), tokenizer=str(tmp_path / "tokenizer.json"), held_out=0.3, seed=7)
    outcome = make(job, tmp_path / "tokens", processes=2)
    assert outcome.found is not None
    assert outcome.parts > 10
    assert list(outcome.found.notes) == []
    wanted: dict[bool, list[int]] = {False: [], True: []}
    for text in documents(corpus):
        held_out = number_of(text.encode()[: cutting.PIECE], 7) < 0.3 * OF_ALL
        ids = backend.encode(text, add_special_tokens=False).ids
        wanted[held_out] += [*ids, outcome.found.separator]
    assert ids_of(tmp_path / "tokens", "train") == wanted[False]
    assert ids_of(tmp_path / "tokens", "held_out") == wanted[True]
    splits = outcome.found.splits
    size = sum(len(text.encode()) for text in documents(corpus))
    assert splits["train"].text_bytes + splits["held_out"].text_bytes == size
    assert sum(split.documents for split in splits.values()) == len(documents(corpus))


def test_all_of_a_long_text_is_in_one_split(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_LEAST", cutting.PIECE)  # a first stretch is shorter than a piece
    (tmp_path / "texts").mkdir()
    for number in range(12):
        line = f"<{number:02}> " + "word " * 20 + "\n"
        (tmp_path / "texts" / f"{number:02}.txt").write_text(line * 80)
    outcome = make(Job(str(tmp_path / "texts"), held_out=0.5), tmp_path / "tokens")
    assert outcome.found is not None
    seen = []
    for split, told in outcome.found.splits.items():
        ids = ids_of(tmp_path / "tokens", split)
        text = bytes(n for n in ids if n < 256).decode()
        seen.append({number for number in range(12) if f"<{number:02}>" in text})
        assert ids.count(outcome.found.separator) == told.documents == len(seen[-1])
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_a_part_of_another_task_is_made_again_where_its_files_have_changed(
    tmp_path: Path, small_parts: None
) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number}" * 4000)
    job, folder = Job(str(tmp_path / "texts"), held_out=0), tmp_path / "tokens"
    assert make(job, folder, share=Share(0, 2)).missing == 2
    seen = (tmp_path / "texts" / "0.txt").stat()
    (tmp_path / "texts" / "0.txt").write_text("x" * 4000)
    os.utime(tmp_path / "texts" / "0.txt", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert make(job, folder, share=Share(1, 2)).missing == 1
    assert make(job, folder, share=Share(0, 2)).found is not None
    assert ids_of(folder, "train")[:4000] == [ord("x")] * 4000


def test_cuts_that_a_tokenizer_sees_are_counted(
    corpus: Path, tmp_path: Path, small_parts: None
) -> None:
    unigram("always").save(str(tmp_path / "tokenizer.json"))  # a blank before every piece
    job = Job(str(corpus / "b-long.txt"), tokenizer=str(tmp_path / "tokenizer.json"))
    found = make(job, tmp_path / "tokens").found
    assert found is not None
    (note,) = found.notes
    assert "cut(s) of documents above 1 MiB" in note
    assert int(note.split()[0]) >= len((corpus / "b-long.txt").read_bytes()) // 2048 - 1


@pytest.mark.parametrize("least", [997, 4096, 1 << 20])
def test_bytes_are_the_text_wherever_parts_begin(
    least: int, corpus: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_LEAST", least)
    text = "\ufeff" + "".join(documents(corpus))
    (tmp_path / "one.txt").write_text(text)
    lines = [json.dumps({"text": line}) for line in documents(corpus)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))  # the last line has no end
    for name, wanted in (
        ("one.txt", [text[1:]]),
        ("rows.jsonl", documents(corpus)),
    ):
        job = Job(str(tmp_path / name), held_out=0)
        assert make(job, tmp_path / f"{name}.tokens").found is not None
        ids = ids_of(tmp_path / f"{name}.tokens", "train")
        assert ids == [i for one in wanted for i in [*one.encode(), byte_tokenizer().separator]]


def test_a_line_that_begins_where_a_part_does_is_read_once(
    tmp_path: Path, small_parts: None
) -> None:
    rows = [f"{number:051}" for number in range(300)]
    lines = [json.dumps({"text": row}) + "\n" for row in rows]
    assert {len(line) for line in lines} == {64}  # 64 of them are a part
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    outcome = make(Job(str(tmp_path / "rows.jsonl"), held_out=0), tmp_path / "tokens")
    assert outcome.parts == 5
    ids = ids_of(tmp_path / "tokens", "train")
    assert ids == [i for row in rows for i in [*row.encode(), byte_tokenizer().separator]]


# -- who works -------------------------------------------------------------------------------------


def test_processes_and_shares_leave_no_trace(
    corpus: Path, tmp_path: Path, small_parts: None
) -> None:
    job = Job(str(corpus), tokenizer="bpe", vocabulary=400, held_out=0.2)
    make(job, tmp_path / "one")
    make(job, tmp_path / "two", processes=3)
    for index in (2, 0, 1):
        outcome = make(job, tmp_path / "shares", share=Share(index, 3), processes=2)
        assert (outcome.found is None) == (index != 1)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "shares")
    assert not (tmp_path / "one" / work.PROGRESS).exists()


def test_a_share_that_is_done_says_what_is_left_to_others(
    corpus: Path, tmp_path: Path, small_parts: None
) -> None:
    outcome = make(Job(str(corpus)), tmp_path / "tokens", share=Share(0, 2))
    assert str(outcome) == f"{outcome.missing} of {outcome.parts} part(s) are left to other tasks"
    assert outcome.missing == outcome.parts // 2
    with pytest.raises(DataError, match="is no whole folder of tokens"):
        read_token_folder(tmp_path / "tokens")


def _make_slowly(job: Job, folder: Path, seconds: float) -> None:
    os.setsid()
    encode = work.Tokenizer.encode_all

    def slow(self: Any, texts: Any) -> Any:
        time.sleep(seconds)
        return encode(self, texts)

    work.Tokenizer.encode_all = slow  # type: ignore[method-assign]  # of this process alone
    make(job, folder, processes=2)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    corpus: Path, tmp_path: Path, small_parts: None
) -> None:
    job = Job(str(corpus), held_out=0.2)
    make(job, tmp_path / "whole")
    draw, unfinished = random.Random(1), 0
    for _ in range(5):
        kill_after(draw.uniform(0.1, 0.5), job, tmp_path / "killed", 0.02)
        unfinished += not (tmp_path / "killed" / MANIFEST).exists()
    assert unfinished
    make(job, tmp_path / "killed", processes=2)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_a_killed_command_leaves_no_process_behind(
    corpus: Path, tmp_path: Path, small_parts: None
) -> None:
    """Some thirty parts take two seconds each; a process ends the one that it is at."""
    kill_after(1.0, Job(str(corpus)), tmp_path / "tokens", 2.0)
    assert not (tmp_path / "tokens" / MANIFEST).exists()


def kill_after(seconds: float, job: Job, folder: Path, each: float) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=_make_slowly, args=(job, folder, each)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads (3.12)
        child.start()
    time.sleep(seconds)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    await_end_of_group(child.pid)


def await_end_of_group(pid: int) -> None:
    """The processes of a killed command end by themselves."""
    for _ in range(200):
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a process of a killed command is still there")


def test_what_is_made_is_not_made_again(
    corpus: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(str(corpus), held_out=0.2)
    total = make(job, tmp_path / "tokens", share=Share(0, 2)).num_bytes
    assert make(job, tmp_path / "tokens", share=Share(0, 2)).num_bytes == 0
    assert (
        make(job, tmp_path / "tokens").num_bytes == make_plan(job, lambda *_: None).weight - total
    )
    monkeypatch.setattr(pool, "make_part", None)
    assert make(job, tmp_path / "tokens").num_bytes == 0


def test_text_of_the_same_size_and_time_is_made_again(
    corpus: Path, tmp_path: Path, small_parts: None
) -> None:
    job = Job(str(corpus))
    make(job, tmp_path / "tokens", share=Share(0, 2))
    for file in (corpus / "a0.txt", corpus / "c.jsonl"):
        before, text = file.stat(), file.read_text()
        file.write_text(text.replace("a", "b"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    make(job, tmp_path / "tokens")
    make(job, tmp_path / "anew")
    shards = [{k: v for k, v in files_of(tmp_path / n).items() if k.endswith(".bin")} for n in NEW]
    assert shards[0] == shards[1]
    (corpus / "a0.txt").write_text(document(0))
    with pytest.raises(DataError, match="files of its source have been written to since"):
        make(job, tmp_path / "anew")


NEW = ("tokens", "anew")


# -- errors ----------------------------------------------------------------------------------------


def test_a_file_that_is_no_text_is_named_by_the_process_that_reads_it(
    corpus: Path, tmp_path: Path
) -> None:
    (corpus / "a3.txt").write_bytes(b"word " * 30_000 + b"\xff")
    with pytest.raises(DataError, match=r"a3\.txt is not UTF-8 text") as caught:
        make(Job(str(corpus)), tmp_path / "tokens", processes=2)
    assert "byte 0xff at offset 150,000" in str(caught.value)


def test_a_process_that_is_killed_ends_the_command_with_words(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "make_part", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="A process that tokenised has ended") as caught:
        make(Job(str(corpus)), tmp_path / "tokens", processes=2)
    assert "SIGKILL" in str(caught.value)


def test_a_folder_of_something_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    make(Job(str(corpus)), out)
    with pytest.raises(DataError, match="holds tokens of something else") as caught:
        make(Job(str(corpus), seed=1), out)
    assert "seed is 0 there and 1 here" in str(caught.value)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="is made by another tokenizer"):
        make(Job(str(corpus), tokenizer=str(tmp_path / "tokenizer.json")), out)
    (corpus / "more.txt").write_text("more")
    with pytest.raises(DataError, match="holds tokens of something else"):
        make(Job(str(corpus)), out)
    with pytest.raises(DataError, match="is no new folder"):
        make(Job(str(corpus)), corpus.parent)
    with pytest.raises(DataError, match="tokenize <source> <a folder outside of it>"):
        make(Job(str(corpus)), corpus / "tokens")


@pytest.mark.parametrize(
    ("source", "words"),
    [("hub:owner/name", "hf download owner/name"), ("nowhere", "There is no text in data.source")],
)
def test_a_source_that_cannot_be_cut_is_refused(source: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        make(Job(source), tmp_path / "tokens")
    assert words in str(caught.value)
    assert not (tmp_path / "tokens").exists()


def test_special_tokens_in_plain_text_are_counted_over_all_parts(
    tmp_path: Path, small_parts: None
) -> None:
    (tmp_path / "chat").mkdir()
    for number in range(40):
        (tmp_path / "chat" / f"{number}.txt").write_text("hello <|endoftext|> you " * 20)
    for specials, words in (("text", "read as letters; --specials ids"), ("ids", "those tokens")):
        job = Job(str(tmp_path / "chat"), specials=specials)  # type: ignore[arg-type]
        found = make(job, tmp_path / specials).found
        assert found is not None
        assert "800 time(s), first <|endoftext|> in " in found.notes[0]
        assert words in found.notes[0]
        ids = ids_of(tmp_path / specials, "train") + ids_of(tmp_path / specials, "held_out")
        assert ids.count(found.separator) == 40 + 800 * (specials == "ids")


def test_shares_are_read_from_options_launchers_and_arrays() -> None:
    assert find_share("", {}) == Share(0, 1)
    assert find_share("2/8", {}) == Share(2, 8)
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert find_share("", torchrun) == Share(3, 4, here=2)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4"}
    array |= {"SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "8"}
    assert find_share("", array) == Share(2, 4)
    assert find_share("", {"JOB_COMPLETION_INDEX": "0"}) == Share(0, 1)
    assert find_share("1/2", {"JOB_COMPLETION_INDEX": "1"}) == Share(1, 2)
    with pytest.raises(ConfigError, match=r'--share "\$JOB_COMPLETION_INDEX/<pods>"'):
        find_share("", {"JOB_COMPLETION_INDEX": "1"})
    assert find_share("0/2", array | torchrun) == Share(0, 2)
    for words in ("4/4", "-1/2", "1", "a/b", "0/0", "1/99999999"):
        with pytest.raises(ConfigError, match="is no share"):
            find_share(words, {})
    with pytest.raises(ConfigError, match="not numbered one by one"):
        find_share("", array | {"SLURM_ARRAY_TASK_MAX": "20"})


# -- the manifest ----------------------------------------------------------------------------------


DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another format": (lambda told: told.update(format="x"), 'no "format"'),
    "a later version": (lambda told: told.update(version=2), "its version is 2"),
    "another dtype": (lambda told: told.update(dtype="float32"), "dtype is 'float32'"),
    "a vocabulary too large": (lambda told: told.update(vocabulary=2**17), "vocabulary is 131072"),
    "a truth value": (lambda told: told.update(vocabulary=True), "vocabulary is True"),
    "a separator outside": (lambda told: told.update(separator=259), "separator is 259"),
    "no splits": (lambda told: told.pop("splits"), "KeyError"),
    "splits of another kind": (lambda told: told.update(splits=[]), "TypeError"),
    "a way out": (lambda told: train(told).update(file="../x"), "no plain name"),
    "an absolute name": (lambda told: train(told).update(file="/etc/passwd"), "no plain name"),
    "too many tokens": (lambda told: train(told).update(tokens=10**30), "tokens is 1"),
    "another size": (lambda told: train(told).update(tokens=1), "bytes, not 2."),
    "a missing file": (lambda told: train(told).update(file="x.bin"), "x.bin: No such file"),
    "no checksum": (lambda told: train(told).update(sha256="abc"), "is no SHA-256"),
}


def train(told: Any) -> Any:
    return told["splits"]["train"]["shards"][0]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_manifest_that_is_not_right_is_refused_in_words(damage: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words")
    make(Job(str(tmp_path / "a.txt")), tmp_path / "tokens")
    file = tmp_path / "tokens" / MANIFEST
    told = json.loads(file.read_text())
    change, words = DAMAGE[damage]
    change(told)
    file.write_text(json.dumps(told))
    with pytest.raises(DataError, match="is no whole folder of tokens") as caught:
        read_token_folder(tmp_path / "tokens")
    assert words in str(caught.value)


def test_the_manifest_is_read_as_it_was_written(corpus: Path, tmp_path: Path) -> None:
    found = make(Job(str(corpus), held_out=0.2), tmp_path / "tokens").found
    assert isinstance(found, TokenFolder)
    assert read_token_folder(tmp_path / "tokens") == found


# -- the command -----------------------------------------------------------------------------------


def test_the_command_makes_says_and_checks(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "tokens")
    words = ["tokenize", str(corpus), out, "--held-out", "0.2", "--processes", "2"]
    assert main(words) == 0
    printed, said = capfd.readouterr()
    assert printed.startswith(f"{out}: ")
    assert "held out; 259 ids, " in printed
    assert " MB/s" in said
    assert main(["tokenize", out, "--check"]) == 0
    assert "are what was written" in capfd.readouterr().out
    shard = tmp_path / "tokens" / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    assert main(["tokenize", out, "--check"]) == 1
    assert "1 damaged file(s), such as train-00000.bin" in capfd.readouterr().out
    assert main(["tokenize", str(corpus)]) == 1
    assert "needs a folder to make" in capfd.readouterr().err
    assert main(["tokenize", out, "--check", "--seed", "3"]) == 1
    assert "--seed would have no effect beside --check" in capfd.readouterr().err
