"""Hierarchical collectives equal flat ones, for every dtype and reduction FSDP2 uses."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import mics
from mics import compat
from mics.communication import forms
from mics.communication.backend import Gloo, at_once, run
from mics.communication.collectives import AllGather, ReduceScatter
from mics.communication.forms import decide_by
from mics.communication.ledger import Ledger, Untimed
from mics.ranks import issuing
from mics.ranks.mesh import Groups, groups_of, ranks_of, stage_groups
from mics.traffic import Key

N = 5  # elements of a shard: odd on purpose


def _comms(form: Any, partition: int = 8, k: int = 2) -> tuple[Groups, Ledger, AllGather, Any]:
    groups = groups_of(mics.init_mesh(partition=partition, gpus_per_node=k))
    ledger = Ledger(rank=dist.get_rank(), gpus_per_node=k)
    decide = decide_by(groups, form)
    return groups, ledger, AllGather(groups, ledger, decide), ReduceScatter(groups, ledger, decide)


def _shard_of(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(N) + 10 * rank).to(dtype)


def _gather(partition: int, k: int, dtype: torch.dtype, async_op: bool) -> None:
    groups, ledger, gather, _ = _comms("hierarchical", partition, k)
    group = groups.shard
    output = gather.allocate((partition * N,), dtype=dtype, device=torch.device("cpu"))
    output.zero_()
    mine = output.narrow(0, N * group.rank(), N)  # as FSDP2 does: the input is in the output
    mine.copy_(_shard_of(dist.get_rank(), dtype))
    work = gather(output, mine, group, async_op=async_op)
    if async_op:
        assert isinstance(work, dist.Work)
        work.wait()
        work.wait()  # waiting twice is allowed
    else:
        assert work is None
    expected = torch.cat([_shard_of(r, dtype) for r in ranks_of(group)])
    assert torch.equal(output, expected)
    calls = {key.stage: count.calls for key, count in ledger.traffic().counts.items()}
    assert calls == ({"inter": 1, "intra": 1} if partition > k > 1 else {"flat": 1})


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize(("partition", "k"), [(8, 2), (8, 4), (4, 2), (4, 4), (4, 1)])
def test_all_gather_puts_every_shard_in_group_rank_order(
    partition: int, k: int, async_op: bool
) -> None:
    run_ranks(_gather, 8, partition, k, torch.float32, async_op)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.int64])
def test_all_gather_moves_bytes_of_any_dtype(dtype: torch.dtype) -> None:
    run_ranks(_gather, 8, 8, 2, dtype, False)


def _reduce(op_name: str, dtype: torch.dtype, partition: int, k: int) -> None:
    op = getattr(dist.ReduceOp, op_name)
    groups, ledger, _, scatter = _comms("hierarchical", partition, k)
    _, _, _, flat = _comms("flat", partition, k)
    rank, p = groups.shard.rank(), groups.shard.size()
    cpu = torch.device("cpu")
    inputs = [
        torch.randint(-8, 8, (p * N,), generator=torch.Generator().manual_seed(r)).to(dtype)
        for r in ranks_of(groups.shard)
    ]
    outputs = []
    for comm in (scatter, flat):
        whole = comm.allocate((p * N,), dtype=dtype, device=cpu)
        whole.copy_(inputs[rank])
        output = comm.allocate((N,), dtype=dtype, device=cpu)
        comm(output, whole, groups.shard, op)
        outputs.append(output)
    total = torch.stack([i.double() for i in inputs]).sum(0)[rank * N : (rank + 1) * N]
    exact = total / p if op_name == "AVG" else total  # small integers: exact in every dtype here
    assert torch.equal(outputs[0].double(), exact)
    assert torch.equal(outputs[0], outputs[1])
    assert {k.stage for k in ledger.traffic().counts} == {"inter", "intra"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["AVG", "SUM"])
def test_two_stage_reductions_are_exact(op: str, dtype: torch.dtype) -> None:
    run_ranks(_reduce, 8, op, dtype, 8, 2)


def _premul_sum(factor: float) -> Any:
    kind: Any = dist.ReduceOp.PREMUL_SUM
    return kind(factor) if callable(kind) else dist._make_nccl_premul_sum(factor)  # before 2.13


def _premul_stages() -> None:
    """Gloo has no PREMUL_SUM; what matters is which stage is asked for which operation."""
    groups, _, _, scatter = _comms("hierarchical")
    premul = _premul_sum(0.25)
    assert compat.is_premul_sum(premul)
    assert not compat.is_premul_sum(dist.ReduceOp.SUM)
    assert not compat.is_premul_sum(dist.ReduceOp.AVG)
    asked: list[Any] = []
    real: Any = Gloo.reduce

    def recording(self: Any, pieces: Any, op: Any, group: Any, *rest: Any) -> Any:
        asked.extend((group.size(), op) for _ in pieces)
        scale = 0.25 if compat.is_premul_sum(op) else 1.0
        scaled = [(output, input * scale) for output, input in pieces]
        return real(self, scaled, dist.ReduceOp.SUM, group, *rest)

    Gloo.reduce = recording  # type: ignore[method-assign]  # this forked process only
    whole, output = torch.ones(8 * N), torch.empty(N)
    scatter(output, whole, groups.shard, premul)
    assert torch.equal(output, torch.full((N,), 8 * 0.25))
    intra, inter = asked[:-1], asked[-1]
    assert len(intra) == 4 and all(size == 2 and op is premul for size, op in intra)
    assert inter == (4, dist.ReduceOp.SUM)


def test_premul_sum_scales_in_the_first_stage_only() -> None:
    run_ranks(_premul_stages, 8)


class _Copies(TorchDispatchMode):
    """Counts the operators that copy data, those inside Gloo's collectives included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        copying = ("copy", "clone", "cat", "index", "contiguous")
        self.count += name.startswith("aten::") and any(word in name for word in copying)
        return func(*args, **(kwargs or {}))


