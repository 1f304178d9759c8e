"""`mics plan` and `mics simulate` from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_run_page import Page

import mics
from mics.__main__ import main
from mics.planning.validation import Holds, Row


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences stay on one line, and tables have all columns."""
    monkeypatch.setenv("COLUMNS", "300")


PLAN = ["plan", "--model", "gpt2-tiny", "--nodes", "2", "--micro-batch", "1", "4"]


def test_mics_plan_prints_a_table_and_writes_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {kind: tmp_path / f"plan.{kind}" for kind in ("json", "html", "png")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert main([*PLAN, "--sweep", "nodes=1..4", "--tokens", "300e9", *options]) == 0
    out = capsys.readouterr().out
    for words in (
        "A step costs $",
        "300.00 B tokens $",
        " days; ",
        "Best: p = ",
        "$/B",
        "Around it: partition down to ",
        "GPU: NVIDIA A100 data sheet",
        "Assumed: 0.8 GiB a GPU for its runtime",
        "a failure in 50,000 GPU hours, 10 minutes to restart, a checkpoint every 30 minutes",
        "Not modelled: ",
    ):
        assert words in out
    assert "software stack eager" in out
    document = json.loads(files["json"].read_text())
    assert [one["nodes"] for one in document["sweep"]] == [1, 2, 4]
    assert document["plans"][0]["reason"] in out
    page = Page(files["html"].read_text())
    assert len(page.figures) == 5
    assert page.tags.count("table") == 2
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_python_users_see_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PLAN) == 0
    plans = mics.plan("gpt2-tiny", "p4d:2", micro_batches=(1, 4))
    assert f"{plans}\n" == capsys.readouterr().out
    assert main([*PLAN, "--tokens", "300e9", "--reduce-dtype", "bf16", "--top", "2"]) == 0
    out = capsys.readouterr().out
    plans = mics.plan("gpt2-tiny", "p4d:2", micro_batches=(1, 4), reduce_bytes=2)
    assert str(plans.price(300e9)) in out
    assert str(plans.limits) in out
    assert out.startswith(plans.report(top=2, tokens=300e9))
    assert out.endswith("\n".join(plans.caveats()) + "\n")


