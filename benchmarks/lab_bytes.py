"""Bytes between nodes: what the kernel counts at their interfaces, beside what the ledger counts.

    sudo .venv/bin/python benchmarks/lab_bytes.py             # a few minutes

For partitions inside a node, over 2 and over 4 nodes, flat and in two stages: one step of 2
micro-steps, repeated, in a lab of 4 nodes x 2 ranks (200 Mbit/s). Expected: the kernel's count is
the ledger's plus the headers of TCP, IP and Ethernet and the acknowledgements, about 1 % with
frames of 9000 bytes; in two stages an all-gather sends (p - k) / (p - 1) of what it sends flat.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.benching.spread import Spread
from mics.communication.wire import bytes_sent
from mics.ranks.agreement import gather_text
from mics.ranks.mesh import start
from mics.sharding.prediction import predict_traffic
from mics.topology import possible_partitions

RESULTS = Path(__file__).parent / "results"
NODES, RANKS = 4, 2
WIDTH, BLOCKS, MICRO_STEPS = 512, 4, 2


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def one_step(model: nn.Module) -> None:
    for _ in mics.micro_steps(model, range(MICRO_STEPS)):
        model(torch.ones(2, WIDTH)).sum().backward()
    model.zero_grad()


def node_sum(value: float) -> float:
    """Over the ranks of this node, as rank order has them."""
    values = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    first = dist.get_rank() // RANKS * RANKS
    return float(values[first : first + RANKS].sum())


def count(partition: int, form: str, repeats: int) -> dict[str, Any]:
    """One layout: bytes that leave this node in a step, by ledger and by kernel."""
    torch.manual_seed(0)
    whole = nn.Sequential(*[block() for _ in range(BLOCKS)])
    model = mics.shard(
        whole,
        partition=partition,
        gpus_per_node=RANKS,
        blocks=list(whole),
        mp_policy=MixedPrecisionPolicy(),
        collectives=form,
    )
    one_step(model)  # makes connections
    view = mics.ledger(model)
    ratios = []
    for _ in range(repeats):
        view.reset()
        sent = kernel_bytes(lambda: one_step(model))
        ledger = node_sum(float(view.traffic().flow.inter_bytes))
        assert view.traffic() == predict_traffic(model, micro_steps=MICRO_STEPS)
        ratios.append(sent / ledger)
    # Gathers alone come last: FSDP2 prefetches in the order of the last forward, evaluation too.
    with torch.no_grad():
        alone = [kernel_bytes(lambda: model(torch.ones(2, WIDTH))) for _ in range(repeats)]
    return {
        "partition": partition,
        "form": form,
        "ledger_bytes_of_node": ledger,
        "kernel_over_ledger": vars(Spread.of(ratios)),
        "all_gathers_by_kernel": vars(Spread.of(alone)),
    }


def kernel_bytes(work: Callable[[], object]) -> int:
    """What this node sends meanwhile."""
    before = sent_so_far()
    work()
    return sent_so_far() - before


def sent_so_far() -> int:
    """Read between two barriers: no rank of this node sends anything else meanwhile."""
    dist.barrier()
    sent = bytes_sent()
    assert sent is not None, "not in a lab"
    dist.barrier()
    return sent


def in_lab(out: Path, repeats: int) -> None:
    """What every rank runs; the last of each node's ranks speaks for the node."""
    start()
    torch.set_num_threads(1)
    found = []
    for partition in possible_partitions(NODES, RANKS):
        forms = ("flat", "hierarchical") if partition > RANKS else ("flat",)
        found += [count(partition, form, repeats) for form in forms]
    world = dist.group.WORLD
    assert world is not None
    texts = gather_text(json.dumps(found), world, torch.device("cpu"))
    if dist.get_rank() == 0:
        per_node = [json.loads(text) for text in texts[::RANKS]]
        out.write_text(json.dumps(per_node))
    dist.destroy_process_group()


def table(per_node: list[list[dict[str, Any]]]) -> list[str]:
    """The node that is worst off, for every layout."""
    lines = ["partition  form            ledger, bytes of a node   kernel / ledger, worst node"]
    for rows in zip(*per_node, strict=True):
        worst = max(rows, key=lambda row: abs(row["kernel_over_ledger"]["median"] - 1))
        spread = worst["kernel_over_ledger"]
        lines.append(
            f"{worst['partition']:>9}  {worst['form']:<14}{worst['ledger_bytes_of_node']:>25,.0f}"
            f"   {spread['median']:.4f} ({spread['low']:.4f} to {spread['high']:.4f})"
        )
    return lines


def forms_compared(per_node: list[list[dict[str, Any]]]) -> list[dict[str, float]]:
    """What the nodes send in all-gathers, by the kernel: in two stages over flat."""
    found = []
    for partition in possible_partitions(NODES, RANKS):
        sent = {
            form: sum(
                row["all_gathers_by_kernel"]["median"]
                for rows in per_node
                for row in rows
                if row["partition"] == partition and row["form"] == form
            )
            for form in ("flat", "hierarchical")
        }
        if partition > RANKS:
            found.append(
                {
                    "partition": partition,
                    "hierarchical over flat": sent["hierarchical"] / sent["flat"],
                    "(p - k) / (p - 1)": (partition - RANKS) / (partition - 1),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "lab_bytes.json")
    arguments = parser.parse_args()
    if "MICS_LAB" in os.environ:
        in_lab(arguments.out, arguments.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        words = ["mics", "lab", "run", "--nodes", str(NODES), "--gpus-per-node", str(RANKS)]
        words += ["--link", "200mbit", "--logs", folder, "--", __file__]
        words += ["--repeats", str(arguments.repeats), "--out", str(raw)]
        subprocess.run([sys.executable, "-m", *words], check=True)
        per_node = json.loads(raw.read_text())
    lines = table(per_node)
    print("\n".join(lines))
    document = {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "mics": mics.__version__,
        "table": lines,
        "all-gather": forms_compared(per_node),
        "nodes": per_node,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
