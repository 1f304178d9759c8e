"""``mics.owned``: optimizer state dealt to the replicas trains as the plain mode does.

Widths of 12 and 13: shares of units divide by 2 and do not, and cut parameters in two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import full
from ranks import mesh_of_rank, run_ranks
from test_other_meshes import _data as data_of_experts
from test_other_meshes import _sharded as of_experts
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.communication.forms import Collectives
from mics.sharding.units import units_of
from mics.traffic import Key

FULL = MixedPrecisionPolicy()
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
ROWS, STEPS, MICRO_STEPS = 3, 4, 2


def net(width: int = 13) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.LayerNorm(width)]
    return nn.Sequential(*layers, nn.Linear(width, width, bias=False))


def sharded(
    partition: int,
    width: int = 13,
    *,
    policy: MixedPrecisionPolicy = FULL,
    overlap: bool = True,
    collectives: Collectives = "auto",
) -> nn.Module:
    return mics.shard(
        net(width),
        mesh=mesh_of_rank(partition),
        blocks=nn.Linear,
        mp_policy=policy,
        overlap=overlap,
        collectives=collectives,
    )


def batch(step: int, micro_step: int, width: int = 13) -> torch.Tensor:
    seed = 1000 * step + 10 * micro_step + dist.get_rank()
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    width: int = 13,
    steps: range = range(STEPS),
    clip: float | None = None,
) -> list[float]:
    """The losses of every step and micro-step, and the norms."""
    said = []
    for step in steps:
        batches = [batch(step, i, width) for i in range(MICRO_STEPS)]
        for one in mics.micro_steps(model, batches, normalise="micro_steps"):
            loss = model(one).float().pow(2).mean()
            loss.backward()
            said.append(loss.item())
        if clip is not None:
            said.append(mics.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return said


def weights(model: nn.Module) -> list[torch.Tensor]:
    state = model.state_dict()
    return [full(one).detach().clone() for one in state.values()]


# -- as the plain mode ----------------------------------------------------------------------------

Make = Callable[[Any], torch.optim.Optimizer]
RULES: dict[str, Make] = {
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, foreach=True),
    "SGD, one by one": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, foreach=False),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=False),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1, foreach=True),
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1, fused=True),
}


def both_modes(
    partition: int, rule: str, width: int, options: dict[str, Any], clip: float | None
) -> float:
    """How far losses, norms and weights of the two modes are apart."""
    said, ended = [], []
    for dealt in (False, True):
        model = sharded(partition, width, **options)
        params = mics.owned(model) if dealt else list(model.parameters())
        said.append(train(model, RULES[rule](params), width=width, clip=clip))
        ended.append(weights(model))
    far = max(abs(a - b) for a, b in zip(*said, strict=True))
    return max(far, *(float((a - b).abs().max()) for a, b in zip(*ended, strict=True)))


@pytest.mark.parametrize("rule", RULES)
def test_losses_and_weights_are_those_of_the_plain_mode(rule: str) -> None:
    assert max(run_ranks(both_modes, 4, 2, rule, 13, {}, None, ranks_per_node=2)) < 1e-6


@pytest.mark.parametrize(
    ("world", "partition", "width"), [(2, 1, 13), (4, 1, 12), (4, 4, 13), (4, 2, 12)]
)
@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_layout_is_as_the_plain_mode(
    world: int, partition: int, width: int, overlap: bool
) -> None:
    options = {"overlap": overlap}
    apart = run_ranks(both_modes, world, partition, "AdamW", width, options, 0.05, ranks_per_node=2)
    assert max(apart) < 1e-6


def test_mixed_precision_is_as_the_plain_mode() -> None:
    apart = run_ranks(both_modes, 4, 2, "AdamW", 13, {"policy": HALF}, 0.05, ranks_per_node=2)
    assert max(apart) < 1e-6


# -- bytes and memory -----------------------------------------------------------------------------


def hop_2(view: Any) -> dict[Key, Any]:
    return {key: count for key, count in view.traffic().counts.items() if key.hop == 2}


def bytes_of_modes(partition: int, width: int, collectives: Collectives = "auto") -> dict[str, Any]:
    """What a step sends and is said to send, and the optimizer's bytes, of both modes."""
    said: dict[str, Any] = {}
    for dealt in (False, True):
        model = sharded(partition, width, collectives=collectives)
        params = mics.owned(model) if dealt else list(model.parameters())
        optimizer = torch.optim.AdamW(params)
        view = mics.ledger(model)
        train(model, optimizer, width=width, steps=range(1))
        model.state_dict()  # the new shards are there
        predicted = mics.predict_traffic(model, micro_steps=MICRO_STEPS)
        assert view.traffic() == predicted
        state = [one for table in optimizer.state.values() for one in table.values()]
        local = [one.to_local() if hasattr(one, "to_local") else one for one in state]
        said["dealt" if dealt else "plain"] = (
            hop_2(view),
            view.traffic().hop(2),
            sum(one.nbytes for one in local if one.ndim),
        )
    return said


