"""Five steps of a row by mics, by FSDP2 and in one process."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import mics
from kinds.models import LENGTH, ROWS, Net, build
from kinds.rows import Place, Row, by_fsdp2, by_mics
from mics import compat
from mics.sharding.units import units_of

STEPS, IGNORED, MOST = 5, -100, 0.1  # MOST: the norm that gradients are clipped to
# Llama 2's. With AdamW's default of 1e-8, elements whose gradient is as small as that turn rounding
# into whole steps: fp32 and fp64 of one process are then up to 4e-4 apart.
EPS = 1e-5

Engine = Literal["mics", "FSDP2"]
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """How a step is run."""

    optimizer: Literal["SGD", "AdamW", "Muon", "Muon, dealt"]
    micro_steps: int
    by_tokens: bool
    clip: bool

    @property
    def words(self) -> str:
        """For the file of results."""
        by = "tokens" if self.by_tokens else "micro-steps"
        return f"{self.micro_steps} micro-steps, by {by}" + (", clipped" if self.clip else "")


SCHEDULES = tuple(
    Schedule(optimizer, *how)
    for optimizer in ("SGD", "AdamW", "Muon", "Muon, dealt")
    for how in (
        (1, False, False),
        (1, True, True),
        (3, False, False),
        (3, False, True),
        (3, True, False),
        (3, True, True),
    )
)


@dataclass
class Trained:
    """What a run ends with."""

    weights: dict[str, torch.Tensor]
    norms: list[float]
    as_predicted: bool | None = None  # bytes and messages of every step
    once: bool | None = None  # hop 2 of every unit in every step


def batch(row: Row, step: int, micro_step: int, data_rank: int) -> Batch:
    """Words and what follows them; how many of them count differs from batch to batch."""
    seed = torch.Generator().manual_seed(1000 * step + 100 * micro_step + data_rank)
    words = torch.randint(0, row.shape.words, (ROWS, LENGTH), generator=seed)
    targets = words.roll(-1, 1)
    targets[:, LENGTH - 1 - data_rank % 3 - micro_step :] = IGNORED
    return words, targets


def num_counted(data: Batch) -> torch.Tensor:
    """Tokens that the loss counts."""
    return (data[1] != IGNORED).sum()


def sum_of(model: nn.Module, data: Batch) -> torch.Tensor:
    """The loss, summed over tokens."""
    words, targets = data
    return F.cross_entropy(
        model(words).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that need a gradient, by name."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """What was trained, whole."""
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in trained_parameters(model).items()
    }


def optimizers(
    kind: str, model: nn.Module, muon: Callable[..., list[torch.optim.Optimizer]]
) -> list[torch.optim.Optimizer]:
    """SGD and AdamW of everything; Muon of the blocks' matrices, AdamW of the rest.

    Args:
        kind: of a schedule.
        model: sharded or not.
        muon: makes Muon of parameters, one optimizer or several.
    """
    params = trained_parameters(model)
    if kind == "SGD":
        return [torch.optim.SGD(params.values(), lr=0.1)]
    matrices = [p for n, p in params.items() if "Muon" in kind and p.ndim == 2 and "blocks" in n]
    rest = [p for p in params.values() if not any(p is one for one in matrices)]
    others = [torch.optim.AdamW(rest, lr=3e-3, eps=EPS)] if rest else []
    return others + (muon(matrices, lr=0.02) if matrices else [])


def muon_of_torch(params: Any, **options: Any) -> list[torch.optim.Optimizer]:
    """torch's own, of whole parameters or of shards."""
    return [torch.optim.Muon(params, **options)]


def alone(row: Row, schedule: Schedule, data_ranks: int, *, otherwise: bool = False) -> Trained:
    """One process, which sees the data of all.

    Args:
        row: what is trained.
        schedule: how.
        data_ranks: whose data there is.
        otherwise: round otherwise, to see what this does to one process: compute in fp64. Where
            bf16 or float8 forbids that, normalise behind the backward passes, as mics does: they
            round gradients of another scale otherwise.
    """
    model, norms = build(row.shape), []
    behind = otherwise and row.shape.weights in ("float8", "lora")
    if otherwise and not behind:
        _in_double(model)
    opts = optimizers(schedule.optimizer, model, muon_of_torch)
    for step in range(STEPS):
        everybody = itertools.product(range(schedule.micro_steps), range(data_ranks))
        data = [batch(row, step, micro_step, rank) for micro_step, rank in everybody]
        tokens = sum(int(num_counted(one)) for one in data)
        for one in data:
            of_batch, of_step = 1 if schedule.by_tokens else num_counted(one), tokens
            if not schedule.by_tokens:
                of_step = len(data)
            loss = sum_of(model, one) / of_batch
            (loss if behind else loss / of_step).backward()
        for param in trained_parameters(model).values() if behind else ():
            assert param.grad is not None
            param.grad /= of_step
        if schedule.clip:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MOST)))
        _step(opts)
    return Trained(whole(model), norms)


