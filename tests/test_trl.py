"""TRL's SFTTrainer with mics: beside DDP, counted, resumed, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import weights
from peft import LoraConfig
from ranks import run_ranks
from small_models import LENGTH, UNITS, gpt, table_of_tokens, tokenizer
from test_trainer import Hops, arguments, history, quietly

from mics.integrations.transformers import with_mics

trl = pytest.importorskip("trl", reason="pip install 'torch-mics[dev]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

WORLD, PARTITION, SIZE = 4, 2, 44


def _trainer(kind: Any, folder: str, adapters: bool, **others: Any) -> Any:
    given = arguments(folder, bf16=False, activation_checkpointing=False, **others).to_dict()
    known = set(trl.SFTConfig.__dataclass_fields__)
    args = trl.SFTConfig(**{k: v for k, v in given.items() if k in known}, max_length=LENGTH)
    lora = LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)
    torch.manual_seed(1)
    return kind(
        model=gpt(),
        args=args,
        train_dataset=table_of_tokens(SIZE),
        processing_class=tokenizer(),
        peft_config=lora if adapters else None,
    )


def _train(folder: str, adapters: bool) -> tuple[Any, ...]:
    right = _trainer(trl.SFTTrainer, folder, adapters)
    right.train()
    hops, sharded = Hops(), with_mics(trl.SFTTrainer, partition=PARTITION)
    found = _trainer(sharded, folder, adapters, save_strategy="steps", save_steps=2)
    found.add_callback(hops)
    found.train()
    resumed = _trainer(sharded, folder, adapters)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    mine, its = weights(found.model), weights(resumed.model)
    other = [name for name in mine if not torch.equal(mine[name], its[name])]
    return (
        history(right, "loss"),
        history(found, "loss"),
        history(resumed, "loss"),
        hops.counted,
        other,
    )


@pytest.mark.extra
@pytest.mark.parametrize("adapters", [False, pytest.param(True, marks=pytest.mark.extra)])
def test_sft_trainer_gives_ddps_losses_counts_and_resumes(adapters: bool, tmp_path: Path) -> None:
    units = UNITS["lora" if adapters else "gpt"]
    for right, found, resumed, hops, other in run_ranks(
        quietly, WORLD, _train, str(tmp_path), adapters
    ):
        assert len(right) == 4
        assert max(abs(a - b) for a, b in zip(right, found, strict=True)) < 1e-5
        assert hops == 2 * [0, 0, 0, units, 0, units]
        assert resumed == found
        assert other == []