def _count_copies() -> dict[str, int]:
    copies = {}
    for form in ("flat", "hierarchical"):
        groups, _, gather, scatter = _comms(form)
        output = torch.zeros(8 * N)
        mine = output.narrow(0, N * groups.shard.rank(), N)
        with _Copies() as counted:
            gather(output, mine, groups.shard)
        copies[f"{form} all_gather"] = counted.count
        with _Copies() as counted:
            scatter(torch.empty(N), torch.ones(8 * N), groups.shard, dist.ReduceOp.SUM)
        copies[f"{form} reduce_scatter"] = counted.count
    return copies


def test_no_stage_reorders_by_copying() -> None:
    """A flat reduce-scatter over nodes reduces in a copy, as Gloo's own; the exchange does not."""
    copies = run_ranks(_count_copies, 8)[0]
    assert copies["flat all_gather"] == copies["hierarchical all_gather"] == 0
    assert copies["flat reduce_scatter"] == 2  # into it, and this rank's row out of it
    assert copies["hierarchical reduce_scatter"] == 0


def _exchange(op_name: str, dtype: torch.dtype) -> None:
    """Against Gloo's own, on numbers whose sums are exact, and on ones that round."""
    group = dist.group.WORLD
    assert group is not None
    op = getattr(dist.ReduceOp, op_name)
    seeded = torch.Generator().manual_seed(dist.get_rank())
    for numbers in (torch.randint(-8, 8, (4 * N,), generator=seeded), torch.randn(4 * N)):
        input = numbers.to(dtype)
        ours, theirs = torch.empty(N, dtype=dtype), torch.empty(N, dtype=dtype)
        run(Gloo().reduce([(ours, input.clone())], op, group, Untimed(), at_once))
        compat.reduce_scatter(theirs, input.clone(), op, group)
        if numbers.dtype == torch.int64:
            assert torch.equal(ours, theirs)
        assert torch.allclose(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)
    # And one that is waited for in slices, over ranks that are not neighbours.
    first = dist.get_rank() % 2
    apart = dist.new_group([first, first + 2], use_local_synchronization=True)
    ours, theirs, input = (torch.ones(n, dtype=dtype) for n in (N, N, 2 * N))
    input += torch.arange(2 * N) + dist.get_rank()
    issuing.reduce_scatter(ours, input.clone(), op, apart)
    compat.reduce_scatter(theirs, input.clone(), op, apart)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["AVG", "SUM"])
def test_an_exchange_and_a_sum_is_a_reduce_scatter(op: str, dtype: torch.dtype) -> None:
    run_ranks(_exchange, 4, op, dtype)


class _Calls(TorchDispatchMode):
    """Notes the collectives of torch by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::"):
            self.names.add(func.name().removeprefix("c10d::"))
        return func(*args, **(kwargs or {}))


def _calls_of_gloo() -> set[str]:
    groups, _, gather, scatter = _comms("hierarchical")
    with _Calls() as calls:
        gather(torch.empty(8 * N), torch.empty(N), groups.shard)
        scatter(torch.empty(N), torch.ones(8 * N), groups.shard, dist.ReduceOp.SUM)
    return calls.names


def test_nothing_is_coalesced_on_gloo() -> None:
    """Its threads free the name of such a call twice when two calls end at once."""
    assert run_ranks(_calls_of_gloo, 8)[0] == {"_allgather_base_", "alltoall_base_"}


def _two_groups() -> dict[Any, int]:
    """reshard_after_forward=int calls one object with two groups."""
    groups, ledger, gather, _ = _comms("hierarchical")
    for ranks in (list(range(8)), [0, 1, 2, 3] if dist.get_rank() < 4 else [4, 5, 6, 7]):
        group = dist.new_group(ranks, use_local_synchronization=True)
        output = torch.zeros(len(ranks) * N)
        mine = output.narrow(0, N * group.rank(), N)
        mine.copy_(_shard_of(dist.get_rank(), torch.float32))
        gather(output, mine, group)
        assert torch.equal(output, torch.cat([_shard_of(r, torch.float32) for r in ranks]))
        pair = stage_groups(groups, tuple(ranks))
        assert pair is not None and pair.inter.size() == len(ranks) // 2
    return {key: count.calls for key, count in ledger.traffic().counts.items()}


def test_one_object_serves_groups_of_different_size() -> None:
    calls = run_ranks(_two_groups, 8)[0]
    assert calls == {Key(1, "all_gather", "inter"): 2, Key(1, "all_gather", "intra"): 2}


def _chosen_beside_each_other() -> dict[Any, str]:
    """Two meshes that find otherwise which form is faster, of two sizes; one has a profile."""
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("shard", "tp"))
    groups = groups_of(mesh["shard"], gpus_per_node=4)
    faster = {"flat": (1.0, 2.0), "hierarchical": (2.0, 1.0)}
    found = faster["flat" if mesh.get_local_rank("tp") else "hierarchical"]
    forms._time_forms = lambda *_: found  # type: ignore[assignment]
    os.environ["MICS_PROFILE"] += str(mesh.get_local_rank("tp"))
    for message_bytes in (2**10, 2**20):
        ranks = ranks_of(groups.shard)
        forms.measure(groups, groups.shard, ranks, "all_gather", message_bytes, torch.float32)
    return dict(forms.choices_of(groups))


def test_meshes_beside_each_other_choose_alike_whatever_each_of_them_measures() -> None:
    first, *others = run_ranks(_chosen_beside_each_other, 8)
    assert len(first) == 2
    assert others == [first] * 7
