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
from mics.planning.subject import subject
from mics.planning.weighing import needed_by, simulate_recipe
from mics.recipe import Machine, Recipe
from mics.training.batching import Batching
from mics.training.config import ParallelConfig, TrainConfig
from mics.training.expectation import forecast


def _forecast(options: dict[str, Any]) -> tuple[Any, ...]:
    """Of four ranks, two per node: the choice, and what is expected of two partitions."""
    config = TrainConfig(parallel=ParallelConfig(gpus_per_node=2, dtype="bf16", **options))
    shape = load_config("gpt2-tiny", vocabulary=512, separator=0)
    run = forecast(config, subject(shape), Batching(32, 4, 2, 4), 128, torch.device("cpu"))
    choice = run.choose()
    return choice, run.expect(2), run.expect(4)


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
