"""What the engines train: small transformers models on real text, the same for all of them."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mics.benching.options import Workload

_MASKED = 0.15
_MASK_ID = 256
_IDS = 264


class Language:
    """A small language model on real text: the same weights and batches for every engine.

    Args:
        options: its size and its batches.
    """

    def __init__(self, options: Workload) -> None:
        self.options = options

    def model(self) -> Any:
        """The model with the same weights every time, without dropout."""
        from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        if self.options.kind == "gpt":
            return GPT2LMHeadModel(
                GPT2Config(
                    n_embd=self.options.hidden,
                    n_layer=self.options.layers,
                    n_head=4,
                    n_positions=self.options.length,
                    vocab_size=_IDS,
                    bos_token_id=0,
                    eos_token_id=0,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    use_cache=False,
                )
            )
        return BertForMaskedLM(
            BertConfig(
                hidden_size=self.options.hidden,
                intermediate_size=4 * self.options.hidden,
                num_hidden_layers=self.options.layers,
                num_attention_heads=4,
                max_position_embeddings=self.options.length,
                vocab_size=_IDS,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks of its model."""
        stack: Any = model
        found = stack.transformer.h if self.options.kind == "gpt" else stack.bert.encoder.layer
        return list(found)

    def batches(self, rank: int, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and labels of every micro-step of one rank: windows of real source text."""
        choose = random.Random(f"{rank} {step}")
        return [self._batch(choose) for _ in range(self.options.micro_steps)]

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Mean over a micro-batch's labels; every micro-batch has as many."""
        logits = model(input_ids=batch[0]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    def _batch(self, choose: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        text = _text()
        starts = [
            choose.randrange(len(text) - self.options.length - 1) for _ in range(self.options.rows)
        ]
        rows = torch.stack(
            [text[start : start + self.options.length + 1] for start in starts]
        ).long()
        if self.options.kind == "gpt":
            return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        inputs = rows[:, :-1].clone()
        labels = torch.full_like(inputs, -100)
        for row in range(self.options.rows):
            places = choose.sample(range(self.options.length), round(_MASKED * self.options.length))
            labels[row, places] = inputs[row, places]
            inputs[row, places] = _MASK_ID
        return inputs, labels


_cached: list[torch.Tensor] = []


def _text() -> torch.Tensor:
    """The standard library's source, one byte per element."""
    if not _cached:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        data = b"".join(file.read_bytes() for file in files)
        _cached.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return _cached[0]
