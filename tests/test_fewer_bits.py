"""Hop 2 in fewer bits: what is rounded, what is held back, what is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.communication import fewer_bits
from mics.communication.blocks_of_values import BLOCK, Code, coded_bytes, decode, encode
from mics.communication.fewer_bits import FewerBits
from mics.sharding.units import units_of

CODES: tuple[Code, ...] = ("fp8", "int8")
LARGEST = {"fp8": 448.0, "int8": 127.0}
STEP = {"fp8": 2.0**-4, "int8": 0.5 / 127}  # the largest error, in a block's largest value
FP32 = MixedPrecisionPolicy()

# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_an_error_is_at_most_half_a_step_of_its_block(code: Code) -> None:
    torch.manual_seed(0)
    scales = torch.logspace(-30, 30, 61)[:, None]
    values = torch.randn(61, BLOCK) * scales
    error = (decode(encode(values, code), code) - values).abs()
    largest = values.abs().amax(dim=1, keepdim=True)
    assert (error <= largest * STEP[code] * (1 + 1e-5)).all()
    if code == "fp8":  # the error of a float is in its own value, down to its smallest step
        smallest = largest / LARGEST[code] * 2.0**-10
        assert (error <= torch.maximum(values.abs() * 2.0**-4, smallest) * (1 + 1e-5)).all()


@pytest.mark.parametrize("code", CODES)
def test_the_largest_value_of_a_block_keeps_its_size(code: Code) -> None:
    values = torch.full((BLOCK,), 3.4e38)
    assert torch.allclose(decode(encode(values, code), code), values, rtol=1e-6)
    assert torch.equal(decode(encode(torch.zeros(BLOCK), code), code), torch.zeros(BLOCK))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_block_with_no_number_has_none(code: Code, bad: float) -> None:
    values = torch.ones(2 * BLOCK)
    values[7] = bad
    decoded = decode(encode(values, code), code)
    assert not decoded[:BLOCK].isfinite().any()
    assert torch.equal(decoded[BLOCK:], encode_and_decode_ones(code))


def encode_and_decode_ones(code: Code) -> torch.Tensor:
    return decode(encode(torch.ones(BLOCK), code), code)


def test_bytes_of_blocks_by_hand() -> None:
    """1000 values over 2 ranks are 2 pieces of 2 blocks of 260 bytes."""
    assert coded_bytes(1000, 2) == 2 * 2 * 260
    assert coded_bytes(1024, 2) == 2 * 2 * 260
    assert coded_bytes(1025, 2) == 2 * 3 * 260
    assert encode(torch.zeros(2, 512), "int8").shape == (2, 520)
    fewer = coded_bytes(10**6, 4) / 10**6
    assert fewer <= 0.52 * 2 and fewer <= 0.27 * 4


# -- one step --------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A loss whose gradients are what it is given."""

    def __init__(self, rows: int = 64, width: int = 96) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Table(rows, width) for _ in range(3))

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        parts = [block(*gradients) for block in self.blocks]
        return torch.stack(parts).sum()