@pytest.mark.parametrize(("world", "partition", "nodes"), [(4, 2, 2), (2, 1, 2), (4, 1, 1)])
def test_bytes_are_those_of_the_all_reduce_and_memory_is_divided(
    world: int, partition: int, nodes: int
) -> None:
    replicas = world // partition
    for rank in run_ranks(bytes_of_modes, world, partition, 32, ranks_per_node=world // nodes):
        plain, dealt = rank["plain"], rank["dealt"]
        assert {key.collective for key in plain[0]} == {"all_reduce"}
        assert {key.collective for key in dealt[0]} == {"reduce_scatter", "all_gather"}
        assert dealt[1].intra_bytes == plain[1].intra_bytes
        assert dealt[1].inter_bytes == plain[1].inter_bytes
        assert dealt[1].intra_bytes + dealt[1].inter_bytes > 0
        assert dealt[2] == pytest.approx(plain[2] / replicas, rel=0.02)


def test_shares_that_do_not_divide_are_padded_and_counted() -> None:
    for rank in run_ranks(bytes_of_modes, 4, 1, 13, ranks_per_node=4):
        plain, dealt = (rank[mode][1].intra_bytes for mode in ("plain", "dealt"))
        assert plain < dealt < 1.02 * plain


# Gloo's own reduce-scatter is an all-reduce: two replicas on each of two nodes send 1.5 times.
def test_replicas_on_a_node_and_on_others_send_half_more_than_a_ring_on_gloo() -> None:
    for rank in run_ranks(bytes_of_modes, 4, 1, 32, "flat", ranks_per_node=2):
        plain, dealt = rank["plain"][1], rank["dealt"][1]
        assert dealt.inter_bytes == 1.5 * plain.inter_bytes
        assert dealt.intra_bytes == 1.5 * plain.intra_bytes


# -- groups, several optimizers, parts of a model --------------------------------------------------


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    params = list(model.parameters())
    return [p for p in params if p.ndim == 2], [p for p in params if p.ndim == 1]


def groups_and_optimizers(kind: str) -> tuple[float, list[int]]:
    """How far two modes end apart, and the gathers of hop 2 in each step of each unit."""
    ended, gathers = [], []
    for dealt in (False, True):
        model = sharded(2)

        def part(params: list[nn.Parameter], dealt: bool = dealt, model: Any = model) -> Any:
            return mics.owned(model, params) if dealt else params

        matrices, vectors = map(part, split(model))
        if kind == "groups":
            groups = [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "lr": 0.1}]
            optimizers: list[torch.optim.Optimizer] = [
                torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
            ]
        else:
            optimizers = [
                torch.optim.AdamW(matrices, lr=0.01),
                torch.optim.SGD(vectors, lr=0.1, momentum=0.9),
            ]
        view = mics.ledger(model)
        for step in range(STEPS):
            for one in mics.micro_steps(model, [batch(step, 0), batch(step, 1)]):
                model(one).pow(2).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        ended.append(weights(model))
        counts = view.traffic().counts
        gathers = [c.calls for k, c in counts.items() if (k.hop, k.collective) == (2, "all_gather")]
    pairs = zip(*ended, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs), gathers


@pytest.mark.parametrize("kind", ["groups", "optimizers"])
def test_groups_and_several_optimizers_are_as_the_plain_mode(kind: str) -> None:
    for apart, gathers in run_ranks(groups_and_optimizers, 4, kind, ranks_per_node=2):
        assert apart < 1e-6
        assert gathers == [4 * STEPS]  # three blocks and the root


