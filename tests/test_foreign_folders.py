"""Folders of others: what transformers loads comes along, what cannot be right is refused."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mics
from mics.__main__ import main
from mics.errors import CheckpointError, ConfigError, MicsError
from mics.models.building import build, load_config
from mics.models.interchange.comparing import differing_files
from mics.models.interchange.exporting import export
from mics.models.interchange.importing import import_folder
from mics.models.interchange.weights import load_weights
from mics.models.small_files import OF_MODELS, OF_TOKENIZERS, small_files
from mics.training.data.tokens import byte_tokenizer

INDEX = "model.safetensors.index.json"
SMALL = {
    "generation_config.json": b'{"temperature": 0.6, "do_sample": true}',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}\u00e9{% endfor %}".encode(),
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "added_tokens.json": b'{"<|x|>": 300}',
    "special_tokens_map.json": b'{"eos_token": "<|endoftext|>"}',
    "tokenizer.model": bytes(range(256)),
    "preprocessor_config.json": b'{"size": 224}',
    "processor_config.json": b'{"image_seq_length": 4}',
    "video_preprocessor_config.json": b'{"fps": 2}',
}


def silent(what: str, done: int, total: int) -> None:
    pass


def save_model(folder: Path, name: str = "llama-tiny", **settings: Any) -> Any:
    """What ``save_pretrained`` writes of a tiny model, its configuration changed afterwards."""
    model: Any = build(load_config(name, vocabulary=96, separator=0), device="cpu")
    model.save_pretrained(folder)
    write_config(folder, **settings)
    return model


def write_config(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(call: Callable[[], object], kind: type[MicsError]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def imported(folder: Path, out: Path) -> Any:
    return import_folder(folder, out, dtype=None, told=silent)


# -- small files -----------------------------------------------------------------------------------


def test_everything_that_transformers_loads_comes_through_and_code_stays_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours, back = (tmp_path / name for name in ("theirs", "ours", "back"))
    save_model(theirs, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    byte_tokenizer().save(theirs)
    (theirs / "additional_chat_templates").mkdir()
    for name, data in SMALL.items():
        (theirs / name).write_bytes(data)
    (theirs / "tokenizer.model").rename(tmp_path / "blob")
    (theirs / "tokenizer.model").symlink_to(tmp_path / "blob")  # as in the hub's cache
    (theirs / "modeling.py").write_text("raise SystemExit")
    (theirs / "README.md").write_text("of theirs")
    assert main(["import", str(theirs), str(ours)]) == 0
    assert "code is never brought along: modeling.py, auto_map of config.json" in (
        capsys.readouterr().out
    )
    assert main(["export", str(ours), str(back), "--check"]) == 0
    assert "small files of the folder and of the checkpoint: equal" in capsys.readouterr().out
    for name, data in SMALL.items():
        assert (back / name).read_bytes() == data, name
    assert not (back / "modeling.py").exists()
    assert not (back / "README.md").exists()
    assert "auto_map" not in json.loads((back / "config.json").read_text())
    assert transformers.GenerationConfig.from_pretrained(back).temperature == 0.6
    assert transformers.AutoTokenizer.from_pretrained(back).chat_template is not None


def test_what_most_models_have_and_this_one_lacks_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").unlink()
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    lacking = "generation_config.json, tokenizer.json, tokenizer_config.json"
    assert f"not there: {lacking}" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert f"the checkpoint does not have: {lacking}" in capsys.readouterr().out


def test_check_names_small_files_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "theirs")
    for name in ("generation_config.json", "chat_template.jinja", "added_tokens.json"):
        (tmp_path / "theirs" / name).write_bytes(SMALL[name])
    imported(tmp_path / "theirs", tmp_path / "ours")
    back = tmp_path / "back"
    done = export(tmp_path / "ours", back, dtype=None, shard_bytes=10**9, told=silent)
    (back / "added_tokens.json").write_text('{ "<|x|>":300 }')  # the same value
    assert differing_files(done) == []
    (back / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    (back / "chat_template.jinja").unlink()
    write_config(back, rms_norm_eps=0.5)
    wrong = ["config.json", "generation_config.json", "chat_template.jinja"]
    assert differing_files(done) == wrong

    from mics.models.interchange import comparing

    monkeypatch.setattr(comparing, "differing_files", lambda exported: wrong)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "c"), "--check"]) == 1
    assert f"{', '.join(wrong)} differ or are not there" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", INDEX])
@pytest.mark.parametrize("what", ["device", "pipe", "large"])
def test_a_small_file_that_never_ends_is_refused_at_once(
    what: str, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    save_model(folder)
    (folder / name).unlink(missing_ok=True)
    if what == "device":
        (folder / name).symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(folder / name)
    else:
        with (folder / name).open("wb") as file:
            file.truncate(200 << 20)
    if name == INDEX:
        (folder / "model.safetensors").unlink()
    begin = time.monotonic()
    said = refused(lambda: imported(folder, tmp_path / "ours"), ConfigError)
    assert time.monotonic() - begin < 5
    assert f"{name} cannot be read: it" in said
    assert ("more than 134,217,728 bytes" if what == "large" else "it is no regular file") in said


def test_only_names_that_transformers_knows_are_taken(tmp_path: Path) -> None:
    for name in ("x.model", "sub/vocab.json", "trainer_state.json", "evil.py", "vocab.json.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert list(small_files(tmp_path, (*OF_MODELS, *OF_TOKENIZERS))) == ["x.model"]


# -- configurations --------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_attention_heads": 0}, "has num_attention_heads = 0"),
    "three heads": ({"num_attention_heads": 3}, "num_key_value_heads = 2 for 3 heads"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    "words": ({"vocab_size": "many"}, "vocab_size = 'many'"),
    "architecture": ({"architectures": [5]}, "architectures = [5]"),
    "kernel": ({"attn_implementation": "evil/kernel"}, "which would load code from the hub"),
    "hidden kernel": ({"_attn_implementation_internal": "evil/k"}, "would load code from the hub"),
    "nested kernel": ({"x": {"attn_implementation": "a/b"}}, "would load code from the hub"),
    "experts": ({"experts_implementation": "evil/k"}, "would load code from the hub"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config"),
    "dtype": ({"torch_dtype": "float99"}, "torch_dtype = 'float99'"),
    "dtype of another kind": ({"dtype": 5}, "dtype = 5"),
    "positions": ({"max_position_embeddings": "no"}, "cannot read the configuration"),
    "activation": ({"hidden_act": "evil"}, "transformers cannot build a llama"),
    "padding": ({"pad_token_id": 9999}, "transformers cannot build a llama"),
}


@pytest.mark.parametrize("which", SETTINGS)
def test_a_setting_that_cannot_be_right_is_named(which: str, tmp_path: Path) -> None:
    settings, words = SETTINGS[which]
    config = load_config("llama-tiny", vocabulary=96, separator=0)
    config.save_pretrained(tmp_path)
    write_config(tmp_path, **settings)
    assert words in refused(
        lambda: build(load_config(str(tmp_path), vocabulary=1, separator=0)), ConfigError
    )


@pytest.mark.parametrize("layers", [10**9, -1, 0])
def test_a_size_is_limited_under_the_name_that_its_model_has_for_it(
    layers: int, tmp_path: Path
) -> None:
    load_config("gpt2-tiny", vocabulary=96, separator=0).save_pretrained(tmp_path)
    write_config(tmp_path, n_layer=layers)
    said = refused(lambda: load_config(str(tmp_path), vocabulary=1, separator=0), ConfigError)
    assert f"has n_layer = {layers}" in said


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, ""])
def test_a_configuration_that_is_no_table_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json is no table of JSON" in refused(
        lambda: load_config(str(tmp_path), vocabulary=1, separator=0), ConfigError
    )


def test_heads_that_do_not_divide_are_named_by_those_who_build_them(tmp_path: Path) -> None:
    load_config("bert-tiny", vocabulary=96, separator=0).save_pretrained(tmp_path)
    write_config(tmp_path, num_attention_heads=3)
    said = refused(
        lambda: build(load_config(str(tmp_path), vocabulary=1, separator=0)), ConfigError
    )
    assert "transformers cannot build a bert of this configuration" in said
    assert "128" in said


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "mistral3", "llama4", "musicgen", "git"])
def test_a_model_of_several_is_refused_alike_by_train_plan_and_import(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.AutoConfig.for_model(kind)
    config.save_pretrained(tmp_path)
    words = f"Models of type '{kind}' are made of several; mics takes language models alone"
    assert words in refused(lambda: build(config), ConfigError)
    for command in (
        ["train", "--model.name", str(tmp_path), "--dry-run"],
        ["plan", "--model", str(tmp_path)],
    ):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert words in said
        assert "get_text_config()" in said
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert words in refused(lambda: imported(tmp_path, tmp_path / "out"), ConfigError)


# -- weights ---------------------------------------------------------------------------------------


def two_files(folder: Path) -> dict[str, Any]:
    """Put the weights of a folder into two files; returns their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file)
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_an_index_that_is_wrong_is_named(tmp_path: Path) -> None:
    folder, out = tmp_path / "theirs", tmp_path / "ours"
    save_model(folder)
    index = two_files(folder)
    names = list(index["weight_map"])
    cases = {
        "weight_map is a list, not the file": {"weight_map": [1, 2]},
        "weight_map is missing": {"metadata": {}},
        "is no index of safetensors": {"weight_map": {"a": 5}},
        "names files outside of its folder": {"weight_map": {names[0]: "../a.safetensors"}},
        "c.safetensors is no file, or not there": {"weight_map": {names[0]: "c.safetensors"}},
        "where model.safetensors.index.json says it is": {
            "weight_map": index["weight_map"] | {names[0]: "b.safetensors"}
        },
    }
    for words, table in cases.items():
        (folder / INDEX).write_text(json.dumps(table))
        assert words in refused(lambda: imported(folder, out), CheckpointError)
    (folder / INDEX).write_text(json.dumps(index))
    save_file(
        load_file(folder / "b.safetensors") | {names[0]: torch.ones(2)}, folder / "b.safetensors"
    )
    said = refused(lambda: imported(folder, out), CheckpointError)
    assert f"{names[0]} stands in two files of" in said
    assert "a.safetensors and b.safetensors" in said


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_weights_of_whole_numbers_are_refused_when_they_come_and_when_they_go(
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "theirs")
    name = "model.norm.weight"
    change_weights(tmp_path / "theirs", lambda t: t.update({name: t[name].to(torch.int8)}))
    for call in (
        lambda: imported(tmp_path / "theirs", tmp_path / "ours"),
        lambda: load_weights(model, tmp_path / "theirs"),
    ):
        said = refused(call, CheckpointError)
        assert "holds whole numbers where the model has floating-point ones" in said
        assert "model.norm.weight is int8" in said
    change_weights(tmp_path / "theirs", lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    said = refused(lambda: imported(tmp_path / "theirs", tmp_path / "ours"), CheckpointError)
    assert "has a dtype that models do not train in" in said
    assert "It is F8_E4M3." in said
    whole = torch.nn.Module()
    whole.register_buffer("count", torch.ones(2, dtype=torch.int64))
    asset = {"model/config.json": model.config.to_json_string().encode()}
    mics.save(tmp_path / "whole", model=whole, assets=asset)
    said = refused(
        lambda: export(
            tmp_path / "whole", tmp_path / "out", dtype=None, shard_bytes=10**9, told=silent
        ),
        CheckpointError,
    )
    assert "holds no floating-point weights" in said
    assert "Its 1 tensors are int64." in said


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    save_model(folder, "gpt2-tiny")
    tied, first = "lm_head.weight", "transformer.wte.weight"
    change_weights(folder, lambda t: t.update({tied: t[first].clone()}))
    imported(folder, tmp_path / "equal")
    change_weights(folder, lambda t: t[tied][-1].add_(1))
    said = refused(lambda: imported(folder, tmp_path / "ours"), CheckpointError)
    assert "are one parameter in the model, and differ in" in said
    assert first in said
    assert tied in said


def test_weights_that_are_no_numbers_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "theirs")
    name = "model.norm.weight"
    change_weights(tmp_path / "theirs", lambda t: t[name][3:4].fill_(1e30))
    words = ["import", str(tmp_path / "theirs"), str(tmp_path / "half"), "--dtype", "fp16"]
    assert main(words) == 0
    alarm = f"These weights hold NaN or infinity: {name}."
    assert alarm in capsys.readouterr().err
    assert main(["export", str(tmp_path / "half"), str(tmp_path / "out")]) == 0
    assert alarm in capsys.readouterr().err
    change_weights(tmp_path / "theirs", lambda t: t[name][3:4].fill_(float("nan")))
    load_weights(model, tmp_path / "theirs")
    assert f"hold NaN or infinity ({name})" in capsys.readouterr().err
