"""Conversations become tokens and targets: those of transformers' template, of TRL, of 20 lines."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chatting import CONVERSATIONS, FORGETS, MARKED, PLAIN, ask, saved, tokenizer, written
from ranks import errors_of_ranks, run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from mics.errors import DataError
from mics.training.config import DataConfig
from mics.training.data import IGNORED, Data, open_data
from mics.training.data.chat_template import ChatTemplate
from mics.training.data.chats import Chats
from mics.training.data.conversations import Conversation, read_conversations
from mics.training.data.packing import packed
from mics.training.data.tokens import Tokenizer

PROMPTS = [
    {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in CONVERSATIONS
]


def prepare(source: object, folder: Path, template: str | None = PLAIN, **more: Any) -> Data:
    own = saved(folder / "tokenizer", template)
    config = DataConfig(source=str(source), format="chat", tokenizer=str(own), **more)
    return open_data(config, seed=0, sequence=64, masked=False, folder=folder / "run")


def rows(data: Data) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of every conversation of the training split, in the order of their ids."""
    stream = data.train
    batch = stream.batch(0, stream.num_sequences)
    assert batch.positions is not None
    found = []
    pad = tokenizer().pad_token_id
    for ids, labels, places in zip(batch.inputs, batch.labels, batch.positions, strict=True):
        starts = [*(places == 0).nonzero().flatten().tolist(), len(ids)]
        for a, b in pairwise(starts):
            if not (ids[a:b] == pad).all():
                found.append((ids[a:b].tolist(), labels[a:b].tolist()))
    return sorted(found)


# -- targets ---------------------------------------------------------------------------------------


