"""Steps recorded on all ranks: what the file holds, what it says, and that nothing changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, errors_of_ranks, mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import mics
from mics.__main__ import main
from mics.lab.tracing.accounts import Account, Hop, account_of_host, measure
from mics.lab.tracing.clocks import Offset, between, offset_of
from mics.lab.tracing.devices import settle_on_device
from mics.lab.tracing.file import read_file
from mics.lab.tracing.lanes import lanes_of
from mics.lab.tracing.profiles import parse
from mics.lab.tracing.stragglers import Arrival, straggler_of, waited_for
from mics.lab.tracing.summary import Job, Summary, summarise
from mics.ranks.recording import Flight, Recorder, recorder
from mics.ranks.times import Places
from mics.sharding.units import units_of
from mics.traffic import StageMessage

ROOT = Path(__file__).parents[1]
STEPS, SKIP, MICRO_STEPS = 2, 2, 2


def model_of(collectives: Any, partition: int) -> nn.Module:
    """Three blocks and the root's own layer: four units."""
    mesh = mesh_of_rank(partition, 2)
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(32, 1))
    for block in [*blocks, model]:
        mics.fully_shard(block, mesh=mesh, collectives=collectives, gpus_per_node=2, overlap=True)
    return model


def train(model: nn.Module, steps: int, slow: int = -1) -> tuple[list[str], list[Any]]:
    """Loss bits of every micro-step, and what the ledger counted in every step."""
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(1 + dist.get_rank())
    losses, counted = [], []
    for _ in range(steps):
        mics.ledger(model).reset()
        for x in mics.micro_steps(model, [torch.randn(4, 32) for _ in range(MICRO_STEPS)]):
            if dist.get_rank() == slow:
                time.sleep(0.3)
            loss = model(x).square().mean() / MICRO_STEPS
            loss.backward()
            losses.append(loss.item().hex())
        optimizer.step()
        optimizer.zero_grad()
        counts = mics.ledger(model).traffic().counts
        counted.append(
            {
                (key.hop, key.collective, key.stage): (count.calls, count.message_bytes)
                for key, count in counts.items()
            }
        )
    return losses, counted


def both_ways(folder: str, slow: int = -1) -> dict[str, Any]:
    """Train with and without a trace, flat and in two stages."""
    found: dict[str, Any] = {"units": {}, "losses": {}, "counted": {}, "summary": {}}
    for collectives, partition in (("flat", 2), ("hierarchical", 4)):
        plain, _ = train(model_of(collectives, partition), SKIP + STEPS + 2)
        model = model_of(collectives, partition)
        with mics.trace(model, f"{folder}/{collectives}.json.gz", steps=STEPS, skip=SKIP) as traced:
            losses, counted = train(model, SKIP + STEPS + 2, slow)
        assert recorder() is None
        found["losses"][collectives] = plain, losses
        found["counted"][collectives] = counted[SKIP : SKIP + STEPS]
        found["summary"][collectives] = traced.summary
    return found


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("traces")
    return folder, run_ranks(both_ways, 4, str(folder), 2, ranks_per_node=2)


Traced = tuple[Path, list[dict[str, Any]]]
BOTH = pytest.mark.parametrize("collectives", ["flat", "hierarchical"])


def own_events(file: Path) -> list[dict[str, Any]]:
    return [event for event in read_file(file)["traceEvents"] if event.get("cat") == "mics"]


@BOTH
def test_a_trace_changes_no_bit_of_any_loss(traced: Traced, collectives: str) -> None:
    for rank in traced[1]:
        plain, recorded = rank["losses"][collectives]
        assert len(plain) == (SKIP + STEPS + 2) * MICRO_STEPS
        assert plain == recorded


@BOTH
def test_every_collective_is_in_the_file_with_the_bytes_that_the_ledger_counted(
    traced: Traced, collectives: str
) -> None:
    events = own_events(traced[0] / f"{collectives}.json.gz")
    for rank, seen in enumerate(traced[1]):
        for number, counted in enumerate(seen["counted"][collectives]):
            step = SKIP + 1 + number
            found: dict[Any, tuple[int, int]] = {}
            for event in events:
                args = event["args"]
                if event["pid"] == rank and "hop" in args and args["step"] == step:
                    assert event["ph"] == "X"
                    key = args["hop"], args["collective"], args["stage"]
                    calls, total = found.get(key, (0, 0))
                    found[key] = calls + 1, total + args["bytes"]
            assert found == counted


