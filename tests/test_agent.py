"""mics run on one node: real processes, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agents import COUNTS, Agent, agents, is_alive, pid_of, stepped, until

from mics.agent.folder import own_folder

pytestmark = pytest.mark.slow


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    script = tmp_path / "count.py"
    script.write_text(COUNTS)
    return script


def parent_of_ranks(agent: Agent) -> int:
    pid = agent.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_a_killed_rank_a_stopped_one_and_their_killed_parent_cost_no_step(
    tmp_path: Path, counts: Path
) -> None:
    words = ["--ranks-per-node", "3", "--hang-seconds", "2", "--", str(counts), str(tmp_path)]
    with agents([*words, "100000"]) as (agent,):
        until(stepped(tmp_path, 1, 3), lambda: agent.text)
        before = int((tmp_path / "step-1").read_text())
        os.kill(pid_of(tmp_path, 1, 1), signal.SIGKILL)
        assert until(stepped(tmp_path, 2, 3), lambda: agent.text) < 30
        said = agent.wait_for("was killed by SIGKILL")
        assert re.search(r"rank 1 on node 0 was killed by SIGKILL \(micro-step 1 of step \d+", said)
        assert int((tmp_path / "step-1").read_text()) >= before

        # Their parent has one thread, which each fork asks for.
        status = Path(f"/proc/{parent_of_ranks(agent)}/status").read_text()
        assert re.search(r"^Threads:\s+1$", status, re.MULTILINE)

        until(lambda: int((tmp_path / "step-2").read_text()) >= before + 3)
        os.kill(pid_of(tmp_path, 2, 2), signal.SIGSTOP)
        until(stepped(tmp_path, 3, 3), lambda: agent.text)
        said = agent.wait_for("has stood still")
        assert re.search(
            r"rank 2 on node 0 has stood still for \d+ s \(limit \d+ s\): micro-step 1 of step \d+",
            said,
        )
        assert not is_alive(pid_of(tmp_path, 2, 2))

        os.kill(parent_of_ranks(agent), signal.SIGKILL)
        until(stepped(tmp_path, 4, 3), lambda: agent.text)
        agent.wait_for("the parent of the ranks of node 0 has died")

        ranks = [pid_of(tmp_path, 4, rank) for rank in range(3)]
        processes = [*ranks, parent_of_ranks(agent)]
        assert all(map(is_alive, processes))
        agent.process.kill()
        agent.process.wait()
        took = until(lambda: not any(map(is_alive, processes)))
        assert took < 1.0
    with own_folder() as folder:  # what the killed agent has left is swept
        assert not any(folder.parent.glob("run-by-mics-*/heartbeat-4-*"))


def test_a_step_that_kills_its_rank_three_times_ends_the_job_with_a_verdict(
    tmp_path: Path, counts: Path
) -> None:
    kills = "step == 4 and rank == 1 and os.kill(os.getpid(), 11)"
    words = ["--ranks-per-node", "2", "--", str(counts), str(tmp_path), "100000"]
    with agents(words, IN_STEP=kills) as (agent,):
        assert agent.wait() == 128 + signal.SIGSEGV
        assert "step 5 kills rank 1 with SIGSEGV: 3 times in a row" in agent.said[-1]
        assert len([line for line in agent.said if "all ranks begin again" in line]) == 2


def test_the_traceback_of_the_rank_that_failed_first_is_shown_and_the_end_of_all_is_0(
    tmp_path: Path, counts: Path
) -> None:
    raises = "if generation == '1' and step == 2 and rank == 1: raise ValueError('no such thing')"
    words = ["--ranks-per-node", "2", "--", str(counts), str(tmp_path), "5"]
    with agents(words, IN_STEP=raises) as (agent,):
        assert agent.wait() == 0
        assert "ValueError: no such thing" in agent.text
        assert agent.text.count("Traceback") == 1
        assert "mics/agent" not in agent.text  # as where python runs the program
        assert "rank 1 on node 0 raised ValueError (micro-step 1 of step 3" in agent.text
        assert not any(Path("/dev/shm").glob("run-by-mics-*/heartbeat-2-*"))


SHOWS = """
import json, os, sys
import numpy, torch

hook = sys.excepthook.__module__
shown = [__name__, sys.argv, sys.path[0], hook]
shown += [torch.get_num_threads(), torch.distributed.is_initialized(), "__file__" in globals()]
print(json.dumps([shown, torch.initial_seed(), torch.rand(1).item(), numpy.random.rand()]))
"""


def test_ranks_begin_as_new_processes_would(tmp_path: Path) -> None:
    script = tmp_path / "shows.py"
    script.write_text(SHOWS)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    alone = subprocess.run(
        [sys.executable, str(script), "--x"], env=environment, stdout=subprocess.PIPE, check=True
    )
    expected, *_ = json.loads(alone.stdout)
    words = ["--ranks-per-node", "2", "--", str(script), "--x"]
    with agents(words, OMP_NUM_THREADS="2") as (agent,):
        assert agent.wait() == 0
        ranks = [json.loads(line) for line in agent.said if line.startswith("[[")]
    assert [shown for shown, *_ in ranks] == [expected, expected]
    for one, other in zip(ranks[0][1:], ranks[1][1:], strict=True):
        assert one != other  # new processes draw other numbers


TRAINS = """
import ctypes, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
import mics

