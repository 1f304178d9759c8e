"""Make a small chat model of random weights, and conversations, to try fine-tuning with.

    python examples/small_chat.py FOLDER

Writes FOLDER/model (transformers), FOLDER/chats.jsonl and FOLDER/other.jsonl.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = ["apple", "river", "stone", "cloud", "tiger", "piano", "lemon", "storm", "candle"]


def conversation(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    roles = ("user", question), ("assistant", answer)
    return {"messages": [{"role": role, "content": text} for role, text in roles]}


def tokenizer(rows: list[dict[str, list[dict[str, str]]]]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [message["content"] for row in rows for message in row["messages"]]
    backend.train_from_iterator([*texts, "user\n", "assistant\n"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIALS[:2]})
    fast.chat_template = TEMPLATE
    return fast


def main(folder: Path) -> None:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    chats = [
        conversation(f"Which word goes with {n}?", f"It is {WORDS[n % len(WORDS)]}.")
        for n in range(189)
    ]
    other = [conversation(f"Say {word}!", f"{word}, {word}.") for word in WORDS]
    for name, rows in (("chats", chats), ("other", other)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fast = tokenizer(chats + other)
    fast.save_pretrained(str(folder / "model"))
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=400,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(str(folder / "model"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