def test_hop_2_is_there_once_per_unit_and_step_and_stages_are_named(traced: Traced) -> None:
    flat = own_events(traced[0] / "flat.json.gz")
    units = {e["args"]["unit"] for e in flat if e["args"].get("hop") == 1}
    assert units == {"0", "1", "2", "3.weight"}
    for rank in range(4):
        for step in (SKIP + 1, SKIP + 2):
            names = [
                event["name"]
                for event in flat
                if event["pid"] == rank
                and event["args"].get("hop") == 2
                and event["args"]["step"] == step
            ]
            assert sorted(names) == sorted(f"hop 2 all-reduce {unit}" for unit in units)
    names = {event["name"] for event in own_events(traced[0] / "hierarchical.json.gz")}
    for unit in units:
        assert f"hop 1 all-gather inter {unit}" in names
        assert f"hop 1 reduce-scatter intra {unit}" in names
        assert {f"forward {unit}", f"backward {unit}"} <= names


@BOTH
def test_the_file_is_as_perfetto_reads_it_and_ranges_nest(traced: Traced, collectives: str) -> None:
    document = read_file(traced[0] / f"{collectives}.json.gz")
    events = document["traceEvents"]
    labels = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    replica = [0, 0, 1, 1] if collectives == "flat" else [0] * 4
    assert labels == {r: f"rank {r}, node {r // 2}, replica {replica[r]}" for r in range(4)}
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    for event in events:
        assert event["ph"] in ("M", "X", "i", "s", "f")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] != "M":
            assert event["ts"] >= 0
            assert (event["pid"], event["tid"]) in named
        if event["ph"] == "X":
            assert event["dur"] >= 0
            begun = event["ts"]
            rows.setdefault((event["pid"], event["tid"]), []).append((begun, begun + event["dur"]))
    for ranges in rows.values():
        ends: list[float] = []
        for begun, ended in sorted(ranges, key=lambda one: (one[0], -one[1])):
            while ends and ends[-1] <= begun + 1e-3:
                ends.pop()
            assert not ends or ended <= ends[-1] + 1e-3
            ends.append(ended)
    starts = [e["id"] for e in events if e["ph"] == "s"]
    assert len(set(starts)) == len(starts) > 0  # no arrow of one rank is another's


def test_torchs_rows_have_operators_and_the_same_names(traced: Traced) -> None:
    events = read_file(traced[0] / "flat.json.gz")["traceEvents"]
    for rank in range(4):
        of_torch = [e for e in events if e["pid"] == rank and e.get("cat") != "mics"]
        names = {event["name"] for event in of_torch}
        assert "aten::addmm" in names
        annotated = {e["name"] for e in of_torch if e.get("cat") == "user_annotation"}
        assert any(name.startswith("hop 1 all-gather ") for name in annotated)
        assert any(name.startswith("hop 2 all-reduce ") for name in annotated)
        assert any(name.startswith("waits for the ") for name in annotated)


@BOTH
def test_the_parts_of_a_step_add_up_and_the_summary_is_what_the_file_says(
    traced: Traced, collectives: str
) -> None:
    summaries = [rank["summary"][collectives] for rank in traced[1]]
    assert len({str(one) for one in summaries}) == 1
    summary: Summary = summaries[0]
    document = read_file(traced[0] / f"{collectives}.json.gz")
    clocks = {int(r): Offset(**one) for r, one in document["mics"]["clocks_ns"].items()}
    file = str(traced[0] / f"{collectives}.json.gz")
    places = Places((0, 1, 2, 3), 2 if collectives == "flat" else 4, 2)
    again = summarise(
        document["traceEvents"], Job(file, places, clocks, document["mics"]["step_before_ns"])
    )
    assert again == summary
    assert [(one.step, one.rank) for one in summary.steps] == [
        (step, rank) for step in (SKIP + 1, SKIP + 2) for rank in range(4)
    ]
    for one in summary.steps:
        assert set(one.total) == ({1, 2} if collectives == "flat" else {1})
        waited = sum(value for value in one.exposed.values() if value is not None)
        assert one.compute is not None
        assert one.others is not None
        assert one.compute + waited + one.others == pytest.approx(one.took)
        # What is waited for is under way, but for what finishes it: sums and copies of its result.
        assert all(0 <= one.total[hop] <= one.took for hop in one.total)


