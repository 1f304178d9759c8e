"""What a run is expected to need, as the planner sees the run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ranks import run_ranks

from mics.hardware.cluster import Cluster
from mics.hardware.lookup import find_node
from mics.models.building import load_config
from mics.planning.plan import Way, needed_by, simulate_way
from mics.planning.question import Question
from mics.planning.subject import subject
from mics.training.config import ParallelConfig, TrainConfig
from mics.training.expectation import Forecast


def _forecast(options: dict[str, Any]) -> tuple[Any, ...]:
    """Of four ranks, two per node: the choice, and what is expected of two partitions."""
    config = TrainConfig(parallel=ParallelConfig(gpus_per_node=2, dtype="bf16", **options))
    shape = load_config("gpt2-tiny", vocabulary=512, separator=0)
    forecast = Forecast(
        config, shape, micro_batch=4, micro_steps=2, sequence=128, device=torch.device("cpu")
    )
    choice = forecast.choose()
    return choice, forecast.expect(2), forecast.expect(4)


def expected(form: Any, partition: int, **changed: Any) -> tuple[float, float]:
    """Bytes and seconds by hand, with two GPUs in a p4d."""
    node = dataclasses.replace(find_node("p4d"), gpus_per_node=2)
    anatomy = subject(load_config("gpt2-tiny", vocabulary=512, separator=0))
    asked: dict[str, Any] = {
        "micro_steps": 2,
        "optimizer": "adamw-fused",
        "reductions": 2,
        "runtime_gib": 0.0,
        "communicator_gib": 0.0,
    }
    question = Question(128, **(asked | changed))
    way, where = Way(partition, 4, 2, False, form), Cluster(node, 2)
    seconds = simulate_way("mics", anatomy, where, question, way).seconds
    return round(needed_by(anatomy, where, question, way)), seconds


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
