"""Tensor and context parallelism: data axes of larger meshes, by name, beside one process.

Every rank is seeded differently before it builds its model; the first rank's values are those of
the one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from models import full, seeded
from parity import quiet
from ranks import run_ranks
from torch import nn
from torch.distributed import _functional_collectives, fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import mics
from mics.errors import MicroStepError
from mics.sharding import tokens
from mics.sharding.units import units_of

FP32 = MixedPrecisionPolicy()
WORDS, WIDTH, LENGTH, STEPS, MICRO_STEPS = 16, 8, 8, 4, 2
TOLERANCE = {"SGD": 1e-6, "AdamW": 1e-5}

# torch 2.13 renamed it, and the old name warns.
_gather: Any = (
    getattr(_functional_collectives, "all_gather_single_autograd", None)
    or _functional_collectives.all_gather_tensor_autograd
)

Normalise = Literal["micro_steps", "tokens", "tokens of all"]

needs_dims = pytest.mark.skipif(
    not hasattr(fsdp, "DataParallelMeshDims"), reason="dp_mesh_dims came with torch 2.12"
)


class Block(nn.Module):
    """Causal attention without weights, over a sequence that may be spread over ranks; an MLP."""

    def __init__(self, attends: bool, cp: DeviceMesh | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.attends, self.cp = attends, cp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self._attend(x) if self.attends else x
        return x + self.down(torch.relu(self.up(self.norm(seen))))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        if self.cp is None:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        keys = _gather(x, 1, self.cp.get_group())
        rank, n = self.cp.get_local_rank(), x.shape[1]
        mask = torch.ones(n, keys.shape[1], dtype=torch.bool).tril(rank * n)
        return nn.functional.scaled_dot_product_attention(x, keys, keys, mask)


class Net(nn.Module):
    def __init__(self, attends: bool, cp: DeviceMesh | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(attends, cp) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) + 0  # not a view


def batch(step: int, micro_step: int, replica: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and labels, some of which do not count: more of them in some batches."""
    seed = torch.Generator().manual_seed(100 * step + 10 * micro_step + replica)
    words = torch.randint(0, WORDS, (3, LENGTH), generator=seed)
    labels = words.roll(-1, 1)
    labels[:, -1 - replica :] = -100
    return words, labels


