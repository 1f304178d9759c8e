"""Activations on the host: the same training, less kept on the device, weights left alone."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate

import mics
from mics import compat
from mics.anatomy.anatomy import Anatomy
from mics.anatomy.offloaded import away, leaving, pinned_bytes
from mics.anatomy.trace import ROOT, Segment, Trace
from mics.errors import PlanError, ShardError
from mics.hardware.cluster import Cluster, Host, Node
from mics.hardware.lookup import find_node
from mics.planning.answer import Plans
from mics.quantities import GIB
from mics.sharding.host_copies import Lanes
from mics.sharding.offload import SMALLEST, Offload, offload_of
from mics.sharding.units import units_of

WIDTH, ROWS = 64, 256  # a row of activations of every block is as large as the smallest that leaves
ONE = WIDTH * ROWS * 4


class Block(nn.Module):
    """Saves its input and the norm's output, one each, and a hidden of four; the weights are views
    of what is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((ROWS, WIDTH), 0.5))
        self.hidden: weakref.ref[torch.UntypedStorage] | None = None
        self.fails = self.writes = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(self.norm(x)))
        self.hidden = weakref.ref(hidden.untyped_storage())
        if self.fails:
            raise ValueError("on purpose")
        if self.writes:
            out = self.down(hidden)
            hidden.detach().add_(1)
            return out
        return x + self.down(hidden) * self.scale


class Model(nn.Module):
    def __init__(self, uses: int = 1, tied: bool = False) -> None:
        super().__init__()
        self.uses = uses
        self.skip: int | None = None
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        if tied:
            self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            for _ in range(0 if number == self.skip else self.uses):
                x = block(x)
        return self.last(x)


def sharded(partition: int, model: dict[str, Any], **options: Any) -> Model:
    torch.manual_seed(0)
    made = Model(**model)
    mesh = mesh_of_rank(partition)
    return mics.shard(made, mesh=mesh, mp_policy=MixedPrecisionPolicy(), **options)


def trained(
    partition: int, model: dict[str, Any], *, skips: bool = False, **options: Any
) -> tuple[list[float], list[torch.Tensor], Offload | None]:
    one = sharded(partition, model, **options)
    optimizer = torch.optim.AdamW(one.parameters())
    losses = []
    rank = torch.distributed.get_rank()
    torch.manual_seed(1 + rank)
    for _ in range(2):
        one.skip = rank % 3 if skips else None
        for part in mics.micro_steps(one, list(torch.randn(2, ROWS, WIDTH))):
            loss = one(part).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            one(torch.ones(ROWS, WIDTH))
    return losses, [compat.local_of(p).clone() for p in one.parameters()], offload_of(one)


CASES: list[dict[str, Any]] = [
    {},
    {"activation_checkpointing": True},
    {"model": {"uses": 2, "tied": True}, "reshard_after_forward": False},
    {"model": {"uses": 2}, "activation_checkpointing": True},
    {"skips": True},
    {"skips": True, "activation_checkpointing": True, "overlap": False},
]


def same(partition: int, case: dict[str, Any]) -> Offload:
    options = {"model": {}} | case
    stays, leaves = (
        trained(partition, **options),
        trained(partition, **options, activation_offload=True),
    )
    assert stays[0] == leaves[0], case
    assert all(torch.equal(a, b) for a, b in zip(stays[1], leaves[1], strict=True)), case
    assert stays[2] is None and leaves[2] is not None
    return leaves[2]


def micro_steps_bytes(case: dict[str, Any], blocks: int) -> int:
    """What leaves in two steps of two micro-steps; a block's output is the next one's input."""
    uses = case.get("model", {}).get("uses", 1)
    of_block = 1 if case.get("activation_checkpointing") else 6
    return 4 * blocks * uses * of_block * ONE


