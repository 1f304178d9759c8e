"""The learning rate of every step: shapes worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mics.training.config import OptimizerConfig, RunConfig, TrainConfig
from mics.training.length import say_if_never_warm
from mics.training.schedules import learning_rate


def rates(steps: int, **options: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **options)  # type: ignore[arg-type]
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


def test_the_learning_rate_rises_then_falls_to_its_final_share() -> None:
    found = rates(20, warmup=4, final=0.1)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    assert found[3:] == sorted(found[3:], reverse=True)
    assert found[-1] == pytest.approx(0.1)
    assert rates(5, decay="linear", final=0.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates(5, decay="none") == 5 * [1.0]


def test_wsd_is_flat_until_the_last_share_of_the_steps() -> None:
    assert rates(10, decay="wsd", decayed=0.4, final=0.0, warmup=2) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    )
    longer = rates(20, decay="wsd", decayed=0.4, final=0.0, warmup=2)
    assert longer[2:6] == 4 * [1.0], "a longer run goes on from the plateau without a jump"
    assert rates(3, decay="wsd", decayed=0.1, final=0.5) == [1.0, 1.0, 0.5]
    assert rates(4, decay="wsd", decayed=1.0, final=0.0) == [0.75, 0.5, 0.25, 0.0]
    assert rates(2, decay="wsd", warmup=2) == [0.5, 1.0]


def test_inverse_square_root_begins_at_the_peak_and_knows_no_end() -> None:
    found = rates(16, decay="inverse-sqrt", warmup=4, final=0.0)
    assert found[3] == 1.0
    assert found[15] == pytest.approx(0.5)
    assert found == rates(100, decay="inverse-sqrt", warmup=4, final=0.0)[:16]
    assert rates(9, decay="inverse-sqrt", final=0.5)[3:] == 6 * [0.5]
    assert rates(4, decay="inverse-sqrt", final=0.0) == pytest.approx(
        [1, 0.7071, 0.5774, 0.5], 1e-4
    )


def test_no_schedule_divides_by_zero() -> None:
    for decay in ("cosine", "linear", "wsd", "inverse-sqrt", "none"):
        for steps in (1, 2, 3):
            for warmup in (0, 1, 3, 5):
                found = rates(steps, decay=decay, warmup=warmup)
                assert all(0 < rate <= 1 for rate in found)


def test_a_run_that_ends_before_its_peak_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(run=RunConfig(steps=4), optimizer=OptimizerConfig(warmup=4))
    say_if_never_warm(config)
    assert capsys.readouterr().err == ""
    say_if_never_warm(replace(config, optimizer=replace(config.optimizer, warmup=8)))
    said = " ".join(capsys.readouterr().err.split())
    assert "the run has 4 steps, the last with 1.5e-04 instead of 3.0e-04" in said
