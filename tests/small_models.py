"""Small transformers models and their data, for the tests of other tools."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

VOCABULARY, LENGTH = 29, 12


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random tokens: the item of an index is always the same; labels are tokens or one class."""

    def __init__(self, size: int, *, classes: bool = False) -> None:
        self.size, self.classes = size, classes

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.size:
            raise IndexError(index)
        seed = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=seed)
        return {"input_ids": tokens, "labels": tokens.sum() % 2 if self.classes else tokens}


def gpt(dropout: float = 0.0) -> Any:
    """Its output layer is tied to its embedding."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=18,
            n_layer=2,
            n_head=3,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLM",
        )
    )


def bert(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            hidden_size=18,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=20,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def lora(dropout: float = 0.0) -> Any:
    """Adapters beside the frozen GPT, all of them with values: peft begins with zeros."""
    model = get_peft_model(
        gpt(dropout), LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.normal_(std=0.1)
    return model


MAKERS = {"gpt": gpt, "bert": bert, "lora": lora}
UNITS = {"gpt": 3, "bert": 4, "lora": 2}
"""Units that train: two blocks and the root, BERT's embeddings; nothing trains in LoRA's root."""


def tokens_of(kind: str, size: int) -> Tokens:
    return Tokens(size, classes=kind == "bert")


def table_of_tokens(size: int) -> Any:
    """The same as a table of the library datasets, for TRL."""
    tokens = Tokens(size)
    return datasets.Dataset.from_dict({"input_ids": [tokens[i]["input_ids"] for i in range(size)]})


def tokenizer() -> Any:
    """One of made-up words, which TRL wants to have."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    fast = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="w0", pad_token="w0")
