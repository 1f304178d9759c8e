"""What mics adds to FSDP2 on the host, counted: calls and bytecodes of the interpreter.

    python benchmarks/host_cost.py
    python benchmarks/host_cost.py --before ../before     # a checkout of an older tree, beside it

Two Gloo ranks train the GPT of ``mics bench``, small enough that the host is what a step takes: in
one partition group beside plain ``fully_shard``, and as two replicas of one rank beside FSDP2 on
the same mesh and DistributedDataParallel. The clock of a shared machine tells no difference of a
percent, so work is counted: calls of Python and C functions (``cProfile``), and bytecodes that the
interpreter executes (``sys.settrace``), on rank 0 and its own thread. A step of L blocks and s
micro-steps is counted at two values of each, which gives the four parts of

    a + b L + c s + d L s

where d is what one unit costs in one micro-step. Seconds of the thread, which take in what a call
costs inside of it, are of steps of both engines in turn; the ratio is of neighbouring steps.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ranks import run_ranks

import mics
from mics.benching.contestants import Contestant, Layout
from mics.benching.options import Workload
from mics.benching.workloads import Language

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LAYERS, MICRO_STEPS, TIMED = (3, 6), (2, 4), 12
LAYOUTS: dict[str, tuple[int, str, list[str]]] = {  # p; the engine looked at; its peers
    "p = 2, one replica": (2, "mics", ["fsdp2"]),
    "p = 1, two replicas": (1, "mics p=1", ["hsdp deferred", "ddp"]),
}
PEERS = {"fsdp2": "FSDP2", "hsdp deferred": "FSDP2, replicas of one rank", "ddp": "DDP"}
PARTS = ("a unit in a micro-step", "a unit in a step", "a micro-step", "a step")


# -- on a rank -------------------------------------------------------------------------------------


def contestants(partition: int, names: list[str], layers: int, micro_steps: int) -> list[Any]:
    workload = Workload(hidden=32, length=16, rows=1, layers=layers, micro_steps=micro_steps)
    layout = Layout(partition, gpus_per_node=partition)
    made = [Contestant(name, Language(workload), layout) for name in names]  # type: ignore[arg-type]
    for one in made:
        for _ in range(2):
            one.step()
    return made


def count(partition: int, names: list[str], layers: int, micro_steps: int) -> list[dict[str, int]]:
    """Calls and bytecodes of a step of each engine."""
    return [
        {"calls": _calls(one), "bytecodes": _bytecodes(one)}
        for one in contestants(partition, names, layers, micro_steps)
    ]


def _calls(one: Contestant) -> int:
    found = []
    for _ in range(2):  # what ends in Gloo's threads may end in this one
        profile = cProfile.Profile()
        dist.barrier()
        profile.enable()
        one.step()
        profile.disable()
        found.append(sum(entry.callcount for entry in profile.getstats()))
    return min(found)


def _bytecodes(one: Contestant) -> int:
    executed = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal executed
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        executed += event == "opcode"
        return trace

    dist.barrier()
    if dist.get_rank() == 0:
        sys.settrace(trace)
    one.step()
    sys.settrace(None)
    return executed


def seconds(partition: int, names: list[str]) -> list[list[float]]:
    """Seconds of this thread in each of the steps of each engine, which take turns."""
    made = contestants(partition, names, LAYERS[-1], MICRO_STEPS[-1])
    spent: list[list[float]] = [[] for _ in made]
    for step in range(TIMED):
        for at in range(len(made)) if step % 2 else reversed(range(len(made))):
            dist.barrier()
            began = time.thread_time()
            made[at].step()
            spent[at].append(time.thread_time() - began)
    return spent


# -- all together ----------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """Everything of the tree whose mics is imported."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for layout, (partition, mine, peers) in LAYOUTS.items():
        names = [mine, *peers]
        counted = {
            f"{layers} x {steps}": dict(
                zip(names, run_ranks(count, 2, partition, names, layers, steps)[0], strict=True)
            )
            for layers in LAYERS
            for steps in MICRO_STEPS
        }
        timed = run_ranks(seconds, 2, partition, names)[0]
        found[layout] = {"counted": counted, "seconds": dict(zip(names, timed, strict=True))}
    return found


