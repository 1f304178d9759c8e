"""The one record of how a step is run: its defaults, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

import mics
from mics.anatomy.recipe import Machine, Recipe
from mics.commands import plan, simulate
from mics.errors import PlanError
from mics.training.batching import Batching
from mics.training.config import TrainConfig
from mics.training.expectation import question_of


def test_defaults_are_the_same_from_python_and_from_every_command() -> None:
    plans = mics.plan("gpt2-tiny", "p4d:2", micro_batches=[1], partitions=[8])
    by_default = Recipe(1, sequence=plans.question.recipe.sequence)
    assert plans.question.recipe == by_default
    assert plans.cluster.node.machine == Machine()
    asked = plan.options_of(plan.Config())
    for name in ("optimizer", "reduce_bytes", "prefetch", "stack"):
        assert asked[name] == getattr(by_default, name), name
    assert asked["fragmentation"] == Machine().fragmentation
    figures = simulate.Config()
    assert (figures.micro_steps, figures.stack) == (by_default.micro_steps, by_default.stack)
    assert (figures.pipelined, figures.sigma) == (by_default.pipelined, Machine().sigma)


def test_a_run_differs_from_a_plan_only_in_what_it_says() -> None:
    recipe = question_of(TrainConfig(), Batching(32, 4, 2, 4), 128).recipe
    said = {"micro_steps": 2, "sequence": 128, "optimizer": "adamw-fused"}
    assert replace(recipe, compute_bytes=2) == Recipe(1, **said)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"partition": 0}, "partition must be a whole number, at least 1, got 0"),
        ({"micro_batch": 1.5}, "micro_batch must be a whole number"),
        ({"micro_steps": True}, "micro_steps must be a whole number"),
        ({"prefetch": -1}, "prefetch must be a whole number, at least 0"),
        ({"checkpointing": "none"}, "checkpointing must be False or True, got 'none'"),
        ({"hop_two": "fp4"}, "hop_two must be fp32 or bf16 or fp8 or int8, got 'fp4'"),
        ({"form": "ring"}, "form must be auto or flat or hierarchical, got 'ring'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(figures: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Recipe(**{"partition": 8} | figures)


@pytest.mark.parametrize(
    ("form", "partition", "gpus_per_node", "stages"),
    [
        ("hierarchical", 16, 8, True),
        ("auto", 16, 8, True),
        ("flat", 16, 8, False),
        ("hierarchical", 8, 8, False),
        ("hierarchical", 4, 1, False),
    ],
)
def test_two_stages_need_a_group_over_nodes_of_several_gpus(
    form: Any, partition: int, gpus_per_node: int, stages: bool
) -> None:
    assert Recipe(partition, form=form).two_stages(gpus_per_node) is stages


def test_a_recipe_needs_no_torch() -> None:
    code = "import sys, mics.anatomy.recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