def loss_of(output: torch.Tensor, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    return nn.functional.cross_entropy(
        output.flatten(0, 1), labels.flatten(), reduction=reduction, ignore_index=-100
    )


def counted(data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (data[1] != -100).sum()


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    make: Any = getattr(torch.optim, kind)
    return make(model.parameters(), lr=0.1 if kind == "SGD" else 1e-2)  # type: ignore[no-any-return]


def alone(
    kind: str, replicas: int, by_tokens: bool, attends: bool
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and norms of one process that sees the data of all."""
    net = seeded(lambda: Net(attends))
    optimizer, norms = optimizer_of(kind, net), []
    for step in range(STEPS):
        all_data = [batch(step, m, r) for m, r in itertools.product(range(2), range(replicas))]
        tokens = sum(int(counted(data)) for data in all_data)
        for words, labels in all_data:
            if by_tokens:
                (loss_of(net(words), labels, "sum") / tokens).backward()
            else:
                (loss_of(net(words), labels, "mean") / len(all_data)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in net.named_parameters()}, norms


def train(
    model: nn.Module,
    kind: str,
    replica: int,
    normalise: Normalise,
    cp: DeviceMesh | None = None,
) -> list[str]:
    """Train this rank's part; return what is not as in one process, or not as predicted."""
    optimizer, norms, wrong = optimizer_of(kind, model), [], []
    view = mics.ledger(model)
    for step in range(STEPS):
        view.reset()
        whole = [batch(step, m, replica) for m in range(MICRO_STEPS)]
        by_tokens = normalise != "micro_steps"
        own = whole if normalise == "tokens of all" else [_part(data, cp) for data in whole]
        for data in mics.micro_steps(
            model,
            own,
            normalise=counted if by_tokens else "micro_steps",
            tokens_shared_over=cp if normalise == "tokens of all" else None,
        ):
            words, labels = _part(data, cp) if normalise == "tokens of all" else data
            loss_of(model(words), labels, "sum" if by_tokens else "mean").backward()
        if view.traffic() != mics.predict_traffic(model, micro_steps=MICRO_STEPS):
            wrong.append(f"counted {view.traffic()}")
        wrong += wrong_hops(model)
        norms.append(float(mics.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    replicas = units_of(model)[0].groups.whole.size() // (1 if cp is None else cp.size())
    weights, right = alone(kind, replicas, by_tokens, attends=cp is not None)
    for name, param in model.named_parameters():
        apart = float((full(param) - weights[name]).abs().max() / weights[name].abs().max())
        if not apart <= TOLERANCE[kind]:
            wrong.append(f"{name} is {apart:.1e} off")
    for ours, theirs in zip(norms, right, strict=True):
        if not abs(ours / theirs - 1) <= 1e-5:
            wrong.append(f"norm {ours} instead of {theirs}")
    return wrong


def _part(
    data: tuple[torch.Tensor, torch.Tensor], cp: DeviceMesh | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if cp is None:
        return data
    words, labels = (one.chunk(cp.size(), 1)[cp.get_local_rank()] for one in data)
    return words, labels


def sharded(model: Net, how: str, **where: Any) -> Any:
    if how == "shard":
        return mics.shard(model, mp_policy=FP32, **where)
    for module in (*model.blocks, model):
        mics.fully_shard(module, mp_policy=FP32, **where)
    return model


def wrong_hops(model: nn.Module) -> list[str]:
    """Units of which hop 2 did not run once since the ledgers were reset."""
    found = []
    for unit in units_of(model):
        counts = unit.ledger.traffic().counts
        hops = sum(count.calls for key, count in counts.items() if key.hop == 2)
        if hops != (unit.groups.replicas is not None):
            found.append(f"{unit.name}: {hops} hops 2")
    return found


# -- tensor parallelism --------------------------------------------------------------------------


def parallel(model: Net, tp: DeviceMesh, sequences: bool) -> Net:
    """Spread over ``tp`` as torch's tutorial does, with parts of sequences between the layers."""
    if sequences:
        outside: dict[str, Any] = {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        inside: dict[str, Any] = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
    else:
        outside = {"head": ColwiseParallel(output_layouts=Replicate())}
        inside = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, tp, outside)
    for block in model.blocks:
        parallelize_module(block, tp, inside)
    return model


def _tensor_parallel(shape: tuple[int, int, int], cases: list[tuple[str, str, bool]]) -> list[str]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
    data = mesh["replicate", "shard"]
    replica = data.get_local_rank(0) * shape[1] + data.get_local_rank(1)
    wrong = []
    for how, kind, sequences in cases:
        torch.manual_seed(dist.get_rank())
        model = sharded(parallel(Net(attends=False), mesh["tp"], sequences), how, mesh=data)
        normalise: Normalise = "tokens" if how == "shard" else "micro_steps"
        found = train(model, kind, replica, normalise)
        wrong += [f"{how}, {kind}, {sequences}: {one}" for one in found]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(2, 1, 2), (1, 2, 2), pytest.param((2, 2, 2), marks=pytest.mark.extra)]
)
def test_tensor_parallel_models_train_as_in_one_process_and_send_what_is_predicted(
    shape: tuple[int, int, int],
) -> None:
    cases = [("shard", "SGD", True), ("fully_shard", "AdamW", False), ("shard", "AdamW", False)]
    ranks = shape[0] * shape[1] * shape[2]
    assert run_ranks(quiet, ranks, lambda: _tensor_parallel(shape, cases)) == [[]] * ranks


# -- context parallelism -------------------------------------------------------------------------


def _context_parallel(how: str) -> list[str]:
    wrong = []
    names = ("dp_replicate", "dp_shard", "cp")
    for shape in ((2, 1, 2), (1, 2, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        dims = fsdp.DataParallelMeshDims(shard=("dp_shard", "cp"), replicate="dp_replicate")
        replica = mesh.get_local_rank("dp_replicate") * shape[1] + mesh.get_local_rank("dp_shard")
        for kind, normalise in (("SGD", "tokens"), ("AdamW", "tokens of all")):
            torch.manual_seed(dist.get_rank())
            model = Net(True, mesh["cp"])
            model = sharded(model, how, mesh=mesh, dp_mesh_dims=dims)
            over = units_of(model)[0].groups.mesh
            assert over.mesh_dim_names == ("dp_shard_cp",)
            assert over.mesh.tolist() == sorted(dist.get_process_group_ranks(over.get_group()))
            found = train(model, kind, replica, normalise, mesh["cp"])  # type: ignore[arg-type]
            wrong += [f"{shape}, {kind}, {normalise}: {one}" for one in found]
    return wrong


@needs_dims
@pytest.mark.slow
@pytest.mark.parametrize("how", ["shard", "fully_shard"])
def test_context_parallel_models_train_as_in_one_process_with_tokens_counted_once(how: str) -> None:
    assert run_ranks(quiet, 4, lambda: _context_parallel(how)) == [[]] * 4


@pytest.mark.parametrize("in_loop", [True, False])
def test_tokens_that_only_some_ranks_say_are_shared_are_refused(in_loop: bool) -> None:
    def rank() -> str:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "cp"))
        model = mics.fully_shard(nn.Linear(2, 2), mesh=mesh["shard", "cp"]._flatten("data"))
        over = mesh["cp"] if dist.get_rank() else None
        with pytest.raises(MicroStepError) as raised:
            if in_loop:
                for _ in mics.micro_steps(model, [1], normalise=int, tokens_shared_over=over):
                    model(torch.ones(2, 2)).sum().backward()
            else:
                with mics.micro_step(model, last=True, tokens=1, tokens_shared_over=over):
                    model(torch.ones(2, 2)).sum().backward()
        return str(raised.value)

    for text in run_ranks(quiet, 2, rank):
        assert "rank(s) 0: divided by tokens; rank(s) 1: divided by shared tokens" in text


def test_tokens_shared_over_ranks_that_are_not_added_up_are_refused() -> None:
    def rank() -> list[str]:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "tp"))
        model = mics.fully_shard(nn.Linear(2, 2), mesh=mesh["shard"])
        calls: list[Callable[[], Any]] = [
            lambda: mics.micro_steps(model, [1], normalise=int, tokens_shared_over=mesh["tp"]),
            lambda: mics.micro_step(
                model, last=True, tokens=1, tokens_shared_over=mesh["tp"]
            ).__enter__(),
            lambda: mics.micro_steps(
                model, [1], normalise="micro_steps", tokens_shared_over=mesh["shard"]
            ),
            lambda: mics.micro_step(model, last=True, tokens_shared_over=mesh["shard"]).__enter__(),
        ]
        texts = []
        for call in calls:
            with pytest.raises(MicroStepError) as raised:
                call()
            texts.append(str(raised.value))
        return texts

    for texts in run_ranks(rank, 2):
        for text in texts[:2]:
            assert "Tokens are not summed over the ranks of tokens_shared_over" in text
            assert "Its axes are ('tp',), its ranks [0, 1]; the model's mesh has ('sh" in text
            assert 'mesh["cp"] of the mesh whose other axes' in text
        for text in texts[2:]:
            assert "tokens_shared_over was given where no tokens are counted" in text
            assert "Its axes are ('shard',)" in text and "tokens=number in micro_step" in text


def _parts_said_to_be_whole(late: bool = False) -> list[str]:
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp_replicate", "dp_shard", "cp"))
    dims = fsdp.DataParallelMeshDims(shard=("dp_shard", "cp"), replicate="dp_replicate")
    model = sharded(Net(True, mesh["cp"]), "shard", mesh=mesh, dp_mesh_dims=dims)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = [_part(batch(0, m, mesh.get_local_rank("dp_shard")), mesh["cp"]) for m in range(2)]

    def step() -> None:
        for words, labels in mics.micro_steps(
            model, own, normalise=counted, tokens_shared_over=mesh["cp"]
        ):
            loss_of(model(words), labels, "sum").backward()

    texts = []
    if late:  # as on an accelerator
        tokens._Looked.is_here = property(lambda _: False)  # type: ignore[assignment,method-assign]
        step()
        optimizer.zero_grad()
    with pytest.raises(MicroStepError) as raised:
        step()
    texts.append(str(raised.value))
    with pytest.raises(MicroStepError) as raised:
        optimizer.step()
    texts.append(str(raised.value))
    return texts


@needs_dims
def test_ranks_that_count_their_parts_and_say_that_they_count_all_are_refused() -> None:
    now = run_ranks(quiet, 4, _parts_said_to_be_whole)
    assert now == run_ranks(quiet, 4, lambda: _parts_said_to_be_whole(late=True))
    for differ, not_over in now:
        assert "were said to count the same tokens, and their counts differ" in differ
        # 3 sequences of 8 words and 2 micro-steps; the last word, or two, has no label.
        assert "rank(s) 1: 18; rank(s) 0: 24." in differ
        assert "no tokens_shared_over, where each counts its own part" in differ
        assert "optimizer.step() was called before" in not_over