def measure_of(trees: dict[str, Path]) -> dict[str, Any]:
    """The same of checkouts, each in a process that imports its mics, all of them at once."""
    command = [sys.executable, __file__, "--only-measure"]
    running = {
        name: subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(tree / "src")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, tree in trees.items()
    }
    said = {name: process.communicate()[0] for name, process in running.items()}
    if any(process.returncode for process in running.values()):
        raise SystemExit("a tree was not measured")
    return {name: json.loads(text.splitlines()[-1]) for name, text in said.items()}


def parts(layout: dict[str, Any], mine: str, peer: str, kind: str) -> list[float]:
    """What an engine adds to its peer: the four of ``PARTS``, and all of the largest step."""
    (few, many), (short, long) = LAYERS, MICRO_STEPS
    added = {
        (layers, steps): counts[mine][kind] - counts[peer][kind]
        for layers in LAYERS
        for steps in MICRO_STEPS
        for counts in [layout["counted"][f"{layers} x {steps}"]]
    }
    of_units = {s: (added[many, s] - added[few, s]) / (many - few) for s in MICRO_STEPS}
    of_rest = {s: added[many, s] - many * of_units[s] for s in MICRO_STEPS}
    unit_micro_step = (of_units[long] - of_units[short]) / (long - short)
    micro_step = (of_rest[long] - of_rest[short]) / (long - short)
    unit, step = of_units[long] - long * unit_micro_step, of_rest[long] - long * micro_step
    return [unit_micro_step, unit, micro_step, step, added[many, long]]


def report(trees: dict[str, Any]) -> str:
    lines = [
        "# What mics adds on the host",
        "",
        f"`python benchmarks/host_cost.py{' --before TREE' * (len(trees) > 1)}`, "
        f"{datetime.date.today()}: 2 Gloo ranks on {os.cpu_count()} cores without a GPU, "
        f"torch {torch.__version__}, Python {platform.python_version()}, mics {mics.__version__}, "
        f"{platform.machine()}. The GPT of `mics bench`, {LAYERS[-1]} blocks of width 32, "
        f"{MICRO_STEPS[-1]} micro-steps of 16 bytes; counts are rank 0's, and differ by less than "
        f"2 % from run to run. Seconds are of its thread, medians and quartiles of {TIMED} steps "
        "of each engine in turn.",
    ]
    for layout, (_, mine, peers) in LAYOUTS.items():
        for peer in peers:
            lines += ["", f"## {layout}, beside {PEERS[peer]}", ""]
            lines += [f"| added | {' | '.join(PARTS)} | all of a step |", "|---" * 6 + "|"]
            for kind in ("calls", "bytecodes"):
                for name, tree in trees.items():
                    added = parts(tree[layout], mine, peer, kind)
                    cells = " | ".join(f"{one:,.0f}" for one in added)
                    lines.append(f"| {kind}{name} | {cells} |")
            lines += ["", f"| thread seconds | {PEERS[peer]} | mics | ratio | added |"]
            lines += ["|---" * 5 + "|"]
            lines += [_times(name, tree[layout], mine, peer) for name, tree in trees.items()]
    return "\n".join(lines) + "\n"


def _times(name: str, layout: dict[str, Any], mine: str, peer: str) -> str:
    ours, theirs = layout["seconds"][mine], layout["seconds"][peer]
    pairs = list(zip(ours, theirs, strict=True))
    low, ratio, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    added = statistics.quantiles([1e3 * (a - b) for a, b in pairs], n=4)
    return (
        f"| a step{name} | {1e3 * statistics.median(theirs):.1f} ms "
        f"| {1e3 * statistics.median(ours):.1f} ms | {ratio:.3f} ({low:.3f} to {high:.3f}) "
        f"| {added[1]:.1f} ms ({added[0]:.1f} to {added[2]:.1f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout to be measured beside this one")
    parser.add_argument("--only-measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_measure:
        print(json.dumps(measure()))
        return
    trees = {"": ROOT}
    if options.before is not None:
        trees = {", before": options.before, ", after": ROOT}
    measured = measure_of(trees)
    text = report(measured)
    print(text)
    (RESULTS / "host_cost.md").write_text(text)
    (RESULTS / "host_cost.json").write_text(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
