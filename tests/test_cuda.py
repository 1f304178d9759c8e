"""On a GPU: streams, NCCL, the caching allocator. Ranks may share one GPU (``ranks.py``)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import Outcome, Run, distance, identical, quiet, train_alone, train_sharded
from ranks import run_ranks
from test_parity import ODDITIES
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.profiler import ProfilerActivity, profile

import mics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

WORLD = 4
WIDTH = 2048


def _train(runs: list[Run]) -> list[tuple[Outcome, Outcome]]:
    return [quiet(lambda run=run: (train_sharded(run), train_alone(run, WORLD))) for run in runs]


def assert_parity(runs: list[Run], tolerance: float) -> None:
    by_rank = run_ranks(_train, WORLD, runs, ranks_per_node=2, backend="nccl")
    for position, run in enumerate(runs):
        ours = [pairs[position][0] for pairs in by_rank]
        assert all(identical(ours[0], other) for other in ours), f"ranks differ: {run}"
        apart = distance(ours[0], by_rank[0][position][1])
        assert apart <= tolerance, f"{apart:.2e} apart: {run}"


LAYOUTS = [(1, "flat"), (2, "flat"), (4, "flat"), (4, "hierarchical")]


def test_sgd_equals_single_process_on_the_gpu() -> None:
    runs = [Run(p, 2, collectives=form, micro_steps=s) for p, form in LAYOUTS for s in (1, 3)]
    assert_parity(runs, 2e-6)


def test_oddities_equal_single_process_on_the_gpu() -> None:
    runs = [
        Run(p, 2, collectives=form, steps=3, micro_steps=2, **oddity)
        for name, oddity in ODDITIES.items()
        for p, form in [(2, "flat"), (4, "hierarchical")]
        if name != "reshard_after_forward 2" or p > 2
    ]
    runs += [Run(2, 2, steps=3, shard={"offload_policy": CPUOffloadPolicy()})]
    assert_parity(runs, 2e-6)


def _whole(p: torch.Tensor) -> torch.Tensor:
    return p.full_tensor()  # type: ignore[attr-defined]


def _wide_model(collectives: str, partition: int = 4) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(6)])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return quiet(
        lambda: mics.shard(
            model,
            blocks=[nn.Linear],
            partition=partition,
            gpus_per_node=2,
            collectives=collectives,
            mp_policy=policy,
        )
    )


def _train_wide(collectives: str, partition: int) -> list[torch.Tensor]:
    """Buffers large enough to be reused by the allocator while another stream might read them."""
    model = _wide_model(collectives, partition)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    torch.manual_seed(dist.get_rank())
    for _ in range(8):
        batches = torch.randn(3, 512, WIDTH, device="cuda")
        for batch in mics.micro_steps(model, batches, normalise="micro_steps"):
            model(batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [_whole(p).detach().cpu() for p in model.parameters()]


def _train_wide_both(partition: int) -> bool:
    flat = _train_wide("flat", partition)
    again = _train_wide("flat", partition)
    assert all(torch.equal(a, b) for a, b in zip(flat, again, strict=True)), "not reproducible"
    staged = _train_wide("hierarchical", partition)
    scale = max(p.abs().max() for p in flat)
    return all((a - b).abs().max() <= 1e-5 * scale for a, b in zip(flat, staged, strict=True))


def test_no_buffer_is_reused_while_a_stream_still_reads_it() -> None:
    """A race would differ from run to run, and between one stage and two."""
    for partition in (2, 4):
        assert all(run_ranks(_train_wide_both, WORLD, partition, ranks_per_node=2, backend="nccl"))


def _ledger_on_gpu() -> tuple[bool, dict[str, Any]]:
    model = _wide_model("hierarchical")
    view = mics.ledger(model)
    view.reset()
    for batch in mics.micro_steps(model, torch.randn(2, 64, WIDTH, device="cuda")):
        model(batch).float().square().mean().backward()
    equal = view.traffic() == mics.predict_traffic(model, micro_steps=2)
    torch.cuda.synchronize()
    return equal, {str(key): seconds for key, seconds in view.seconds().items()}


def test_the_ledger_counts_and_times_without_synchronising() -> None:
    for equal, seconds in run_ranks(_ledger_on_gpu, WORLD, ranks_per_node=2, backend="nccl"):
        assert equal
        assert len(seconds) == 4  # two collectives of two stages; one replica, no hop 2
        assert all(s.total > 0 and s.exposed is None for s in seconds.values())


def _unshard_ahead(collectives: str) -> bool:
    model = _wide_model(collectives)
    before = [_whole(p).detach().bfloat16() for p in model.parameters()]
    handles = [layer.unshard(async_op=True) for layer in model]
    for handle in handles:
        handle.wait()
    gathered = [p.detach() for layer in model for p in layer.parameters()]
    return all(torch.equal(a, b) for a, b in zip(before, gathered, strict=True))


@pytest.mark.parametrize("collectives", ["flat", "hierarchical"])
def test_unshard_may_run_ahead(collectives: str) -> None:
    assert all(run_ranks(_unshard_ahead, WORLD, collectives, ranks_per_node=2, backend="nccl"))


def _hop_two_timeline() -> tuple[float, float, int]:
    """First start of an all-reduce, last end of a matrix product (microseconds); all-reduces."""
    model = _wide_model("flat", partition=2)

    def step() -> None:
        for batch in mics.micro_steps(model, torch.randn(2, 4096, WIDTH, device="cuda")):
            model(batch).float().square().mean().backward()

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    reduces = [e.time_range for e in kernels if "AllReduce" in e.name and "nccl" in e.name.lower()]
    products = [e.time_range for e in kernels if re.search("gemm|nvjet|cutlass", e.name)]
    return min(r.start for r in reduces), max(p.end for p in products), len(reduces)


def test_hop_two_runs_beside_the_last_backward() -> None:
    for first, last, count in run_ranks(_hop_two_timeline, 4, ranks_per_node=2, backend="nccl"):
        assert first < last
        assert count >= 6, "one all-reduce for each of six units, and none more than once"
