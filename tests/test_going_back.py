"""What mics train does with bad steps (skipped, recorded, gone back from) and with slow ranks."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from parity import quiet
from ranks import errors_of_ranks, run_ranks
from test_training import _train_with_bad_steps, elsewhere, lines, losses, settings, train
from test_training import corpus as corpus
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import mics
from mics.ranks.skips import FEWEST, SkipRule
from mics.training import loop, setup
from mics.training import step as step_module
from mics.training.config import OptimizerConfig, TrainConfig
from mics.training.data import Batch
from mics.training.optimisation import make_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"),
]

STEADY = {"learning_rate": 0.01, "decay": "none"}


def _train_with_bad_data(config: TrainConfig, bad: list[int], shift: dict[int, int]) -> int:
    """The steps that begin at some positions give no number on one rank; others begin elsewhere."""
    current = 0
    micro_batches, losses = setup.Run.micro_batches, step_module.losses

    def noting(run: Any, position: int) -> Any:
        nonlocal current
        current = shift.get(position, position)
        return micro_batches(run, current)

    def spoiling(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        loss, balance = losses(*args)
        return loss * (math.inf if current in bad and dist.get_rank() == 1 else 1.0), balance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.Run, "micro_batches", noting)
        patch.setattr(step_module, "losses", spoiling)
        return loop.train(config)


def test_a_run_goes_back_and_on_behind_bad_data_as_if_it_had_never_been(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Steps 5 to 7 are skipped; the checkpoint of step 6 is one of them, with the state of 4."""
    config = settings(tmp_path, corpus, run={"steps": 8}, checkpoint={"every": 2}, optimizer=STEADY)
    assert run_ranks(_train_with_bad_data, 2, config, [32, 40, 48], {}) == [0, 0]
    assert [(e["step"], e["taken"]) for e in lines(config)] == [
        *[(step, True) for step in range(1, 5)],
        *[(step, False) for step in range(5, 8)],
        (7, True),
        (8, True),
    ]
    skips = lines(config, "skip")
    assert [(e["step"], e["first"], e["last"], e["in_a_row"]) for e in skips] == [
        (5, 32, 39, 1),
        (6, 40, 47, 2),
        (7, 48, 55, 3),
    ]
    assert all(len(set(e["sequences"])) == 8 and e["loss"] is None for e in skips)
    (back,) = lines(config, "rollback")
    assert (back["step"], back["to"], back["position"]) == (7, 6, 56)
    out, err = capfd.readouterr()
    assert (
        "step 5 was skipped on all ranks (not finite: loss inf); its data are positions 32" in out
    )
    assert "AFTER STEP 7 THE RUN GOES BACK: weights and optimizer are those of step 6" in err
    assert "counted = predicted, every rank, stage and link: 9 of 9 steps" in out

    never = elsewhere(config, "never", run={"steps": 6})
    assert run_ranks(_train_with_bad_data, 2, never, [], {32: 56, 40: 64}) == [0, 0]
    assert losses(never) == losses(config)[:4] + losses(config)[7:]
    ours, theirs = lines(config, "evaluation"), lines(never, "evaluation")
    assert [e["loss"] for e in ours] == [e["loss"] for e in theirs]


def test_a_run_goes_back_further_where_it_fails_at_once_and_not_for_ever(
    tmp_path: Path, corpus: Path
) -> None:
    config = settings(
        tmp_path,
        corpus,
        run={"steps": 8},
        checkpoint={"every": 2},
        optimizer=STEADY | {"bad_steps": 2, "rollbacks": 2},
    )
    for text in errors_of_ranks(_train_with_bad_data, 2, config, list(range(32, 999)), {}):
        assert "not finite in 2 steps in a row" in text
        assert "Steps 3 to 4 of 2 ranks; the run has gone back 2 time(s); the newest" in text
        assert "step-00000002" in text
    backs = lines(config, "rollback")
    assert [(e["step"], e["to"], e["position"]) for e in backs] == [(6, 4, 48), (6, 2, 64)]
    assert (config.run.folder / "step-00000004.damaged").is_dir()


def test_skipped_steps_count_across_a_resume(tmp_path: Path, corpus: Path) -> None:
    config = settings(tmp_path, corpus, run={"steps": 3}, optimizer={"rollbacks": 0})
    assert run_ranks(_train_with_bad_steps, 2, config, [2, 3]) == [0, 0]
    longer = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=9))
    for text in errors_of_ranks(_train_with_bad_steps, 2, longer, [4]):
        assert "not finite in 3 steps in a row" in text
        assert "Steps 2 to 4 of 2 ranks" in text


