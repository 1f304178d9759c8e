"""Presets have the parameters that their authors published; sizes have a shape by a rule."""

from __future__ import annotations

import math

import pytest

from mics.errors import ConfigError
from mics.models.building import build, load_config, num_parameters
from mics.models.families import FAMILIES
from mics.models.presets import PRESETS, find_preset, rule_of

# The totals of the safetensors that the authors published, tied weights counted once.
PUBLISHED = {
    "llama-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_248_023_552,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}


def counted(name: str) -> int:
    return num_parameters(build(load_config(name, vocabulary=8, separator=0)))


def test_every_family_has_its_published_total_in_the_list() -> None:
    assert set(PUBLISHED) == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_were_published(name: str) -> None:
    assert counted(name) == PUBLISHED[name]


def test_thirteen_billion_is_llama_13b_to_the_parameter() -> None:
    shape = load_config("13b", vocabulary=8, separator=0)
    assert (shape.num_hidden_layers, shape.hidden_size) == (40, 5120)
    assert (shape.intermediate_size, shape.num_attention_heads) == (13824, 40)
    assert counted("13b") == counted("LLaMA-13B") == 13_015_864_320
    assert "13b is 40 layers of width 5120: width near 128 x layers" in rule_of("13b")[0]
    assert rule_of("llama-8b") == rule_of("runs/config.json") == []


@pytest.mark.parametrize("size", ["20m", "125m", "350m", "1b", "1.5b", "7b", "70b", "1t", "10t"])
def test_a_size_is_met_within_half_a_layer_by_a_shape_near_the_rule(size: str) -> None:
    preset = find_preset(size)
    assert preset is not None
    wanted = float(size[:-1]) * {"m": 1e6, "b": 1e9, "t": 1e12}[size[-1]]
    width, layers = preset.settings["hidden_size"], preset.settings["num_hidden_layers"]
    assert abs(counted(size) - wanted) <= 0.51 * (counted(size) - 64001 * width) / layers
    assert width % 128 == 0
    assert abs(math.log(width / (128 * layers))) < (1 if size == "20m" else 0.2)


@pytest.mark.parametrize("name", ["19m", "11t", "0b"])
def test_a_size_without_a_shape_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="20m to 10t have one"):
        find_preset(name)


@pytest.mark.parametrize("name", ["13", "b13", "13 b", "13b.json", "owner/13b", "12345b"])
def test_what_is_no_size_is_none(name: str) -> None:
    assert find_preset(name) is None


def test_no_preset_is_called_as_a_size_of_another_count() -> None:
    for name, preset in PRESETS.items():
        assert find_preset(name) is preset
