"""Uneven loaders end together, with the weights of one process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import UnevenMLP
from parity import quiet
from ranks import run_ranks

import mics
from mics.errors import MicroStepError

LENGTHS = [5, 9, 4, 7]  # micro-batches of each rank: 2 whole steps of 2 on rank 2, more elsewhere
STEPS, MICRO_STEPS = 2, 2


def loader(rank: int, read: list[int]) -> Iterator[torch.Tensor]:
    for i in range(LENGTHS[rank]):
        read.append(i)
        yield UnevenMLP().example(100 * rank + i)[0]


def one_process() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = UnevenMLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loaders = [loader(rank, []) for rank in range(4)]
    for _ in range(STEPS):
        for one in loaders:
            for _ in range(MICRO_STEPS):
                (model(next(one)).square().mean() / len(loaders)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def on_ranks(with_model: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model, said, read, read_in_step = UnevenMLP(), io.StringIO(), [], []
    quiet(lambda: mics.shard(model, partition=2, gpus_per_node=2, blocks=list(model.blocks),
                             mp_policy=torch.distributed.fsdp.MixedPrecisionPolicy()))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = loader(dist.get_rank(), read)
    with contextlib.redirect_stderr(said):
        for step in mics.steps(
            batches, micro_steps=MICRO_STEPS, model=model if with_model else None
        ):
            read_in_step.append(len(read))
            for x in mics.micro_steps(model, step):
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    return {"weights": weights, "said": said.getvalue(), "read": read_in_step}


@pytest.mark.parametrize("with_model", [False, True])
def test_uneven_loaders_end_together_with_the_weights_of_one_process(with_model: bool) -> None:
    results = run_ranks(on_ranks, 4, with_model)
    for result in results:
        assert result["read"] == [2, 4]  # nothing was read ahead
        for name, weight in one_process().items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-6)
    assert results[0]["said"] == (
        "mics: the loaders have ended after 2 step(s) of 2 micro-batch(es); micro-batches that are "
        "left over: rank(s) 2: 0; rank(s) 0: 1; rank(s) 1, 3: a whole step or more\n"
    )
    assert [result["said"] for result in results[1:]] == ["", "", ""]


def test_a_process_alone_needs_no_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(mics.steps(range(6), micro_steps=3)) == [[0, 1, 2], [3, 4, 5]]
    assert capsys.readouterr().err == ""
    assert list(mics.steps("abc", micro_steps=2)) == [["a", "b"]]
    assert "left over: rank(s) 0: 1" in capsys.readouterr().err
    assert list(mics.steps([])) == []


@pytest.mark.parametrize("wrong", [0, -1, 1.0, True, "4"])
def test_a_number_of_micro_steps_is_checked_before_the_first_batch(wrong: Any) -> None:
    with pytest.raises(MicroStepError, match=r"is not a number of micro-batches"):
        mics.steps([1, 2], micro_steps=wrong)
