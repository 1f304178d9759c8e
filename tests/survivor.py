"""A training that is to survive: what the tests of recovery start, kill and compare.

    torchrun --nproc-per-node 4 tests/survivor.py FOLDER [options]

Each rank appends a line ``step, bits of the loss, newest step known to be kept`` per finished step
to ``FOLDER/losses.RANK``, each attempt one to ``FOLDER/attempts``, and in the end the hash of its
shard to ``FOLDER/final.RANK``. ``--fault phase:rank:step`` kills a rank with SIGKILL there, once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics import compat
from mics.communication import hop_two
from mics.recovery import healing, slot, state

WIDTH = 64
BLOCKS = 3

PHASES = (
    "rendezvous",
    "building",
    "forward gather",
    "backward reduce-scatter",
    "between the hops",
    "norm",
    "mid-optimizer",
    "mid-snapshot",
    "before the head",
    "restoring",
)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a step takes longer")
    parser.add_argument("--fault", default="")
    parser.add_argument("--second-fault", default="", help="the same, in a later attempt")
    parser.add_argument("--partition", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="FSDP2's HSDP instead of mics")
    parser.add_argument("--no-memory", action="store_true", help="checkpoints on disk alone")
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--until", type=Path, help="a file that says the last step, once it exists")
    return parser.parse_args()


class Fault:
    """Kills this rank in a phase of a step, once in the life of the folder."""

    def __init__(self, folder: Path, text: str) -> None:
        self.phase, rank, step = text.split(":") if text else ("", "-1", "-1")
        self.rank, self.step = int(rank), int(step)
        self._mark = folder / f"struck.{self.phase}"
        self.now = -1  # until the first step

    def strike(self, phase: str) -> None:
        mine = int(os.environ["RANK"]) == self.rank and phase == self.phase
        if mine and self.now >= self.step and not self._mark.exists():
            self._mark.write_text(str(self.now))
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, name: str, phase: str, calls: int = 0) -> None:
        """Strike when a function is called for the time ``calls`` in the step."""
        if phase != self.phase:
            return
        plain: Callable[..., Any] = getattr(owner, name)
        seen = [-1, 0]

        def run(*args: Any, **kwargs: Any) -> Any:
            if seen[0] != self.now:
                seen[:] = [self.now, 0]
            seen[1] += 1
            if seen[1] > calls:
                self.strike(phase)
            return plain(*args, **kwargs)

        setattr(owner, name, run)


def place(fault: Fault) -> None:
    fault.before(compat, "all_gather", "forward gather", calls=1)
    fault.before(dist, "all_reduce", "backward reduce-scatter", calls=1)
    fault.before(hop_two.HopTwo, "start", "between the hops")
    fault.before(slot.Slot, "_both_crcs", "mid-snapshot", calls=1)
    fault.before(slot, "_write_head", "before the head")
    fault.before(state.State, "restore", "restoring")
    fault.before(healing, "recall", "recalling")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.gelu(self.up(self.norm(x)))
        return x + nn.functional.dropout(self.down(y), 0.1, self.training)


def build(partition: int, *, plain: bool) -> nn.Module:
    mesh = mics.init_mesh(partition=partition)
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(BLOCKS)])
    if plain:
        from torch.distributed.fsdp import fully_shard

        for block in model:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return mics.shard(model, partition=partition, mp_policy=MixedPrecisionPolicy())


def main() -> None:
    given = options()
    fault = Fault(given.folder, given.fault)
    if (given.folder / f"struck.{fault.phase}").exists() and given.second_fault:
        fault = Fault(given.folder, given.second_fault)
    place(fault)
    rank = int(os.environ["RANK"])
    with (given.folder / "attempts").open("a") as file:
        file.write(f"{rank} {time.time()} {os.getpid()}\n")
    if len((given.folder / "attempts").read_text().splitlines()) > int(os.environ["WORLD_SIZE"]):
        fault.strike("rendezvous")
    model = build(given.partition, plain=given.plain)
    fault.strike("building")
    optimizers = [
        torch.optim.AdamW(model[0].parameters(), lr=1e-2),
        torch.optim.AdamW(model[1:].parameters(), lr=1e-2),
    ]
    optimizers[1].register_step_pre_hook(lambda *_: fault.strike("mid-optimizer"))
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 3, 0.7) for one in optimizers]
    torch.manual_seed(100 + rank)  # of dropout
    extras = {f"scheduler {at}": one for at, one in enumerate(schedulers)}
    every = 10**9 if given.no_memory else 1
    snapshots = mics.Snapshots(model, optimizers, extras=extras, every=every)
    step = snapshots.restore(given.checkpoints)
    with (given.folder / f"resumed.{rank}").open("a") as file:
        file.write(f"{step} {time.time()}\n")
    losses = (given.folder / f"losses.{rank}").open("a", buffering=1)
    while step < last_step(given):
        fault.now = step
        loss = one_step(model, optimizers, fault, step, plain=given.plain)
        for scheduler in schedulers:
            scheduler.step()
        time.sleep(given.pause)
        bits = struct.pack("<f", loss).hex()
        losses.write(f"{step + 1} {bits} {snapshots.finished} {time.time()}\n")
        step = snapshots.keep(step + 1)
        if given.save_every and step % given.save_every == 0:
            snapshots.save(given.checkpoints, step)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        local = value.to_local() if hasattr(value, "to_local") else value
        digest.update(name.encode() + bytes(local.contiguous().view(-1).view(torch.uint8).tolist()))
    (given.folder / f"final.{rank}").write_text(digest.hexdigest())
    snapshots.close()
    dist.destroy_process_group()


def last_step(given: argparse.Namespace) -> int:
    if given.until is not None and given.until.exists():
        return int(given.until.read_text())
    return int(given.steps)


def one_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    fault: Fault,
    step: int,
    *,
    plain: bool,
) -> float:
    data = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    batch = [torch.randn(8, WIDTH, generator=data) for _ in range(2)]
    total = torch.zeros(())
    for at, x in enumerate(batch if plain else mics.micro_steps(model, batch)):
        if plain:
            model.set_requires_all_reduce(at == len(batch) - 1)
        loss = model(x).square().mean() / len(batch)
        loss.backward()
        total += loss.detach()
    fault.strike("norm")
    mics.clip_grad_norm_(model.parameters(), 1.0)
    for one in optimizers:
        one.step()
        one.zero_grad()
    return total.item()


if __name__ == "__main__":
    main()
