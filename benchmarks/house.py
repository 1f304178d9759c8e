"""What a reader of the source meets, counted: rooms, imports, circles, long functions.

    python benchmarks/house.py                       # the tree that this file belongs to
    python benchmarks/house.py --places              # and where each of them is

Before and after:

    git worktree add ../before b990d36
    python benchmarks/house.py --against ../before --out benchmarks/results/house.md

The source is read, not imported: a tree may be older than this file, and may be broken. Only the
last row runs code, in processes of its own that see the tree's `src`. `tests/test_house.py` holds
the tree to the same counts.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import source as reading
from passing import rooms_of_mesh

ROOT = Path(__file__).parents[1]
RANKS, LAYERS = 2, 127
EDGES = "import edges between rooms"

# -- what only a run shows -----------------------------------------------------------------------


def gathers_of_shard(source: Path) -> dict[str, int]:
    """The all-gathers of one `shard` of a deep BERT: those that compare ranks, and all."""
    environment = os.environ | {"PYTHONPATH": str(reading.package_of(source).parent)}
    command = [sys.executable, __file__, "--count-gathers"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"shard failed in {source}:\n{done.stdout}{done.stderr}")
    counted: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counted


def count_gathers() -> dict[str, int]:
    """Shard on forked ranks; return what rank 0 counted."""
    importlib.import_module("torch._dynamo")  # FSDP2 imports it; once here, not once per rank
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, folder)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank failed")
        counted: dict[str, int] = json.loads(Path(folder, "counted").read_text())
    return counted


def _rank(rank: int, folder: str) -> None:
    import torch
    import torch.distributed as dist
    from transformers import BertConfig, BertForMaskedLM

    size = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in size.items()}
    os.environ["MICS_PROFILE"] = f"{folder}/profile.json"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS
    )
    counted: Counter[str] = Counter()
    for name in [name for name in dir(dist) if name.startswith("all_gather")]:
        setattr(dist, name, _counting(getattr(dist, name), counted))
    mics = importlib.import_module("mics")  # after the counters: it binds torch's names at import
    with torch.device("meta"):
        model = BertForMaskedLM(
            BertConfig(
                num_hidden_layers=LAYERS,
                hidden_size=16,
                intermediate_size=16,
                num_attention_heads=1,
                vocab_size=64,
            )
        )
    mics.shard(model, partition=RANKS)
    if not counted["comparing"]:
        raise AssertionError("nobody compared the ranks in agreement.py: it has another name")
    if rank == 0:
        Path(folder, "counted").write_text(json.dumps(counted))


def _counting(collective: Callable[..., Any], counted: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        frames = traceback.extract_stack()
        compares = any(Path(frame.filename).name == "agreement.py" for frame in frames)
        texts = any(frame.name == "gather_text" for frame in frames)
        counted["of all"] += 1
        counted["comparing"] += compares and not texts
        return collective(*args, **kwargs)

    return call


# -- the table -----------------------------------------------------------------------------------


def measure(source: Path) -> dict[str, list[str] | int]:
    """Every row of the table: a count, or the places that are counted."""
    package = reading.package_of(source)
    files, checkout = reading.read_package(package), package.parents[1]
    rooms, gathers = reading.room_edges(files), gathers_of_shard(source)
    return {
        "entries on the first look": reading.first_look(package),
        "files": [file.path for file in files],
        "lines": sum(len(file.text.splitlines()) for file in files),
        EDGES: [f"{a} -> {b}" for a in rooms for b in sorted(rooms[a])],
        "edges that run up": reading.edges_up(rooms, reading.file_map(checkout)),
        "circles of rooms": [" - ".join(circle) for circle in reading.circles(rooms)],
        "circles of files": [
            " - ".join(circle) for circle in reading.circles(reading.file_edges(files))
        ],
        "rooms that `fully_shard` passes a mesh through": rooms_of_mesh(files, "fully_shard"),
        f"files over {reading.MOST_LINES} lines": _shown(reading.long_files(files)),
        f"functions over {reading.MOST_OF_A_FUNCTION} lines": _shown(reading.long_functions(files)),
        f"functions with more than {reading.MOST_PARAMETERS} parameters": _shown(
            reading.wide_functions(files)
        ),
        'places that compare a device with "cpu"': reading.host_tests(files),
        "private names of others outside compat.py": reading.private_names(files),
        "all-gathers that compare ranks, per `shard`": gathers["comparing"],
        "all-gathers in all, per `shard`": gathers["of all"],
    }


def _shown(counts: dict[str, int]) -> list[str]:
    return [f"{place} ({count})" for place, count in counts.items()]


def table(columns: dict[str, dict[str, list[str] | int]]) -> str:
    """One row per measure, one column per tree."""
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in next(iter(columns.values())):
        counts = [_count(found[row]) for found in columns.values()]
        lines.append(f"| {row} | {' | '.join(counts)} |")
    return "\n".join(lines)


def _count(found: list[str] | int) -> str:
    return f"{found if isinstance(found, int) else len(found):,}"


def places(found: dict[str, list[str] | int]) -> str:
    """Where what is counted stands, row by row; what every tree has many of is left out."""
    shown = {
        row: entries
        for row, entries in found.items()
        if isinstance(entries, list) and entries and row not in ("files", EDGES)
    }
    return "\n\n".join(f"{row}: {', '.join(entries)}" for row, entries in shown.items())


def commit_of(source: Path) -> str:
    """The commit of a checkout, and whether files of it were changed since."""
    git = ["git", "-C", str(source)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--short", "src"], capture_output=True, text=True)
    return commit.stdout.strip() + (" with changes" if changed.stdout else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, default=ROOT, help="a checkout")
    parser.add_argument("--against", type=Path, help="the checkout of before")
    parser.add_argument("--places", action="store_true", help="say where, too")
    parser.add_argument("--out", type=Path, help="write the table into this file")
    parser.add_argument("--count-gathers", action="store_true", help=argparse.SUPPRESS)
    config = parser.parse_args()
    if config.count_gathers:
        print(json.dumps(count_gathers()))
        return
    trees = ([config.against] if config.against else []) + [config.source]
    columns = {commit_of(tree): measure(tree) for tree in trees}
    print(table(columns))
    if config.places:
        print(*(f"\n## {name}\n\n{places(found)}" for name, found in columns.items()), sep="\n")
    if config.out:
        config.out.write_text(document(columns))


def document(columns: dict[str, dict[str, list[str] | int]]) -> str:
    """The page in `benchmarks/results/`."""
    before = "`git worktree add ../before b990d36`, then " if len(columns) > 1 else ""
    *_, (name, now) = columns.items()
    return f"""# The house, counted

{before}`python {" ".join(sys.argv)}`, {datetime.date.today()}, Python {platform.python_version()},
torch {version("torch")}.

{table(columns)}

A room is the first name under `src/mics/`: a folder, or a file that stands loose. Edges and circles
count imports inside functions and for types too; what `mics/__init__.py` loads when it is first
used is left out. An edge runs up when what is imported does not stand above the importer in
ARCHITECTURE's map of the same commit. A mesh is followed from `fully_shard` through calls that
imports resolve and that take it, a process group of it, or a record that holds one; methods of an
object are not followed, so there may be more rooms. The lines of a function include its docstring;
`self` is no parameter. Private names are those of torch, transformers and other files.

The last two rows are counted on {RANKS} Gloo ranks of one node while `mics.shard` shards a BERT of
{LAYERS} layers on the meta device. It is as deep as BERT 10B but of width 16, because the width
changes no number of collectives. The first of them counts what `agreement.py` issues to compare
ranks, the second also the host names that are gathered and the weights that are compared.

## Places in {name}

{places(now)}
"""


if __name__ == "__main__":
    main()