@pytest.mark.parametrize("verb", [PLAN, ["simulate", "--model", "gpt2-tiny", "--nodes", "1"]])
def test_what_fails_at_its_end_has_printed_nothing(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, "--json", "/dev/full"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "/dev/full cannot be written.\n  No space left on device." in err


def test_json_says_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main([*PLAN, "--checkpointing", "none", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    document = json.loads(path.read_text())
    rows = [line.split() for line in out.splitlines()]
    head = next(number for number, row in enumerate(rows) if row[:2] == ["p", "replicas"])
    for row, one in zip(rows[head + 1 :], document["plans"][:10], strict=False):
        assert row[:6] == [
            str(one["partition"]),
            str(16 // one["partition"]),
            str(one["micro_batch"]),
            str(one["micro_steps"]),
            "none",
            one["all_gather"],
        ]
        assert row[6] == f"{one['memory_bytes'] / 2**30:.1f}"
        assert row[8] == f"{one['step_seconds']:.3f}"
        assert row[10] == f"{one['tokens_per_second']:,.0f}"
        assert one["global_batch"] == document["global_batch"]
        assert one["plain_full_sharding"] == (one["partition"] == 16)
    assert f"a step of {document['global_batch']:,} sequences" in out
    assert f"{document['ways_that_fit']} of {document['ways_tried']} ways fit" in out
    assert document["step_error"] == 0.03
    for caveat in document["caveats"]:
        assert caveat in out
    assert f"partition down to {document['limits']['partition']}," in out
    assert main([*PLAN, "--checkpointing", "none", "--json", str(path)]) == 0
    assert json.loads(path.read_text()) == document
    assert capsys.readouterr().out == out


def test_plans_are_a_sequence_and_a_plan_reads_as_a_sentence() -> None:
    plans = mics.plan("gpt2-tiny", "p4d:2", micro_batches=(1, 4))
    assert list(plans) == list(plans[:]) == [plans[n] for n in range(len(plans))]
    assert plans.best is plans[0]
    best = plans[0]
    assert str(best).splitlines() == [
        f"{best.way} on 2 x p4d (16 x A100-40GB, 39.5 GiB each): {best.needed / 2**30:.1f} of "
        f"39.5 GiB, a step of {best.seconds:.3f} s, {best.tokens_per_second:,.0f} tokens/s, "
        f"MFU {best.mfu:.1%}",
        best.reason,
    ]
    assert repr(plans) == (
        f"<{len(plans)} plans of gpt2-tiny on 2 x p4d (16 x A100-40GB, 39.5 GiB each), the best: "
        f"{best.way}>"
    )
    step = mics.simulate(plans)
    assert str(step).splitlines()[0] == f"a step of {step.seconds:.4g} s"
    shares = [float(line.split()[-1].rstrip("%")) for line in str(step).splitlines()[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert (
        "Links of p4d: a ring inside a node carries 230.8 GB/s, a node sends others 42.5 GB/s (340 "
        "Gbit/s)." in str(plans)
    )
    price = plans.price(300e9)
    assert price.run == pytest.approx(300 * (price.billion_tokens or 0))
    assert plans.price().run is None
    assert plans.limits.partition == 1
    assert (plans.limits.micro_batch or 0) > 4


def test_a_sweep_leaves_out_what_does_not_go(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "gpt2-tiny", "--nodes", "2", "--micro-batch", "1"]
    assert main([*words, "--partition", "16", "--sweep", "nodes=1..4"]) == 0
    out, err = capsys.readouterr()
    assert "1 nodes are left out: partition 16 is not possible" in err
    assert "the best plan on each number of nodes, for a step of 64 sequences" in out


def test_a_page_of_thousands_of_nodes(tmp_path: Path) -> None:
    page, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    words = ["plan", "--model", "gpt2-tiny", "--nodes", "2050", "--partition", "16400"]
    words += ["--micro-batch", "1", "--checkpointing", "none"]
    assert main([*words, "--html", str(page), "--png", str(picture)]) == 0
    assert len(Page(page.read_text()).figures) == 5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_mics_plan_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list"]) == 0
    out = capsys.readouterr().out
    assert "p6-b300" in out
    assert "n/a" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--node", "p4x"], "did you mean"),
        (["--nodes", "0"], "--nodes must be a whole number from 1 to 131,072, got 0"),
        (["--nodes", "1000000"], "--nodes must be a whole number from 1 to 131,072, got 1"),
        (["--node", "p6-b300"], "never measured"),
        (["--memory", "40"], "three numbers"),
        (["--model", "lama-8b"], "did you mean 'llama-8b'"),
        (["--sequence", "9999999"], "does not take a sequence"),
        (["--stack", "x"], "no software stack"),
        (["--sweep", "x"], "is no range"),
        (["--profile", "missing.json", "--gpu", "H100"], "no result of mics bench collectives"),
        (["--profile", "missing.json"], "not what computes"),
        (["--profile", "missing.json", "--memory", "40"], "--memory would have no effect beside"),
        (["--node", "p5", "--gpu", "H100"], "--gpu would have no effect beside --node"),
        (["--node", "p5", "--gpus-per-node", "4"], "--gpus-per-node would have no effect beside"),
        (["--list"], "--model and --nodes and --micro-batch would have no effect beside --list"),
        (["--gpu", "H100"], "--gpu would have no effect without --memory or --profile"),
        (["--memory", "40", "--intra", "200"], "--inter is missing"),
        (["--top", "0"], "--top must be a whole number from 1 to 1,000,000, got 0"),
        (["--tokens", "-1"], "--tokens must be a number from 1 to 1e+18, got -1"),
        (["--fragmentation", "-2"], "--fragmentation must be a number from 1 to 10, got -2"),
        (["--sweep", "2..9999999"], "A cluster has 1 to 131,072 nodes, got 2..9999999"),
        (["--global-batch", "96", "--micro-steps", "7"], "micro_steps follow from global_batch"),
        (["--json", "nowhere/plan.json"], "There is no nowhere"),
        (["--html", "."], "It is a folder"),
    ],
)
def test_mics_plan_refuses_what_makes_no_sense(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PLAN, *options]) == 1
    assert words in capsys.readouterr().err


def test_mics_plan_takes_three_numbers_and_ranks_by_cost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers = ["--memory", "40", "--intra", "200", "--inter", "20"]
    assert main([*PLAN, *numbers]) == 0
    assert "n/a" in capsys.readouterr().out  # nobody knows its price
    sweep = ["--by", "cost", "--sweep", "nodes=1..4"]
    assert main([*PLAN, *numbers, *sweep]) == 1
    assert "price of described is not known" in capsys.readouterr().err
    assert main([*PLAN, "--by", "cost"]) == 1
    assert "time and cost rank alike" in capsys.readouterr().err
    assert main([*PLAN, *sweep]) == 0
    by_cost = capsys.readouterr().out
    assert "Best by cost: 1 nodes, p = 1" in by_cost  # nothing is cheaper than not to communicate
    assert main([*PLAN, "--sweep", "nodes=1..4"]) == 0
    assert "Best by time: 4 nodes, p = 1" in capsys.readouterr().out


def test_a_gpu_without_bf16_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--node", "p3dn"]) == 0
    assert "V100-32GB multiplies 16 bits in fp16 only" in capsys.readouterr().out
    assert main(PLAN) == 0
    assert "fp16" not in capsys.readouterr().out


def test_mics_simulate_compares_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / kind for kind in ("json", "png", "trace")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    words = ["simulate", "--model", "gpt2-tiny", "--nodes", "1..4", "--engines", "mics", "fsdp2"]
    assert main([*words, *options]) == 0
    out = capsys.readouterr().out
    assert out.count("FSDP2 full shard over all ranks") == 1
    assert "p4d were measured on up to 2 nodes; times on more are extrapolated" in out
    curves = json.loads(files["json"].read_text())["tokens_per_second_by_gpus"]
    assert [gpus for gpus, _ in curves["fsdp2"]] == [8, 16, 32]
    assert json.loads(files["trace"].read_text())["traceEvents"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "as if it fitted" not in out
    numbers = ["--memory", "4", "--intra", "200", "--inter", "20", "--micro-batch", "1"]
    large = ["simulate", "--model", "bert-large", "--nodes", "1", *numbers, "--sequence", "128"]
    assert main([*large, "--engines", "mics", "ddp"]) == 0
    assert "of 3.948 GiB for a step: it is simulated as if it fitted" in capsys.readouterr().out
    assert main([*words, "--bandwidth", "0.01", "--scaling", "strong"]) == 0
    slower = capsys.readouterr().out
    assert slower != out


def test_mics_simulate_leaves_out_what_does_not_go(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--model", "gpt2-tiny", "--engines", "mics", "--partition", "16"]
    assert main([*words, "--nodes", "3..48"]) == 0
    out, err = capsys.readouterr()
    assert "3 nodes are left out: partition 16 does not divide them" in err
    assert [int(line.split()[0]) for line in out.splitlines() if " mics " in line] == [
        8 * n for n in (6, 12, 24, 48)
    ]
    assert main([*words, "--nodes", "2..64", "--scaling", "strong", "--micro-steps", "2"]) == 0
    assert (
        "8 nodes are left out: 4 micro-batches of a node do not divide" in capsys.readouterr().err
    )


def test_mics_simulate_takes_three_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--model", "gpt2-tiny", "--nodes", "2", "--engines", "mics"]
    numbers = ["--memory", "40", "--intra", "200", "--inter", "20", "--gpu", "H100"]
    assert main([*words, *numbers]) == 0
    assert "computes like H100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bandwidth", "0"], "--bandwidth must be a number from 1e-06 to 1e+06, got 0"),
        (["--latency", "nan"], "--latency must be a number from 1e-06 to 1e+06, got nan"),
        (["--nodes", "x"], "is no range"),
        (["--nodes", "0"], "is no range"),
        (["--partition", "64", "--nodes", "1..2"], "goes with no number of nodes of the range"),
        (["--partition", "3"], "goes with no number of nodes"),
        (["--engines"], "There is nothing to simulate"),
        (["--engines", "mics", "mics"], "--engines names one twice"),
        (["--out", "table.md"], "--out is the file of --validate"),
        (
            ["--validate", "--nodes", "4"],
            "--model and --nodes would have no effect",
        ),
        (["--micro-batch", "0"], "--micro-batch must be a whole number from 1 to 65,536, got 0"),
        (["--micro-steps", "0"], "--micro-steps must be a whole number from 1 to"),
        (["--sigma", "-1"], "--sigma must be a number from 0 to 10, got -1"),
        (["--node", "p4d", "--profile", "x.json"], "--profile would have no effect"),
        (["--trace", "nowhere/trace.json"], "There is no nowhere"),
        (["--trace", "a", "--micro-steps", "2000"], "at most 1,024 micro-steps, got 2,000"),
        (["--node", "p6-b300"], "never measured"),
    ],
)
def test_mics_simulate_refuses_what_makes_no_sense(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--model", "gpt2-tiny", *options]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("holds", "code"), [("yes", 0), ("in the bracket", 0), ("NO", 1)])
def test_mics_simulate_validate_fails_when_a_figure_is_missed(
    tmp_path: Path,
    holds: Holds,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = Row("a figure", "1 x", "2 x", 1.0, "held out", holds, "somebody", "nothing")
    monkeypatch.setattr("mics.commands.simulate.validate", lambda told: [row])
    out = tmp_path / "table.md"
    assert main(["simulate", "--validate", "--out", str(out)]) == code
    printed, err = capsys.readouterr()
    assert out.read_text() == printed
    assert f"| a figure | 1 x | 2 x | +100.0% | held out | {holds} |" in printed
    assert ("not held: a figure" in err) == bool(code)


# -- the width of a terminal -----------------------------------------------------------------------

WHOLE = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?![\w,]|\.\d)")


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize(
    "words", [[*PLAN, "--sweep", "nodes=1..4"], ["simulate", "--model", "gpt2-tiny"]]
)
def test_nothing_is_wider_than_the_terminal_and_no_number_is_broken(
    columns: int,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words) == 0
    numbers = set(WHOLE.findall(capsys.readouterr().out))
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(words) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert set(WHOLE.findall(out)) <= numbers
    assert columns > 60 or "left out for want of room: " in out