def one_replica() -> bool:
    model = sharded(4)
    same = all(a is b for a, b in zip(mics.owned(model), model.parameters(), strict=True))
    train(model, torch.optim.SGD(mics.owned(model), lr=0.1), steps=range(1))
    return same and not hop_2(mics.ledger(model))


def test_one_replica_owns_its_parameters() -> None:
    assert all(run_ranks(one_replica, 4, ranks_per_node=2))


class Chooses(nn.Module):
    """Uses two branches on rank 0 alone, the third on all ranks, the fourth on none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(13, 13) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(13))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        if dist.get_rank() == 0:
            x = x + self.branches[1](self.branches[0](x))
        return self.branches[2](x)


def unused(decay: float) -> tuple[float, float]:
    ended = []
    for dealt in (False, True):
        model = mics.shard(Chooses(), mesh=mesh_of_rank(2), blocks=nn.Linear, mp_policy=FULL)
        params = mics.owned(model) if dealt else list(model.parameters())
        train(model, torch.optim.AdamW(params, lr=0.01, weight_decay=decay))
        ended.append(weights(model))
    left_alone = Chooses().branches[3].weight
    state = dict(zip(model.state_dict(), ended[1], strict=True))
    moved = float((state["branches.3.weight"] - left_alone).abs().max().detach())
    pairs = zip(*ended, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs), moved


def test_what_nobody_used_is_not_stepped() -> None:
    for apart, moved in run_ranks(unused, 4, 0.3, ranks_per_node=2):
        assert apart < 1e-6
        assert moved == 0


def frozen_and_average() -> float:
    """Frozen parameters stay; an average and whole weights are of the new shards."""
    ended = []
    for dealt in (False, True):
        model = sharded(2)
        model[0].requires_grad_(False)
        optimizer = torch.optim.AdamW(
            mics.owned(model) if dealt else [p for p in model.parameters() if p.requires_grad],
            lr=0.1,
        )
        ema = mics.EMA(model, decay=0.5)
        for step in range(STEPS):
            train(model, optimizer, steps=range(step, step + 1))
            ema.update()
        with ema.swapped():
            averages = weights(model)
        optimizer.step()
        ended.append([*averages, *(v for _, v in mics.gathered(model, replica=None))])
    pairs = zip(*ended, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_averages_and_whole_weights_are_of_the_new_shards() -> None:
    assert max(run_ranks(frozen_and_average, 4, ranks_per_node=2)) < 1e-6


# -- other meshes ----------------------------------------------------------------------------------


def experts(way: Any, replicated: bool, partition: int) -> tuple[float, list[float], int]:
    """How far two modes end apart, and their norms; units that were dealt."""
    ended, norms, num_dealt = [], [], 0
    for dealt in (False, True):
        model = of_experts(way, replicated, partition)
        params = mics.owned(model) if dealt else list(model.parameters())
        optimizer = torch.optim.AdamW(params, lr=0.01)
        for step in range(3):
            for i in mics.micro_steps(model, range(2)):
                model(data_of_experts(10 * step + i, dist.get_rank())).square().mean().backward()
            norms.append(mics.clip_grad_norm_(params if step else model.parameters(), 0.05).item())
            optimizer.step()
            optimizer.zero_grad()
        ended.append(weights(model))
        num_dealt = sum(unit.share is not None for unit in units_of(model))
    pairs = zip(*ended, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs), norms, num_dealt


@pytest.mark.parametrize(
    ("way", "replicated", "partition", "units"),
    [("own mesh", True, 2, 5), ("own mesh", False, 2, 3), ("placed", True, 1, 5)],
)
def test_experts_on_other_ranks_are_dealt_to_their_own_replicas(
    way: str, replicated: bool, partition: int, units: int
) -> None:
    """Each gradient counts once in the norm, whoever owns it."""
    for apart, norms, dealt in run_ranks(experts, 4, way, replicated, partition):
        assert apart < 1e-6
        assert norms[:3] == pytest.approx(norms[3:], rel=1e-6)
        assert dealt == units
