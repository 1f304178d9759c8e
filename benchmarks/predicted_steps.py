"""Predicted steps beside measured ones, in a lab; needs root on Linux.

    sudo .venv/bin/python benchmarks/predicted_steps.py           # measure and compare, 15 minutes
    sudo .venv/bin/python benchmarks/predicted_steps.py --again   # compare with what is on disk

`mics bench collectives` gives latency and bandwidth of both links. One run gives one factor: how
much longer a stage inside a node takes in a step than alone, where 8 ranks copy, sum and run
FSDP2's hooks on the same cores. Every other run is predicted from these, its bytes too. The
workload is BERT 10B on p3dn with every time stretched (`mics bench dilated`), so computation is
known and communication is real.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mics import traffic
from mics.benching.dilated import Dilation
from mics.errors import PlanError
from mics.hardware.cluster import Node
from mics.hardware.lookup import find_gpu
from mics.hardware.measured import measured_node
from mics.hardware.network import Stage, all_reduce_seconds, gather_stages
from mics.simulation.step import Schedule, Work, simulate
from mics.simulation.step_on_cpu import CpuRank
from mics.topology import Topology

RESULTS = Path(__file__).parent / "results"
LINK = "100mbit"
RANKS = 2  # per node


@dataclass(frozen=True)
class Case:
    """One run."""

    nodes: int
    partition: int
    micro_steps: int
    form: str = "hierarchical"
    micro_batch: int = 8

    @property
    def dilation(self) -> Dilation:
        return Dilation(micro_batch=self.micro_batch, micro_steps=self.micro_steps)

    def __str__(self) -> str:
        return (
            f"{self.nodes} nodes, p {self.partition}, s {self.micro_steps}, "
            f"micro-batch {self.micro_batch}, {self.form}"
        )


CALIBRATES = Case(4, 4, 4)
CASES = (
    Case(4, 2, 4),
    Case(4, 2, 2),
    Case(4, 2, 8),
    Case(2, 2, 4),
    Case(4, 1, 4),
    Case(4, 4, 4, "flat"),
    Case(4, 4, 2),
    Case(2, 4, 4),
    Case(4, 8, 4),
    Case(4, 2, 4, micro_batch=4),
)


def lab(nodes: int, words: list[str]) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "mics", "lab", "run", "--nodes", str(nodes)]
        command += ["--gpus-per-node", str(RANKS), "--link", LINK, "--logs", folder, "--"]
        command += ["mics", "bench", *words, "--out", str(out)]
        print(f"$ {' '.join(command[1:])}", flush=True)
        subprocess.run(command, check=True)
        document: dict[str, Any] = json.loads(out.read_text())
        return document


def measure(case: Case) -> dict[str, Any]:
    words = ["dilated", "--partition", str(case.partition), "--steps", "2"]
    words += ["--collectives", case.form, "--engines", "mics"]
    words += ["--dilation.micro-steps", str(case.micro_steps)]
    words += ["--dilation.micro-batch", str(case.micro_batch)]
    return lab(case.nodes, words)


def measure_all() -> dict[str, Any]:
    # Small ones show latency inside a node; between nodes the shaper lets them through in a burst,
    # faster than the link is, and the fit leaves them out.
    sizes = ["--sizes", "64KiB", "1MiB", "2MiB", "4MiB", "8MiB"]
    collectives = lab(4, ["collectives", *sizes, "--repeats", "5"])
    runs = [{"case": asdict(case), "run": measure(case)} for case in (CALIBRATES, *CASES)]
    return {"collectives": collectives, "runs": runs}


def slowed(stages: tuple[Stage, ...], inside: float) -> tuple[Stage, ...]:
    """The stages inside a node that much longer."""
    return tuple(Stage(s.link, s.seconds * (inside if s.link == "intra" else 1)) for s in stages)


def predict(case: Case, run: dict[str, Any], node: Node, inside: float) -> float:
    """Seconds of a step of mics on Gloo, with the sleeps that the run has had."""
    made = run["arithmetic"]
    p, world, size = case.partition, case.nodes * RANKS, made["block_bytes"]
    form = "flat" if case.form == "flat" else "hierarchical"
    gather = slowed(gather_stages(node, p, size, form), inside)
    reduce = gather[::-1]
    if form == "flat" and p > RANKS:  # Gloo's flat reduce-scatter is an all-reduce
        reduce = (Stage("inter", all_reduce_seconds(node, p, p // RANKS, size)),)
    replicas = world // p
    nodes = replicas if p >= RANKS else case.nodes
    sync = all_reduce_seconds(node, replicas, nodes, size / p, min(p, RANKS))
    block = Work(
        made["forward"], made["backward"], gather, reduce, (Stage("inter", sync),) if sync else ()
    )
    schedule = Schedule(
        case.micro_steps,
        prefetch=1,
        in_flight=1,
        pipelined=True,
    )
    blocks = [block] * case.dilation.blocks
    return simulate(blocks, Work(0.0, 0.0), schedule, kind=CpuRank).seconds


def predicted_bytes(case: Case) -> float:
    """What all nodes send in a step, divided by their number; the small root unit included."""
    blocks = [traffic.Block(2**21, 2**21, 2**21 // case.partition)] * case.dilation.blocks
    root = 4 * 2 * (64 * 64 + 64)
    blocks.append(traffic.Block(root, root, root // case.partition, gathers=1))
    topology = Topology(case.nodes, RANKS, case.partition)
    form: traffic.Form = "flat" if case.form == "flat" else "hierarchical"
    sent = [
        traffic.mics(
            topology,
            blocks,
            case.micro_steps,
            all_gather=form,
            reduce_scatter=form,
            gloo=True,
            rank=rank,
        )
        for rank in range(case.nodes * RANKS)
    ]
    return float(traffic.node_inter_bytes(sent) / case.nodes)


def calibrate(run: dict[str, Any], node: Node, measured: float) -> float:
    """The factor inside a node at which the calibrating run is met."""
    low, high = 1.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if predict(CALIBRATES, run, node, middle) < measured else (low, middle)
        )
    return low


def compare(document: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    profile = folder / "collectives.json"
    profile.write_text(json.dumps(document["collectives"]))
    node = measured_node(profile, find_gpu("V100-32GB"))
    print(f"inside  {node.intra}\nbetween {node.inter}\nall-reduce {node.all_reduce}")
    seconds = [one["run"]["engines"][0]["seconds"]["median"] for one in document["runs"]]
    inside = calibrate(document["runs"][0]["run"], node, seconds[0])
    print(f"inside a node, in a step: x {inside:.2f}, calibrated at {CALIBRATES}")
    rows = []
    print(f"{'case':<62}{'measured':>10}{'predicted':>11}{'error':>8}{'kernel over predicted':>24}")
    for one, measured in zip(document["runs"], seconds, strict=True):
        case = Case(**one["case"])
        found = predict(case, one["run"], node, inside)
        sent = one["run"]["engines"][0]["bytes_sent"]
        expected = predicted_bytes(case)
        used = "calibrated" if case == CALIBRATES else "predicted"
        rows.append(
            {
                "case": asdict(case),
                "used": used,
                "measured_seconds": measured,
                "predicted_seconds": found,
                "error": found / measured - 1,
                "kernel_bytes": sent,
                "predicted_bytes": expected,
            }
        )
        print(
            f"{f'{case} ({used})':<62}{measured:>8.2f} s{found:>9.2f} s"
            f"{found / measured - 1:>+8.1%}{sent / expected:>24.3f}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="do not measure, compare anew")
    parser.add_argument("--out", type=Path, default=RESULTS / "predicted_steps.json")
    arguments = parser.parse_args()
    if arguments.again and not arguments.out.is_file():
        raise PlanError(f"There is no {arguments.out}.", write="the same without --again")
    document = json.loads(arguments.out.read_text()) if arguments.again else measure_all()
    with TemporaryDirectory() as folder:
        document["rows"] = compare(document, Path(folder))
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
