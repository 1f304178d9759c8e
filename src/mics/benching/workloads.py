"""What the engines train: small transformers models on real text, the same for all of them."""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from mics.anatomy.recipe import MOST_MICRO_BATCH, MOST_MICRO_STEPS
from mics.quantities import Within

_MASKED = 0.15
_MASK_ID = 256
_IDS = 264


@dataclass(frozen=True)
class Workload:
    """A model, its text and its batches; ids are bytes.

    Args:
        kind: "gpt" or "bert".
        hidden: width.
        layers: blocks.
        rows: sequences per rank and micro-step.
        length: bytes per sequence.
        micro_steps: per step.
    """

    kind: Literal["gpt", "bert"] = "gpt"
    hidden: Annotated[int, Within(1, 1 << 16)] = 256
    layers: Annotated[int, Within(1, 1 << 10)] = 6
    rows: Annotated[int, Within(1, MOST_MICRO_BATCH)] = 2
    length: Annotated[int, Within(1, 1 << 16)] = 64
    micro_steps: Annotated[int, Within(1, MOST_MICRO_STEPS)] = 4

    def model(self) -> Any:
        """The model with the same weights every time, without dropout."""
        from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        if self.kind == "gpt":
            return GPT2LMHeadModel(
                GPT2Config(
                    n_embd=self.hidden,
                    n_layer=self.layers,
                    n_head=4,
                    n_positions=self.length,
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
                hidden_size=self.hidden,
                intermediate_size=4 * self.hidden,
                num_hidden_layers=self.layers,
                num_attention_heads=4,
                max_position_embeddings=self.length,
                vocab_size=_IDS,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks of its model."""
        stack: Any = model
        found = stack.transformer.h if self.kind == "gpt" else stack.bert.encoder.layer
        return list(found)

    def batches(self, rank: int, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and labels of every micro-step of one rank: windows of real source text."""
        choose = random.Random(f"{rank} {step}")
        return [self._batch(choose) for _ in range(self.micro_steps)]

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Mean over a micro-batch's labels; every micro-batch has as many."""
        logits = model(input_ids=batch[0]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    def _batch(self, choose: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        text = _text()
        starts = [choose.randrange(len(text) - self.length - 1) for _ in range(self.rows)]
        rows = torch.stack([text[start : start + self.length + 1] for start in starts]).long()
        if self.kind == "gpt":
            return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        inputs = rows[:, :-1].clone()
        labels = torch.full_like(inputs, -100)
        for row in range(self.rows):
            places = choose.sample(range(self.length), round(_MASKED * self.length))
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
