"""Mixtures of experts in mics train: the loss that balances them, and plans of real ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import quiet
from ranks import run_ranks

from mics.errors import ConfigError, MicsError
from mics.models.building import build, load_config
from mics.models.experts import ask_for_router_loss, router_loss_weight
from mics.planning.subject import subject
from mics.training import loop
from mics.training.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mics.training.data import Batch
from mics.training.dry_run import describe
from mics.training.step import losses

pytestmark = pytest.mark.filterwarnings(
    "ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"
)


def settings(folder: Path, *, micro_batch: int, partition: int, **run: Any) -> TrainConfig:
    """A run of 8 sequences a step with a router loss that is felt."""
    text = folder.parent / "text.txt"
    text.write_text(" ".join(f"{n} times {n + 3} is {n * (n + 3)}." for n in range(400)))
    return TrainConfig(
        run=RunConfig(folder=folder, **{"steps": 4, **run}),
        model=ModelConfig(name="qwen3-moe-tiny", router_loss=0.5),
        data=DataConfig(source=str(text), sequence=16, held_out=0.0),
        batch=BatchConfig(global_batch=8, micro_batch=micro_batch),
        optimizer=OptimizerConfig(learning_rate=0.003, decay="none"),
        parallel=ParallelConfig(
            partition=partition, gpus_per_node=partition, collectives="flat", dtype="fp32"
        ),
        evaluation=EvaluationConfig(every=0, sample=0),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(tensorboard=False),
    )


def train(config: TrainConfig) -> int:
    return quiet(lambda: loop.train(config))


def steps(config: TrainConfig, name: str) -> list[Any]:
    lines = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    return [entry[name] for entry in map(json.loads, lines) if entry["kind"] == "step"]


def test_equal_micro_batches_have_one_router_loss_at_every_layout_and_others_another(
    tmp_path: Path,
) -> None:
    """4 ranks, 2 replicas and 2 micro-steps against one process; resumed at another partition."""
    split = settings(tmp_path / "split", micro_batch=1, partition=2)
    assert run_ranks(train, 4, dataclasses.replace(split, run=RunConfig(split.run.folder, 2))) == (
        [0] * 4
    )
    wider = settings(split.run.folder, micro_batch=1, partition=1)
    assert run_ranks(train, 2, wider) == [0] * 2
    alone = settings(tmp_path / "alone", micro_batch=1, partition=1)
    assert run_ranks(train, 1, alone) == [0]
    whole = settings(tmp_path / "whole", micro_batch=8, partition=1, steps=1)
    assert run_ranks(train, 1, whole) == [0]
    for name in ("loss", "router_loss", "norm"):
        assert steps(split, name) == pytest.approx(steps(alone, name), rel=1e-4)
    assert all(steps(split, "traffic_as_predicted"))
    kept = json.loads(
        (split.run.folder / "step-00000004" / "assets" / "model" / "config.json").read_text()
    )
    assert kept["output_router_logits"] is False  # who loads the model has not asked for it
    assert kept["router_aux_loss_coef"] == 0.5
    assert steps(alone, "router_loss")[0] > 2  # what balance is, for 2 experts a token
    # Weights are the same in the first step: so is the loss of the text, not the router's.
    assert steps(whole, "loss")[0] == pytest.approx(steps(alone, "loss")[0], rel=1e-6)
    assert abs(steps(whole, "router_loss")[0] - steps(alone, "router_loss")[0]) > 1e-3


def test_the_loss_is_transformers_own() -> None:
    shape = load_config("qwen3-moe-tiny", vocabulary=300, separator=0)
    ask_for_router_loss(shape, 0.25)
    torch.manual_seed(0)
    model: Any = build(shape, device="cpu")
    ids = torch.randint(0, 300, (3, 16))
    labels = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1)
    batch = Batch(ids, labels)
    loss, balance = losses(model, batch)
    assert balance is not None
    mean = (loss + 0.25 * balance) / batch.num_targets
    torch.testing.assert_close(mean, model(input_ids=ids, labels=ids).loss)


def test_a_model_that_returns_no_router_loss_is_refused() -> None:
    class Silent(torch.nn.Module):
        config = load_config("qwen3-moe-tiny", vocabulary=300, separator=0)

        def forward(self, input_ids: torch.Tensor) -> Any:
            return type("Output", (), {"logits": torch.zeros(1, 4, 8), "aux_loss": None})()

    ask_for_router_loss(Silent.config, 0.1)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(MicsError, match="Silent returns no loss that balances experts"):
        losses(Silent(), Batch(ids, ids))


def test_the_configuration_decides_unless_a_weight_is_given() -> None:
    shape = load_config("qwen3-moe-tiny", vocabulary=300, separator=0)
    assert router_loss_weight(shape) is None
    shape.output_router_logits = True
    ask_for_router_loss(shape, None)
    assert router_loss_weight(shape) == 0.01
    ask_for_router_loss(shape, 0.3)
    assert router_loss_weight(shape) == shape.router_aux_loss_coef == 0.3
    ask_for_router_loss(shape, 0.0)
    assert router_loss_weight(shape) is None


@pytest.mark.parametrize(
    ("name", "weight", "words"),
    [
        ("gpt2-tiny", 0.1, "'gpt2' have no loss that balances experts"),
        ("qwen3-moe-tiny", -1.0, "a number from 0 on"),
        ("qwen3-moe-tiny", float("nan"), "a number from 0 on"),
    ],
)
def test_a_weight_that_cannot_be_is_refused(name: str, weight: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        describe(TrainConfig(model=ModelConfig(name=name, router_loss=weight)))


@pytest.mark.parametrize(
    ("name", "parameters", "work"),
    [("mixtral-8x7b", "46.70 B", "77.4"), ("qwen3-30b-a3b", "30.53 B", "19.7")],
)
def test_a_dry_run_counts_the_chosen_experts_only(name: str, parameters: str, work: str) -> None:
    """6 FLOPs for each weight that a token meets (12.9 B, 3.3 B less embeddings) and attention."""
    parallel = ParallelConfig(ranks=64, gpus_per_node=8, dtype="fp32")
    data = DataConfig(sequence=1024)
    text = describe(TrainConfig(model=ModelConfig(name=name), data=data, parallel=parallel))
    assert f"{parameters} parameters" in text
    assert f"work    {work} GFLOPs per token" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_experts_are_traced_in_every_dtype(dtype: torch.dtype) -> None:
    """Torch's meta device multiplies groups of rows in bf16 alone."""
    half = subject("qwen3-moe-tiny").trace(1, 64)
    made = subject("qwen3-moe-tiny", dtype=dtype).trace(1, 64)
    for direction in ("forward", "backward"):
        assert made.flops(direction) == half.flops(direction)  # type: ignore[arg-type]