def test_four_ranks_train_to_the_same_bits_and_send_what_blocks_save() -> None:
    def train() -> None:
        for case in CASES:
            offload = same(2, case)
            blocks = 3 if case.get("skips") else 4
            assert offload.copied_bytes == micro_steps_bytes(case, blocks), case
            assert offload.host_bytes == 0

    run_ranks(train, 4)


def test_on_one_rank_the_device_keeps_what_one_block_saves() -> None:
    def train() -> None:
        same(1, {})
        for checkpointing in (False, True):
            model = sharded(1, {}, activation_checkpointing=checkpointing, activation_offload=True)
            loss = model(torch.ones(ROWS, WIDTH)).sum()
            alive = [
                block.hidden is not None and block.hidden() is not None for block in model.blocks
            ]
            assert alive == [False, False, False, not checkpointing]
            offload = offload_of(model)
            assert offload is not None
            assert offload.host_bytes == 4 * (1 if checkpointing else 6) * ONE
            assert 0 <= offload.stayed_bytes < SMALLEST
            loss.backward()
            del loss
            assert offload.host_bytes == 0
            assert offload.most_host_bytes == 4 * (1 if checkpointing else 6) * ONE

    run_ranks(train, 1)


def test_a_gathered_weight_is_freed_after_forward_though_backward_needs_it() -> None:
    def train() -> None:
        model = sharded(2, {}, activation_offload=True)
        loss = model(torch.ones(ROWS, WIDTH)).sum()
        sizes = [
            compat.local_of(param).untyped_storage().nbytes()
            for unit in units_of(model)
            if unit.name.startswith("blocks.") and not unit.name.startswith("blocks.3")
            for param in compat.gathered_params(unit.group)
        ]
        assert sizes and not any(sizes)
        loss.backward()

    run_ranks(train, 2)


def test_a_forward_that_fails_leaves_no_hook_behind() -> None:
    def train() -> None:
        model = sharded(1, {}, activation_offload=True)
        model.blocks[1].fails = True
        with pytest.raises(ValueError, match="on purpose"):
            model(torch.ones(ROWS, WIDTH))
        offload = offload_of(model)
        assert offload is not None
        before = offload.copied_bytes
        torch.ones(ROWS, WIDTH, requires_grad=True).square()
        assert offload.copied_bytes == before

    run_ranks(train, 1)


def test_what_backward_needs_and_somebody_wrote_is_refused() -> None:
    def train() -> None:
        for number in (1, 3):  # one whose copy has left, and one whose copy has not
            model = sharded(1, {}, activation_offload=True)
            model.blocks[number].writes = True
            with pytest.raises(ShardError, match="written in place after it was saved"):
                model(torch.ones(ROWS, WIDTH)).sum().backward()

    run_ranks(train, 1)


