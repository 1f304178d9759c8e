"""A chat model's tokenizer and conversations, made here, for the tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]

_OPENS = "{{ '<|im_start|>' + m['role'] + '\\n' }}"
_ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

PLAIN = (
    "{% for m in messages %}" + _OPENS + "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}" + _ASKS
)
"""ChatML: answers are not marked."""

MARKED = (
    "{% for m in messages %}" + _OPENS + "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + _ASKS
)
"""The same with answers marked."""

FORGETS = (
    "{% for m in messages %}" + _OPENS + "{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}" + _ASKS
)
"""Old answers lose what was thought."""


def ask(question: str, answer: str, *more: str) -> dict[str, Any]:
    """A row of messages: the user and the assistant in turn."""
    turns = [question, answer, *more]
    roles = ["user", "assistant"]
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]}


CONVERSATIONS = [
    ask("What is the capital of France?", "Paris, of course."),
    ask("Say hello", "Hello!", "And in German?", "Hallo! \u00dcbrigens: gr\u00fc\u00dfe."),
    {"messages": [{"role": "system", "content": "Be short."}, *ask("1 + 1?", "2")["messages"]]},
    ask("Write\n\nlines", " leading blank", "again", "two\n\nlines \n"),
    ask("Emoji \U0001f600 and a tab\t.", "\U0001f600\U0001f600 yes"),
]


def tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges over word boundaries of these conversations."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [m["content"] for row in CONVERSATIONS for m in row["messages"]]
    backend.train_from_iterator([*texts, "user\n", "assistant\n", "system\n"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIALS[:2]})
    fast.chat_template = template
    return fast


def saved(folder: Path, template: str | None = PLAIN) -> Path:
    tokenizer(template).save_pretrained(str(folder))
    return folder


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
