"""A part of ``make fuzz``: seeds that say much in little time, and those that once failed."""

from __future__ import annotations

import pytest
from fuzzing.alone import train_alone
from fuzzing.cases import draw_case
from fuzzing.running import verdicts

FAST = range(8)
FAILED = {
    25: "dealt states: shares were looked at under inference_mode, whose tensors count no writes",
    128: "a rank with empty shards took gradients of two buffers for one, and reduced later",
    175: "a unit that was frozen in the first step was not filled in where a rank skips it",
    179: "buffers were made for inference_mode in a group that was gathered",
    199: "as 175, for an expert",
    213: "one replica: the step was settled before the last reduction had its second stage",
    262: "gradients dropped between two micro_steps: a step by hand after it was refused",
    278: "as 213",
}
"""Seeds that once failed, and what they found."""


def test_a_case_is_drawn_from_its_seed_alone_and_spelled_in_few_lines() -> None:
    for seed in FAST:
        case = draw_case(seed)
        assert case == draw_case(seed)
        assert str(case).startswith(f"seed {seed}: partition=")
        assert len(str(case).splitlines()) == len(case.steps) + 3


def test_one_process_trains_in_every_case() -> None:
    """Else there would be nothing to compare."""
    trained = [train_alone(draw_case(seed))[-1].weights for seed in FAST]
    assert all(weights for weights in trained)


@pytest.mark.slow
def test_random_models_and_schedules_are_trained_as_by_one_process() -> None:
    found = list(verdicts(FAST))
    assert [one for one in found if one.kind != "right"] == []
    assert len(found) == len(FAST)


@pytest.mark.slow
def test_seeds_that_once_failed_are_trained_as_by_one_process() -> None:
    assert [one for one in verdicts(list(FAILED)) if one.kind != "right"] == []