class Writes(nn.Module):
    """Writes in place, after it was saved, what stays on the device."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(8))
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x) * self.scale
        small = y.exp()
        result = small * 1.0
        with torch.no_grad():
            if self.what == "small":
                small.add_(1)
            elif self.what == "buffer":
                self.scale.mul_(0.5)  # type: ignore[operator]
            else:
                self.layer.weight.mul_(0.5)
        return result


@pytest.mark.parametrize("what", ["small", "buffer", "weight"])
def test_writing_to_what_stays_is_refused_as_torch_refuses_it(what: str) -> None:
    def train() -> None:
        x = torch.ones(4, 8, requires_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            Writes(what)(x).sum().backward()
        block = Writes(what)
        model = mics.shard(
            nn.Sequential(block, nn.Linear(8, 8)),
            mesh=mesh_of_rank(1),
            blocks=[block],
            mp_policy=MixedPrecisionPolicy(),
            activation_offload=True,
        )
        with pytest.raises(ShardError, match="written in place after it was saved"):
            model(x).sum().backward()

    run_ranks(train, 1)


def test_a_tensor_on_a_mesh_comes_back_as_one() -> None:
    def train() -> None:
        mesh = mesh_of_rank(1)["shard"]
        block = nn.Identity()
        offload = Offload(nn.Sequential(block), [block], torch.device("cpu"))
        offload._enter(block, ())
        whole = DTensor.from_local(torch.randn(ROWS, WIDTH), mesh, [Replicate()])
        packed = offload._pack(whole.detach().t())
        offload._leave(block, ())
        assert offload.copied_bytes == ONE
        back = offload._unpack(packed)
        assert isinstance(back, DTensor) and back.placements == whole.placements
        assert torch.equal(back.to_local(), whole.to_local().t())
        assert back.stride() == (1, WIDTH)

    run_ranks(train, 1)


def test_views_of_one_storage_leave_once_and_graphs_that_are_dropped_free_the_host() -> None:
    def train() -> None:
        block = nn.Identity()
        offload = Offload(nn.Sequential(block), [block], torch.device("cpu"))
        offload._enter(block, ())
        x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
        q, k = (x * 1.0).unbind(0)
        y = q.sin() * k.cos()
        offload._leave(block, ())
        (found,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        a, b = x.detach().unbind(0)
        assert torch.equal(found, torch.stack([a.cos() * b.cos(), -a.sin() * b.sin()]))
        # x is a leaf that x * 1.0 does not save; q and k are views of one; sin and cos are two.
        assert offload.copied_bytes == 2 * ONE + 2 * ONE
        del y
        gc.collect()
        assert offload.host_bytes == 0

    run_ranks(train, 1)


class Cells(nn.Module):
    """Writes in place to pieces of one storage that are no views of each other, and saves each."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(WIDTH, WIDTH), nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, cell = self.lstm(x)
        out: torch.Tensor = self.gru(hidden) + cell
        return out


class Conjugate(nn.Module):
    """Saves a tensor whose values are the negatives of those in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        negative = torch.complex(x, 2 * x).conj().imag
        assert negative.is_neg()
        return negative * x


@pytest.mark.parametrize("block", [Cells, Conjugate])
def test_gradients_are_right_where_memory_is_shared_or_means_something_else(block: Any) -> None:
    def gradients(leaves: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(block(), block())
        if leaves:
            Offload(model, list(model), torch.device("cpu"))
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        inputs = [x, *model.parameters()]
        return list(torch.autograd.grad(model(x).square().sum(), inputs))

    for stays, leaves in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(stays, leaves)


def test_writing_to_a_tensor_on_a_mesh_is_noticed() -> None:
    def train() -> None:
        mesh = mesh_of_rank(1)["shard"]
        block = nn.Identity()
        offload = Offload(nn.Sequential(block), [block], torch.device("cpu"))
        offload._enter(block, ())
        whole = DTensor.from_local(torch.ones(ROWS, WIDTH), mesh, [Replicate()])
        before = offload._pack(whole)
        whole.add_(1)
        after = offload._pack(whole)
        offload._leave(block, ())
        assert torch.equal(offload._unpack(after).to_local(), torch.full((ROWS, WIDTH), 2.0))
        with pytest.raises(ShardError, match="written in place after it was saved"):
            offload._unpack(before)

    run_ranks(train, 1)


# dynamo looks at .grad of non-leaf tensors itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_bits() -> None:
    def train() -> None:
        compiled = {"compile": {"backend": "aot_eager"}}
        for more in ({}, {"activation_checkpointing": True}):
            case = compiled | more
            assert same(2, case).copied_bytes == micro_steps_bytes(case, 4)

    run_ranks(train, 2)


def test_on_the_host_a_copy_is_made_at_once() -> None:
    source = torch.arange(4)
    copy = Lanes(torch.device("cpu")).send(source)
    source.add_(1)
    assert copy.tolist() == [0, 1, 2, 3]


# -- what is planned -------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_leaves_is_what_was_predicted(checkpointing: bool) -> None:
    def trace_loss(model: Any, micro_batch: int, sequence: int) -> torch.Tensor:
        rows = torch.zeros(micro_batch * sequence, WIDTH, device="meta")
        loss: torch.Tensor = model(rows).square().mean()
        return loss

    with torch.device("meta"):
        planned = Anatomy(_Traced(), trace_loss)
    predicted = sum(leaving(planned.trace(1, ROWS), checkpointing))

    def train() -> int:
        options: dict[str, Any] = {"activation_checkpointing": checkpointing}
        model = mics.shard(
            _Traced(),
            mesh=mesh_of_rank(1),
            mp_policy=MixedPrecisionPolicy(),
            activation_offload=True,
            **options,
        )
        model(torch.ones(ROWS, WIDTH)).square().mean().backward()
        offload = offload_of(model)
        assert offload is not None
        return offload.copied_bytes

    (measured,) = run_ranks(train, 1)
    small = 4 * 2 * ROWS * 4  # mean and deviation of every norm, which stay
    assert predicted - (0 if checkpointing else small) == measured


class _Traced(Model):
    """Without what cannot be traced: a block that looks at its own storages."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Plain() for _ in range(4))


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def _trace(blocks: int = 4) -> Trace:
    """Every block is given 10 bytes, keeps 30 and its output of 10, and 5 come and go."""
    start, segments = 10, []
    for unit in range(blocks):
        segments.append(Segment(unit, "forward", start, start + 45, 0, start + 40, ()))
        start += 40
    segments.append(Segment(ROOT, "forward", start, start + 7, 0, start, ()))
    for unit in reversed(range(blocks)):
        segments.append(Segment(unit, "backward", start, start + 5, 0, start - 40, ()))
        start -= 40
    return Trace(tuple(segments), (16, *[10] * (blocks - 1)))


