"""Is what other people train right? Every kind of model beside FSDP2 and one process.

    python benchmarks/parity_table.py                   # all rows, some 40 minutes on 2 cores
    python benchmarks/parity_table.py --rows MoE --small

A row is a kind of model in two layouts on eight Gloo ranks, trained for five steps: by mics with
two-stage and with flat collectives, by FSDP2, and in one process that sees all data. An entry is
the largest relative difference of a weight (of the tensor's largest) or of a norm from the one
process in fp32, over all schedules in the first layout and two of them in the other: 1 and 3
micro-steps, normalised by micro-steps and by tokens, with and without clipping. Beside it stands
the one process, rounded otherwise: smaller differences than that are rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import itertools
import json
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # ranks.py, which starts ranks

import ranks  # noqa: E402
import torch  # noqa: E402
from kinds.keeping import kept_by_mics, kept_by_torch  # noqa: E402
from kinds.rows import ROWS, WORLD, Row, place_of  # noqa: E402
from kinds.training import (  # noqa: E402
    EPS,
    SCHEDULES,
    STEPS,
    Schedule,
    Trained,
    alone,
    digest,
    distance,
    train_fsdp2,
    train_mics,
)

BOUNDS = {"SGD": 1e-6, "AdamW": 1e-5}
ENGINES = ("mics, two-stage", "mics, flat", "FSDP2")
OTHERWISE = "one process, rounded otherwise"
SMALL = tuple(s for s in SCHEDULES if s.micro_steps == 3 and s.by_tokens == s.clip)
TESTED = (Schedule("SGD", 3, True, False), Schedule("AdamW", 3, False, True))  # by the tests

Result = dict[str, Any]
Rights = dict[tuple[Schedule, int], Trained]


def measure(row: Row, schedules: tuple[Schedule, ...], folder: Path) -> Result:
    """Train and keep a row in every way.

    Args:
        row: what is trained.
        schedules: how.
        folder: for checkpoints; empty.

    Returns:
        ``runs``: one per layout, schedule and engine; ``kept``: what differs after a round of
        saving and loading, or why there was none.
    """
    data_ranks = {layout.data_ranks for layout in row.layouts}
    pairs = [*itertools.product(schedules, data_ranks)]
    rights = {(how, n): alone(row, how, n) for how, n in pairs}
    runs = [
        _run(row, "", how, OTHERWISE, distance(alone(row, how, n, otherwise=True), rights[how, n]))
        for how, n in pairs
    ]
    parts = ranks.run_ranks(_of_rank, WORLD, row, schedules, rights)
    runs += [_worst(same) for same in zip(*parts, strict=True)]
    kept = {name: _kept(row, folder / name, name) for name in ("mics", "torch")}
    return {"row": row.name, "layouts": [one.words for one in row.layouts], "runs": runs} | {
        "kept": kept
    }


def _of_rank(row: Row, schedules: tuple[Schedule, ...], rights: Rights) -> list[Result]:
    _be_quiet()
    runs = []
    ways = [(row.layouts[0], how) for how in schedules]
    ways += [(one, how) for one in row.layouts[1:] for how in schedules if how in SMALL]
    for (layout, schedule), engine in itertools.product(ways, ENGINES):
        if engine == "FSDP2" and schedule.optimizer == "Muon, dealt":
            continue  # it is a way of mics
        place, right = place_of(layout), rights[schedule, layout.data_ranks]
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                if engine == "FSDP2":
                    trained = train_fsdp2(row, place, schedule)
                else:
                    form = "flat" if engine == "mics, flat" else "hierarchical"
                    trained = train_mics(row, place, schedule, form)
        except Exception as error:  # of FSDP2, of an optimizer
            raised = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            runs.append(_run(row, layout.words, schedule, engine, None, raised=raised))
            continue
        apart = distance(trained, right)
        facts = {"as_predicted": trained.as_predicted, "once": trained.once}
        facts["digest"] = digest(trained)
        runs.append(_run(row, layout.words, schedule, engine, apart, **facts))
    return runs


def _run(
    row: Row, layout: str, schedule: Schedule, engine: str, apart: float | None, **facts: Any
) -> Result:
    return {
        "layout": layout,
        "optimizer": schedule.optimizer,
        "schedule": schedule.words,
        "engine": engine,
        "apart": apart,
        **facts,
    }


def _worst(same: tuple[Result, ...]) -> Result:
    """One run as the rank saw it that is furthest off, and whether all ranks have the same."""
    worst = max(
        same,
        key=lambda run: (
            "raised" in run,
            run.get("as_predicted") is False,
            run.get("once") is False,
            run["apart"] or 0.0,
        ),
    )
    alike = len({run.pop("digest", None) for run in same}) == 1
    return worst | {"alike": alike}


def _kept(row: Row, folder: Path, by: str) -> list[str]:
    """What differs after a round, on any rank; or what was said instead."""
    keep = kept_by_mics if by == "mics" else kept_by_torch
    try:
        found = ranks.run_ranks(_quietly, WORLD, keep, row, folder)
    except ranks.RankFailed as error:
        return [_raised(str(error))]
    return sorted({name for rank in found for name in rank})


def _raised(text: str) -> str:
    """The line of a traceback that says what was raised."""
    lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
    said = [line for line in lines[1:] if ": " in line and not line.startswith("Traceback")]
    return "raises " + (said[0] if said else lines[-1])[:200]


def _quietly(keep: Callable[[Row, Path], list[str]], row: Row, folder: Path) -> list[str]:
    _be_quiet()
    with contextlib.redirect_stderr(io.StringIO()):
        return keep(row, folder)


def _be_quiet() -> None:
    """Leave out what torch and torchao say of each other, and of reshaping in several steps."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


