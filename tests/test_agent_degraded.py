"""mics run with fewer nodes than the job has: agents on loopback, each of which stands for one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from agents import (
    COUNTS,
    Agent,
    agents,
    free_addresses,
    make_token,
    pid_of,
    stepped,
    until,
    words_of_nodes,
)

pytestmark = pytest.mark.slow


def words_of_four(folder: Path, *options: str) -> list[list[str]]:
    """Four nodes of two ranks that count steps; who had no part in the latest does not matter."""
    (folder / "count.py").write_text(COUNTS.replace("ReduceOp.MIN", "ReduceOp.MAX"))
    program = ["--", str(folder / "count.py"), str(folder), "100000"]
    shared = ["--ranks-per-node", "2", "--min-nodes", "2", "--degrade-after", "1", *options]
    words = words_of_nodes(free_addresses(4), make_token(folder), *shared)
    return [[*of_node, *program] for of_node in words]


def newest_step(folder: Path) -> int:
    return int((folder / "step-0").read_text())


def test_of_four_nodes_three_go_on_and_the_fourth_comes_back_at_the_end_of_a_step(
    tmp_path: Path,
) -> None:
    words = words_of_four(tmp_path)
    with agents(*words) as started:

        def told() -> str:
            return "\n".join(agent.text for agent in started)

        until(stepped(tmp_path, 1, 8), told)
        started[2].process.kill()
        started[2].process.wait()
        until(stepped(tmp_path, 2, 6), told)
        words_of_all = "generation 2: node 2 is lost; 3 of 4 nodes go on: 6 of 8 ranks, 3 of 4"
        for index in (0, 1, 3):
            started[index].wait_for(words_of_all)
        assert not (tmp_path / "2-6").exists()

        before = newest_step(tmp_path)
        until(lambda: newest_step(tmp_path) > before, told)
        started.append(started[2])
        started[2] = Agent(words[2])
        said = started[0].wait_for("node 2 is back: growing back after step")
        last = int(said.partition("after step ")[2].partition(";")[0])
        until(stepped(tmp_path, 3, 8), told)
        started[3].wait_for("generation 3: all 4 nodes again, 8 ranks")
        # Nobody had begun another one.
        assert (tmp_path / "began-3-0").read_text() == f"begins at {last}"

        started[0].process.send_signal(signal.SIGTERM)
        assert [agent.wait() for agent in started[:4]] == [128 + signal.SIGTERM] * 4


def test_three_go_on_though_the_fourth_was_lost_before_anybody_told_of_the_model(
    tmp_path: Path,
) -> None:
    words = words_of_four(tmp_path)
    kills = "generation == '1' and rank == 4 and os.kill(int((folder / 'agent').read_text()), 9)"
    with agents(*words, IN_STEP=kills) as started:
        (tmp_path / "agent").write_text(str(started[2].process.pid))
        until(stepped(tmp_path, 2, 6), lambda: started[0].text)
        started[0].wait_for("generation 2: node 2 is lost; 3 of 4 nodes go on")


def test_a_node_whose_rank_always_dies_drops_out(tmp_path: Path) -> None:
    words = words_of_four(tmp_path)
    dies = "step == first and os.environ['GROUP_WORLD_SIZE'] == '4' and rank == 5 and os._exit(7)"
    with agents(*words, IN_STEP=dies) as started:

        def told() -> str:
            return "\n".join(agent.text for agent in started)

        until(stepped(tmp_path, 4, 6), told)
        said = started[2].wait_for("drops out: its ranks were the first to fail 3 times in a row")
        assert "rank 5 on node 2 ended with exit code 7" in said
        assert "end the agent there and start it again" in said
        started[0].wait_for("node 2 has dropped out: its ranks")
        os.kill(pid_of(tmp_path, 4, 0), signal.SIGKILL)  # the others still begin again without it
        until(stepped(tmp_path, 5, 6), told)
