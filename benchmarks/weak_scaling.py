"""How the time of a step grows with the cluster: mics and full sharding, nodes added one for one.

    sudo .venv/bin/python benchmarks/weak_scaling.py            # 2, 4 and 8 nodes, about 25 minutes
    sudo .venv/bin/python benchmarks/weak_scaling.py --nodes 2 4 8 16 --engines "mics fp8" \\
        --link 5mbit --steps 2 --out benchmarks/results/weak_scaling_bits.json  # 40 minutes

A large model on a real cluster with every time stretched by one stated factor (`mics bench
dilated`), in a lab of network namespaces with links of 25 Mbit/s. Every node brings its own work,
so a perfect step takes as long on 16 nodes as on 2; the efficiency of n nodes is the time at the
fewest nodes over the time at n. Engines are interleaved in one run per number of nodes. The link is
that slow, and with it every time that long, because all ranks share this machine's cores: what they
compute besides their sleep (FSDP2's hooks, some milliseconds per block) comes one after the other
here, and would not on a cluster.

The floor: computation does not grow. With n nodes of k ranks, what a node sends per step is
2 M (n - 1) / n for mics, once; for full sharding, a ring over all p = n k ranks, it is
4 s M (p - 1) / p on Gloo, whose reduce-scatter is an all-reduce (3 s M (p - 1) / p on NCCL). From 2
to 8 nodes of 2 ranks that is 1.75 times as much for mics and 1.25 times for full sharding. On nodes
of 8 GPUs the ring grows by 1.05 only: what full sharding loses here is the stand-in's, with few
ranks in a node and Gloo's reduce-scatter; what it loses on a cluster with every hop of its ring is
not in it (`mics simulate` has that). What mics keeps is what the figure is for.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mics.planning.pages.colours import of_engine

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "mics": "mics",
    "mics fp8": "mics, hop 2 in fp8",
    "fsdp2": "full sharding (ZeRO-3, FSDP2)",
}


def measure(nodes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One lab, all engines interleaved; what `mics bench dilated` writes."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "dilated.json"
        words = [sys.executable, "-m", "mics", "lab", "run", "--nodes", str(nodes)]
        words += ["--gpus-per-node", str(arguments.ranks), "--link", arguments.link]
        words += ["--logs", folder, "--", "mics", "bench", "dilated"]
        words += ["--partition", str(arguments.ranks), "--steps", str(arguments.steps)]
        words += ["--dilation.cluster", arguments.cluster]
        words += ["--dilation.micro-steps", str(arguments.micro_steps)]
        words += ["--dilation.blocks", str(arguments.blocks)]
        words += ["--dilation.block-bytes", str(arguments.block_bytes)]
        words += ["--engines", *arguments.engines, "--out", str(out)]
        subprocess.run(words, check=True)
        document: dict[str, Any] = json.loads(out.read_text())
        return document


def medians(document: dict[str, Any]) -> dict[str, float]:
    return {one["engine"]: one["seconds"]["median"] for one in document["engines"]}


def table(runs: dict[int, dict[str, Any]]) -> list[str]:
    first = min(runs)
    lines = [
        "nodes   engine              step, median (quartiles)   efficiency   bytes a node sends"
    ]
    for nodes, document in runs.items():
        for one in document["engines"]:
            name, spent = one["engine"], one["seconds"]
            efficiency = medians(runs[first])[name] / spent["median"]
            lines.append(
                f"{nodes:>5}   {name:<18}{spent['median']:>9.2f} s "
                f"({spent['low']:.2f} to {spent['high']:.2f}){efficiency:>13.1%}"
                f"{one['bytes_sent'] or 0:>21,}"
            )
    return lines


def plot(runs: dict[int, dict[str, Any]], picture: Path) -> None:
    """Throughput in units of one node's at the fewest nodes, and efficiency below it."""
    nodes = sorted(runs)
    facts = runs[nodes[0]]
    names = [one["engine"] for one in facts["engines"]]
    what = facts["dilation"]
    sleeps = facts["arithmetic"]["forward"] + facts["arithmetic"]["backward"]
    best = sleeps * what["blocks"] * what["micro_steps"]
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False}):
        figure = Figure(figsize=(8, 7), layout="constrained", dpi=120)
        figure.suptitle(
            f"{what['model']} on {what['cluster']}, times x {facts['arithmetic']['factor']:.1f}; "
            f"{what['micro_steps']} micro-steps"
        )
        speed, efficiency = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        speed.plot(nodes, nodes, ":", color="#228833", label="ideal: computation alone")
        for name in names:
            colour, label = of_engine(name), TITLES[name]
            line = "o--" if name == "mics fp8" else "o-"  # of mics' colour too
            times = [medians(runs[n])[name] for n in nodes]
            speed.plot(
                nodes,
                [n * best / t for n, t in zip(nodes, times, strict=True)],
                line,
                color=colour,
                label=label,
            )
            efficiency.plot(nodes, [100 * times[0] / t for t in times], line, color=colour)
        efficiency.axhline(100, color="#228833", linestyle=":")
        speed.set_ylabel("work per second, in nodes that only compute")
        efficiency.set_ylabel(f"% of {nodes[0]} nodes' speed per node")
        efficiency.set_xlabel("nodes")
        efficiency.set_xticks(nodes)
        for axes in (speed, efficiency):
            axes.grid(alpha=0.25)
            axes.spines["right"].set_visible(False)
        speed.legend(frameon=False)
        figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--engines", nargs="+", choices=TITLES, default=["mics", "fsdp2"])
    parser.add_argument("--ranks", type=int, default=2, help="per node, and per partition group")
    parser.add_argument("--link", default="25mbit")
    parser.add_argument("--cluster", default="p4d")
    parser.add_argument("--micro-steps", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--block-bytes", type=int, default=2**20)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "weak_scaling.json")
    arguments = parser.parse_args()
    runs = {nodes: measure(nodes, arguments) for nodes in sorted(arguments.nodes)}
    lines = table(runs)
    print("\n".join(lines))
    document = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "table": lines,
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    plot(runs, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
