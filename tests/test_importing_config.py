"""Configurations of DeepSpeed and SageMaker: every field gets its row, and contradictions words."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mics.__main__ import main
from mics.errors import ConfigError, MicsError
from mics.training.config import TrainConfig
from mics.training.migrating import deepspeed_fields, sagemaker
from mics.training.migrating.conversion import Verdict
from mics.training.migrating.reading import parse_json, read_json_file
from mics.training.migrating.writing import as_document, as_record, convert
from mics.training.settings import check_settings, read_settings

FOLDER = Path(__file__).parent / "configurations"
FILES = sorted(FOLDER.glob("*.json"))
WANTED: dict[str, dict[str, Any]] = {
    "hf_zero3": {"partition": "auto", "every": 2000},
    "hf_zero2": {"dtype": "bf16", "micro_steps": 4, "micro_batch": 2, "partition": "auto"},
    "mics_flat": {
        **{"partition": 8, "collectives": "flat", "learning_rate": 3e-4, "betas": (0.9, 0.95)},
        **{"warmup": 2000, "decay": "linear", "final": 0.0, "steps": 100000, "clip": 1.0},
    },
    "mics_hierarchical": {"partition": 64, "collectives": "hierarchical", "global_batch": 2048},
    "megatron_zero1": {"dtype": "bf16", "global_batch": 256, "every": 10},
    "old_names": {
        **{"partition": "auto", "global_batch": 64, "micro_steps": 1, "dtype": "bf16"},
        **{"tensorboard": True, "learning_rate": 1.5e-4, "weight_decay": 0.0, "eps": 1e-8},
    },
    "zero_infinity": {
        **{"activation_checkpointing": True, "activation_offload": "on", "decay": "cosine"},
        **{"final": 0.1, "warmup": 100, "steps": 5000, "learning_rate": 1e-5},
    },
    "zeropp": {"partition": "auto", "wandb": "zeropp", "micro_steps": 8},
    "one_bit": {"partition": 1, "clip": 0.0, "learning_rate": 3e-4, "micro_batch": 16},
    "accelerate_minimal": {"micro_steps": 10, "clip": 1.0, "partition": "auto"},
    "chat": {"partition": "auto", "tensorboard": False, "micro_batch": 4},
    "sequence_experts": {"partition": "auto", "global_batch": 128, "dtype": "bf16"},
    "sagemaker_estimator": {
        **{"partition": 16, "collectives": "hierarchical", "clip": 0.5, "dtype": "bf16"},
        **{"gpus_per_node": 8, "activation_offload": "on"},
    },
    "sagemaker_v2": {"partition": 8, "seed": 12345, "activation_offload": "on", "clip": 1.0},
    "sagemaker_plain": {"partition": 1, "dtype": "bf16"},
}


def leaves(table: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in table.items():
        if key == "mp_parameters" and isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def options(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for table in ("batch", "optimizer", "parallel", "log", "run"):
        found |= vars(getattr(config, table))
    return found | {"every": config.log.every}


def refused(tree: dict[str, Any] | str, **keywords: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        convert("x.json", parse_json("x.json", tree) if isinstance(tree, str) else tree, **keywords)
    return str(caught.value)


def test_every_file_has_wanted_options() -> None:
    assert {file.stem for file in FILES} == set(WANTED)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_field_of_a_real_configuration_has_one_row_and_mics_train_reads_the_rest(
    file: Path, tmp_path: Path
) -> None:
    tree = read_json_file(file)
    conversion = convert(file.name, tree)
    rows = [row for row in conversion.rows if row.verdict is not Verdict.ABSENT]
    fields = [row.field for row in rows]
    assert len(set(fields)) == len(fields)
    wanted = {leaf.rpartition("parameters.")[2] for leaf in leaves(tree)}
    assert {field.rpartition("parameters.")[2] for field in fields} == wanted
    assert [row.field for row in rows if row.verdict is Verdict.UNKNOWN] == []
    assert all(row.ours for row in rows)
    path = tmp_path / "train.toml"
    path.write_text(as_document(conversion, file.name))
    config = read_settings(path)
    check_settings(config)
    found = options(config)
    assert {key: found[key] for key in WANTED[file.stem]} == WANTED[file.stem]
    lines = "\n".join(as_record(conversion)["loop"])
    compile(lines, file.name, "exec")


def test_the_command_prints_toml_and_json_and_writes_over_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(FOLDER / "mics_flat.json")
    assert main(["import-config", file, "--ranks", "16", "--gpus-per-node", "8"]) == 0
    printed = capsys.readouterr().out
    assert "partition = 8" in printed and "gpus_per_node = 8" in printed
    assert main(["import-config", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["parallel"]["partition"] == 8
    out = str(tmp_path / "train.toml")
    assert main(["import-config", file, "--out", out]) == 0
    assert main(["import-config", file, "--out", out]) == 1
    assert "exists" in capsys.readouterr().err


# -- contradictions --------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
}
CONTRADICTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"fp16": {"enabled": True}}, "fp16 and bf16 contradict"),
    ({"bfloat16": {"enabled": False}}, "one setting, and differ"),
    ({"train_batch_size": 9}, "sizes of the batch contradict"),
    ({"train_batch_size": 16, "gradient_accumulation_steps": 3}, "sizes of the batch contradict"),
    ({"train_batch_size": 1, "gradient_accumulation_steps": 1}, "sizes of the batch contradict"),
    ({"gradient_accumulation_steps": 0}, "1 or more"),
    ({"gradient_accumulation_steps": True}, "a whole number"),
    ({"gradient_accumulation_steps": 2.5}, "a whole number"),
    ({"gradient_accumulation_steps": 10**30}, "a whole number"),
    ({"gradient_clipping": -1}, "0 (off) or more"),
    ({"gradient_clipping": "1.0"}, "a number"),
    ({"steps_per_print": 0}, "steps_per_print"),
    ({"zero_optimization": {"stage": 4}}, "0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": True}}, "a whole number"),
    ({"zero_optimization": 3}, "true or false"),
    ({"zero_optimization": {"stage": 2, "mics_shard_size": 8}}, "contradict each other"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 0}}, "a number of ranks"),
    (
        {"zero_optimization": {"stage": 3, "mics_shard_size": 4, "zero_hpz_partition_size": 8}},
        "contradict each other",
    ),
    ({"zero_optimization": {"stage": 3, "overlap_comm": 1}}, "true or false"),
    ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "big"}}, "a number"),
    ({"zero_optimization": {"stage": 3, "offload_param": True}}, "a table"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, '"none"'),
    ({"optimizer": {"type": 3}}, "a text"),
    ({"optimizer": {"type": "Adam", "params": {"lr": 0}}}, "above 0"),
    ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, "two numbers"),
    ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.0]}}}, "two numbers"),
    ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, "a list of numbers"),
    ({"optimizer": "AdamW"}, "a table"),
    ({"scheduler": {"type": "Cosine"}}, "WarmupCosineLR"),
    ({"scheduler": {"type": "WarmupDecayLR"}}, "how many steps"),
    (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 5}}},
        "fewer steps than its warmup",
    ),
    ({"gradient_allreduce_op": "max"}, '"mean" or "sum"'),
    ({"train_batch_size": {"a": 4}}, "no table"),
    ({"sharded_data_parallel_degree": 4}, "of DeepSpeed and of SageMaker"),
)


@pytest.mark.parametrize(("change", "words"), CONTRADICTIONS)
def test_a_contradiction_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    assert words in refused(copy.deepcopy(BASE) | change)


def test_ranks_are_compared_with_sizes_and_shards() -> None:
    tree = {**BASE, "train_batch_size": 64, "gradient_accumulation_steps": 4}
    assert convert("x", tree).ranks == 8
    assert "contradict the number of ranks" in refused(tree, ranks=16)
    shards = {**BASE, "zero_optimization": {"stage": 3, "mics_shard_size": 3}}
    assert "does not divide" in refused(shards, ranks=8)
    shards["zero_optimization"] |= {"mics_shard_size": 4, "mics_hierarchical_params_gather": True}
    assert "several nodes" in refused(shards, ranks=8, gpus_per_node=8)
    assert "out of range" in refused(BASE, ranks=0)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"sharded_data_parallel_degree": 4, "pipeline_parallel_degree": 2}, "a pipeline"),
        ({"sharded_data_parallel_degree": 4, "ddp": False}, "needs ddp"),
        ({"sharded_data_parallel_degree": 4, "shard_optimizer_state": True}, "contradict"),
        ({"sharded_data_parallel_degree": 4, "hybrid_shard_degree": 4}, "version 1"),
        ({"sharded_data_parallel_degree": 0}, "1 or more"),
        ({"sharded_data_parallel_degree": "4"}, "a whole number"),
        ({"sharded_data_parallel_degree": 2, "fp16": True, "bf16": True}, "fp16 and bf16"),
        ({"partitions": 2, "pipeline_parallel_degree": 3}, "one setting"),
        ({"hybrid_shard_degree": 3, "random_seed": -1}, "2^63"),
        ({"mp_parameters": "{"}, "not JSON"),
        ({"smdistributed": {"modelparallel": {"enabled": False, "parameters": {}}}}, "off"),
        ({"smdistributed": 4}, "no table"),
        ({"parameters": {}, "mp_parameters": {}}, "two places"),
    ],
)
def test_a_contradiction_of_sagemaker_is_refused_in_words(tree: dict[str, Any], words: str) -> None:
    assert words in refused(tree)


# -- files that are forged -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train_batch_size": 1, "train_batch_size": 2}', "stands twice"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "stands twice"),
        ('{"gradient_clipping": NaN}', "NaN is no number"),
        ('{"gradient_clipping": -Infinity}', "no number"),
        ('{"gradient_clipping": 1e999}', "no number that a computer holds"),
        ('{"train_batch_size": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested"),
        ('{"a": ' * 100000, "nested"),
        ("[1]", "no table"),
        ("", "not JSON"),
        ('{"bf16": ', "not JSON"),
        ('{"bf16": {"enabled": true}} /*', "does not end"),
        ('{"bf16', "does not end on its line"),
        ("{bf16: {enabled: true}}", "double quotes"),
        ("/* " * 300000, "does not end"),
        ('{"a": "' + '\\"' * 300000, "does not end"),
        ('{"what": 1}', "neither DeepSpeed nor SageMaker"),
    ],
    ids=range(17),
)
def test_a_text_that_is_no_configuration_is_refused(text: str, words: str) -> None:
    assert words in refused(text)


def test_a_file_that_is_no_small_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for data in (b"\xff\xfe{}", b" " * (1 << 20) + b"{}"):
        path.write_bytes(data)
        with pytest.raises(MicsError):
            read_json_file(path)
    for other in (tmp_path, tmp_path / "none.json", Path("/dev/zero")):
        with pytest.raises(MicsError, match="cannot be read"):
            read_json_file(other)


def test_comments_and_last_commas_are_allowed_and_texts_stay() -> None:
    text = '{"a": "// # /* ,}", # one\n "b": [1, 2,], /* three */ "c": "\\",]",}'
    assert parse_json("x", text) == {"a": "// # /* ,}", "b": [1, 2], "c": '",]'}


def test_an_unknown_field_is_named_with_the_nearest_and_cannot_break_out_of_its_comment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = BASE | {
        "gradient_acumulation_steps": 4,
        'x\n[run]\nfolder = "/"\n': {"y\n": "\n[run]\nsteps = 3\n\u2028"},
        "optimizer": {"type": "Lion\n[run]\nsteps = 3", "params": {}},
    }
    conversion = convert("x.json", tree)
    unknown = {row.field: row.ours for row in conversion.rows if row.verdict is Verdict.UNKNOWN}
    assert "did you mean gradient_accumulation_steps" in unknown["gradient_acumulation_steps"]
    path = tmp_path / "train.toml"
    path.write_text(as_document(conversion, "x.json"))
    assert read_settings(path).run == TrainConfig().run
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    assert main(["import-config", str(tmp_path / "ds.json")]) == 0
    assert "Unknown fields" in capsys.readouterr().err


def test_nulls_and_empty_tables_have_rows_and_change_nothing() -> None:
    tree = {
        **{"train_batch_size": 8, "zero_optimization": {}, "optimizer": None, "fp16": {}},
        **{"gradient_clipping": None, "bf16": {"enabled": None}, "aio": {}, "scheduler": {}},
    }
    conversion = convert("x.json", tree)
    rows = [row.field for row in conversion.rows if row.verdict is not Verdict.ABSENT]
    assert sorted(rows) == sorted(leaves(tree))
    assert Verdict.UNKNOWN not in [row.verdict for row in conversion.rows]
    assert conversion.settings["parallel", "partition"] == 1


def test_texts_with_signs_that_toml_has_not_are_written_so_that_it_reads_them(
    tmp_path: Path,
) -> None:
    for text in ("\x7f", "\U0001f600", 'a"\\b', "\n"):
        tree = BASE | {"wandb": {"enabled": True, "project": text}, "\x7f": text}
        tree |= {"optimizer": {"type": text, "params": {"lr": 1}}}
        path = tmp_path / "train.toml"
        path.write_text(as_document(convert("x.json", tree), "x.json"), encoding="utf-8")
        assert read_settings(path).log.wandb == text
    assert "letters" in refused(BASE | {"wandb": {"enabled": True, "project": "\ud800"}})


def test_a_key_with_a_dot_is_not_taken_for_a_path() -> None:
    tree = {**BASE, "fp16.enabled": True, "zero_optimization": {"stage": 3, "offload_param.x": 1}}
    rows = convert("x.json", tree).rows
    assert [row.verdict for row in rows].count(Verdict.UNKNOWN) == 2


def test_every_rule_is_of_a_field() -> None:
    names = [name.removesuffix(".*") for name in deepspeed_fields.RULES]
    assert [name for name in names if not re.fullmatch(r"[a-z][a-z0-9_.]+[a-z0-9]", name)] == []
    rows = convert("x", BASE | {"optimizer": {"type": "Adam", "legacy_fusion": True}}).rows
    (row,) = [row for row in rows if row.field == "optimizer.legacy_fusion"]
    assert row.verdict is Verdict.NOT_NEEDED


def test_the_page_has_every_field() -> None:
    page = (Path(__file__).parents[1] / "docs" / "from-deepspeed.md").read_text()
    names = [*deepspeed_fields.RULES, *deepspeed_fields.CONVERTED]
    names += sagemaker.KEYS - {"distribution", "smdistributed", "modelparallel", "parameters"}
    assert [name for name in names if f"`{name}`" not in page] == []
