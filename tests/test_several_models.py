"""One step of several models, of which ranks use different ones: right, or refused on all ranks."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import collect_ranks, errors_of_ranks, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics

WORLD, WIDTH = 4, 8
FULL = MixedPrecisionPolicy()

Used = str
"""The models that a rank uses in a micro-step; "A" is ``a`` without its blocks."""


class Tower(nn.Module):
    """Two blocks and a head of one size; without its blocks it is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, *, short: bool) -> torch.Tensor:
        for block in () if short else self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def _towers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: Tower() for name in "ab"})


def _losses(towers: Any, micro_step: int, rank: int, used: Used) -> list[torch.Tensor]:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7 * micro_step + rank))
    return [towers[name.lower()](x, short=name.isupper()).square().mean() for name in used]


def _alone(used: list[list[Used]]) -> dict[str, torch.Tensor]:
    towers = _towers()
    for micro_step, of_ranks in enumerate(used):
        for rank, names in enumerate(of_ranks):
            if names:
                (sum(_losses(towers, micro_step, rank, names)) / WORLD).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}


def _sharded(**keywords: Any) -> nn.ModuleDict:
    towers = _towers()
    mesh = mics.init_mesh(partition=1, gpus_per_node=2)
    for tower in towers.values():
        for block in tower.blocks:  # type: ignore[union-attr]
            quiet(
                lambda block=block: mics.fully_shard(block, mesh=mesh, mp_policy=FULL, **keywords)
            )
        quiet(lambda tower=tower: mics.fully_shard(tower, mesh=mesh, mp_policy=FULL, **keywords))
    return towers


def _whole(towers: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in towers.named_parameters()}
    return {name: g.full_tensor() for name, g in grads.items() if g is not None}  # type: ignore[attr-defined]


Loop = Literal["together", "apart", "not known"]


def _step(towers: nn.ModuleDict, used: list[list[Used]], loop: Loop) -> None:
    rank = dist.get_rank()

    def backward(micro_step: int, names: Used) -> None:
        losses = _losses(towers, micro_step, rank, names)
        for loss in losses:
            if loop != "together":
                loss.backward()
        if loop == "together" and losses:
            sum(losses).backward()  # type: ignore[union-attr]

    if loop == "not known":
        for micro_step, of_ranks in enumerate(used):
            with mics.micro_step(towers, last=None):
                backward(micro_step, of_ranks[rank])
        mics.finish_step(towers)
        return
    for micro_step in mics.micro_steps(towers, range(len(used))):
        backward(micro_step, used[micro_step][rank])


def _gradients(used: list[list[Used]], loop: Loop, collectives: Any) -> Any:
    towers = _sharded(collectives=collectives)
    found = []
    for _ in range(2):  # in the second step all have run, and FSDP2 knows the roots
        _step(towers, used, loop)
        found.append(_whole(towers))
        towers.zero_grad()
    return found


ALL = ["ab"] * 4
LEFT_OUT: dict[str, list[list[Used]]] = {
    "nothing": [ALL, ALL],
    "the second on one rank": [ALL, ["ab", "a", "ab", "ab"]],
    "the first on one rank": [ALL, ["ab", "ab", "b", "ab"]],
    "each on some": [["a", "b", "ab", "ab"], ["b", "a", "ab", "b"]],
    "the second on all but one, in the only micro-step": [["a", "a", "ab", "a"]],
    "blocks of the second on one rank": [ALL, ["ab", "aB", "ab", "ab"]],
    "everything on one rank": [ALL, ["ab", "", "ab", "ab"]],
}
LOOPS: tuple[Loop, ...] = ("together", "apart", "not known")


@pytest.mark.parametrize(
    ("loop", "collectives"),
    # In one pass and in stages, ranks that leave out a model wait for each other without a verdict.
    [*((loop, "flat") for loop in LOOPS), ("apart", "hierarchical")],
)
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_models_that_ranks_leave_out_are_right_or_refused(
    left_out: str, loop: Loop, collectives: str
) -> None:
    used = LEFT_OUT[left_out]
    alone = _alone(used)
    found = collect_ranks(_gradients, WORLD, used, loop, collectives, stop_at_first=False)
    if any(kind == "raised" for kind, _ in found):
        assert left_out != "nothing"
        assert all("Ranks ran hop 2" in text or "RankError" in text for _, text in found)
        return
    for rank, (_, steps) in enumerate(found):
        for step, gradients in enumerate(steps):
            assert gradients.keys() == alone.keys(), (rank, step)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, alone[name], msg=f"{rank} {step} {name}")


def test_models_that_all_ranks_use_may_be_in_stages_and_in_one_pass() -> None:
    alone = _alone([ALL, ALL])
    for steps in run_ranks(_gradients, WORLD, [ALL, ALL], "together", "hierarchical"):
        for gradients in steps:
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, alone[name], msg=name)


def _without_steps(used: list[list[Used]]) -> dict[str, torch.Tensor]:
    towers = _sharded()
    for of_ranks in used:
        for loss in _losses(towers, 0, dist.get_rank(), of_ranks[dist.get_rank()]):
            loss.backward()
    return _whole(towers)


def test_passes_without_steps_that_leave_out_a_model_are_refused() -> None:
    used = [["ab", "b", "ab", "ab"], ALL]
    for text in errors_of_ranks(_without_steps, WORLD, used):
        assert "Ranks ran hop 2 of other units" in text
