"""What mics asks of a model again and again is asked by short ways, which must find the same."""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from mics import compat

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from host_cost import count


class _Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class _Record:
    first: Any
    second: Any


def _needs() -> torch.Tensor:
    return torch.ones(2, requires_grad=True)


_STRUCTURES = {
    "a tensor": _needs(),
    "one that needs none": torch.ones(2),
    "a parameter": nn.Parameter(torch.ones(2)),
    "arguments": ((_needs(), None, 3, "x", torch.ones(2)), {"mask": _needs(), "flag": True}),
    "containers in containers": [{"a": (_needs(), [_needs()])}, (), OrderedDict(b=_needs())],
    "named": _Pair(_needs(), _Pair([_needs()], 1)),
    "a dataclass": [_Record(_needs(), {"x": _needs()}), _Record],
    "what transformers return": (BaseModelOutput(last_hidden_state=_needs()), _needs()),
    "what torch does not look into": ({1, 2}, iter([_needs()]), nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", _STRUCTURES)
def test_tensors_that_need_gradients_are_those_that_fsdp2_finds_in_its_order(name: str) -> None:
    from torch.distributed.fsdp import _common_utils

    by_torch = getattr(_common_utils, "collect_grad_tensors", None)
    if by_torch is None:
        pytest.skip("this torch looks for them in another way")
    found, expected = compat.tensors_with_grad(_STRUCTURES[name]), by_torch(_STRUCTURES[name])
    assert [id(one) for one in found] == [id(one) for one in expected]


def test_modules_are_those_of_torch_in_its_order() -> None:
    shared = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), shared), shared, nn.ModuleList([shared]))
    model.register_module("nothing", None)
    assert compat.modules_under(model) == list(model.modules())
    own = [param for module in compat.modules_under(model) for param in compat.own_params(module)]
    assert {id(param) for param in own} == {id(param) for param in model.parameters()}


@pytest.mark.parametrize(
    ("partition", "mine", "peer", "most"),
    [(2, "mics", "fsdp2", 1.45), (1, "mics p=1", "hsdp deferred", 1.05)],
)
def test_a_step_asks_not_much_more_of_the_interpreter_than_fsdp2s(
    partition: int, mine: str, peer: str, most: float
) -> None:
    ours, theirs = run_ranks(count, 2, partition, [mine, peer], 3, 2)[0]
    assert ours["calls"] < most * theirs["calls"]
