"""`mics doctor` tells what is there, and names who disagrees."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from mics.__main__ import main
from mics.commands import VERBS
from mics.commands.examining import facts
from mics.commands.examining.examination import check, examine
from mics.commands.examining.facts import settings_of
from mics.commands.examining.links import Probe, probed_groups
from mics.commands.examining.options import Config
from mics.commands.examining.report import Report, as_json, as_text
from mics.ranks.joining import RanksMissing, join
from mics.ranks.launcher import Launch, read_launch
from mics.ranks.starting import run_local_ranks
from mics.topology import Topology

# Python 3.12 warns of every fork in a process with threads.
FORKS = pytest.mark.filterwarnings("ignore::DeprecationWarning")
COMMAND = [sys.executable, "-m", "mics", "doctor"]


def clean_environment(**changes: str) -> dict[str, str]:
    """This process' variables without any launcher's, and with ``changes``."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI_")
    kept = {n: v for n, v in os.environ.items() if not n.startswith(launchers)}
    return {**kept, **changes}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def doctor(*options: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options],
        env=clean_environment(**changes),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def examined(config: Config, environments: list[dict[str, str]] | None = None) -> dict[str, Any]:
    """On one rank: what the command would print as JSON, and its text and exit code."""
    launch = read_launch()
    assert launch is not None
    environment = environments[launch.rank] if environments else {}
    report = examine(launch, config, "cpu", environment)
    return {**as_json(report), "text": as_text(report)}


