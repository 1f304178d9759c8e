"""Steps that are skipped: one answer on every rank, and no trace of them."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.errors import ConfigError
from mics.ranks.skips import FEWEST, WINDOW, SkipRule, Verdict

# -- the rule --------------------------------------------------------------------------------------


def usual(rule: SkipRule, steps: int = FEWEST) -> None:
    for step in range(steps):
        assert rule.judge(2.0 + 0.01 * (step % 3), 1.0 + 0.1 * (step % 5)).take


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(bad: float) -> None:
    assert not SkipRule().judge(bad, 1.0).take
    assert not SkipRule().judge(1.0, bad).take
    assert not SkipRule().judge(None, bad).take
    assert SkipRule().judge(None, 1.0).take
    assert SkipRule().judge(1.0, bad).why == f"not finite: norm {bad}"


def test_without_a_factor_nothing_is_a_spike() -> None:
    rule = SkipRule()
    usual(rule, WINDOW)
    assert rule.judge(1e9, 1e9).take


def test_a_spike_is_above_its_factor_times_the_median() -> None:
    rule = SkipRule(spike_norm=10.0, spike_loss=2.0)
    usual(rule)
    assert rule.judge(2.0, 10 * 1.2 - 0.01).take  # the median of the norms is 1.2 and above
    assert not rule.judge(2.0, 10 * 1.3 + 0.01).take
    assert not rule.judge(4.1, 1.0).take
    verdict = rule.judge(2.0, 130.0)
    assert verdict.why.startswith("spike: norm 130, 108.3 times the median 1.2 of the 17 latest")
    assert verdict.in_a_row == 3
    assert rule.judge(2.0, 1.0).in_a_row == 0


def test_nothing_is_a_spike_before_there_is_something_usual() -> None:
    rule = SkipRule(spike_norm=2.0)
    for step in range(FEWEST):
        assert rule.judge(2.0, 100.0 / (step + 1)).take
    assert not rule.judge(2.0, 1000.0).take


def test_spikes_do_not_become_what_is_usual() -> None:
    rule = SkipRule(spike_norm=10.0)
    usual(rule, WINDOW)
    for _ in range(2 * WINDOW):
        assert not rule.judge(2.0, 100.0).take


def test_a_rule_that_is_resumed_gives_the_same_verdicts() -> None:
    draw = random.Random(0)
    numbers = [(draw.uniform(1, 3), draw.lognormvariate(0, 1.5)) for _ in range(300)]
    whole = SkipRule(spike_norm=5.0, spike_loss=1.3)
    expected = [whole.judge(*pair) for pair in numbers]
    assert 10 < sum(not verdict.take for verdict in expected) < 290
    for cut in (1, FEWEST, 40, 150, 299):
        first = SkipRule(spike_norm=5.0, spike_loss=1.3)
        for pair in numbers[:cut]:
            first.judge(*pair)
        second = SkipRule(spike_norm=5.0, spike_loss=1.3)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second.judge(*pair) for pair in numbers[cut:]] == expected[cut:]


@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0, math.inf, math.nan])
def test_a_factor_that_is_none_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="spike_norm is how many times the usual a spike is"):
        SkipRule(spike_norm=factor)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"in_a_row": 0, "loss": [1.0]},
        {"in_a_row": "x", "loss": [], "norm": []},
        {"in_a_row": -1, "loss": [], "norm": []},
        {"in_a_row": 0, "loss": [], "norm": [math.nan]},
        {"in_a_row": 0, "loss": None, "norm": []},
    ],
)
def test_what_is_no_state_is_refused_and_changes_nothing(state: dict[str, Any]) -> None:
    rule = SkipRule(spike_norm=10.0)
    usual(rule)
    before = rule.state_dict()
    with pytest.raises(ConfigError, match="no state of a rule that skips steps"):
        rule.load_state_dict(state)
    assert rule.state_dict() == before


# -- in a loop of one's own ------------------------------------------------------------------------


def _own_loop(poisoned: int | None, left_out: int | None) -> Any:
    """12 steps; one may have a batch that gives no number on one rank, or not be there at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    mics.shard(model, mesh=mesh_of_rank(2, 2), mp_policy=MixedPrecisionPolicy(), collectives="flat")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    verdicts = mics.Verdicts(spike_norm=50)
    answers = []
    for step in range(12):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        batches = list(torch.randn(2, 4, 8, generator=generator))
        if step == left_out:
            continue
        if step == poisoned and dist.get_rank() == 1:
            batches[1][0, 0] = math.inf
        losses = []
        for x in mics.micro_steps(model, batches):
            loss = (model(x) ** 2).mean()
            loss.backward()
            losses.append(loss.detach())
        norm = mics.clip_grad_norm_(model.parameters(), 1.0)
        before = [p.detach().to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
        state = [[v.clone() for v in s.values()] for s in optimizer.state.values()]
        verdict = verdicts.agree(torch.stack(losses).mean(), norm)
        if verdict.take:
            optimizer.step()
        else:
            now = [p.to_local() for p in model.parameters()]  # type: ignore[attr-defined]
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
            kept = [list(s.values()) for s in optimizer.state.values()]
            assert all(
                torch.equal(a, b)
                for x, y in zip(state, kept, strict=True)
                for a, b in zip(x, y, strict=True)
            )
        optimizer.zero_grad()
        answers.append((verdict.take, verdict.why.partition(":")[0]))
    weights = [p.full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]
    return answers, [w.tolist() for w in weights], verdicts.state_dict()


def test_a_poisoned_batch_leaves_no_trace_and_all_ranks_say_the_same() -> None:
    poisoned = run_ranks(_own_loop, 4, 7, None, ranks_per_node=2)
    without = run_ranks(_own_loop, 4, None, 7, ranks_per_node=2)
    assert all(one == poisoned[0] for one in poisoned)
    answers, weights, state = poisoned[0]
    assert answers == [(True, "")] * 7 + [(False, "not finite")] + [(True, "")] * 4
    assert weights == without[0][1]
    assert state == without[0][2]


def _one_rank_spikes() -> list[bool]:
    verdicts = mics.Verdicts(spike_loss=3)
    taken = [verdicts.agree(1.0, torch.tensor(1.0)).take for _ in range(FEWEST)]
    taken.append(verdicts.agree(9.0 if dist.get_rank() == 1 else 1.0, 1.0).take)  # the mean is 5
    return taken


def test_a_loss_that_spikes_on_one_rank_is_skipped_on_all() -> None:
    assert run_ranks(_one_rank_spikes, 2) == [[True] * FEWEST + [False]] * 2


def test_without_other_ranks_there_is_nobody_to_ask() -> None:
    verdicts = mics.Verdicts()
    assert verdicts.agree(torch.tensor(1.0), 2.0) == Verdict(True, "", 0, 1.0, 2.0)
    assert not verdicts.agree(math.nan, 2.0).take
