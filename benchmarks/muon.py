"""A step of Muon by three ways: torch's over shards, every rank whole matrices, one owner of each.

    python benchmarks/muon.py --out benchmarks/results/muon

Eight Gloo ranks on this machine, two replicas of four. The three take turns in one run, so that
whatever else the machine does falls on all of them, and the ratio is taken of neighbouring steps.
The ranks share the machine's cores, so the time of a step is that of the work of all ranks
together; their processor time is measured beside it. The aim is 1 / R of torch's, and 10 %.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import mics
from mics.benching.spread import Spread
from mics.communication.timing import time_in_turn

RANKS, PARTITION = 8, 4
REPLICAS = RANKS // PARTITION
WAYS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.optim.Muon over shards": torch.optim.Muon,
    "mics.WholeStep": lambda params, **options: mics.WholeStep(params, torch.optim.Muon, **options),
    "mics.DealtStep": lambda params, **options: mics.DealtStep(params, torch.optim.Muon, **options),
}
TORCH = next(iter(WAYS))


class Block(nn.Module):
    """The matrices of a block of a transformer; it is not run."""

    def __init__(self, width: int) -> None:
        super().__init__()
        shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
        self.matrices = nn.ParameterList(torch.randn(shape) / width**0.5 for shape in shapes)


def measure(width: int, blocks: int, repeats: int) -> dict[str, Any]:
    """Times of this rank's steps, and what they send."""
    steps: dict[str, Callable[[], object]] = {}
    models, processor = {}, {}
    mesh = mics.init_mesh(partition=PARTITION, device_type="cpu")
    for name, make in WAYS.items():
        torch.manual_seed(0)
        model = nn.Sequential(*[Block(width) for _ in range(blocks)])
        mics.shard(model, mesh=mesh, blocks=list(model), mp_policy=MixedPrecisionPolicy())
        for number, param in enumerate(model.parameters()):
            param.grad = _gradient(param, number)
        optimizer = make(model.parameters(), lr=0.02)
        models[name], processor[name] = model, list[float]()
        steps[name] = _timed(optimizer.step, processor[name])
    seconds = time_in_turn(steps, repeats, torch.device("cpu"))
    sent = {}
    for name, model in models.items():
        mics.ledger(model).reset()
        steps[name]()
        sent[name] = str(mics.ledger(model).traffic())
    whole, dealt = (
        [param.full_tensor() for param in models[name].parameters()]  # type: ignore[operator]
        for name in ("mics.WholeStep", "mics.DealtStep")
    )
    return {
        "seconds": seconds,
        "processor": {name: several[1 : repeats + 1] for name, several in processor.items()},
        "sent": sent,
        "bit-equal": all(map(torch.equal, whole, dealt)),
    }


def _gradient(param: nn.Parameter, number: int) -> DTensor:
    """Of the same numbers on every replica."""
    assert isinstance(param, DTensor)
    here = torch.Generator().manual_seed(100 * number + param.device_mesh.get_local_rank())
    part = torch.randn(param.to_local().shape, generator=here)
    return DTensor.from_local(
        part,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def _timed(step: Callable[[], object], seconds: list[float]) -> Callable[[], object]:
    """A step that notes the processor time of all ranks in it."""

    def run() -> None:
        began = time.process_time()
        step()
        spent = torch.tensor(time.process_time() - began)
        dist.all_reduce(spent)
        seconds.append(float(spent))

    return run


def document(found: dict[str, Any], command: str, words: str) -> str:
    """The page in `benchmarks/results/`."""
    base, work = found["seconds"][TORCH], found["processor"][TORCH]
    lines = [
        "# A step of Muon",
        "",
        f"`{command}`, {datetime.date.today()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores, {RANKS} Gloo ranks on them, "
        f"{REPLICAS} replicas x partition of {PARTITION}, {words}.",
        "",
        "Medians with quartiles; ratios are of neighbouring steps. The aim is at most "
        f"{1 / REPLICAS + 0.1:.2f}: the ranks of one replica share torch's products, and each of "
        f"{REPLICAS} replicas repeats them.",
        "",
        "| | step, slowest rank | of torch's | processor time of all ranks | of torch's |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in WAYS:
        seconds, processor = found["seconds"][name], found["processor"][name]
        cells = [
            _shown(seconds, " s"),
            _shown([a / b for a, b in zip(seconds, base, strict=True)]),
            _shown(processor, " s"),
            _shown([a / b for a, b in zip(processor, work, strict=True)]),
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    equal = "bit-equal" if found["bit-equal"] else "not equal"
    lines += ["", f"Weights of `WholeStep` and `DealtStep` are {equal}. What rank 0 sends:", ""]
    for name in WAYS:
        if name != TORCH:  # what it sends is not counted
            lines += [f"`{name}`:", "", "```", found["sent"][name], "```", ""]
    return "\n".join(lines)


def _shown(values: list[float], unit: str = "") -> str:
    spread = Spread.of(values)
    return f"{spread.median:.2f}{unit} ({spread.low:.2f} to {spread.high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a file without suffix; .json and .md are added")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    sizes = asked.width, asked.blocks, asked.repeats
    found = run_ranks(measure, RANKS, *sizes, ranks_per_node=RANKS // 2)[0]
    words = f"{asked.blocks} blocks of width {asked.width}, six matrices each, fp32"
    command = " ".join(["python", "benchmarks/muon.py", *sys.argv[1:]])
    page = document(found, command, f"{words}, {asked.repeats} rounds")
    print(page)
    if asked.out:
        asked.out.with_suffix(".md").write_text(page)
        asked.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
