"""Everything that the README says about slow links, measured in labs; needs root on Linux.

    sudo .venv/bin/python benchmarks/slow_links.py            # about 40 minutes
    sudo .venv/bin/python benchmarks/slow_links.py --small    # a minute: does it all run?
    sudo .venv/bin/python benchmarks/slow_links.py --only inside dilated_p3dn

Each measurement is one `mics lab run ... -- mics bench ...`; its command is in its result file.
Links carry 200 Mbit/s, or 100 where a large model is stretched. All engines of a measurement take
their steps in turn, in one run. DeepSpeed's run beside mics in a run of their own, as all at once
need more than 24 GB of memory; they are left out without `make bench-environments`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mics.benching.deepspeed_parent import RELEASES, find_python
from mics.benching.options import MODES, OWN_ENGINES
from mics.errors import MicsError

RESULTS = Path(__file__).parent / "results"
DEEPSPEED = ("mics", *RELEASES)
OWNED = ("mics", "mics owned")
IN_A_ROW = ("--in-a-row", "4")
BITS = ("mics", *MODES, "hsdp deferred", "computation")


@dataclass(frozen=True)
class Measurement:
    """One lab and what runs in it."""

    nodes: int
    ranks: int  # per node
    link: str
    bench: tuple[str, ...]
    engines: tuple[str, ...] = OWN_ENGINES
    small: tuple[str, ...] = ("--steps", "1")  # added for a short run


INSIDE = ("train", "--partition", "2")
BERT = (*INSIDE, "--workload.kind", "bert")
DILATED = ("dilated", "--partition", "2")
SIZES = ("--sizes", "64KiB", "256KiB", "1MiB", "4MiB", "8MiB", "16MiB")
FOUR = ("--dilation.micro-batch", "4")
MEASUREMENTS = {
    "collectives": Measurement(
        2, 4, "200mbit", ("collectives", *SIZES), (), ("--sizes", "64KiB", "--repeats", "2")
    ),
    "inside": Measurement(4, 2, "200mbit", INSIDE),
    "inside_deepspeed": Measurement(4, 2, "200mbit", INSIDE, DEEPSPEED),
    "inside_bits": Measurement(4, 2, "200mbit", INSIDE, BITS),
    "inside_owned": Measurement(4, 2, "200mbit", (*INSIDE, *IN_A_ROW), OWNED),
    "inside_rows4": Measurement(4, 2, "200mbit", (*INSIDE, "--workload.rows", "4")),
    "bert": Measurement(4, 2, "200mbit", BERT),
    "bert_deepspeed": Measurement(4, 2, "200mbit", BERT, DEEPSPEED),
    "spanning": Measurement(2, 4, "200mbit", ("train", "--partition", "8")),
    "dilated_p3dn": Measurement(4, 2, "100mbit", DILATED),
    "dilated_p3dn_4": Measurement(4, 2, "100mbit", (*DILATED, *FOUR)),
    "dilated_p3dn_4_bits": Measurement(4, 2, "100mbit", (*DILATED, *FOUR), BITS),
    "dilated_p3dn_4_owned": Measurement(4, 2, "100mbit", (*DILATED, *FOUR, *IN_A_ROW), OWNED),
    # Every time twice as long, what the host does not: how much of a ratio is the host's.
    "dilated_p3dn_4_slower": Measurement(4, 2, "50mbit", (*DILATED, *FOUR), BITS),
    "dilated_p3dn_4_deepspeed": Measurement(4, 2, "100mbit", (*DILATED, *FOUR), DEEPSPEED),
    "dilated_p4d": Measurement(4, 2, "100mbit", (*DILATED, "--dilation.cluster", "p4d")),
    "dilated_spanning": Measurement(4, 2, "100mbit", ("dilated", "--partition", "4")),
}
STEPS = {"train": "4", "dilated": "2"}
SMALLER = {
    "train": ("--workload.hidden", "32", "--workload.layers", "2", "--workload.length", "16"),
    "dilated": ("--dilation.block-bytes", "16384", "--dilation.blocks", "2"),
}


def why_not(measurement: Measurement) -> str:
    """What is missing for it, if anything."""
    try:
        for name in set(measurement.engines) & set(RELEASES):
            find_python(name)
    except MicsError as error:
        return str(error)
    return ""


def command(name: str, out: Path, *, small: bool) -> list[str]:
    """What a user would type."""
    one = MEASUREMENTS[name]
    kind = one.bench[0]
    words = ["mics", "lab", "run", "--nodes", str(min(one.nodes, 2) if small else one.nodes)]
    words += ["--gpus-per-node", str(one.ranks), "--link", one.link, "--", "mics", "bench"]
    words += one.bench
    if one.engines:
        words += ["--engines", *one.engines]
    if small:
        words += [*one.small, *SMALLER.get(kind, ())]
    elif kind in STEPS:
        words += ["--steps", STEPS[kind]]
    return [*words, "--out", str(out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny models, one step, 2 nodes")
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), default=MEASUREMENTS)
    parser.add_argument("--folder", type=Path, help="results/; --small: a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="mics-small-")) if arguments.small else RESULTS
    for name in arguments.only:
        if missing := why_not(MEASUREMENTS[name]):
            print(f"\n{name} is left out: {missing}", file=sys.stderr)
            continue
        file = name if name == "collectives" else f"lab_{name}"
        words = command(name, folder / f"{file}.json", small=arguments.small)
        print(f"\n$ {' '.join(words)}", flush=True)
        subprocess.run([sys.executable, "-m", *words], check=True)


if __name__ == "__main__":
    main()