def _in_double(model: nn.Module) -> None:
    """What is in fp32 is computed in fp64; bf16 and NF4 stay."""
    for param in model.parameters():
        if type(param.data) is torch.Tensor and param.dtype == torch.float32:
            param.data = param.data.double()


def _step(opts: Iterable[torch.optim.Optimizer]) -> None:
    for one in opts:
        one.step()
        one.zero_grad()


def own_part(row: Row, place: Place, step: int, micro_step: int) -> tuple[Batch, torch.Tensor]:
    """This rank's part of its data, and how many tokens of the whole count."""
    data = batch(row, step, micro_step, place.data_rank)
    cp, counted = place.across.cp, num_counted(data)
    return (data if cp is None else _part(data, cp)), counted


def _part(data: Batch, cp: DeviceMesh) -> Batch:
    words, targets = (one.chunk(cp.size(), 1)[cp.get_local_rank()] for one in data)
    return words, targets


def train_mics(row: Row, place: Place, schedule: Schedule, collectives: str) -> Trained:
    """This rank's part of the same by mics."""
    model = by_mics(row, place, collectives)
    muon = _dealt_muon if schedule.optimizer == "Muon, dealt" else _whole_muon
    opts = optimizers(schedule.optimizer, model, muon)
    view, norms, as_predicted, once = mics.ledger(model), [], True, True
    if row.scales:
        mics.precompute_scales(model)
    for step in range(STEPS):
        view.reset()
        predicted = mics.predict_traffic(model, micro_steps=schedule.micro_steps, optimizer=opts)
        own = [own_part(row, place, step, m) for m in range(schedule.micro_steps)]
        how: Any = (lambda pair: num_counted(pair[0])) if schedule.by_tokens else "micro_steps"
        for data, counted in mics.micro_steps(model, own, normalise=how):
            loss = sum_of(model, data)
            (loss if schedule.by_tokens else loss * place.layout.cp / counted).backward()
        if schedule.clip:
            norms.append(float(mics.clip_grad_norm_(model.parameters(), MOST)))
        once &= _hop_2_once(model)
        _step(opts)
        if row.scales:
            mics.precompute_scales(model)
        as_predicted &= view.traffic() == predicted
    return Trained(whole(model), norms, as_predicted, once)


def _whole_muon(params: Any, **options: Any) -> list[torch.optim.Optimizer]:
    return [mics.WholeStep(params, torch.optim.Muon, **options)]


def _dealt_muon(params: Any, **options: Any) -> list[torch.optim.Optimizer]:
    """Each matrix on one rank, but for those that other axes than the data's split too."""
    beyond = [p for p in params if sum(not one.is_replicate() for one in p.placements) > 1]
    dealt = [param for param in params if not any(param is one for one in beyond)]
    made = [mics.DealtStep(dealt, torch.optim.Muon, **options)] if dealt else []
    return made + (_whole_muon(beyond, **options) if beyond else [])


def _hop_2_once(model: nn.Module) -> bool:
    """Whether each unit that has something to reduce over replicas did so once."""
    for unit in units_of(model):
        counts = unit.ledger.traffic().counts
        calls = {count.calls for key, count in counts.items() if key.hop == 2}  # of each stage
        needed = unit.groups.replicas is not None and compat.trainable_shard_numel(unit.group) > 0
        if calls != ({1} if needed else set()):
            return False
    return True


def train_fsdp2(row: Row, place: Place, schedule: Schedule) -> Trained:
    """This rank's part of the same by FSDP2, its all-reduce in the last micro-step."""
    model, norms, ranks = by_fsdp2(row, place), [], place.data.size()
    opts = optimizers(schedule.optimizer, model, muon_of_torch)
    everybody = range(place.layout.data_ranks)
    for step in range(STEPS):
        counts = [
            num_counted(batch(row, step, m, rank))
            for m in range(schedule.micro_steps)
            for rank in everybody
        ]
        for micro_step in range(schedule.micro_steps):
            last = micro_step == schedule.micro_steps - 1
            model.set_requires_all_reduce(last)  # type: ignore[operator]
            data, counted = own_part(row, place, step, micro_step)
            if schedule.by_tokens:
                loss = sum_of(model, data) * ranks / sum(counts)
            else:
                loss = sum_of(model, data) * place.layout.cp / counted / schedule.micro_steps
            loss.backward()
        if schedule.clip:
            norms.append(_clip(model))
        _step(opts)
        if row.scales:
            _precompute(model)
    return Trained(whole(model), norms)


def _precompute(model: nn.Module) -> None:
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def _clip(model: Net) -> float:
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), MOST)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def digest(trained: Trained) -> str:
    """The same where, and only where, every bit of the weights is."""
    found = hashlib.sha256()
    for weight in trained.weights.values():
        found.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def distance(ours: Trained, right: Trained) -> float:
    """The largest relative difference of weights (of each tensor's largest) and of norms."""
    assert ours.weights.keys() == right.weights.keys()
    apart = [
        float((ours.weights[name] - weight).abs().max() / weight.abs().max())
        for name, weight in right.weights.items()
    ]
    apart += [abs(a / b - 1) for a, b in zip(ours.norms, right.norms, strict=True)]
    return max(apart)
