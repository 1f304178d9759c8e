"""Models by name: sizes, tasks, positions, work per token; sharded from the meta device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import AutoConfig

import mics
from mics.errors import ConfigError
from mics.models.building import (
    build,
    check_fits,
    check_mask,
    load_config,
    num_parameters,
    num_positions,
    task_of,
)
from mics.models.presets import PRESETS
from mics.training.data.tokens import Tokenizer, byte_tokenizer, train_bpe

TINY = ["bert-tiny", "roberta-tiny", "gpt2-tiny", "llama-tiny", "qwen3-moe-tiny"]


def preset(name: str) -> Any:
    return load_config(name, vocabulary=300, separator=7)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("bert-10b", 10.08),
        ("bert-15b", 15.04),
        ("roberta-10b", 10.04),
        ("gpt2-10b", 10.01),
        ("llama-8b", 8.03),
        ("gpt2-xl", 1.56),
        ("mixtral-8x7b", 46.70),
        ("qwen3-30b-a3b", 30.53),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert round(num_parameters(build(preset(name))) / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("name", "task", "positions"),
    [
        ("bert-10b", "masked", 512),
        ("roberta-10b", "masked", 512),
        ("gpt2-10b", "causal", 514),
        ("llama-8b", "causal", 8192),
    ],
)
def test_task_and_positions_of_each_family(name: str, task: str, positions: int) -> None:
    assert task_of(preset(name)) == task
    assert num_positions(preset(name)) == positions


def test_what_a_saved_model_is_decides_over_its_family(tmp_path: Path) -> None:
    config = preset("bert-tiny")
    config.architectures = ["BertLMHeadModel"]
    config.save_pretrained(tmp_path)
    assert task_of(load_config(str(tmp_path), vocabulary=1, separator=0)) == "causal"
    assert task_of(load_config(str(tmp_path / "config.json"), vocabulary=1, separator=0)) == (
        "causal"
    )


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_take_the_tokenizers_vocabulary_rounded_up(name: str) -> None:
    config = preset(name)
    assert config.vocab_size == 304
    assert config.eos_token_id == config.bos_token_id == 7
    assert num_positions(config) == 128


def test_other_presets_keep_their_own() -> None:
    assert preset("bert-10b").vocab_size == 32008


def test_a_model_is_built_in_fp32_without_memory_and_tells_its_class() -> None:
    config = preset("gpt2-tiny")
    model = build(config)
    assert all(p.is_meta and p.dtype is torch.float32 for p in model.parameters())
    assert config.architectures == ["GPT2LMHeadModel"]
    assert config.use_cache
    assert not model.config.use_cache  # type: ignore[union-attr]


def _forward(name: str) -> tuple[float, int]:
    model: Any = build(preset(name))
    torch.manual_seed(dist.get_rank())
    quiet(lambda: mics.shard(model, partition=2, mp_policy=MixedPrecisionPolicy()))
    seeded = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 300, (2, 2, 128), generator=seeded)
    logits = model(input_ids=ids).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.item(), sum(isinstance(module, FSDPModule) for module in model.modules())


# transformers' models return views, of which FSDP2 warns; nothing here edits an output in place.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("name", TINY)
def test_tiny_models_shard_from_meta_and_know_nothing_yet(name: str) -> None:
    for loss, units in run_ranks(_forward, 2, name):
        assert units == 5  # four blocks and the root
        assert abs(loss - torch.log(torch.tensor(304.0))) < 0.5


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2-tinny", ["There is no model 'gpt2-tinny'; did you mean 'gpt2-tiny'?", "Presets: "]),
        ("zzz", ["There is no model 'zzz'."]),
        ("missing/config.json", ["There is no missing/config.json"]),
    ],
)
def test_an_unknown_model_is_named_with_the_nearest(name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        preset(name)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no .*config\.json"):
        preset(str(tmp_path))


def test_a_configuration_that_transformers_cannot_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(ConfigError, match="transformers cannot read the configuration"):
        preset(str(tmp_path))


def test_what_is_no_language_model_is_named() -> None:
    with pytest.raises(ConfigError, match="'vit' are not language models"):
        task_of(AutoConfig.for_model("vit"))


def test_sequences_and_ids_that_do_not_fit_are_named_with_the_numbers() -> None:
    config = preset("gpt2-tiny")
    check_fits(config, sequence=128, vocabulary=304)
    with pytest.raises(ConfigError, match="longer than the model has positions") as caught:
        check_fits(config, sequence=129, vocabulary=304)
    assert "data.sequence = 129, the model has 128" in str(caught.value)
    with pytest.raises(ConfigError, match="ids that the model has no embedding for") as caught:
        check_fits(config, sequence=128, vocabulary=305)
    assert "305 ids, the model's vocabulary is 304" in str(caught.value)


@pytest.mark.parametrize("name", ["bert-tiny", "roberta-tiny"])
@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe([b"ab" * 99], 300)])
def test_masks_and_separators_are_no_padding(name: str, make: Callable[[], Tokenizer]) -> None:
    """Padding has an embedding of zeros that never learns, and RoBERTa gives it no position."""
    tokenizer = make()
    config = load_config(name, vocabulary=tokenizer.size, separator=tokenizer.separator)
    assert config.pad_token_id not in (tokenizer.mask, tokenizer.separator, None)
    check_mask(config, tokenizer.mask)


def test_a_mask_that_the_model_takes_for_padding_is_refused() -> None:
    config = preset("roberta-tiny")
    with pytest.raises(ConfigError, match="takes the tokenizer's mask for padding") as caught:
        check_mask(config, config.pad_token_id)
    assert "mask_token has id 1, pad_token_id = 1" in str(caught.value)


def test_every_preset_says_what_it_is() -> None:
    assert all(each.about for each in PRESETS.values())