def test_a_rank_that_sleeps_is_the_one_waited_for(traced: Traced) -> None:
    summary: Summary = traced[1][0]["summary"]["flat"]
    for step, late in summary.stragglers.items():
        assert late is not None
        assert late.rank == 2
        assert late.last[2] == (4, 4)  # all of its hop 2
        rows = {one.rank: one for one in summary.steps if one.step == step}
        assert max(rows, key=lambda rank: rows[rank].compute or 0) == 2
        # Its own partition group waits at hop 1, the other one at hop 2 and for the end.
        exposed = {rank: one.exposed[1] or 0 for rank, one in rows.items()}
        assert max(exposed, key=lambda rank: exposed[rank]) == 3
        assert all((rows[rank].exposed[2] or 0) > (rows[2].exposed[2] or 0) for rank in (0, 1))
    assert "Rank 2 (node 1) was waited for" in str(summary)


def test_nothing_is_written_down_while_nobody_traces() -> None:
    def work() -> list[bool]:
        model = model_of("flat", 2)
        spans = []
        unit = units_of(model)[0]
        message = StageMessage("flat", (0, 1), 64, 1)
        spans.append(unit.ledger.issue(1, "all_gather", message, torch.device("cpu")))
        return [span._flight is None for span in spans] + [recorder() is None]

    assert run_ranks(work, 2, ranks_per_node=2) == [[True, True]] * 2


# -- what is refused -------------------------------------------------------------------------------


def too_short(folder: str) -> None:
    model = model_of("flat", 2)
    with mics.trace(model, f"{folder}/a.json", skip=3):
        train(model, 2)


def no_folder(folder: str) -> None:
    model = model_of("flat", 2)
    with mics.trace(model, f"{folder}/none/a.json", steps=1, skip=1):
        train(model, 3)