def the_only_problem(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The one problem of a report that must be the same on every rank."""
    assert all(document["problems"] == documents[0]["problems"] for document in documents)
    (problem,) = documents[0]["problems"]
    assert isinstance(problem, dict)
    assert not documents[0]["ok"]
    assert not documents[0]["links"], "ranks that disagree must not be measured"
    return problem


# -- what it reports -----------------------------------------------------------------------------


def test_ranks_that_agree_are_mapped_and_measured() -> None:
    config = Config(partition=4, gpus_per_node=2)
    for document in run_ranks(examined, 8, config):
        assert document["ok"]
        assert document["world"] == 8
        assert document["topology"]["simulated_nodes"]
        assert document["topology"]["inter_groups"] == Topology(4, 2, 4).inter_groups()
        for link in ("intra", "inter"):
            small, large = document["links"][link]
            assert (small["groups"], small["ranks"], small["bytes"]) == (4, 2, 64 * 2**10)
            assert large["bytes"] == 4 * 2**20
            assert 0 < large["busbw_min"] <= large["busbw"] <= large["busbw_max"]
        assert "Nodes are simulated" in document["text"]


def test_one_node_has_no_inter_link() -> None:
    for document in run_ranks(examined, 2, Config()):
        assert document["links"]["inter"] is None
        assert len(document["links"]["intra"]) == 2
        assert "inter   n/a: there is one node" in document["text"]
        assert "simulated" not in document["text"]


def test_bandwidths_are_those_of_nccl_tests() -> None:
    probe = Probe(num_groups=1, num_ranks=4, message_bytes=8 * 10**9, seconds=(4.0, 2.0, 1.0))
    assert probe.algbw == 4.0  # 8 GB in 2 s
    assert probe.busbw == 3.0  # of which each rank's link carried 3/4
    assert probe.busbw_range == (1.5, 6.0)


@pytest.mark.parametrize(
    ("shape", "intra", "inter"),
    [
        ((4, 2, 4), [(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ((2, 4, 4), [(0, 1, 2, 3), (4, 5, 6, 7)], [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ((2, 4, 1), [(0, 1, 2, 3), (4, 5, 6, 7)], [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ((1, 4, 2), [(0, 1), (2, 3)], []),
        ((4, 1, 2), [], [(0, 1), (2, 3)]),
        ((1, 1, 1), [], []),
    ],
)
def test_links_are_probed_in_the_groups_training_uses(
    shape: tuple[int, int, int], intra: list[Any], inter: list[Any]
) -> None:
    assert probed_groups(Topology(*shape)) == {"intra": intra, "inter": inter}


def test_only_settings_that_matter_are_shown() -> None:
    environment = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1", "HOME": "x", "TORCHELASTIC": "y"}
    assert settings_of(environment) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}


# -- what it finds -------------------------------------------------------------------------------


def test_setting_that_differs_names_the_rank_and_both_values() -> None:
    same = {"NCCL_DEBUG": "INFO", "NCCL_HOSTID": "a"}
    odd = {"NCCL_DEBUG": "WARN", "NCCL_HOSTID": "b"}  # the second may differ
    documents = run_ranks(examined, 4, Config(), [same, same, odd, same])
    problem = the_only_problem(documents)
    assert problem["kind"] == "DisagreementError"
    assert problem["ranks"] == [2]
    host = socket.gethostname()
    assert f"disagree on NCCL_DEBUG: rank 2 ({host})" in problem["what"]
    assert f"'INFO' on ranks 0-1, 3 ({host}); 'WARN' on rank 2 ({host})." in problem["numbers"]


def test_setting_only_one_rank_has_is_a_disagreement() -> None:
    problem = the_only_problem(run_ranks(examined, 3, Config(), [{"GLOO_X": "1"}, {}, {}]))
    assert problem["ranks"] == [0]
    assert "not set on ranks 1-2" in problem["numbers"]


def _examined_with_version(config: Config, odd: int) -> dict[str, Any]:
    if dist.get_rank() == odd:
        facts.__version__ = "9.9"  # this rank's process ends with the test
    return examined(config)


def test_version_that_differs_names_the_rank() -> None:
    problem = the_only_problem(run_ranks(_examined_with_version, 3, Config(), 1))
    assert problem["ranks"] == [1]
    assert "9.9 on rank 1" in problem["numbers"]


def _examined_with_options(configs: list[Config]) -> dict[str, Any]:
    return examined(configs[dist.get_rank()])


def test_options_that_differ_name_the_rank() -> None:
    configs = [Config(partition=p) for p in (2, 2, 4, 2)]
    problem = the_only_problem(run_ranks(_examined_with_options, 4, configs))
    assert problem["ranks"] == [2]
    assert "--partition" in problem["what"]


def _examined_on_hosts(hosts: list[str], ranks_per_node: list[int]) -> dict[str, Any]:
    rank = dist.get_rank()
    socket.gethostname = lambda: hosts[rank]
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node[rank])
    return examined(Config())


def test_ranks_not_numbered_node_by_node_are_refused() -> None:
    documents = run_ranks(_examined_on_hosts, 4, ["a", "b", "a", "b"], [2, 2, 2, 2])
    problem = the_only_problem(documents)
    assert problem["kind"] == "TopologyError"
    assert "Ranks 0 to 1 should share a node" in problem["what"]
    assert documents[0]["hosts"] == {"a": [0, 2], "b": [1, 3]}


def test_unequal_nodes_are_refused_and_named() -> None:
    documents = run_ranks(_examined_on_hosts, 4, ["a", "a", "a", "b"], [3, 3, 3, 1])
    problem = the_only_problem(documents)
    assert problem["kind"] == "TopologyError"
    assert problem["ranks"] == [3]
    assert "Ranks per host: a: 3, b: 1." in problem["numbers"]


def test_illegal_partition_is_refused() -> None:
    problem = the_only_problem(run_ranks(examined, 4, Config(partition=3)))
    assert problem["kind"] == "TopologyError"
    assert "partition = 3 does not divide the world size 4." in problem["what"]


def _exit_code(environments: list[dict[str, str]]) -> int:
    launch = read_launch()
    assert launch is not None
    return check(launch, Config(), "cpu", environments[launch.rank])


def test_every_rank_leaves_with_the_same_code() -> None:
    assert run_ranks(_exit_code, 2, [{}, {}]) == [0, 0]
    assert run_ranks(_exit_code, 2, [{}, {"TORCH_X": "1"}]) == [1, 1]


# -- the command ---------------------------------------------------------------------------------


def test_command_starts_its_own_ranks() -> None:
    done = doctor("--ranks", "4", "--gpus-per-node", "2", "--partition", "4", NCCL_DEBUG="WARN")
    assert done.returncode == 0, done.stderr
    assert "  replica 0  0 1 | 2 3  nodes 0-1" in done.stdout
    assert "NCCL_DEBUG=WARN" in done.stdout
    assert re.search(r"\n  inter +2 x 2 ranks +4 MiB +[\d.]+ ms ", done.stdout)
    assert done.stdout.endswith("ok: all 4 ranks agree on versions, device, options and settings\n")
    assert done.stderr == "mics doctor: loading PyTorch\n"


@FORKS
def test_command_prints_one_json_document_also_when_it_fails(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--ranks", "2", "--partition", "4", "--json"]) == 1
    printed = capfd.readouterr()
    (problem,) = json.loads(printed.out)["problems"]
    assert problem["what"] == "partition = 4 is larger than the world of 2 rank(s)."
    assert "Traceback" not in printed.err


def launched(world: int) -> list[tuple[int, str, str]]:
    """Start ranks as a launcher would, each with its own OMP_NUM_THREADS: (code, out, err)."""
    port = free_port()
    processes = [
        subprocess.Popen(
            COMMAND,
            env=clean_environment(
                RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                OMP_NUM_THREADS=str(rank + 1),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def test_launched_ranks_that_disagree_exit_1_and_are_named_once() -> None:
    (code_0, out_0, err_0), (code_1, out_1, err_1) = launched(2)
    assert (code_0, code_1) == (1, 1)
    assert "Ranks disagree on OMP_NUM_THREADS: rank 1 " in out_0
    assert "'1' on rank 0" in out_0
    assert "'2' on rank 1" in out_0
    assert out_1 == ""
    assert "Traceback" not in err_0 + err_1


def test_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch("Slurm", 0, 4, 0, 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # so that what is exported ends with the test
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RanksMissing, match=r"Rank\(s\) 1-3 of 4 did not come within 0.5 s."):
        join(launch, "cpu", 0.5)


def _one_rank_raises(launch: Launch) -> int:
    if launch.rank == 1:
        raise RuntimeError("this one")
    time.sleep(600)
    return 0


@FORKS
def test_local_rank_that_raises_ends_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_local_ranks(_one_rank_raises, 2, "cpu", 30.0) == 1
    printed = capsys.readouterr().err
    assert "mics: rank 1 raised" in printed
    assert "RuntimeError: this one" in printed


# -- verbs and usage -----------------------------------------------------------------------------


def test_mics_alone_lists_every_verb_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    for verb in VERBS:
        assert verb.summary in printed
        assert f"$ {verb.example}" in printed
        assert importlib.util.find_spec(f"mics.commands.{verb.options}")


def test_unknown_verb_and_option_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docter"]) == 2
    assert "did you mean 'doctor'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--gpu", "2"])
    assert caught.value.code == 2


def test_options_without_sense_exit_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--ranks", "0"]) == 2
    assert "--ranks must be a whole number from 1 to 1,024, got 0" in capsys.readouterr().err
    assert main(["doctor", "--ranks", "9" * 20]) == 2
    assert "--ranks must be a whole number from 1 to 1,024" in capsys.readouterr().err
    assert main(["doctor", "--timeout", "inf"]) == 2
    assert "--timeout must be a number" in capsys.readouterr().err
    assert main(["doctor", "--device", "abacus"]) == 2
    assert "--device abacus is not on this machine" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor", "--ranks", "2"]) == 2
    assert "torchrun has started 2 ranks already" in capsys.readouterr().err
    assert main(["doctor", "--ranks", "4"]) == 2
    words = "torchrun has started 2 ranks already. For others write torchrun --nproc-per-node 4"
    assert words in capsys.readouterr().err


def test_without_tyro_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["doctor"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "mics: the command line needs tyro: pip install 'torch-mics[cli]'\n"
    assert printed.out == ""


def test_report_without_ranks_is_still_json() -> None:
    assert json.loads(json.dumps(as_json(Report())))["world"] is None
