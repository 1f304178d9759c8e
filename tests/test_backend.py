"""A backend is one class and one line: a third one, made up here, trains like one process."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import Run, Stack, distance, quiet, train_alone, train_sharded
from ranks import errors_of_ranks, run_ranks

import mics
from mics import compat
from mics.communication import backend
from mics.communication.backend import Gloo, Issue, Lane, Piece, Program, Streams, with_handle
from mics.communication.ledger import Timed

WORLD = 4
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


class Third:
    """Gloo under another name, which reduces piece by piece as a ring would and never exchanges."""

    blocks = True
    reduces_by_all_reduce = False

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def beside(
        self, program: Callable[[Issue], Program], device: torch.device, lane: Lane
    ) -> dist.Work:
        self.calls[lane] += 1
        return Gloo().beside(lambda issue: program(with_handle), device, lane)

    def gather(self, output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup) -> None:
        Gloo().gather(output, input, group)

    def reduce(
        self,
        pieces: Sequence[Piece],
        op: compat.ReduceOp,
        group: dist.ProcessGroup,
        span: Timed,
        issue: Issue,
    ) -> Program:
        self.calls["reduce"] += len(pieces)
        with span:
            for output, input in pieces:
                compat.reduce_scatter(output, input, op, group)
        yield


def start_again(name: str) -> None:
    """Make the world anew on a backend of another name, which is Gloo underneath."""
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    dist.barrier()  # or a rank would leave while another one is still connecting to it
    dist.destroy_process_group()

    def make(prefix: Any, rank: int, size: int, timeout: Any) -> Any:
        return dist.ProcessGroupGloo(prefix, rank, size, timeout=timeout)

    dist.Backend.register_backend(name, make, devices=["cpu"])
    again = dist.PrefixStore(name, store)
    dist.init_process_group(name, store=again, rank=rank, world_size=WORLD)


def train_on(
    name: str, made_up: Any, partition: int, form: Any, overlap: bool
) -> tuple[float, bool]:
    backend.BACKENDS[name] = made_up
    start_again(name)
    run = Run(partition, 2, collectives=form, micro_steps=2, shard={"overlap": overlap}, steps=2)
    apart = distance(quiet(lambda: train_sharded(run)), train_alone(run, WORLD))
    model = quiet(
        lambda: mics.shard(
            Stack(), partition=partition, gpus_per_node=2, collectives=form, overlap=overlap
        )
    )
    view = mics.ledger(model)
    view.reset()
    for _ in mics.micro_steps(model, range(2)):
        model(torch.ones(2, 13)).sum().backward()
    return apart, view.traffic() == mics.predict_traffic(model, micro_steps=2)


def train_on_a_third(partition: int, form: Any, overlap: bool) -> tuple[float, bool, set[str]]:
    third = Third()
    apart, counted = train_on("third", third, partition, form, overlap)
    return apart, counted, set(third.calls)


@pytest.mark.parametrize(
    ("partition", "form", "overlap", "asked"),
    [
        (2, "flat", False, {"hop 2"}),
        (2, "flat", True, {"gathers", "hop 2", "reduce"}),
        (4, "hierarchical", False, {"reduce"}),
        (4, "hierarchical", True, {"gathers", "reduce"}),
    ],
)
def test_a_third_backend_trains_as_one_process_and_is_counted(
    partition: int, form: Any, overlap: bool, asked: set[str]
) -> None:
    for apart, counted, calls in run_ranks(train_on_a_third, WORLD, partition, form, overlap):
        assert apart < 1e-6
        assert counted
        assert calls == asked


def train_on_contributings(partition: int) -> tuple[float, bool]:
    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    names = {**vars(backend)}
    exec(code, names)
    return train_on("slow", names["Slow"](), partition, "hierarchical", True)


@pytest.mark.parametrize("partition", [2, 4])
def test_the_class_that_contributing_shows_is_a_backend(partition: int) -> None:
    for apart, counted in run_ranks(train_on_contributings, WORLD, partition):
        assert apart < 1e-6
        assert counted


def shard_on_an_unknown() -> None:
    start_again("fourth")
    quiet(lambda: mics.shard(Stack(), partition=2, gpus_per_node=2))


def test_an_unknown_backend_is_refused_by_name() -> None:
    for text in errors_of_ranks(shard_on_an_unknown, WORLD):
        assert "mics does not know how the backend 'fourth' behaves" in text
        assert "known are gloo, nccl, xccl, hccl, fake" in text
        assert "communication/backend.py" in text


def backends_of_devices() -> tuple[bool, bool]:
    group = dist.group.WORLD
    assert group is not None
    on_host = backend.backend_of(group, torch.device("cpu"))
    return isinstance(on_host, Gloo), isinstance(backend.BACKENDS["nccl"], Streams)


def test_the_backend_is_the_one_that_serves_the_device() -> None:
    assert run_ranks(backends_of_devices, 2) == [(True, True)] * 2