# -- who is slow -----------------------------------------------------------------------------------


def _train_with_a_slow_rank(config: TrainConfig, slow: float) -> int:
    losses = step_module.losses

    def slowly(*args: Any) -> Any:
        time.sleep(0.2 + (slow if dist.get_rank() == 1 else 0.0))
        return losses(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "losses", slowly)
        return loop.train(config)


@pytest.mark.extra
def test_the_slow_rank_is_named_in_the_step_line_the_table_and_the_metrics(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The step lines are ten steps apart, but that somebody has become slow is news."""
    log = {"stragglers": True, "every": 100}
    config = settings(tmp_path, corpus, run={"steps": 12}, log=log)
    assert run_ranks(_train_with_a_slow_rank, 2, config, 1.0) == [0, 0]
    (found,) = lines(config, "stragglers")
    assert found["step"] == 11
    assert [one["rank"] for one in found["ranks"]] == [0, 1]
    assert found["ranks"][1]["own"] > found["ranks"][0]["own"]
    (slow,) = found["slow"]
    assert slow.startswith("rank 1 (node 0) is slow: ") and slow.endswith("late at hop 1")
    assert [e["slow"] for e in lines(config)] == [None] * 10 + [slow] * 2
    out = capfd.readouterr().out
    shown = out.splitlines()
    assert [shown[n - 1].split("  ")[0] for n, line in enumerate(shown) if "SLOW" in line] == [
        "step 11/12",
        "step 12/12",
    ]
    assert "ranks after step 11\n rank  node         own" in out
    assert "<- slow" in out


# -- no trace --------------------------------------------------------------------------------------


def _steps_with_dropout(poisoned: int | None, left_out: int | None) -> list[Any]:
    shape = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(shape)
    mics.shard(model, partition=2, mp_policy=MixedPrecisionPolicy(), collectives="flat")
    model.train()
    config = OptimizerConfig(learning_rate=0.01, decay="none")
    optimizer = make_optimizer(model, config)
    torch.manual_seed(1 + dist.get_rank())
    rule, seen, losses = SkipRule(), [], step_module.losses
    for step in range(1, 11):
        if step == left_out:
            continue
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(64, (2, 4, 9), generator=generator)
        batches = [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]
        factor = math.nan if step == poisoned and dist.get_rank() == 1 else 1.0

        def spoiling(*args: Any, factor: float = factor) -> Any:
            loss, balance = losses(*args)
            return loss * factor, balance

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_module, "losses", spoiling)
            outcome = step_module.take_step(
                model, optimizer, batches, config, step=step, steps=10, count=dict, rule=rule
            )
        seen.append((outcome.verdict.take, outcome.loss, outcome.norm))
    weights = [p.full_tensor().tolist() for p in model.parameters()]
    state = [value for one in optimizer.state.values() for value in one.values()]
    whole = [v.full_tensor() if isinstance(v, DTensor) else v for v in state]
    return [seen, weights, [value.tolist() for value in whole]]


def test_a_poisoned_step_leaves_no_trace_in_weights_optimizer_or_dropout() -> None:
    poisoned = run_ranks(lambda: quiet(lambda: _steps_with_dropout(7, None)), 4)
    without = run_ranks(lambda: quiet(lambda: _steps_with_dropout(None, 7)), 4)
    for ours, theirs in zip(poisoned, without, strict=True):
        taken = [one for one in ours[0] if one[0]]
        assert (len(ours[0]), len(taken)) == (10, 9)
        assert not ours[0][6][0]
        assert [taken, *ours[1:]] == theirs


def test_a_norm_that_spikes_is_skipped_where_that_is_asked_for(
    tmp_path: Path, corpus: Path
) -> None:
    """Sooner or later a norm is a spike to a factor this small."""
    spikes = STEADY | {"spike_norm": 1.02, "bad_steps": 99}
    config = settings(tmp_path, corpus, run={"steps": 24}, optimizer=spikes)
    run_ranks(train, 2, config)
    skips = lines(config, "skip")
    assert skips
    assert all(e["step"] > FEWEST and e["why"].startswith("spike: norm ") for e in skips)
    assert [e["step"] for e in lines(config) if not e["taken"]] == [e["step"] for e in skips]