def on_some_ranks(folder: str) -> None:
    meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    model = nn.Linear(8, 8)
    mics.fully_shard(model, mesh=meshes[dist.get_rank() // 2])
    with mics.trace(model, f"{folder}/a.json"):
        raise AssertionError("it should have been refused")


@pytest.mark.parametrize(
    ("work", "world", "said"),
    [
        (too_short, 2, "It took 2 step(s), of which the first 3 are skipped"),
        (no_folder, 2, "cannot be written"),
        (on_some_ranks, 4, "It is on 2 of 4 ranks"),
    ],
)
def test_what_cannot_be_traced_is_refused_on_every_rank(
    work: Any, world: int, said: str, tmp_path: Path
) -> None:
    for text in errors_of_ranks(work, world, str(tmp_path), ranks_per_node=2):
        assert "TraceError" in text
        assert said in text
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_in_the_end_is_told_on_every_rank(tmp_path: Path) -> None:
    def work() -> None:
        model = model_of("flat", 2)
        folder = tmp_path / "gone"
        folder.mkdir(exist_ok=True)
        with mics.trace(model, folder / "a.json.gz", steps=1, skip=1):
            train(model, 1)
            shutil.rmtree(folder, ignore_errors=True)
            train(model, 2)

    for text in errors_of_ranks(work, 4, ranks_per_node=2):
        assert "TraceError" in text
        assert "a.json.gz cannot be written" in text
        assert "FileNotFoundError" in text


def test_a_loop_that_raises_raises_its_own_error_and_leaves_no_file(tmp_path: Path) -> None:
    def work() -> None:
        model = model_of("flat", 2)
        try:
            with mics.trace(model, tmp_path / "a.json", steps=3, skip=1):
                train(model, 2)
                raise ZeroDivisionError("a loop's own")
        finally:
            assert recorder() is None

    with pytest.raises(RankFailed, match="a loop's own"):
        run_ranks(work, 2, ranks_per_node=2)
    assert not list(tmp_path.iterdir())


def test_a_loop_that_ends_early_has_the_steps_that_there_were(tmp_path: Path) -> None:
    def work() -> list[int]:
        model = model_of("flat", 2)
        with mics.trace(model, tmp_path / "a.json", steps=5, skip=1) as traced:
            train(model, 3)
        assert traced.summary is not None
        return list(traced.summary.stragglers)

    assert run_ranks(work, 2, ranks_per_node=2) == [[2, 3]] * 2
    assert len({e["pid"] for e in own_events(tmp_path / "a.json")}) == 2


# -- the verb --------------------------------------------------------------------------------------

LOOP = """
import sys, torch, mics
from torch import nn
mesh = mics.init_mesh(partition=2)
model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(2)])
for one in model:
    mics.fully_shard(one, mesh=mesh)
mics.fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(int(sys.argv[1])):
    for x in mics.micro_steps(model, [torch.randn(4, 16) for _ in range(2)]):
        model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def verb(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mics", "trace", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_the_verb_traces_a_script_that_is_not_changed_and_ends_it(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    words = ["--ranks", "4", "--gpus-per-node", "2", "--steps", "1", "--skip", "1"]
    done = verb(tmp_path, *words, "loop.py", "1000000")
    assert done.returncode == 0, done.stderr
    assert "1 step(s) of 4 rank(s) on 2 node(s), p = 2" in done.stdout
    events = own_events(tmp_path / "trace.json.gz")
    assert {e["pid"] for e in events} == {0, 1, 2, 3}
    assert {e["name"] for e in events if e["args"].get("hop") == 2} == {
        "hop 2 all-reduce 0",
        "hop 2 all-reduce 1",
    }


@pytest.mark.slow
def test_the_verb_says_that_a_script_was_too_short(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    done = verb(tmp_path, "--ranks", "2", "--steps", "2", "--skip", "1", "loop.py", "2")
    assert done.returncode == 1
    assert "The program ended before its steps were recorded" in done.stderr
    assert "1 are skipped, 2 recorded, and one more has to begin" in done.stderr
    assert not (tmp_path / "trace.json.gz").exists()


def test_ranks_that_the_configuration_contradicts_are_refused_before_any_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text("[parallel]\nranks = 8\ngpus_per_node = 2\n")
    for words, said in (
        (["--ranks", "4"], "--ranks 4, parallel.ranks = 8"),
        (["--gpus-per-node", "4"], "--gpus-per-node 4, parallel.gpus_per_node = 2"),
        (["--out", "trace.txt"], "trace.txt is not named as one"),
        (["--out", "none/trace.json"], "none is no folder to write to"),
    ):
        assert main(["trace", *words, "job.toml"]) == 1
        assert said in capsys.readouterr().err
    assert main(["trace", "train.py"]) == 1
    assert "There is no script or configuration train.py" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.extra
def test_the_trainer_under_torchrun_is_traced_and_its_run_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("what is read here is of no interest. " * 3000)
    (tmp_path / "job.toml").write_text(
        '[run]\nfolder = "run"\nsteps = 1\n[data]\nsource = "text.txt"\nsequence = 32\n'
        '[batch]\nglobal_batch = 4\nmicro_steps = 2\n[parallel]\ndtype = "fp32"\n'
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m", "mics", "trace"]
    launch += ["--steps", "1", "--skip", "1", "job.toml", "--parallel.partition", "1"]
    done = subprocess.run(
        launch,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 step(s) of 2 rank(s) on 1 node(s), p = 1" in done.stdout
    hops = {e["args"]["hop"] for e in own_events(tmp_path / "trace.json.gz") if "hop" in e["args"]}
    assert hops == {2}
    kept = {path.name for path in tmp_path.iterdir()} - {".cache"}
    assert kept == {"text.txt", "job.toml", "trace.json.gz"}


# -- arithmetic, by hand ---------------------------------------------------------------------------


def test_overlapping_intervals_count_once_and_only_inside_the_span() -> None:
    assert measure([(0, 10), (5, 15), (20, 30)], (2, 25)) == 13 + 5
    assert measure([], (0, 5)) == 0


def test_the_account_of_a_host_by_hand() -> None:
    flights = [(1, (0, 10)), (1, (5, 20)), (2, (50, 90))]
    waits = [(1, (5, 10)), (2, (80, 90)), (None, (90, 95)), (1, (200, 300))]
    account = account_of_host(7, (0, 100), flights, waits)
    assert account == Account(7, 0, 100, 100 - 20, {1: Hop(20, 5), 2: Hop(40, 10)}, 5)


def test_a_rank_late_through_another_one_is_not_blamed() -> None:
    first, second = Arrival(0, 10, 10, 50), Arrival(1, 60, 10, 0)
    assert waited_for([first, second]) == (1, 0.0)  # it has waited itself before
    assert waited_for([first, Arrival(1, 60, 60, 0)]) == (1, 50)
    assert waited_for([Arrival(0, 10, 10, 20), Arrival(1, 60, 60, 0)]) == (1, 20)
    assert waited_for([Arrival(0, 10, 10, None), Arrival(1, 60, 60, None)]) == (1, 50)


def test_lateness_that_the_clocks_error_explains_is_none() -> None:
    met = [(2, [Arrival(0, 10, 10, None), Arrival(1, 60, 60, None)])]
    late = straggler_of(met, {0: 0.0, 1: 49.0}, 100.0)
    assert late is not None
    assert (late.rank, late.hop, late.waited, late.last) == (1, 2, 50.0, {2: (1, 1)})
    assert straggler_of(met, {0: 1.0, 1: 49.0}, 100.0) is None
    assert straggler_of(met, {}, 50.0 / 0.03 + 1) is None  # too little of a step


def test_an_offset_by_hand() -> None:
    """A clock that is 1,000 ahead; the second all-gather is short, the others bound it less."""
    first = [(0, 100), (200, 230), (300, 390)]
    other = [(1_010, 1_100), (1_205, 1_235), (1_290, 1_390)]
    # At least 1,205 - 230 = 975, at most 1,235 - 200 = 1,035.
    assert offset_of(first, other) == Offset(1_005, 30)
    # The third one's visit came late: the other can not have left before.
    assert offset_of([(0, 100), (50, 100)], [(1_090, 1_100), (1_050, 1_051)]) == Offset(995, 6)
    assert between(Offset(1_030, 10), Offset(1_050, 14)) == Offset(1_040, 14 + 10)
    assert between(Offset(30, 40), Offset(-10, 40)) == Offset(0, 60)  # one clock, for all we know


def test_what_does_not_nest_gets_a_lane_of_its_own() -> None:
    ranges = [(0, 10_000), (2_000, 4_000), (5_000, 15_000), (16_000, 17_000), (9_000, 10_500)]
    lanes, ends = lanes_of(ranges)
    assert lanes == [0, 0, 1, 0, 0]
    assert ends == [10_000, 4_000, 15_000, 17_000, 10_000]  # the last was rounded


def kernel(number: int, begun: float, dur: float, stream: int) -> dict[str, Any]:
    return {
        "ph": "X", "cat": "kernel", "name": f"k{number}", "pid": 0, "tid": stream,
        "ts": begun, "dur": dur, "args": {"correlation": number},
    }  # fmt: skip


def launch(number: int, ts: float) -> dict[str, Any]:
    return {
        "ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 9, "tid": 9,
        "ts": ts, "dur": 1, "args": {"correlation": number},
    }  # fmt: skip


def test_a_device_is_accounted_by_its_kernels_and_who_launched_them() -> None:
    """One all-gather beside computation for a half, then a step that computes only."""
    recording = Recorder(lambda: None, dict)
    message = StageMessage("flat", (0, 1), 64, 1)
    flight = Flight("hop 1 all-gather a", "a", 1, "all_gather", message, 10_000, 0, recording)
    flight.waits = [(10_000, 14_000)]
    note = {
        "ph": "X", "cat": "user_annotation", "name": flight.name, "pid": 9, "tid": 9,
        "ts": 10, "dur": 4, "args": {},
    }  # fmt: skip
    events = [note, launch(1, 5), launch(2, 11), launch(3, 20), launch(4, 55)]
    events += [kernel(1, 100, 20, 7), kernel(2, 110, 20, 8), kernel(3, 130, 30, 7)]
    events += [kernel(4, 180, 10, 7)]
    profile = parse({"baseTimeNanoseconds": 0, "traceEvents": json.loads(json.dumps(events))})
    steps = [(4, (0, 50_000)), (5, (50_000, 90_000)), (6, (90_000, 99_000))]
    accounts = settle_on_device(profile.events, [flight], steps)
    # 100-180: computes 20 and 30; gathers 110-130, of which 120-130 beside nothing.
    assert accounts[0] == Account(4, 100_000, 180_000, 50_000, {1: Hop(20_000, 10_000)}, None)
    assert accounts[1] == Account(5, 180_000, 190_000, 10_000, {}, None)
    assert accounts[2] == Account(6, 90_000, 99_000, None, {}, None)  # it launched nothing
    assert (flight.begun, flight.ended, flight.own) == (110_000, 130_000, 10_000)
    assert flight.waits == []
