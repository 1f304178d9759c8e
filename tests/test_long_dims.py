"""Tensors with fewer rows than ranks: split along another dim, so that memory falls with p."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import full
from parity import quiet
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import mics
from mics.anatomy.sizes import Parameter, dim_to_split, units_of_model
from mics.sharding.prediction import bytes_of
from mics.sharding.units import units_of

WORLD, WIDTH = 4, 8


class Experts(nn.Module):
    """Two experts that both see every token; the second tensor has no dim that 4 divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, WIDTH, 6) / 3)
        self.odd = nn.Parameter(torch.randn(2, 1, 6) / 3)
        self.down = nn.Linear(6, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(x @ self.up + self.odd).sum(0))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Experts(), Experts())


def _batch(rank: int) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(rank))


def test_the_dim_to_split_is_the_first_unless_padding_would_fill_memory() -> None:
    assert dim_to_split((8, 4096, 14336), 8) == 0
    assert dim_to_split((8, 4096, 14336), 64) == 1
    assert dim_to_split((8, 3, 14336), 64) == 2
    assert dim_to_split((8, 3, 5), 64) == 0
    assert dim_to_split((8, 4096), 64) == 0
    assert Parameter((8, 4096, 14336), True).padded(64) == 8 * 4096 * 14336
    assert Parameter((8, 3, 5), True).padded(64) == 64 * 3 * 5
    assert Parameter((), True).padded(4) == 4


def _errors(folder: Path) -> list[str]:
    wrong = []
    kept = []
    for partition in (4, 2):
        mesh = mesh_of_rank(partition, 2)
        model = mics.shard(_net(), mesh=mesh, mp_policy=MixedPrecisionPolicy())
        dims = [p.placements[-1].dim for p in model[0].parameters() if isinstance(p, DTensor)]
        if dims != ([1, 0, 0, 0] if partition == 4 else [0, 0, 0, 0]):
            wrong.append(f"p = {partition}: split along {dims}")
        sizes, _ = units_of_model(_net(), list(_net()))
        gathered = [bytes_of(unit, model).gather_bytes for unit in units_of(model)]
        if gathered != [4 * size.numel(partition) for size in sizes]:
            wrong.append(f"p = {partition}: gathers {gathered} bytes, planned {sizes}")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if kept:
            mics.load(folder / "kept", model=model, optimizer=optimizer)
            wrong += [
                n for n, p in model.named_parameters() if not torch.equal(full(p), kept[0][n])
            ]
            continue
        view = mics.ledger(model)
        view.reset()
        for batch in mics.micro_steps(model, [_batch(dist.get_rank())]):
            model(batch).square().mean().backward()
        if view.traffic() != mics.predict_traffic(model):
            wrong.append(f"counted {view.traffic()}")
        alone = _net()
        for rank in range(WORLD):
            (alone(_batch(rank)).square().mean() / WORLD).backward()
        for name, param in alone.named_parameters():
            ours = full(dict(model.named_parameters())[name].grad)  # type: ignore[arg-type]
            if not torch.allclose(ours, param.grad, rtol=1e-5, atol=1e-6):  # type: ignore[arg-type]
                wrong.append(f"gradient of {name}")
        optimizer.step()
        mics.save(folder / "kept", model=model, optimizer=optimizer)
        kept.append({name: full(param) for name, param in model.named_parameters()})
    return wrong


@pytest.mark.slow
def test_experts_fewer_than_ranks_train_as_one_process_and_load_at_another_p(
    tmp_path: Path,
) -> None:
    assert run_ranks(quiet, WORLD, lambda: _errors(tmp_path)) == [[]] * WORLD
