"""Predicted steps beside measured ones, in a lab; needs root on Linux.

    sudo .venv/bin/python benchmarks/predicted_steps.py            # measure and compare, 15 minutes
    sudo .venv/bin/python benchmarks/predicted_steps.py --cases 1  # the least that can be compared
    sudo .venv/bin/python benchmarks/predicted_steps.py --again    # compare with what is on disk

`mics bench collectives` gives latency and bandwidth of both links: a profile that `mics plan` and
`mics simulate` read, and simulate in the order of Gloo. One run gives one factor: how much longer a
stage inside a node takes in a step than alone, where 8 ranks copy, sum and run FSDP2's hooks on the
same cores; it goes into the profile as `inside_in_a_step`. Every other run is predicted from these,
its bytes too, and once more without the factor. The workload is BERT 10B on p3dn with every time
stretched (`mics bench dilated`), so computation is known and communication is real.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from mics import traffic
from mics.anatomy.anatomy import Anatomy
from mics.anatomy.recipe import Recipe
from mics.benching.dilated import Dilation, Stretched
from mics.errors import PlanError
from mics.hardware.cluster import Cluster, Node
from mics.hardware.lookup import find_gpu
from mics.hardware.measured import measured_node
from mics.planning.subject import language_model_loss
from mics.simulation.compute import Times
from mics.simulation.engine_step import simulate_engine
from mics.topology import Topology

RESULTS = Path(__file__).parent / "results"
LINK, LINK_BITS = "100mbit", 100e6
RANKS = 2  # per node


@dataclass(frozen=True)
class Case:
    """One run; ``hop_two`` is the form of hop 2, which was flat before there was another."""

    nodes: int
    partition: int
    micro_steps: int
    form: str = "hierarchical"
    micro_batch: int = 8
    hop_two: str = "flat"

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


def measure_all(cases: int) -> dict[str, Any]:
    # Small ones show latency inside a node; between nodes the shaper lets them through in a burst,
    # faster than the link is, and the fit leaves them out.
    sizes = ["--sizes", "64KiB", "1MiB", "2MiB", "4MiB", "8MiB"]
    collectives = lab(4, ["collectives", *sizes, "--repeats", "5"])
    asked = [replace(case, hop_two=case.form) for case in (CALIBRATES, *CASES[:cases])]
    runs = [{"case": asdict(case), "run": measure(case)} for case in asked]
    return {"collectives": collectives, "runs": runs}


def form_of(word: str) -> traffic.Form:
    return "flat" if word == "flat" else "hierarchical"


@cache
def stand_in(case: Case) -> Anatomy:
    """The blocks of the stretched model without what is around them, which is small."""
    workload = Stretched(case.dilation, LINK_BITS)
    with torch.device("meta"):
        blocks = workload.blocks(workload.model())
    return Anatomy(nn.Sequential(*blocks), language_model_loss, blocks)


def predict(case: Case, run: dict[str, Any], node: Node) -> float:
    """Seconds of a step, with the sleeps that the run has had, by the simulator of `mics plan`."""
    slept, count = run["arithmetic"], case.dilation.blocks
    forward, backward = (slept["forward"],) * count, (slept["backward"],) * count
    computed = Times(forward, backward, before=0.0, between=0.0, after=0.0)
    recipe = Recipe(
        case.partition,
        case.micro_batch,
        case.micro_steps,
        form=form_of(case.form),
        hop_two_form=form_of(case.hop_two),
        compute_bytes=4,
    )
    cluster = Cluster(node, case.nodes)
    return simulate_engine("mics", stand_in(case), computed, cluster, recipe).seconds


def predicted_bytes(case: Case) -> float:
    """What all nodes send in a step, divided by their number; the small root unit included."""
    blocks = [traffic.Block(2**21, 2**21, 2**21 // case.partition)] * case.dilation.blocks
    root = 4 * 2 * (64 * 64 + 64)
    blocks.append(traffic.Block(root, root, root // case.partition, gathers=1))
    topology = Topology(case.nodes, RANKS, case.partition)
    form = form_of(case.form)
    sent = [
        traffic.mics(
            topology,
            blocks,
            case.micro_steps,
            all_gather=form,
            reduce_scatter=form,
            all_reduce=form_of(case.hop_two),
            gloo=True,
            rank=rank,
        )
        for rank in range(case.nodes * RANKS)
    ]
    return float(traffic.node_inter_bytes(sent) / case.nodes)


def profiled(collectives: dict[str, Any], folder: Path) -> Node:
    """The node that `mics plan --profile` makes of the collectives that were measured.

    The stand-in sleeps equally long on every rank and has next to nothing to optimise.
    """
    profile = folder / "collectives.json"
    profile.write_text(json.dumps(collectives))
    node = measured_node(profile, replace(find_gpu("V100-32GB"), bandwidth=None))
    return replace(node, machine=replace(node.machine, sigma=0.0))


def calibrated(run: dict[str, Any], node: Node, measured: float) -> float:
    """The factor inside the node at which the calibrating run is met."""
    low, high = 1.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        seconds = predict(CALIBRATES, run, replace(node, inside=middle))
        low, high = (middle, high) if seconds < measured else (low, middle)
    return low


def compare(document: dict[str, Any], folder: Path) -> None:
    """Put the factor and the rows into the document."""
    collectives = document["collectives"]
    alone = profiled(collectives, folder)
    print(f"inside  {alone.intra}\nbetween {alone.inter}\nall-reduce {alone.all_reduce}")
    seconds = [one["run"]["engines"][0]["seconds"]["median"] for one in document["runs"]]
    inside = calibrated(document["runs"][0]["run"], alone, seconds[0])
    node = profiled(collectives | {"inside_in_a_step": inside}, folder)
    print(f"inside a node, in a step: x {inside:.2f}, calibrated at {CALIBRATES}")
    rows = [
        row(Case(**one["case"]), one["run"], measured, node, alone)
        for one, measured in zip(document["runs"], seconds, strict=True)
    ]
    document |= {"inside_in_a_step": inside, "rows": rows}
    print(
        f"{'case':<62}{'measured':>10}{'predicted':>11}{'error':>8}{'without the factor':>20}"
        f"{'kernel over predicted':>24}"
    )
    for one in rows:
        named = f"{Case(**one['case'])} ({one['used']})"
        without = one["seconds_without_the_factor"] / one["measured_seconds"] - 1
        print(
            f"{named:<62}{one['measured_seconds']:>8.2f} s"
            f"{one['predicted_seconds']:>9.2f} s{one['error']:>+8.1%}{without:>+20.1%}"
            f"{one['kernel_bytes'] / one['predicted_bytes']:>24.3f}"
        )


def row(
    case: Case, run: dict[str, Any], measured: float, node: Node, alone: Node
) -> dict[str, Any]:
    """One case: measured, predicted with the factor inside a node, and without."""
    predicted = predict(case, run, node)
    return {
        "case": asdict(case),
        "used": "calibrated" if case == CALIBRATES else "predicted",
        "measured_seconds": measured,
        "predicted_seconds": predicted,
        "error": predicted / measured - 1,
        "seconds_without_the_factor": predict(case, run, alone),
        "kernel_bytes": run["engines"][0]["bytes_sent"],
        "predicted_bytes": predicted_bytes(case),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="do not measure, compare anew")
    parser.add_argument("--cases", type=int, default=len(CASES), help="predict so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "predicted_steps.json")
    arguments = parser.parse_args()
    if arguments.again and not arguments.out.is_file():
        raise PlanError(f"There is no {arguments.out}.", write="the same without --again")
    document = (
        json.loads(arguments.out.read_text()) if arguments.again else measure_all(arguments.cases)
    )
    with TemporaryDirectory() as folder:
        compare(document, Path(folder))
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
