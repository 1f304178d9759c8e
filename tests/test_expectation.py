"""What a run is expected to need, as the planner sees the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from parity import quiet
from ranks import run_ranks
from transformers import AutoModelForCausalLM

import mics
from mics.anatomy.recipe import Machine, Recipe
from mics.hardware.cluster import Cluster
from mics.hardware.lookup import find_node
from mics.models.building import load_config
from mics.planning.question import Question
from mics.planning.subject import subject
from mics.planning.weighing import needed_by, simulate_recipe
from mics.training import dry_run
from mics.training.batching import Batching, solve
from mics.training.config import (
    BatchConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mics.training.expectation import compute_dtype, fastest, forecast
from mics.training.setup import set_up


def _forecast(options: dict[str, Any]) -> tuple[Any, ...]:
    """Of four ranks, two per node: the choice, and what is expected of two partitions."""
    config = TrainConfig(parallel=ParallelConfig(gpus_per_node=2, dtype="bf16", **options))
    shape = load_config("gpt2-tiny", vocabulary=512, separator=0)
    run = forecast(config, subject(shape), Batching(32, 4, 2, 4), 128, torch.device("cpu"))
    choice = run.choose()
    return choice.partition, run.expect(2, False), run.expect(4, False)


def expected(form: Any, partition: int, **changed: Any) -> tuple[float, float]:
    """Bytes and seconds by hand, with two GPUs in a p4d."""
    machine = Machine(reductions=2, runtime_gib=0.0, communicator_gib=0.0)
    node = dataclasses.replace(find_node("p4d"), gpus_per_node=2, machine=machine)
    anatomy = subject(load_config("gpt2-tiny", vocabulary=512, separator=0))
    how: dict[str, Any] = {"sequence": 128, "optimizer": "adamw-fused"}
    recipe, where = Recipe(partition, 4, 2, False, form, **(how | changed)), Cluster(node, 2)
    seconds = simulate_recipe("mics", anatomy, where, recipe).seconds
    return round(needed_by(anatomy, where, recipe)), seconds


@pytest.mark.slow
def test_a_forecast_is_of_the_run_as_it_is() -> None:
    for choice, inside, over in run_ranks(_forecast, 4, {"node": "p4d"}, ranks_per_node=2):
        assert (inside.memory_bytes, inside.step_seconds) == expected("flat", 2)
        # Either form may be measured to be faster: time of the faster, memory of the larger.
        flat, staged = expected("flat", 4), expected("hierarchical", 4)
        assert over.step_seconds == min(flat[1], staged[1])
        assert over.memory_bytes == max(flat[0], staged[0])
        assert choice.partition in (1, 2, 4)
        assert choice.reason.startswith(f"p = {choice.partition}: ")


@pytest.mark.slow
@pytest.mark.extra
def test_a_forecast_of_a_forced_form_and_compiled_blocks() -> None:
    options = {"node": "p4d", "collectives": "flat", "compile": True}
    _, _, over = run_ranks(_forecast, 4, options, ranks_per_node=2)[0]
    assert (over.memory_bytes, over.step_seconds) == expected("flat", 4, stack="fused")


@pytest.mark.slow
@pytest.mark.extra
def test_without_a_node_there_is_no_time_and_the_smallest_is_taken() -> None:
    choice, inside, _ = run_ranks(_forecast, 4, {}, ranks_per_node=2)[0]
    assert inside.step_seconds is None
    assert choice.partition == 1
    assert "smallest that fits" in choice.reason


# -- one question, one model -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, {}),
        ({"partition": 8, "collectives": "hierarchical"}, {"partitions": (8,)}),
        ({"dtype": "fp32", "compile": True}, {"dtype": torch.float32, "stack": "fused"}),
        ({"activation_checkpointing": True}, {"checkpointing": (True,)}),
    ],
)
def test_a_run_a_dry_run_and_a_plan_of_the_same_settings_ask_the_same_question(
    options: dict[str, Any], asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = ParallelConfig(
        **{"dtype": "bf16", "ranks": 16, "gpus_per_node": 8, "node": "p4d"} | options
    )
    config = TrainConfig(
        model=ModelConfig(name="gpt2-tiny"),
        data=DataConfig(sequence=128),
        batch=BatchConfig(micro_batch=4, micro_steps=2),
        parallel=parallel,
    )
    questions: list[Question] = []

    taken: list[int] = []

    def seen(anatomy: Any, cluster: Any, question: Question) -> Any:
        questions.append(question)
        best = fastest(anatomy, cluster, question)
        assert best is not None
        taken.append(best.way.partition)
        return best

    monkeypatch.setattr(dry_run, "fastest", seen)
    dry_run.describe(config)
    anatomy = subject("gpt2-tiny", dtype=compute_dtype(config))
    batch = solve(config.batch, 16)
    questions.append(forecast(config, anatomy, batch, 128, torch.device("cpu")).question)
    forced = parallel.collectives
    forms = {"forms": (forced,), "hop_two_form": forced} if forced != "auto" else {}
    how = {"micro_steps": 2, "micro_batches": (4,), "checkpointing": (False,)} | forms | asked
    plans = mics.plan("gpt2-tiny", "p4d:2", sequence=128, optimizer="adamw-fused", **how)
    assert questions == [plans.question] * 2
    assert taken == [plans.best.way.partition]


@contextmanager
def builds() -> Iterator[list[str]]:
    """Names of the models that are built meanwhile."""
    names: list[str] = []
    original = AutoModelForCausalLM.from_config

    def counted(config: Any, **keywords: Any) -> Any:
        names.append(config.model_type)
        return original(config, **keywords)

    with patch.object(AutoModelForCausalLM, "from_config", counted):
        yield names


def test_a_dry_run_builds_the_model_once() -> None:
    parallel = ParallelConfig(ranks=16, gpus_per_node=8, node="p4d")
    with builds() as names:
        dry_run.describe(TrainConfig(model=ModelConfig(name="gpt2-tiny"), parallel=parallel))
    assert names == ["gpt2"]


def _set_up(config: TrainConfig) -> tuple[list[str], set[torch.dtype], bool]:
    """What a rank builds until its first step; dtypes of what it then trains."""
    with builds() as names:

        def run() -> tuple[set[torch.dtype], bool]:
            with set_up(config) as ready:
                dtypes = {param.dtype for param in ready.model.parameters()}
                return dtypes, ready.expected.memory_bytes is not None

        return names, *quiet(run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("partition", ["auto", 1])
def test_a_run_builds_the_model_once_and_trains_it_in_fp32(partition: Any, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(8):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{number} is a number. " * 40)
    config = TrainConfig(
        run=RunConfig(folder=tmp_path / "run", steps=1),
        model=ModelConfig(name="gpt2-tiny"),
        data=DataConfig(source=str(tmp_path / "corpus"), sequence=16),
        parallel=ParallelConfig(dtype="bf16", partition=partition),
        log=LogConfig(tensorboard=False),
    )
    for names, dtypes, forecast_was_made in run_ranks(_set_up, 2, config):
        assert names == ["gpt2"]
        assert dtypes == {torch.float32}
        assert forecast_was_made