# -- what is wrong -------------------------------------------------------------------------------


def wrong(row: Row, result: Result) -> Iterator[str]:
    """What a row does not keep of what is promised."""
    for run in result["runs"]:
        if not run["engine"].startswith("mics"):
            continue
        what = f"{row.name} ({run['layout']}), {run['optimizer']}, {run['schedule']}, "
        what += run["engine"]
        if "raised" in run:
            yield f"{what}: {run['raised']}"
            continue
        most = BOUNDS.get(run["optimizer"]) if row.fp32 else None
        if most is not None and not run["apart"] <= most:
            yield f"{what}: {run['apart']:.1e} off, of at most {most:.0e}"
        if not run["as_predicted"]:
            yield f"{what}: counted is not predicted"
        if not run["alike"]:
            yield f"{what}: ranks have other weights"
        if not run["once"]:
            yield f"{what}: hop 2 ran not once per unit and step"
    for name in result["kept"]["mics"]:
        yield f"{row.name}: not the same after mics.save and mics.load: {name}"


# -- the table -----------------------------------------------------------------------------------


def document(results: list[Result], command: str) -> str:
    """The page in `benchmarks/results/`."""
    parts = [
        "# Every kind of model, beside FSDP2 and one process",
        f"`{command}`, {datetime.date.today()}, Python {platform.python_version()}, torch "
        f"{version('torch')}, torchao {version('torchao')}, {WORLD} Gloo ranks.",
        "Entries: the largest relative difference of a weight or norm from one process in fp32 "
        f"after {STEPS} steps, over all schedules in the first layout of the row (1 and 3 "
        "micro-steps, by micro-steps and by tokens, with and without clipping) and two of them in "
        "the other. The last column is one process in fp64; with bf16 or float8 weights it "
        "normalises behind the backward passes, as mics does, which those round otherwise.",
    ]
    for optimizer, words in _OPTIMIZERS.items():
        engines = (*ENGINES, OTHERWISE)
        lines = [_line("", *engines), _rule(len(engines))]
        lines += [
            _line(r["row"], *(_cell(r["runs"], optimizer, engine) for engine in engines))
            for r in results
        ]
        parts += [f"## {optimizer}", words, "\n".join(lines)]
    columns = (
        "layouts",
        "counted = predicted",
        "hop 2 once",
        "alike on every rank",
        "kept by mics",
        "kept by torch",
    )
    lines = [_line("", *columns), _rule(len(columns), right=False)]
    lines += [_line(r["row"], *_facts(r)) for r in results]
    parts += ["## Bytes and checkpoints", _FACTS, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


_OPTIMIZERS = {
    "SGD": "In fp32 at most 1e-6.",
    "AdamW": f"In fp32 at most 1e-5; eps is {EPS:.0e}, because with 1e-8 elements with gradients "
    "as small make fp32 and fp64 of one process up to 4e-4 differ.",
    "Muon": "Of the matrices of the blocks, with AdamW of the rest: `mics.WholeStep` of "
    "`torch.optim.Muon` here, `torch.optim.Muon` of DTensors in FSDP2. Its iteration is in bf16, "
    "so that a difference in the last bit of a gradient becomes one in the third digit.",
    "Muon, dealt": "The same with `mics.DealtStep`, and with `mics.WholeStep` of matrices that "
    "tensor or expert parallelism splits too.",
}
_FACTS = (
    "Layouts are replicas x partition, and k ranks per node; the checkpoint of the first is read "
    "in the last, every weight and state compared bit by bit."
)


def _cell(runs: list[Result], optimizer: str, engine: str) -> str:
    mine = [r for r in runs if r["optimizer"] == optimizer and r["engine"] == engine]
    apart = [r["apart"] for r in mine if r["apart"] is not None]
    raised = [r for r in mine if "raised" in r]
    if not mine:
        return "n/a"
    if not apart:
        return "raises"
    found = f"{max(apart):.1e}"
    if raised and all("clipped" in r["schedule"] for r in raised):
        return f"{found}; clipping raises"
    return f"{found}; {len(raised)} of {len(mine)} raise" if raised else found


def _facts(result: Result) -> list[str]:
    ours = [r for r in result["runs"] if r["engine"].startswith("mics") and "raised" not in r]
    said = [
        "; ".join(result["layouts"]),
        f"{sum(r['as_predicted'] for r in ours)} of {len(ours)}",
        f"{sum(r['once'] for r in ours)} of {len(ours)}",
        f"{sum(r['alike'] for r in ours)} of {len(ours)}",
    ]
    for by in ("mics", "torch"):
        differ = result["kept"][by]
        said.append("bit-equal" if not differ else "; ".join(differ[:2]).replace("|", "/"))
    return said


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int, right: bool = True) -> str:
    return "|---|" + ("---:|" if right else "---|") * columns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="rows whose names contain this")
    parser.add_argument("--small", action="store_true", help="two schedules for each optimizer")
    parser.add_argument("--out", type=Path, help="a file without suffix; .json and .md are added")
    asked = parser.parse_args()
    rows = [row for row in ROWS if asked.rows in row.name]
    ranks.SECONDS = 1800.0  # between two words of a rank: a whole row
    torch.set_num_threads(1)
    _be_quiet()
    results, failures, began = [], [], time.monotonic()
    for number, row in enumerate(rows, 1):
        with tempfile.TemporaryDirectory() as folder:
            result = measure(row, SMALL if asked.small else SCHEDULES, Path(folder))
        results.append(result)
        failures += wrong(row, result)
        seconds = time.monotonic() - began
        print(f"{number} of {len(rows)}: {row.name}, after {seconds:.0f} s", file=sys.stderr)
    command = " ".join(["python", "benchmarks/parity_table.py", *sys.argv[1:]])
    page = document(results, command)
    print(page)
    if asked.out:
        asked.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        asked.out.with_suffix(".md").write_text(page)
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
