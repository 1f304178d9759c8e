"""What a script sends, and what is wrong with it: watched without changing script or torch."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mics.__main__ import main
from mics.errors import CheckError
from mics.hardware.cluster import Cluster
from mics.hardware.lookup import find_node
from mics.lab.checking.copies import copies_of, unreduced
from mics.lab.checking.costs import costs_of
from mics.lab.checking.evidence import Evidence, reduces_of
from mics.lab.checking.flows import flow_of
from mics.lab.checking.judging import judge
from mics.lab.checking.outcome import Job
from mics.lab.checking.ranks import observe
from mics.lab.checking.report import Call, Param, Print, RankReport, Seen, Step
from mics.lab.checking.script import read

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "checked"

# Three blocks of 4,192 parameters in fp32, and a root of 33 that is padded to 66 over two ranks.
BLOCK, HEAD = 4 * 4192, 4 * 66
WHOLE = 3 * BLOCK + HEAD


def check(
    capfd: pytest.CaptureFixture[str], *words: str, steps: int = 2
) -> tuple[int, dict[str, Any]]:
    """The exit code of a check, and its document."""
    script, *rest = words
    with warnings.catch_warnings():  # what a script warns of ends no script
        warnings.simplefilter("default")
        code = main(["check", "--json", "--steps", str(steps), str(SCRIPTS / script), *rest])
    return code, json.loads(capfd.readouterr().out)


def kinds(document: dict[str, Any]) -> list[str]:
    return [finding["kind"] for finding in document["findings"]]


def between_nodes(document: dict[str, Any], what: str) -> int:
    return sum(row["inter_bytes"] for row in document["rows"] if row["what"].startswith(what))


def inside_nodes(document: dict[str, Any], what: str) -> int:
    return sum(row["intra_bytes"] for row in document["rows"] if row["what"].startswith(what))


# -- the six kinds, bytes by hand ------------------------------------------------------------------


def test_a_right_script_is_right_and_its_bytes_are_those_worked_out_by_hand(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, document = check(capfd, "hsdp.py")
    assert (code, document["kind"], kinds(document)) == (0, "right", [])
    assert document["all_reduces"] == {"found": 4, "needed": 4}
    assert document["micro_steps"] == 4
    assert (document["partition"], document["replicas"]) == (2, 2)
    # Each of a node's two ranks sends half of what is gathered or reduced.
    assert inside_nodes(document, "hop 1: all-gather") == 4 * (6 * BLOCK + HEAD)
    assert inside_nodes(document, "hop 1: reduce-scatter") == 4 * WHOLE
    assert between_nodes(document, "hop 1") == 0
    assert between_nodes(document, "hop 2") == WHOLE
    assert document["read_as"] == ['hsdp.py, line 28: "nccl" as "gloo"']


def test_an_all_reduce_in_every_micro_step_is_found_with_what_it_sends_for_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, document = check(capfd, "hsdp.py", "--way", "every")
    assert (code, kinds(document)) == (1, ["hop 2 in every micro-step"])
    assert document["all_reduces"] == {"found": 16, "needed": 4}
    assert between_nodes(document, "hop 2") == 4 * WHOLE
    assert document["needless_bytes"] == 3 * WHOLE
    assert document["costs"]["needless"] == pytest.approx(0.75 * document["costs"]["hop_2"])
    assert "set_requires_all_reduce" in document["findings"][0]["write"]


@pytest.mark.slow
def test_gradients_that_are_kept_whole_are_found_with_their_bytes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, document = check(capfd, "hsdp.py", "--way", "unsharded")
    assert (code, kinds(document)) == (1, ["unsharded gradients"])
    assert document["unsharded_bytes"] == WHOLE
    assert inside_nodes(document, "hop 1: reduce-scatter") == WHOLE


@pytest.mark.slow
def test_full_sharding_is_named_and_not_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    code, document = check(capfd, "hsdp.py", "--way", "full")
    assert (code, document["kind"], kinds(document)) == (0, "full sharding", [])
    assert (document["partition"], document["replicas"]) == (4, 1)
    # One of a node's ranks sends to the other node; the root is padded to 132 over four ranks.
    assert between_nodes(document, "hop 1: reduce-scatter") == 4 * (3 * BLOCK + 2 * HEAD) * 3 // 4
    assert "With p = 2" in document["notes"][0]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["seeds", "rates"])
def test_replicas_that_drift_apart_are_found(capfd: pytest.CaptureFixture[str], way: str) -> None:
    code, document = check(capfd, "hsdp.py", "--way", way)
    assert (code, kinds(document)) == (1, ["replicas differ"])
    assert document["copies_apart"] > 1e-3
    (finding,) = document["findings"]
    assert ("before the first step" in finding["numbers"]) == (way == "seeds")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["left-out", "one replica"])
def test_experts_that_nobody_reduces_are_named(capfd: pytest.CaptureFixture[str], way: str) -> None:
    code, document = check(capfd, "experts.py", way)
    assert (code, kinds(document)) == (1, ["parameters without hop 2", "replicas differ"])
    assert document["findings"][0]["names"] == ["1.weight"]
    assert document["all_reduces"] == {"found": 1, "needed": 2}


@pytest.mark.slow
def test_hop_2_that_never_runs_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    code, document = check(capfd, "hsdp.py", "--way", "never")
    assert (code, kinds(document)) == (1, ["parameters without hop 2"])
    assert document["all_reduces"] == {"found": 0, "needed": 4}


@pytest.mark.slow
def test_the_report_that_the_documents_show_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    shown = (ROOT / "docs" / "check.md").read_text().split("```text\n")[1].split("```")[0]
    script = str(SCRIPTS / "hsdp.py")
    assert main(["check", "--node", "p3dn", script, "--way", "every"]) == 1
    printed = capfd.readouterr().out.replace(script, "train.py").splitlines()
    assert printed[: len(shown.splitlines())] == shown.splitlines()


# -- other scripts ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["defer", "always"])
def test_ddp_gets_its_own_answer(capfd: pytest.CaptureFixture[str], way: str) -> None:
    code, document = check(capfd, "replicated.py", way)
    assert document["engines"] == ["DDP"]
    assert (code, kinds(document)) == (
        (0, []) if way == "defer" else (1, ["hop 2 in every micro-step"])
    )
    times = 1 if way == "defer" else 4
    # 2,112 values around a ring of four ranks, of which one per node sends to the other.
    assert between_nodes(document, "hop 2") == times * 4 * 2112 * 2 * 3 // 4


def test_what_is_counted_of_mics_is_what_its_ledger_counts(tmp_path: Path) -> None:
    file = tmp_path / "counted.json"
    job = Job((str(SCRIPTS / "with_mics.py"), str(file)), 2, 2, 2, 120.0)
    reports = observe(job)
    first = reports[0]
    for step, counted in zip(first.steps, json.loads(file.read_text()), strict=True):
        hops = {1: [0.0, 0.0], 2: [0.0, 0.0]}
        for seen, number in step.calls:
            if seen.call.small:
                continue
            flow = flow_of(seen.call, 0, 2)
            hop = hops[2 if seen.call.ranks == (0, 2) else 1]
            hop[0] += number * float(flow.intra_bytes)
            hop[1] += number * float(flow.inter_bytes)
        assert [hops[1], hops[2]] == counted
    # What mics reduces by all-reduces on Gloo counts as reduce-scatters: 3 micro-steps, 3 units.
    evidence = Evidence(reports, 2)
    assert sum(n for _, n in reduces_of(evidence.last[0])) == 9
    assert judge(evidence).findings == []


@pytest.mark.parametrize("data", ["own", "same"])
def test_hop_2_in_two_stages_is_one_hop_2_of_each_unit(tmp_path: Path, data: str) -> None:
    file = tmp_path / "counted.json"
    words = (str(SCRIPTS / "with_mics.py"), str(file), "1", "hierarchical", data)
    reports = observe(Job(words, 2, 2, 2, 120.0))
    evidence = Evidence(reports, 2)
    verdict = judge(evidence)
    assert verdict.findings == []
    assert verdict.all_reduces == (3, 3)
    rows = {row.what: row for row in verdict.rows if row.what.startswith("hop 2")}
    assert {what: row.calls for what, row in rows.items()} == {
        f"hop 2: {name} between copies": 3
        for name in ("reduce-scatter", "all-reduce", "all-gather")
    }
    # Two ranks of a node send a row each, of half of 3 x 1,056 values: 2 x 1/2 of it.
    assert sum(row.inter_bytes for row in rows.values()) == 3 * 1056 * 4
    for step, counted in zip(reports[0].steps, json.loads(file.read_text()), strict=True):
        flows = [flow_of(s.call, 0, 2) * n for s, n in step.calls if not s.call.small]
        sent = sum(float(f.intra_bytes) for f in flows), sum(float(f.inter_bytes) for f in flows)
        assert [[0.0, 0.0], [*sent]] == counted
    costs = costs_of(evidence, verdict, Cluster(find_node("p4d"), 2))
    assert costs.hop_1 == 0 and costs.hop_2 > 0 and costs.unknown == 0


@pytest.mark.slow
def test_a_script_that_wants_gpus_is_read_with_the_host_in_their_place(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, document = check(capfd, "on_gpus.py")
    assert (code, kinds(document)) == (1, ["hop 2 in every micro-step"])
    assert 'on_gpus_groups.py, line 12: "nccl" as "gloo"' in document["read_as"]
    # Two units of 1,056 parameters, gathered in bf16 and reduced in fp32; blocks are gathered in
    # forward and backward, and the root has no parameters.
    assert inside_nodes(document, "hop 1: all-gather") == 2 * 2 * 2 * 2 * 1056
    assert between_nodes(document, "hop 2") == 2 * 2 * 4 * 1056


def test_a_model_without_modules_and_a_thread_of_its_own_are_seen(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import threading, torch\nimport torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "def train():\n"
        "    w = torch.ones(64, requires_grad=True)\n"
        "    optimizer = torch.optim.SGD([w])\n"
        "    while True:\n"
        "        ((dist.get_rank() + 1) * w).sum().backward()\n"
        "        dist.all_reduce(w.grad)\n"
        "        optimizer.step()\n"
        "        optimizer.zero_grad()\n"
        "thread = threading.Thread(target=train)\nthread.start()\nthread.join()\n"
    )
    reports = observe(Job((str(script),), 1, 2, 2, 60.0))
    assert [len(report.steps) for report in reports] == [2, 2]
    verdict = judge(Evidence(reports, 2))
    assert (verdict.kind, verdict.all_reduces) == ("right", (1, 1))


def test_a_script_that_fails_says_why(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("x = 1\nraise ValueError(f'no such data {x}')\n")
    with pytest.raises(CheckError, match=r"(?s)train.py fails on rank .*line 2.*no such data 1"):
        observe(Job((str(script),), 1, 2, 1, 60.0))


def test_a_script_without_a_step_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import torch\n")
    with pytest.raises(CheckError, match="ended without a step"):
        observe(Job((str(script),), 1, 2, 1, 60.0))


def test_a_script_that_hangs_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import time\nwhile True:\n    time.sleep(1)\n")
    with pytest.raises(CheckError, match="has not taken 1 optimizer steps in 2 s"):
        observe(Job((str(script),), 1, 2, 1, 2.0))


# -- parts -----------------------------------------------------------------------------------------


def test_only_a_backend_that_needs_gpus_is_read_otherwise() -> None:
    source = b'"""Doc."""\nfrom __future__ import annotations\nX = "cuda"\nY = "nccl"\n'
    names: dict[str, Any] = {}
    exec(read(source, "train.py", without_gpus=False), names)
    assert (names["X"], names["Y"]) == ("cuda", "nccl")
    exec(read(source, "train.py", without_gpus=True), names)
    assert names["X"] == "cpu"


def test_a_report_survives_as_text() -> None:
    print_ = Print("ab", 1.5, (1.0, 2.0))
    param = Param("0:1/2", True, 8, 32, print_, print_, None)
    seen = Seen(Call("all_reduce", (0, 2), 32, 8), 1, "backward")
    report = RankReport(1, 4, [Step(2, [(seen, 3)], {"w": param}, "d")], ["FSDP2"])
    assert RankReport.from_text(report.to_text()) == report


def step_with(gradient: float, after: float, *, shard: str = "", before: float = 0.0) -> Step:
    prints = [Print(str(one), abs(one), (one,)) for one in (before, gradient, after)]
    return Step(1, [], {"w": Param(shard, bool(shard), 1, 4, *prints)})


def test_gradients_that_an_optimizer_sums_itself_are_reduced() -> None:
    (copies,) = copies_of([step_with(1.0, 5.0), step_with(2.0, 5.0)])
    assert unreduced(copies, [step_with(1.0, 5.0), step_with(2.0, 5.0)]) == 0.0
    assert unreduced(copies, [step_with(1.0, 5.0), step_with(2.0, 6.0)]) == 0.5


def test_a_learning_rate_of_zero_does_not_hide_what_is_not_reduced() -> None:
    steps = [step_with(1.0, 0.0), step_with(2.0, 0.0)]
    assert unreduced(copies_of(steps)[0], steps) == 0.5


def test_shards_are_no_copies_and_experts_of_a_ranks_own_are_none() -> None:
    shards = [step_with(1.0, 5.0, shard="0:0/2"), step_with(2.0, 5.0, shard="0:1/2")]
    own = [step_with(1.0, 5.0, before=1.0), step_with(2.0, 5.0, before=2.0)]
    for steps in (shards, own):
        assert [one.ranks for one in copies_of(steps)] == [(0,), (1,)]


def test_an_all_to_all_sends_equal_parts_to_each_rank() -> None:
    flow = flow_of(Call("all_to_all", (0, 1, 2, 3), 400, 100), 1, 2)
    assert (flow.intra_bytes, flow.inter_bytes) == (100, 200)


def evidence_of(params: list[dict[str, Param]], calls: list[Seen], data: str) -> Evidence:
    """Four ranks, two a node, one step of two micro-steps; each has the calls of its groups."""
    reports = [
        RankReport(
            rank,
            4,
            [Step(2, [(s, 1) for s in calls if rank in s.call.ranks], params[rank], data[rank])],
        )
        for rank in range(4)
    ]
    return Evidence(reports, 2)


def param(gradient: str, *, shard: str = "", numel: int = 64) -> Param:
    prints = [Print(one, 1.0, (1.0,)) for one in ("begun", gradient, "after")]
    return Param(shard, bool(shard), numel, 4 * numel, *prints)


def test_experts_that_are_alike_by_their_data_only_are_named() -> None:
    params = [
        {"dense": param(f"g{rank % 2}", shard=f"0:{rank % 2}/2"), "expert": param("g")}
        for rank in range(4)
    ]
    calls = [Seen(Call("all_reduce", ranks, 256, 64), 2, "backward") for ranks in ((0, 2), (1, 3))]
    (finding,) = judge(evidence_of(params, calls, "aaaa")).findings
    assert (finding.kind, finding.names) == ("parameters without hop 2", ("expert",))
    whole = Seen(Call("all_reduce", (0, 1, 2, 3), 256, 64), 2, "backward")
    assert judge(evidence_of(params, [*calls, whole], "aaaa")).findings == []


def test_an_all_reduce_that_only_an_early_micro_step_has_loses_what_comes_behind() -> None:
    params = [{"dense": param(f"g{rank % 2}", shard=f"0:{rank % 2}/2")} for rank in range(4)]
    pairs = ((0, 2), (1, 3))
    calls = [Seen(Call("all_reduce", ranks, 256, 64), 1, "backward") for ranks in pairs]
    calls += [
        Seen(Call("reduce_scatter", ranks, 512, 128), number, "backward")
        for ranks in ((0, 1), (2, 3))
        for number in (1, 2)
    ]
    verdict = judge(evidence_of(params, calls, "abcd"))
    (finding,) = verdict.findings
    assert (finding.kind, finding.names) == ("parameters without hop 2", ("dense",))
    assert "in micro-step 1 of 2, and not in the last one" in finding.what
    assert "micro-step 2 has computed" in finding.numbers
    assert verdict.all_reduces == (1, 1)


def test_what_only_a_later_step_moves_is_judged_too() -> None:
    def step(name: str, rank: int, *, alike: bool) -> Step:
        mine = "" if alike else f" of {rank}"
        prints = [Print(f"{what}{mine}", 1.0 + rank * (not alike), ()) for what in ("g", "after")]
        values = Param("", False, 64, 256, Print("begun", 1.0, ()), *prints)
        return Step(1, [], {name: values}, f"{rank}")

    reports = [
        RankReport(rank, 4, [step("D", rank, alike=True), step("G", rank, alike=False)])
        for rank in range(4)
    ]
    findings = judge(Evidence(reports, 2)).findings
    assert [one.kind for one in findings] == ["parameters without hop 2", "replicas differ"]
    assert findings[1].names == ("G",)


def test_sums_over_ranks_of_the_same_data_are_no_hop_2() -> None:
    params = [{"norm": param("g")} for _ in range(4)]
    calls = [Seen(Call("all_reduce", ranks, 256, 64), 1, "backward") for ranks in ((0, 1), (2, 3))]
    assert judge(evidence_of(params, calls, "aabb")).findings == []
    (finding,) = judge(evidence_of(params, calls, "abab")).findings
    assert finding.kind == "hop 2 in every micro-step"


def test_blocks_of_few_bits_between_copies_are_hop_2() -> None:
    params = [{"w": param("g", numel=4096)} for _ in range(4)]
    copies = (0, 1, 2, 3)
    blocks = 4 * 4 * 260
    in_blocks = [
        Call("all_to_all", copies, blocks, blocks, floating=False),
        Call("all_gather", copies, blocks, blocks, floating=False),
    ]

    def judged(micro_steps: tuple[int, ...], calls: list[Call], data: str) -> list[Any]:
        seen = [Seen(call, number, "backward") for number in micro_steps for call in calls]
        evidence = evidence_of(params, seen, data)
        ours = [replace(one, engines=["mics"]) for one in evidence.reports]
        verdict = judge(Evidence(ours, 2))
        return [[one.kind for one in verdict.findings], verdict.all_reduces]

    assert judged((2,), in_blocks, "abcd") == [[], (2, 2)]
    assert judged((2,), in_blocks, "aaaa") == [[], (2, 2)]
    assert judged((2,), in_blocks[1:], "aaaa")[0] == ["parameters without hop 2"]
    assert judged((1, 2), in_blocks, "abcd") == [["hop 2 in every micro-step"], (4, 2)]


def test_ranks_that_send_nothing_train_alone() -> None:
    own = [Print(f"rank {rank}", 1.0, (float(rank),)) for rank in range(4)]
    params = [{"w": Param("", False, 1, 4, one, one, one)} for one in own]
    assert [one.kind for one in judge(evidence_of(params, [], "abcd")).findings] == ["ranks alone"]
    reduced = [Seen(Call("all_reduce", (0, 1, 2, 3), 256, 64), 2, "backward")]
    assert judge(evidence_of(params, reduced, "abcd")).findings == []
