"""mics train on conversations: all weights and LoRA, at any layout, measured by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import CONVERSATIONS, ask, saved, tokenizer, written
from ranks import errors_of_ranks, run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mics.__main__ import main
from mics.errors import ConfigError
from mics.training import loop
from mics.training.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mics.training.data import IGNORED, open_data
from mics.training.length import in_steps
from mics.training.lora import check_lora
from mics.training.measuring import sources_by_name

pytestmark = pytest.mark.slow

ROWS = [ask(f"What is {n} and {n + 1}?", f"It is {n} and {n + 1}.") for n in range(30)]


def base(folder: Path) -> Path:
    """A small chat model: configuration, weights, tokenizer with its template."""
    saved(folder)
    torch.manual_seed(0)
    fast = tokenizer()
    shape = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(str(folder))
    return folder


def settings(tmp_path: Path, name: str, **tables: Any) -> TrainConfig:
    model = tmp_path / "base"
    if not model.exists():
        base(model)
        written(tmp_path / "chat.jsonl", ROWS)
        written(tmp_path / "other.jsonl", CONVERSATIONS)
    config = TrainConfig(
        run=RunConfig(folder=tmp_path / name, steps=4),
        model=ModelConfig(name=str(model), weights=model),
        data=DataConfig(
            source=str(tmp_path / "chat.jsonl"), format="chat", tokenizer=str(model), held_out=0.2
        ),
        batch=BatchConfig(global_batch=4, micro_batch=1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        parallel=ParallelConfig(dtype="fp32"),
        evaluation=EvaluationConfig(sample=4, prompt="What is 3 and 4?"),
        checkpoint=CheckpointConfig(memory=False),
        log=LogConfig(tensorboard=False, live="off"),
    )
    return replace(config, **tables)


def entries(config: TrainConfig, kind: str) -> list[dict[str, Any]]:
    lines = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def losses(config: TrainConfig) -> list[float]:
    return [entry["loss"] for entry in entries(config, "step")]


def test_losses_are_those_of_one_rank_with_tokens_counted_over_ranks(tmp_path: Path) -> None:
    alone, spread = settings(tmp_path, "alone"), settings(tmp_path, "spread")
    run_ranks(loop.train, 1, alone)
    run_ranks(loop.train, 4, replace(spread, parallel=ParallelConfig(dtype="fp32", partition=2)))
    assert losses(spread) == pytest.approx(losses(alone), abs=1e-5)
    assert losses(alone)[-1] < losses(alone)[0]
    tokens = [[one["tokens"] for one in entries(run, "step")] for run in (alone, spread)]
    assert tokens[0] == tokens[1]
    # Neither prompts nor padding count: an answer is about as long as its question.
    assert 0 < tokens[0][-1] < 4 * 4 * 64 * 0.6


def test_packed_or_not_the_held_out_loss_is_the_same(tmp_path: Path) -> None:
    found = []
    for packing in (True, False):
        config = settings(tmp_path, f"packing {packing}")
        still = OptimizerConfig(learning_rate=1e-12)
        run = replace(config.run, steps=1)
        config = replace(
            config, run=run, optimizer=still, data=replace(config.data, packing=packing)
        )
        run_ranks(loop.train, 2, config)
        found.append(entries(config, "evaluation")[-1]["loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_sets_are_measured_by_their_names(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, "sets")
    sets = (f"other={tmp_path / 'other.jsonl'}", f"train-like={tmp_path / 'chat.jsonl'}")
    config = replace(config, evaluation=replace(config.evaluation, sets=sets, every=2))
    run_ranks(loop.train, 1, config)
    found = [(one["step"], one["name"]) for one in entries(config, "evaluation")]
    assert found == [
        (step, name) for step in (2, 4) for name in ("held_out", "other", "train-like")
    ]
    by_name = {one["name"]: one["loss"] for one in entries(config, "evaluation")[3:]}
    assert by_name["train-like"] < by_name["other"], "it is what was trained on"
    assert "other after step 4: loss" in capfd.readouterr().out


def test_epochs_become_steps_and_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, "epochs", run=RunConfig(folder=tmp_path / "epochs", epochs=1.5))
    run_ranks(loop.train, 1, config)
    assert "or the same command with --run.epochs 3, to go on" in capfd.readouterr().out
    steps = len(losses(config))
    more = replace(config, run=replace(config.run, epochs=3.0))
    run_ranks(loop.train, 1, more)
    assert len(losses(config)) == pytest.approx(2 * steps, abs=1)
    both = replace(config, run=replace(config.run, steps=77))
    for error in errors_of_ranks(loop.train, 1, both):
        assert "run.steps and run.epochs both say" in error


def test_epochs_are_those_of_the_data_whatever_the_steps_so_far_were(tmp_path: Path) -> None:
    config = settings(tmp_path, "epochs", run=RunConfig(folder=tmp_path / "epochs", epochs=3))
    config = replace(config, batch=BatchConfig(global_batch=2), data=_alone(config.data))
    run_ranks(loop.train, 1, config)  # 30 conversations, one in a row: 45 steps
    assert len(losses(config)) == 3 * len(ROWS) // 2

    larger = replace(config, batch=BatchConfig(global_batch=6))
    run_ranks(loop.train, 2, replace(larger, run=replace(config.run, epochs=5)))
    added = len(losses(config)) - 3 * len(ROWS) // 2
    assert added == 2 * len(ROWS) // 6

    step = max((tmp_path / "epochs").glob("step-*"))
    again = RunConfig(folder=tmp_path / "tuned", epochs=2, resume=step)
    data = replace(config.data, source=str(tmp_path / "other.jsonl"))
    tuned = replace(config, run=again, data=data)
    run_ranks(loop.train, 1, tuned)
    assert len(losses(tuned)) == pytest.approx(2 * len(CONVERSATIONS) / 2, abs=1)
    kept = max((tmp_path / "tuned").glob("step-*"))
    assert f"steps = {losses_end(tuned)}" in (kept / "assets" / "config.toml").read_text()


def _alone(data: DataConfig) -> DataConfig:
    return replace(data, packing=False, held_out=0.0)


def losses_end(config: TrainConfig) -> int:
    return int(entries(config, "step")[-1]["step"])


def test_epochs_are_rounded_up_to_whole_steps() -> None:
    config = TrainConfig(run=RunConfig(epochs=2.0))
    assert in_steps(config, sequences=15, global_batch=4).run.steps == 8
    assert in_steps(config, sequences=16, global_batch=4).run.steps == 8
    assert in_steps(config, sequences=1, global_batch=64).run.steps == 1
    with pytest.raises(ConfigError, match="both say"):
        in_steps(replace(config, run=RunConfig(epochs=2.0, steps=9)), sequences=15, global_batch=4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_trains_its_matrices_alone_and_peft_reads_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = settings(tmp_path, "lora", lora=LoraConfig(rank=4, alpha=32.0))
    config = replace(config, optimizer=OptimizerConfig(learning_rate=3e-2))
    run_ranks(loop.train, 2, replace(config, parallel=ParallelConfig(dtype="fp32", partition=2)))
    assert losses(config)[-1] < losses(config)[0] - 0.05
    checkpoint = max(config.run.folder.glob("step-*"))
    assert main(["export", str(checkpoint), str(tmp_path / "adapters"), "--adapters"]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "whole")]) != 0
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapters"))
    measured = entries(config, "evaluation")[-1]["loss"]
    assert by_transformers(adapted, config) == pytest.approx(measured, abs=1e-5)
    kept = adapted.unload().state_dict()
    assert all(torch.equal(kept[name], value) for name, value in plain.items())
    told = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(tmp_path / "base")
    assert len(load_file(tmp_path / "adapters" / "adapter_model.safetensors")) == 2 * 2 * 7


@torch.no_grad()
def by_transformers(model: Any, config: TrainConfig) -> float:
    """The mean loss of the conversations held out, one after the other."""
    data = open_data(
        replace(config.data, packing=False),
        seed=config.run.seed,
        sequence=64,
        masked=False,
        folder=config.run.folder,
    )
    batch = data.held_out.batch(0, data.held_out.num_sequences)
    logits = model(input_ids=batch.inputs).logits
    return float(
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
        )
    )


def test_lora_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    whole = settings(tmp_path, "whole", lora=LoraConfig(rank=2))
    run_ranks(loop.train, 1, whole)
    halves = settings(tmp_path, "halves", lora=LoraConfig(rank=2))
    constant = replace(whole.optimizer, decay="none")
    whole, halves = (replace(one, optimizer=constant) for one in (whole, halves))
    run_ranks(loop.train, 1, replace(halves, run=replace(halves.run, steps=2)))
    run_ranks(loop.train, 2, halves)
    again = replace(whole, run=replace(whole.run, folder=tmp_path / "again"))
    run_ranks(loop.train, 1, again)
    assert losses(halves) == pytest.approx(losses(again), abs=1e-5)


@pytest.mark.parametrize(
    ("lora", "weights", "words"),
    [
        (LoraConfig(alpha=3.0), Path("w"), "all weights train"),
        (LoraConfig(targets=("q_proj",)), Path("w"), "all weights train"),
        (LoraConfig(rank=4), None, "--model.weights"),
    ],
)
def test_options_of_lora_that_do_not_fit_are_refused(
    lora: LoraConfig, weights: Path | None, words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_lora(TrainConfig(lora=lora, model=ModelConfig(weights=weights)))
    assert words in str(error.value)


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = settings(tmp_path, "none", lora=LoraConfig(rank=2, targets=("attention",)))
    for error in errors_of_ranks(loop.train, 1, config):
        assert "does not take these LoRA matrices" in error


@pytest.mark.parametrize(
    "sets", [("a",), ("=b",), ("a=",), ("held_out=x",), ("a=x", "a=y"), ("a b=x",), ("train=x",)]
)
def test_sets_without_a_name_or_a_source_are_refused(sets: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="NAME=SOURCE"):
        sources_by_name(TrainConfig(evaluation=EvaluationConfig(sets=sets)))


def test_sets_need_one_tokenizer() -> None:
    config = TrainConfig(
        data=DataConfig(tokenizer="bpe"), evaluation=EvaluationConfig(sets=("a=b",))
    )
    with pytest.raises(ConfigError, match="trained on each"):
        sources_by_name(config)


def test_the_options_shown_are_those_of_the_example() -> None:
    root = Path(__file__).parents[1]
    shown = (root / "docs" / "fine-tuning.md").read_text().partition("```toml\n")[2]
    assert (root / "examples" / "sft.toml").read_text().endswith("\n\n" + shown.partition("```")[0])


def test_families_that_do_not_keep_conversations_apart_are_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, "opt")
    (tmp_path / "opt.json").write_text(json.dumps({"model_type": "opt", "hidden_size": 16}))
    model = ModelConfig(name=str(tmp_path / "opt.json"))
    for error in errors_of_ranks(loop.train, 1, replace(config, model=model)):
        assert "'opt' keep the conversations" in error
