"""The example of fine-tuning: a model learns 20 conversations by heart and ends its answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chatting import ask, saved, tokenizer, written
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mics.__main__ import main

EXAMPLE = Path(__file__).parents[1] / "examples" / "sft.py"
WORDS = """
    apple river stone cloud tiger piano lemon storm candle forest
    mirror pepper rocket salmon turtle violet walnut yellow zipper harbor
""".split()  # noqa: SIM905
ROWS = [ask(f"Which word goes with {n}?", f"It is {word}.") for n, word in enumerate(WORDS)]


def _model(folder: Path) -> Path:
    saved(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=400,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(str(folder))
    return folder


def test_the_example_is_about_sixty_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 62


@pytest.mark.extra
def test_a_model_learns_twenty_conversations_and_ends_its_answer(tmp_path: Path) -> None:
    chats = written(tmp_path / "chats.jsonl", ROWS)
    model_folder, out = _model(tmp_path / "base"), tmp_path / "out"
    words = [str(EXAMPLE), str(model_folder), str(chats), str(out), "100"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert losses[0] > 5 and losses[-1] < 0.1
    assert main(["export", str(out), str(tmp_path / "exported")]) == 0
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "exported"))
    fast = AutoTokenizer.from_pretrained(str(model_folder))
    right = 0
    for row in ROWS:
        question, answer = row["messages"]
        ids = fast.apply_chat_template(
            [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        written_ids = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        # It stops of itself, with the token that ends a turn.
        right += fast.decode(written_ids) == answer["content"] + "<|im_end|>"
    assert right == len(ROWS)