def by_hand(messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """ChatML written out: a token is a target where it is part of an answer or ends it."""
    fast = tokenizer()
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = f"<|im_start|>{message['role']}\n"
        body = f"{message['content']}<|im_end|>\n"
        if message["role"] != "assistant":
            head, body = head + body, ""
        for text, learnt in ((head, False), (body, True)):
            part = fast(text, add_special_tokens=False)["input_ids"]
            ids += part
            labels += part if learnt else [IGNORED] * len(part)
    return ids, [*labels[1:], IGNORED]


def test_targets_are_those_written_out_by_hand(tmp_path: Path) -> None:
    data = prepare(written(tmp_path / "a.jsonl", CONVERSATIONS), tmp_path, held_out=0.0)
    assert rows(data) == sorted(by_hand(row["messages"]) for row in CONVERSATIONS)


def of_trl(
    examples: list[dict[str, Any]], template: str, folder: Path
) -> list[tuple[list[int], list[int]]]:
    """What TRL's SFTTrainer makes of rows, through its collator, labels moved to their inputs."""
    trl = pytest.importorskip("trl", reason="pip install 'torch-mics[dev]'")
    fast = tokenizer(template)
    shape = LlamaConfig(
        vocab_size=len(fast), hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    args = trl.SFTConfig(
        str(folder), report_to=[], use_cpu=True, bf16=False, assistant_only_loss=template is MARKED
    )
    trainer = trl.SFTTrainer(
        LlamaForCausalLM(shape),
        args=args,
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=fast,
    )
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        labels = batch["labels"][0].tolist()
        found.append((batch["input_ids"][0].tolist(), [*labels[1:], IGNORED]))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("template", "examples"), [(MARKED, CONVERSATIONS), (PLAIN, PROMPTS)], ids=["marked", "plain"]
)
def test_targets_are_those_of_trls_trainer(
    template: str, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    data = prepare(written(tmp_path / "a.jsonl", examples), tmp_path, template, held_out=0.0)
    assert rows(data) == of_trl(examples, template, tmp_path)


def test_a_text_as_prompt_is_a_users_message(tmp_path: Path) -> None:
    row = CONVERSATIONS[0]["messages"]
    plain = {"prompt": row[0]["content"], "completion": row[1]["content"]}
    data = prepare(written(tmp_path / "a.jsonl", [plain]), tmp_path, held_out=0.0)
    assert rows(data) == [by_hand(row)]


def test_only_the_completion_is_learnt_not_answers_of_the_prompt() -> None:
    template = ChatTemplate(Tokenizer(tokenizer()))
    messages = CONVERSATIONS[1]["messages"]
    both, one = template.spoken(
        [
            Conversation("here", messages),
            Conversation("here", messages, prompt=3, whole_turns=True),
        ]
    )
    assert both.ids.tolist() == one.ids.tolist()
    assert one.learnt.sum() < both.learnt.sum()
    assert (both.learnt[-one.learnt.sum() :] == one.learnt[-one.learnt.sum() :]).all()


def test_tools_reach_the_template() -> None:
    own = "{{ tools | length if tools else 'no' }} tools\n" + PLAIN
    template = ChatTemplate(Tokenizer(tokenizer(own)))
    spoken = template.spoken(
        [
            Conversation("here", CONVERSATIONS[0]["messages"], tools=tools)
            for tools in (None, [{"type": "function"}])
        ]
    )
    fast = tokenizer()
    assert [fast.decode(one.ids[:4]).split()[0] for one in spoken] == ["no", "1"]


def test_a_template_that_forgets_is_refused_where_it_matters(tmp_path: Path) -> None:
    thought = ask("a", "<think>b</think>c", "d", "<think>e</think>f")
    fine = written(tmp_path / "fine.jsonl", [ask("a", "<think>b</think>c")])
    prepare(fine, tmp_path, FORGETS, held_out=0.0)
    source = written(tmp_path / "a.jsonl", [ask("a", "b"), thought])
    with pytest.raises(DataError, match="does not say what an answer is") as error:
        prepare(source, tmp_path, FORGETS, held_out=0.0)
    assert f"Line 2 of {source}" in str(error.value)
    assert "generation" in str(error.value)


def test_what_is_said_of_special_tokens_in_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path / "a.jsonl", [ask("a", "b"), ask("end with <|im_end|>", "b")])
    prepare(source, tmp_path, held_out=0.0)
    said = capsys.readouterr().err
    assert "messages spell special tokens" in said and f"<|im_end|> in Line 2 of {source}" in said


def test_a_long_conversation_is_cut_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, lost = ask("a", "b" * 500), ask("a" * 500, "b")
    data = prepare(written(tmp_path / "a.jsonl", [long, lost]), tmp_path, held_out=0.0)
    said = capsys.readouterr().err
    assert "2 conversation(s) are longer than data.sequence = 64" in said
    assert "1 conversation(s) have no answer to learn within 64 tokens" in said
    assert [len(ids) for ids, _ in rows(data)] == [64]


# -- rows ------------------------------------------------------------------------------------------


def test_tables_of_all_kinds_hold_the_same_conversations(tmp_path: Path) -> None:
    written(tmp_path / "lines.txt", CONVERSATIONS)
    (tmp_path / "list.json").write_text(json.dumps(CONVERSATIONS))
    pq.write_table(pa.Table.from_pylist(CONVERSATIONS), tmp_path / "rows.parquet")
    found = [
        [one.messages for one in read_conversations(str(tmp_path / name))]
        for name in ("lines.txt", "list.json", "rows.parquet")
    ]
    assert found == 3 * [[row["messages"] for row in CONVERSATIONS]]


def test_a_table_of_cells_holds_prompts_and_completions(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"What, then?",This.\nAnd?,That.\n')
    found = [one.messages for one in read_conversations(str(tmp_path / "a.csv"))]
    assert found == [ask("What, then?", "This.")["messages"], ask("And?", "That.")["messages"]]


def test_another_column_can_hold_the_messages(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [{"turns": CONVERSATIONS[0]["messages"]}])
    assert len(list(read_conversations(str(source), "turns"))) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "Its columns are text"),
        ({"messages": "a"}, "messages is of type str"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"content": "a"}]}, "message 1 of messages has no role"),
        ({"messages": ["a"]}, "message 1 of messages has no role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type list"),
        ({"messages": 2000 * [{"role": "user", "content": ""}]}, "2,000 turns"),
        ({"prompt": "a", "completion": 3}, "completion is of type int"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "x"}, "tools is of type str"),
        (ask("", "")["messages"], "no JSON object"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_by_its_place(
    row: Any, words: str, tmp_path: Path
) -> None:
    source = written(tmp_path / "a.jsonl", [CONVERSATIONS[0], row])
    with pytest.raises(DataError) as error:
        list(read_conversations(str(source)))
    assert words in str(error.value) or "no JSON object" in str(error.value)
    assert f"Line 2 of {source}" in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": "bytes"}, "chat template"),
        ({"specials": "ids"}, "data.specials is for text"),
        ({"limit": 5}, "data.limit is for text"),
        ({"source": "stdlib"}, "no conversations"),
        ({"source": "text"}, "is text, and no table"),
        ({"source": "answer"}, "begins with an answer"),
        ({"source": "question"}, "no conversation with an answer"),
        ({"template": None}, "has no chat template"),
        ({"template": "{{ raise_exception('never') }}"}, "does not take Line 1"),
        ({"format": "auto", "packing": False}, "data.packing is for conversations"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    own = saved(tmp_path / "tokenizer", options.pop("template", PLAIN))
    (tmp_path / "text").write_text("Some text.")
    written(tmp_path / "answer", [{"messages": [{"role": "assistant", "content": "a"}]}])
    written(tmp_path / "question", [{"messages": [{"role": "user", "content": "a"}]}])
    written(tmp_path / "fine", CONVERSATIONS)
    source = options.pop("source", "fine")
    given = {"format": "chat", "tokenizer": str(own), **options}
    source = source if source == "stdlib" else str(tmp_path / source)
    with pytest.raises(DataError) as error:
        open_data(
            DataConfig(source=source, **given),
            seed=0,
            sequence=64,
            masked=False,
            folder=tmp_path / "run",
        )
    assert words in str(error.value)


# -- rows of a batch -------------------------------------------------------------------------------


def test_rows_hold_every_conversation_once_and_little_else() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (500,), generator=generator).tolist()
    found = packed(lengths, 128)
    assert sorted(n for row in found for n in row) == list(range(500))
    filled = [sum(lengths[n] for n in row) for row in found]
    assert max(filled) <= 128
    assert len(found) <= -(-sum(lengths) // 128) + 2
    assert packed([], 4) == []


def test_without_packing_a_row_is_a_conversation(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", CONVERSATIONS)
    apart = prepare(source, tmp_path, held_out=0.0, packing=False).train
    together = prepare(source, tmp_path, held_out=0.0).train
    assert (apart.num_sequences, together.num_sequences) == (5, 2)
    batch = apart.batch(0, 5)
    assert batch.positions is None
    assert (
        batch.num_targets
        == together.batch(0, 2).num_targets
        == sum(
            len([n for n in labels if n != IGNORED])
            for _, labels in (by_hand(row["messages"]) for row in CONVERSATIONS)
        )
    )


def test_some_conversations_are_held_out(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [ask(f"What is {n}?", f"{n}") for n in range(40)])
    data = prepare(source, tmp_path, held_out=0.2)
    assert isinstance(data.train, Chats) and isinstance(data.held_out, Chats)
    assert data.train.num_conversations + data.held_out.num_conversations == 40
    assert 2 <= data.held_out.num_conversations <= 16
    again = prepare(source, tmp_path, held_out=0.2)
    assert again.fingerprint == data.fingerprint
    written(source, [ask("new", "rows")])
    assert prepare(source, tmp_path, held_out=0.2).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    "name", ["train/ids.bin", "train/learnt.bin", "held_out/starts.bin", "tokenizer/tokenizer.json"]
)
def test_tokens_that_were_damaged_are_made_anew(name: str, tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [ask(f"What is {n}?", f"{n}") for n in range(40)])
    own = saved(tmp_path / "tokenizer", PLAIN)
    config = DataConfig(source=str(source), format="chat", tokenizer=str(own), held_out=0.2)

    def opened() -> Data:
        return open_data(config, seed=0, sequence=64, masked=False, folder=tmp_path / "run")

    whole = opened()
    (file,) = (tmp_path / "run" / "data").glob(f"*/{name}")
    right, made, before = file.read_bytes(), file.stat().st_ino, rows(whole)
    assert opened().fingerprint == whole.fingerprint
    assert file.stat().st_ino == made
    at = len(right) - 2
    file.write_bytes(right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :])
    again = opened()
    assert file.read_bytes() == right
    assert again.fingerprint == whole.fingerprint and rows(again) == before


def _on_ranks(source: str, folder: str) -> tuple[str, int]:
    data = open_data(
        DataConfig(source=source, format="chat", tokenizer=f"{folder}/tokenizer"),
        seed=0,
        sequence=64,
        masked=False,
        folder=Path(folder) / "run",
    )
    return data.fingerprint, int(data.train.batch(3, 2).inputs.sum())


def test_ranks_see_the_same_rows_and_the_same_error(tmp_path: Path) -> None:
    saved(tmp_path / "tokenizer")
    source = written(tmp_path / "a.jsonl", CONVERSATIONS)
    first, second = run_ranks(_on_ranks, 2, str(source), str(tmp_path))
    assert first == second
    broken = written(tmp_path / "b.jsonl", [{"messages": 3}])
    for error in errors_of_ranks(_on_ranks, 2, str(broken), str(tmp_path)):
        assert "messages is of type int" in error