mesh = mics.init_mesh(partition=2)
model = mics.shard(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), mesh=mesh)
optimizer = torch.optim.SGD(model.parameters())
kind, folder = sys.argv[1], Path(sys.argv[2])
bad = os.environ["MICS_GENERATION"] == "1" and dist.get_rank() == 1

def batches(step):
    yield torch.randn(2, 8)
    while bad and step == 4 and kind == "loader":
        time.sleep(0.1)
    yield torch.randn(2, 8)

for step in range(1, 7):
    for x in mics.micro_steps(model, batches(step)):
        model(x).sum().backward()
    if bad and step == 4 and kind == "lock":
        ctypes.PyDLL(None).sleep(1000)
    if not (bad and step == 4 and kind == "skip"):
        mics.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
(folder / f"{os.environ['MICS_GENERATION']}-{dist.get_rank()}").touch()
"""


@pytest.mark.extra
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("loader", "rank 1 on node 0 has stood still for .* micro-step 2 of step 3, in no coll"),
        ("lock", "rank 1 on node 0 has stood still for .* micro-step 2 of step 4, in no coll"),
        ("skip", "Ranks take one and the same collective for different ones|stood still"),
    ],
)
def test_a_rank_that_holds_up_the_others_is_named_and_all_begin_again(
    kind: str, said: str, tmp_path: Path
) -> None:
    script = tmp_path / "trains.py"
    script.write_text(TRAINS)
    options = ["--ranks-per-node", "2", "--hang-seconds", "3"]
    with agents([*options, "--", str(script), kind, str(tmp_path)]) as (agent,):
        assert agent.wait() == 0, agent.text
        assert re.search(said, agent.text), agent.text
    assert sorted(path.name for path in tmp_path.glob("*-*")) == ["2-0", "2-1"]


def run_shell(program: str, *options: str, ranks: int = 2) -> Agent:
    return Agent(["--ranks-per-node", str(ranks), *options, "--", "sh", "-c", program])


def test_ranks_that_end_early_with_0_are_failures_and_a_used_budget_ends_the_job() -> None:
    early = run_shell("test $RANK = 0 || exec sleep 60", "--exit-grace", "0.2", "--restarts", "1")
    assert early.wait() == 1
    assert "rank 0 on node 0 has ended with exit code 0, and others still run" in early.text
    assert "2 failures within 3600 s, and --restarts 1 allows" in early.said[-1]


@pytest.mark.extra
def test_a_program_that_always_fails_is_not_tried_for_ever() -> None:
    agent = run_shell("exit 7")
    assert agent.wait() == 7
    assert re.search(r"the program kills rank \d with exit code 7: 3 times in a row", agent.text)


def test_ranks_are_told_what_torchrun_tells_and_the_job_and_generation() -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MICS_JOB"]
    names += ["MICS_GENERATION", "MASTER_ADDR", "MASTER_PORT"]
    shown = " ".join(f"{name}=${name}" for name in names)
    fails_once = f'echo "{shown}"; test $MICS_GENERATION = 2 || kill -9 $$; sleep 0.5'
    agent = run_shell(fails_once, "--job", "mine")
    assert agent.wait() == 0
    rank_1 = "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_RANK=0 MICS_JOB=mine"
    line = next(li for li in agent.said if li.startswith(f"{rank_1} MICS_GENERATION=2"))
    before = [li for li in agent.said if "MICS_GENERATION=1" in li]
    assert "MASTER_ADDR=127.0.0.1" in line
    assert line.rpartition("=")[2] not in [li.rpartition("=")[2] for li in before]


def test_a_signal_is_passed_on_and_ranks_that_do_not_listen_are_killed_after_a_grace() -> None:
    saves = 'trap "echo saved $RANK; exit 0" TERM; echo ready; while :; do sleep 0.05; done'
    polite = run_shell(saves)
    until(lambda: polite.said.count("ready") == 2, lambda: polite.text)
    polite.process.send_signal(signal.SIGTERM)
    assert polite.wait() == 0
    assert {"saved 0", "saved 1"} <= set(polite.said)

    deaf = run_shell('trap "" TERM; echo ready; while :; do sleep 0.05; done', "--grace", "0.5")
    until(lambda: deaf.said.count("ready") == 2, lambda: deaf.text)
    began = time.monotonic()
    deaf.process.send_signal(signal.SIGTERM)
    assert deaf.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - began >= 0.5


@pytest.mark.extra
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("sys.modules['mics.sharding.steps'] = None", "could not be warmed (ModuleNotFoundError"),
        (
            "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
            "the ranks' parent has 2 threads, with which it cannot fork; another one is started, "
            "not warmed",
        ),
    ],
    ids=["import", "thread"],
)
def test_where_a_parent_cannot_be_warmed_every_rank_is_a_python_of_its_own(
    tmp_path: Path, counts: Path, trouble: str, said: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        f"import sys, threading, time\n"
        f"if {{'mics.agent.zygote', 'warm'}} <= {{*sys.orig_argv}}: {trouble}\n"
    )
    path = os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])
    words = ["--ranks-per-node", "2", "--", str(counts), str(tmp_path), "3"]
    with agents(words, PYTHONPATH=path) as (agent,):
        assert agent.wait() == 0
        assert said in agent.text