class _Table(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(rows, width))
        self.norm = nn.Parameter(torch.zeros(width))

    def forward(self, table: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return (self.table * table).sum() + (self.norm * norm).sum()


def _shard(model: nn.Module, partition: int, **arguments: Any) -> Any:
    mesh = mesh_of_rank(partition, 2)
    arguments = {"mp_policy": FP32, "blocks": _Table, "collectives": "flat", **arguments}
    return quiet(lambda: mics.shard(model, mesh=mesh, **arguments))


def _gradients(model: nn.Module, of_rank: Callable[[int], list[torch.Tensor]]) -> list[Any]:
    """What a step leaves in the gradients, whole."""
    for micro in mics.micro_steps(model, [of_rank(dist.get_rank())]):
        model(micro).backward()
    found = [param.grad.full_tensor() for param in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    return found


def _grid(code: Code) -> torch.Tensor:
    """Values that a code can be, the largest in every block whatever its borders."""
    torch.manual_seed(1)
    steps = torch.arange(-127, 128).float() if code == "int8" else _floats()
    values = steps[torch.randint(len(steps), (64, 96))]
    values[:, ::16] = LARGEST[code]
    return values


def _floats() -> torch.Tensor:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    return every[every.isfinite()]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("overlap", [True, False])
def test_values_that_a_code_can_be_are_averaged_as_in_fp32(code: Code, overlap: bool) -> None:
    """Both replicas have the same, since the sum of two codes is not always one."""

    def same(code: Code, overlap: bool) -> list[list[torch.Tensor]]:
        values = _grid(code)
        found = []
        for bits in (code, "fp32"):
            model = _shard(Scaled(), 2, hop_two=bits, overlap=overlap)
            found.append(_gradients(model, lambda rank: [values, values[0]]))
        return found

    for few, exact in run_ranks(same, 4, code, overlap, ranks_per_node=2):
        assert all(torch.equal(a, b) for a, b in zip(few, exact, strict=True))
        assert few[0].abs().max() == LARGEST[code]


def _random_gradients(bits: str | None, partition: int, factor: float | None) -> Any:
    model = _shard(Scaled(), partition, hop_two=bits)
    if factor is not None:
        for block in model.blocks:
            block.set_gradient_divide_factor(factor)

    def of_rank(rank: int) -> list[torch.Tensor]:
        torch.manual_seed(rank)
        return [torch.randn(64, 96), torch.randn(96)]

    return _gradients(model, of_rank)


def _random_gradients_of_all() -> dict[Any, list[torch.Tensor]]:
    cases = [(bits, *how) for bits in ("fp32", *CODES) for how in LAYOUTS]
    return {case: _random_gradients(*case) for case in cases}


LAYOUTS: list[tuple[int, float | None]] = [(2, None), (1, None), (1, 3.0)]
"""Partition and divide factor."""


def test_replicas_have_the_same_bits_and_one_dim_is_exact() -> None:
    of_ranks = run_ranks(_random_gradients_of_all, 4, ranks_per_node=2)
    for (bits, *how), few in of_ranks[0].items():
        for other in of_ranks:
            pairs = zip(few, other[bits, *how], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), (bits, how)
        if bits == "fp32":
            continue
        for ours, wanted in zip(few, of_ranks[0]["fp32", *how], strict=True):
            if ours.ndim == 1:
                # Four are added up in an order that depends on the place in the message.
                assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-6)
                assert torch.equal(ours, wanted) or how[0] == 1
                continue
            assert not torch.equal(ours, wanted)
            # Every rank's rounding and the sum's, each at most half a step of a block's largest.
            assert (ours - wanted).abs().max() <= 2 * 4 * STEP[bits] * wanted.abs().max()


def _issued() -> str:
    """The exchanges and gathers of a step, in order."""
    model = _shard(Scaled(), 2, hop_two="int8")
    issued: list[str] = []

    def told(letter: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (issued.append(letter), call(*args, **kwargs))[1]

    fewer_bits.exchange = told("e", fewer_bits.exchange)  # type: ignore[assignment]
    fewer_bits.all_gather = told("g", fewer_bits.all_gather)
    _gradients(model, lambda rank: [torch.ones(64, 96), torch.ones(96)])
    return "".join(issued)


def test_a_sum_is_gathered_when_the_next_unit_has_started() -> None:
    """Three units; only the last one's gather waits for the end of the backward."""
    assert run_ranks(_issued, 4, ranks_per_node=2) == ["eegegg"] * 4


# -- error feedback --------------------------------------------------------------------------------


def _running_sums(code: Code, partition: int, feedback: bool) -> tuple[float, float]:
    """How far the sum of what was applied is from the sum of what was true, and a step of it."""
    model = _shard(Scaled(), partition, hop_two=code, error_feedback=feedback)
    applied, true = torch.zeros(64, 96), torch.zeros(64, 96)
    largest = 0.0
    for step in range(50):

        def of_rank(rank: int, step: int = step) -> list[torch.Tensor]:
            torch.manual_seed(rank)
            always = torch.randn(64, 96)  # so that without feedback its rounding adds up
            torch.manual_seed(1000 * step + rank)
            return [always + 0.01 * torch.randn(64, 96), torch.zeros(96)]

        everybody = torch.stack([of_rank(rank)[0] for rank in range(4)])
        largest = max(largest, float(everybody.abs().max()))
        true += everybody.mean(dim=0)
        applied += _gradients(model, of_rank)[0]
    return float((applied - true).abs().max()), largest


def _running_sums_of_all() -> dict[tuple[Code, int, bool], tuple[float, float]]:
    cases = [(code, p, feedback) for code in CODES for p in (2, 1) for feedback in (True, False)]
    return {case: _running_sums(*case) for case in cases}


@pytest.mark.slow
def test_what_is_held_back_comes_later() -> None:
    for found in run_ranks(_running_sums_of_all, 4, ranks_per_node=2):
        for (code, _, feedback), (off, largest) in found.items():
            # Of the ranks' rounding, and of the sum's, which is R times as large and divided by R.
            bound = 2 * 1.1 * STEP[code] * largest
            assert (off <= bound) == feedback, (code, feedback, off, bound)


def _after_no_numbers(code: Code) -> tuple[bool, bool, bool, float]:
    model = _shard(Scaled(), 2, hop_two=code)

    def good(rank: int) -> list[torch.Tensor]:
        torch.manual_seed(rank)
        return [torch.randn(64, 96), torch.zeros(96)]

    def bad(rank: int) -> list[torch.Tensor]:
        table, norm = good(rank)
        if rank == 3:
            table[40, 5] = float("inf")
        return [table, norm]

    _gradients(model, good)
    first = [error.clone() for error in _errors(model)]
    seen = not _gradients(model, bad)[0].isfinite().all()
    kept = all(error.isfinite().all() for error in _errors(model))
    moved = any(not torch.equal(a, b) for a, b in zip(first, _errors(model), strict=True))
    wanted = torch.stack([good(rank)[0] for rank in range(4)])
    again = _gradients(model, good)[0]
    return seen, kept, moved, float((again - wanted.mean(dim=0)).abs().max() / wanted.abs().max())


def _errors(model: nn.Module) -> list[torch.Tensor]:
    found = []
    for unit in units_of(model):
        assert unit.hop_two is not None
        if isinstance(unit.hop_two.averaging, FewerBits):
            feedback = unit.hop_two.averaging.errors
            assert feedback is not None
            found += [error for _, error in feedback.of_params()]
    return found


@pytest.mark.parametrize("code", CODES)
def test_what_is_no_number_is_seen_and_not_held_back(code: Code) -> None:
    for seen, kept, moved, off in run_ranks(_after_no_numbers, 4, code, ranks_per_node=2):
        assert seen and kept and moved
        assert off <= 4 * STEP[code]


def _more_than_once(code: Code) -> tuple[float, float]:
    """Hop 2 in every backward of a loop without micro-steps."""
    model = _shard(Scaled(), 2, hop_two=code)
    true = torch.zeros(64, 96)
    applied = torch.zeros(64, 96)
    for step in range(20):
        for part in range(3):
            tables = []
            for rank in range(4):
                torch.manual_seed(100 * step + 10 * part + rank)
                tables.append(torch.randn(64, 96))
            true += torch.stack(tables).mean(dim=0)
            model([tables[dist.get_rank()], torch.zeros(96)]).backward()
        applied += next(model.parameters()).grad.full_tensor()  # type: ignore[union-attr]
        model.zero_grad()
    return float((applied - true).abs().max()), float(true.abs().max())


@pytest.mark.filterwarnings("ignore:Hop 2 runs more than once")
@pytest.mark.parametrize("code", CODES)
def test_nothing_is_lost_where_hop_two_runs_in_every_backward(code: Code) -> None:
    for off, _ in run_ranks(_more_than_once, 4, code, ranks_per_node=2):
        assert off <= 2 * STEP[code] * 3 * 5  # of what three micro-steps have added up to


class Skipping(Scaled):
    """Blocks of which a step uses some."""

    def forward(self, given: tuple[list[torch.Tensor], list[bool]]) -> torch.Tensor:  # type: ignore[override]
        gradients, uses = given
        chosen = [block for block, use in zip(self.blocks, uses, strict=True) if use]
        return torch.stack([block(*gradients) for block in chosen]).sum()


def _used_sometimes(code: Code, factor: float | None) -> tuple[float, float]:
    """Train a block that no rank uses in three steps of four."""
    model = _shard(Skipping(), 2 if factor is None else 1, hop_two=code)  # Gloo lacks it for two
    if factor is not None:
        model.blocks[0].set_gradient_divide_factor(factor)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tables = [torch.randn(64, 96, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    mean = torch.stack(tables).sum(dim=0) / (factor or 4)
    for step in range(40):
        uses = [step % 4 == 0, True, True]
        given = [tables[dist.get_rank()], torch.zeros(96)]
        for micro in mics.micro_steps(model, [(given, uses)]):
            model(micro).backward()
        assert (model.blocks[0].table.grad is not None) == uses[0]
        optimizer.step()
        optimizer.zero_grad()
    off = (model.blocks[0].table.detach().full_tensor() + 10 * mean).abs().max()
    return float(off), float(torch.stack(tables).abs().max()) * 4 / (factor or 4)


@pytest.mark.parametrize("factor", [None, 3.0])
@pytest.mark.parametrize("code", CODES)
def test_what_nobody_has_used_keeps_what_is_held_back(code: Code, factor: float | None) -> None:
    for off, largest in run_ranks(_used_sometimes, 4, code, factor, ranks_per_node=2):
        assert off <= 2 * 1.1 * STEP[code] * largest


def _dropped(code: Code, how: str) -> list[float]:
    """How far the weights are from the true ones after each step, of which two are dropped."""
    model = _shard(Scaled(), 2, hop_two=code)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    true = torch.zeros(64, 96)
    off = []
    for step in range(6):
        generators = [torch.Generator().manual_seed(10 * step + rank) for rank in range(4)]
        tables = [torch.randn(64, 96, generator=generator) for generator in generators]
        drops = step in (2, 3)
        given = [tables[dist.get_rank()] * (1e12 if drops else 1), torch.zeros(96)]
        for micro in mics.micro_steps(model, [given]):
            model(micro).backward()
        if drops and how == "zeros":
            optimizer.zero_grad(set_to_none=False)
        elif drops:
            model.zero_grad()
            assert not any(one.any() for one in _errors(model))  # also where they are saved now
        else:
            optimizer.step()
            optimizer.zero_grad()
            true += torch.stack(tables).mean(dim=0)
        weights = model.blocks[0].table.detach().full_tensor()
        off.append(float((weights + true).abs().max()))
    return off


@pytest.mark.parametrize("how", ["zeros", "none"])
@pytest.mark.parametrize("code", CODES)
def test_a_step_that_is_dropped_leaves_nothing_to_the_next(code: Code, how: str) -> None:
    for off in run_ranks(_dropped, 4, code, how, ranks_per_node=2):
        assert max(off) <= 3 * 2 * STEP[code] * 5  # what was held back before is gone


def _frozen_later(code: Code) -> tuple[bool, bool]:
    model = _shard(Scaled(), 2, hop_two=code)

    def of_rank(rank: int) -> list[torch.Tensor]:
        torch.manual_seed(rank)
        return [torch.randn(64, 96), torch.randn(96)]

    _gradients(model, of_rank)
    before = [error.clone() for error in _errors(model)]
    model.blocks[0].table.requires_grad_(False)
    left = _errors(model)
    model.blocks[0].table.requires_grad_(True)
    again = _errors(model)
    others = all(torch.equal(a, b) for a, b in zip(before[1:], left, strict=True))
    return others, not again[0].any()


def test_errors_of_what_still_trains_stay_when_others_are_frozen() -> None:
    for others, fresh in run_ranks(_frozen_later, 4, "int8", ranks_per_node=2):
        assert others and fresh


# -- bytes -----------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Blocks of matrices, norms and biases, and one too short for blocks of values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(48, width), nn.Tanh(), nn.Linear(width, 48), nn.LayerNorm(48))
            for width in (96, 3)
        )
        self.last = nn.Linear(48, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


REDUCE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _bytes(cases: list[tuple[int, str | None, str]]) -> list[Any]:
    found = []
    for partition, bits, reduce in cases:
        policy = MixedPrecisionPolicy(reduce_dtype=REDUCE[reduce])
        model = _shard(Mixed(), partition, hop_two=bits, mp_policy=policy, blocks=nn.Sequential)
        view = mics.ledger(model)
        for _ in range(2):
            view.reset()
            torch.manual_seed(dist.get_rank())
            for x in mics.micro_steps(model, [torch.randn(4, 48)] * 2):
                model(x).square().mean().backward()
            counted, predicted = view.traffic(), mics.predict_traffic(model, micro_steps=2)
            assert counted == predicted, f"{counted}\n{predicted}"
            assert "all_to_all" in str(view) or bits not in CODES
        found.append(counted)
    return found


def test_ledger_equals_prediction_for_every_choice() -> None:
    cases = [
        (partition, bits, reduce)
        for partition in (2, 1)
        for bits, reduce in [
            (None, "fp32"),
            ("bf16", "fp32"),
            ("fp32", "bf16"),
            ("fp8", "fp32"),
            ("int8", "bf16"),
            ("int8", "fp16"),
        ]
    ]
    of_ranks = run_ranks(_bytes, 4, cases, ranks_per_node=2)
    rank_0 = dict(zip(cases, of_ranks[0], strict=True))
    for partition in (2, 1):
        plain = rank_0[partition, None, "fp32"].hop(2)
        half = rank_0[partition, "bf16", "fp32"].hop(2)
        assert 2 * (half.intra_bytes + half.inter_bytes) == plain.intra_bytes + plain.inter_bytes
    # Four replicas, two to a node: of three rows that a rank exchanges one stays in its node.
    keys = {key.collective: count for key, count in rank_0[1, "fp8", "fp32"].counts.items()}
    exchanged = keys["all_to_all"].flow
    assert exchanged.inter_bytes == 2 * exchanged.intra_bytes > 0
    assert exchanged.inter_messages == 2 * exchanged.intra_messages


class Experts(nn.Module):
    """A block whose experts are sharded over another mesh than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.experts = _Table(64, 96), _Table(64, 96)

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return self.dense(*gradients) + self.experts(*gradients)


def _bytes_of_experts(code: Code) -> bool:
    model = Experts()
    world = dist.get_world_size()
    names = ("replicate", "shard")
    one = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names)
    other = init_device_mesh("cpu", (world, 1), mesh_dim_names=names)
    for module, mesh in ((model.experts, other), (model.dense, one), (model, one)):
        quiet(
            lambda module=module, mesh=mesh: mics.fully_shard(
                module, mesh=mesh, gpus_per_node=2, hop_two=code
            )
        )
    view = mics.ledger(model)
    view.reset()
    for micro in mics.micro_steps(model, [[torch.ones(64, 96), torch.ones(96)]]):
        model(micro).backward()
    hops = [unit.hop_two for unit in units_of(model) if unit.hop_two is not None]
    assert len({hop.averaging.sent() for hop in hops}) == 2
    return view.traffic() == mics.predict_traffic(model)


def test_experts_on_another_mesh_send_as_predicted() -> None:
    assert all(run_ranks(_bytes_of_experts, 4, "int8", ranks_per_node=2))


# -- what is asked for -----------------------------------------------------------------------------


def _trained(arguments: dict[str, Any]) -> tuple[list[torch.Tensor], str]:
    model = _shard(Mixed(), 2, blocks=nn.Sequential, **arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        for x in mics.micro_steps(model, [torch.randn(4, 48)] * 2):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [param.full_tensor() for param in model.parameters()]
    return weights, str(mics.ledger(model).traffic())


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"hop_two": None},
    {"hop_two": "fp32"},
    {"error_feedback": False},
    {"hop_two": "int8"},
]


def _trained_in_all_ways() -> list[tuple[list[torch.Tensor], str]]:
    return [_trained(arguments) for arguments in ARGUMENTS]


def test_nothing_asked_for_changes_no_bit() -> None:
    (plain, sent), *others = run_ranks(_trained_in_all_ways, 4, ranks_per_node=2)[0]
    for arguments, (weights, sends) in zip(ARGUMENTS[1:], others, strict=True):
        same = all(torch.equal(a, b) for a, b in zip(plain, weights, strict=True))
        assert (same and sends == sent) == (arguments.get("hop_two") != "int8"), arguments


def test_another_word_is_refused_on_every_rank() -> None:
    for text in errors_of_ranks(_shard_with, 2, "fp4", False):
        assert "ShardError" in text and "'fp4' is not a choice" in text


def test_ranks_that_ask_for_other_bits_are_told() -> None:
    for text in errors_of_ranks(_shard_with, 2, "fp8", True):
        assert "DisagreementError" in text and "hop_two=fp8" in text


def _shard_with(bits: str, first_only: bool) -> None:
    bits_here = None if first_only and dist.get_rank() else bits
    _shard(Scaled(), 1, hop_two=bits_here)