def test_two_blocks_are_on_the_device_in_backward_and_one_at_the_loss() -> None:
    trace = _trace()
    assert leaving(trace, False) == (40, 40, 40, 40)  # of the first block's input 6 stay
    assert leaving(trace, True) == (10, 10, 10, 10)
    assert away(trace, False) == [0, 0, 40, 80, 120]
    assert pinned_bytes(trace, True) == 2 * 40


def _node(memory: float | None, rate: float = 25.0) -> Node:
    host = None if memory is None else Host(memory * GIB, rate * 1e9)
    return replace(find_node("p4d"), host=host)


def planned(node: Node, **options: Any) -> Plans:
    how = {"partitions": (8,), "micro_batches": (8,), "checkpointing": (False,)} | options
    return mics.plan("bert-10b", Cluster(node, 4), sequence=512, **how)


@pytest.mark.slow
def test_activations_leave_where_they_do_not_fit_and_the_host_has_the_memory() -> None:
    best = planned(_node(1152)).best
    assert best.way.offload and best.way.setting == "micro-batch 8, offload"
    assert best.simulated.step.exposed[3] > 0
    assert "up to" in planned(_node(1152)).report()
    stays = planned(_node(1152), micro_batches=(2,)).best
    assert not stays.way.offload and stays.host.total == 0  # it fits, and is faster
    slower = planned(_node(1152, 5.0)).best
    assert slower.seconds > best.seconds and slower.host == best.host
    # Not activations alone: 8 ranks' states, 4 GiB of each process, a tenth for the system.
    states = best.memory.phases["optimizer step"]
    assert best.host.snapshot == 8 * (states.parameters + states.optimizer) > 100 * GIB
    assert best.host.processes == 8 * 4 * GIB
    assert best.host.activations < best.host.total - 130 * GIB
    fitting = best.host.total / GIB / 0.9 + 1
    assert planned(_node(fitting)).best.way == best.way
    short = fitting - 2
    with pytest.raises(PlanError, match="of a node's own memory"):
        planned(_node(short), offload=(True,))
    with pytest.raises(PlanError, match="Nothing fits"):
        planned(_node(short))


@pytest.mark.slow
def test_a_host_that_nobody_knows_is_not_planned_with() -> None:
    with pytest.raises(PlanError, match="Nothing fits"):
        planned(_node(None))
    with pytest.raises(PlanError, match="copy to their host is not known"):
        planned(_node(None), offload=(True,))
