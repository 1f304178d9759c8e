"""Parameters that say themselves what is gathered of them (``fsdp_pre_all_gather``).

On four ranks, two to a node, beside one process that computes with the same few bits, and beside
FSDP2. Weights of linear layers are gathered in few bits, norms and biases of their blocks in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from low_precision import Cast, Float8, Int8, Way, cast_linears, unquantised
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import mics
from mics.errors import CheckpointError, DisagreementError, ShardError
from mics.traffic import Key

WORLD, STEPS, MICRO_STEPS, ROWS = 4, 3, 2, 4
FULL = MixedPrecisionPolicy()
WIDTH, ODD_WIDTH = 16, 13


class Block(nn.Module):
    """A norm and two linear layers, one with a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def _net(width: int = WIDTH, *, tied: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    ends = [nn.Linear(width, width, bias=False) for _ in range(2)]
    if tied:
        ends[1].weight = ends[0].weight
    return nn.Sequential(ends[0], Block(width), Block(width), ends[1])


@dataclass(frozen=True)
class Case:
    """One way to shard and to communicate."""

    way: Way
    partition: int
    collectives: str = "auto"
    overlap: bool = True
    reshard: bool | None = None
    width: int = WIDTH
    tied: bool = False

    def cast(self) -> nn.Sequential:
        net = _net(self.width, tied=self.tied)
        cast_linears(net, self.way)
        return net

    def batch(self, step: int, micro_step: int, rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * step + 10 * micro_step + rank)
        return torch.randn(ROWS, self.width, generator=generator)


CASES = [
    Case("float8", 4, "hierarchical", width=ODD_WIDTH, tied=True),
    Case("float8", 4, "flat", overlap=False, width=ODD_WIDTH, reshard=False),
    Case("float8", 2),
    Case("float8", 1, "flat"),
    Case("int8", 4, "hierarchical", overlap=False, tied=True),
    Case("int8", 4),
    Case("int8", 2, reshard=False, tied=True),
    Case("stored", 4, "hierarchical"),
    Case("stored", 2, overlap=False),
]


def _loss(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean() / MICRO_STEPS


def _whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _by_mics(case: Case) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The trained weights at the end, and what was counted otherwise than it was predicted."""
    model = case.cast()
    mics.shard(
        model,
        mesh=mesh_of_rank(case.partition, 2),
        blocks=[model[1], model[2]],
        mp_policy=FULL,
        collectives=case.collectives,  # type: ignore[arg-type]
        overlap=case.overlap,
        reshard_after_forward=case.reshard,
    )
    first = mics.predict_traffic(model, micro_steps=MICRO_STEPS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    wrong = []
    for step in range(STEPS):
        mics.ledger(model).reset()
        batches = [case.batch(step, m, dist.get_rank()) for m in range(MICRO_STEPS)]
        for x in mics.micro_steps(model, batches):
            _loss(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        counted = mics.ledger(model).traffic()
        predicted = mics.predict_traffic(model, micro_steps=MICRO_STEPS)
        units = 3 if any(p.requires_grad for p in model[0].parameters()) else 2
        hops = counted.counts.get(Key(2, "all_reduce", "flat"))
        if counted != predicted or predicted != first:
            wrong.append(f"{case}, step {step}: counted\n{counted}\npredicted\n{predicted}")
        if case.partition < WORLD and (hops is None or hops.calls != units):
            wrong.append(f"{case}, step {step}: {hops} for {units} units")
    return _whole(model), wrong


def _by_fsdp2(case: Case) -> dict[str, torch.Tensor]:
    model = case.cast()
    for module in (model[1], model[2], model):
        fully_shard(module, mesh=mesh_of_rank(case.partition, 2))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            model.set_requires_all_reduce(micro_step == MICRO_STEPS - 1)  # type: ignore[operator]
            _loss(model(case.batch(step, micro_step, dist.get_rank()))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _whole(model)


def _alone(case: Case) -> dict[str, torch.Tensor]:
    model = _net(case.width, tied=case.tied)
    for module in model.modules():
        if isinstance(module, nn.Linear) and case.way == "stored":
            module.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            for rank in range(WORLD):
                few = {
                    name: unquantised(param, case.way) if param.ndim == 2 else param
                    for name, param in model.named_parameters()
                }
                x = case.batch(step, micro_step, rank)
                (_loss(torch.func.functional_call(model, few, (x,))) / WORLD).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _whole(model)


def _far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - t).norm() / t.norm()) for n, t in other.items())


@pytest.mark.slow
def test_few_bits_train_as_one_process_and_fsdp2_and_are_counted_as_predicted() -> None:
    def all_cases() -> list[Any]:
        found = []
        for case in CASES:
            ours, wrong = _by_mics(case)
            # FSDP2 gathers float8 over Gloo nowhere, and one tensor of two where a rank has both.
            theirs = _by_fsdp2(case) if case.way != "float8" else None
            found.append((ours, wrong, theirs))
        return found

    for rank in run_ranks(all_cases, WORLD, ranks_per_node=2):
        for case, (ours, wrong, theirs) in zip(CASES, rank, strict=True):
            assert not wrong, wrong[0]
            assert _far(ours, _alone(case)) < 1e-6, case
            assert theirs is None or _far(ours, theirs) < 1e-6, case


def test_a_gather_of_few_bits_is_predicted_before_the_first_and_counted_in_its_own_bytes() -> None:
    def gather(way: Way) -> tuple[int, int]:
        model = nn.Sequential(nn.Linear(3, 4, bias=False))
        cast_linears(model, way)
        mics.fully_shard(model, mesh=mesh_of_rank(2), mp_policy=FULL)
        key = Key(1, "all_gather", "flat")
        predicted = mics.predict_traffic(model).counts[key].message_bytes
        model(torch.ones(1, 3)).sum().backward()
        return predicted, mics.ledger(model).traffic().counts[key].message_bytes

    def plain(dtype: torch.dtype) -> tuple[int, int]:
        """Frozen values in a dtype of torch that Gloo does not know, beside a bias in full."""
        model = nn.Linear(3, 4)
        few = torch.full((4, 3), 1.0 + dist.get_rank()).to(dtype)
        model.weight = nn.Parameter(few, requires_grad=False)
        mics.fully_shard(model, mesh=mesh_of_rank(2), mp_policy=FULL)
        key = Key(1, "all_gather", "flat")
        predicted = mics.predict_traffic(model).counts[key].message_bytes
        model.unshard()  # type: ignore[operator]
        assert torch.equal(model.weight.float(), torch.ones(4, 3))  # the first rank's
        return predicted, mics.ledger(model).traffic().counts[key].message_bytes

    def all_of_them() -> list[tuple[int, int]]:
        return [
            gather("float8"),
            gather("int8"),
            plain(torch.float8_e5m2),
            plain(torch.int16),
        ]

    # 4 x 3 values of a byte; in int8 a scale of 4 bytes for each of 4 rows beside them. Then 12
    # values of 1 and of 2 bytes beside 4 of 4 bytes.
    assert run_ranks(all_of_them, 2) == [[(12, 12), (28, 28), (28, 28), (40, 40)]] * 2


class _Whole(Cast):
    """A whole weight that knows few operators, as torchao's float8 ones do."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.zeros_like.default:
            raise NotImplementedError(func)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Wrapped(Int8):
    """Gives a whole weight of another type to the model."""

    def fsdp_post_all_gather(
        self, gathered: Any, _: Any, dtype: torch.dtype, *, out: torch.Tensor | None = None
    ) -> Any:
        inner = None if out is None else out.values  # type: ignore[attr-defined]
        given = super().fsdp_post_all_gather(gathered, _, dtype, out=inner)
        return None if given is None else (_Whole(given[0]), given[1])


class _Branches(nn.Module):
    """Uses one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        return self.layers[layer](x)


def test_a_weight_that_one_rank_alone_uses_gets_its_gradient_whatever_its_type() -> None:
    def gradients(kind: type[Int8]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = _Branches()
        for layer in model.layers:
            layer.weight = nn.Parameter(kind(layer.weight.detach()))
        mics.fully_shard(model, mesh=mesh_of_rank(2), mp_policy=FULL)
        rank = dist.get_rank()
        for layer in (0, rank):  # rank 0 never uses the second
            model(torch.full((2, WIDTH), 1.0 + rank), layer).sum().backward()
        return [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]

    def both() -> list[list[torch.Tensor]]:
        return [gradients(Int8), gradients(_Wrapped)]

    for plain, wrapped in run_ranks(both, 2):
        assert plain[1][0, 0] == 2 * 2 / 2  # two rows of 2 on rank 1, mean over two ranks
        assert all(map(torch.equal, plain, wrapped))


class _Raises(Int8):
    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        raise RuntimeError("no scale yet")


def test_what_fsdp2_would_fail_at_later_is_refused_before_anything_changes() -> None:
    def refused(way: Way, width: int, partition: int, **options: Any) -> str:
        model = _net(width)
        cast_linears(model, way)
        with pytest.raises(ShardError) as caught:
            mics.shard(
                model,
                mesh=mesh_of_rank(partition, 2),
                blocks=[model[1], model[2]],
                mp_policy=FULL,
                **options,
            )
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        return str(caught.value)

    def raises() -> str:
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(_Raises(model.weight.detach()))
        with pytest.raises(ShardError) as caught:
            mics.fully_shard(model, mesh=mesh_of_rank(2, 2), mp_policy=FULL)
        return str(caught.value)

    def without_values() -> str:
        with torch.device("meta"):
            model = _net()
        cast_linears(model, "stored")
        with pytest.raises(ShardError) as caught:
            mics.shard(model, mesh=mesh_of_rank(2, 2), blocks=[model[1], model[2]])
        return str(caught.value)

    def other_types() -> str:
        model = _net()
        cast_linears(model, "float8" if dist.get_rank() == 1 else "int8")
        with pytest.raises(DisagreementError) as caught:
            mics.fully_shard(model[1], mesh=mesh_of_rank(2, 2), mp_policy=FULL)
        return str(caught.value)

    def all_of_them() -> list[str]:
        return [
            refused("int8", ODD_WIDTH, 4),
            refused("int8", WIDTH, 1),
            refused("float8", WIDTH, 4, reshard_after_forward=2),
            raises(),
            without_values(),
            other_types(),
        ]

    said = run_ranks(all_of_them, WORLD, ranks_per_node=2)
    assert said == [said[0]] * WORLD
    uneven, alone, fewer, raising, meta, types = said[0]
    assert "0.weight cannot be split unevenly" in uneven
    assert "13 rows of Int8 over 4 ranks; the first gives [4, 13] and [4, 1]" in uneven
    assert "the last [1, 13] and [1, 1]" in uneven
    assert "Write: a partition that divides the rows, or an fsdp_pre_all_gather that pads" in uneven
    assert "0.weight is gathered as 2 tensors, of which FSDP2 keeps one" in alone
    assert "Write: a partition of 2 or more ranks" in alone
    assert "FSDP2 cannot reshard such parameters to fewer ranks after forward" in fewer
    assert "Its tensor is of type Float8; reshard_after_forward = 2." in fewer
    assert "Write: reshard_after_forward=True" in fewer
    assert "weight cannot be split and asked what is gathered of it" in raising
    assert "_Raises of shape [4, 4]: RuntimeError: no scale yet" in raising
    assert "0.weight is on the meta device, and its type makes no tensor that can be" in meta
    assert "Stored(few torch.int8, scale torch.float32): " in meta
    assert "Write: a model that was built on the CPU" in meta
    assert "rank(s) 1 differ from rank 0" in types
    assert "Int8(values torch.float32)" in types and "Float8(values torch.float32)" in types


@pytest.mark.slow
def test_few_bits_start_alike_from_the_meta_device_and_are_kept_at_any_layout(
    tmp_path: Path,
) -> None:
    def sharded(model: nn.Module, partition: int) -> nn.Module:
        return mics.shard(
            model, mesh=mesh_of_rank(partition, 2), blocks=[model[1], model[2]], mp_policy=FULL
        )

    def start(way: Way) -> torch.Tensor:
        model = _net()
        model.register_buffer("short", torch.full((3,), dist.get_rank(), dtype=torch.int16))
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1 * dist.get_rank())
        cast_linears(model, way)
        sharded(model, 2)
        assert not model.short.any()
        return model(torch.ones(1, WIDTH)).detach()

    def from_meta(way: Way) -> torch.Tensor:
        with torch.device("meta"):
            model = _net()
        cast_linears(model, way)
        sharded(model, 2)
        assert type(model[0].weight.to_local()) is {"float8": Float8, "int8": Int8}[way]
        model(torch.ones(1, WIDTH)).sum().backward()
        assert mics.ledger(model).traffic() == mics.predict_traffic(model)
        return model(torch.ones(1, WIDTH)).detach()

    def kept(way: Way) -> None:
        model = sharded(cast_linears(_net(), way), 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        mics.save(tmp_path / way, model=model, optimizer=optimizer)
        other = cast_linears(_net(), way)
        with torch.no_grad():
            for param in other.parameters():
                param.zero_()
        sharded(other, 4)
        later = torch.optim.AdamW(other.parameters(), lr=0.1)
        mics.load(tmp_path / way, model=other, optimizer=later)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one.full_tensor(), two.full_tensor())
            state = optimizer.state[one]["exp_avg"], later.state[two]["exp_avg"]
            assert torch.equal(state[0].full_tensor(), state[1].full_tensor())
            assert type(state[1].to_local()) is torch.Tensor
        x = torch.ones(1, WIDTH)
        assert torch.equal(model(x), other(x))

    def not_kept() -> str:
        model = sharded(cast_linears(_net(), "stored"), 2)
        with pytest.raises(CheckpointError) as caught:
            mics.save(tmp_path / "stored", model=model)
        return str(caught.value)

    def all_of_them() -> tuple[list[torch.Tensor], str]:
        ways: tuple[Way, ...] = ("float8", "int8")
        starts = [start(way) for way in (*ways, "stored")] + [from_meta(way) for way in ways]
        for way in ways:
            kept(way)
        return starts, not_kept()

    answers = run_ranks(all_of_them, WORLD, ranks_per_node=2)
    for starts, said in answers:
        assert all(map(torch.equal, starts, answers[0][0]))
        assert "model/0.weight cannot be kept: its values are not one tensor" in said
        assert "(16, 16) float32 Stored(few torch.int8, scale torch.float32)" in said
        assert "Write: mics.save(..., frozen=False), which leaves out what does not train" in said
    assert not (tmp_path / "stored").exists()


def test_a_plan_says_what_it_assumes_of_few_bits() -> None:
    def loss(model: Any, micro_batch: int, sequence: int) -> torch.Tensor:
        x = torch.zeros(micro_batch, sequence, WIDTH, device="meta", dtype=torch.bfloat16)
        value: torch.Tensor = model(x).sum()
        return value

    def caveats(model: nn.Module) -> str:
        return "\n".join(mics.plan(model, "p4d:2", sequence=64, loss=loss, blocks=Block).caveats())

    said = "which say themselves what is gathered of them, as bfloat16, in memory and on the links"
    assert said not in caveats(_net())
    ways: tuple[Way, ...] = ("float8", "stored")
    for way in ways:
        model = _net()
        cast_linears(model, way)
        assert f"Assumed: 2,560 parameters, {said}." in caveats(model)
        assert type(model[0].weight.detach()) is not torch.Tensor  # the user's model is as it was
