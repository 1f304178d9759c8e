"""mics run on several nodes: agents on loopback, each of which stands for one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from agents import (
    COUNTS,
    Agent,
    agents,
    free_addresses,
    is_alive,
    make_token,
    pid_of,
    stepped,
    until,
    words_of_nodes,
)

from mics.__main__ import main
from mics.errors import LabError
from mics.lab import lifetime, network, running, state
from mics.lab.state import Lab
from mics.lab.system import call, check_system

pytestmark = pytest.mark.slow


def can_build() -> bool:
    """Whether a lab can be built here."""
    try:
        check_system()
        call("ip", "netns", "add", "mics-probe-y")
        call("ip", "netns", "delete", "mics-probe-y")
    except LabError:
        return False
    return True


needs_a_lab = pytest.mark.skipif(not can_build(), reason="no lab can be built")


def test_a_lost_node_and_a_lost_node_0_are_replaced_and_a_silent_one_is_not_waited_for(
    tmp_path: Path,
) -> None:
    (tmp_path / "count.py").write_text(COUNTS)
    program = ["--", str(tmp_path / "count.py"), str(tmp_path), "100000"]
    shared = ["--ranks-per-node", "1"]
    nodes, token = free_addresses(2), make_token(tmp_path)
    words = [[*of_node, *program] for of_node in words_of_nodes(nodes, token, *shared)]
    with agents(*words) as started:

        def told() -> str:
            return "\n".join(agent.text for agent in started)

        until(stepped(tmp_path, 1, 2), told)
        os.kill(pid_of(tmp_path, 1, 1), signal.SIGKILL)  # told to node 0, which begins again too
        until(stepped(tmp_path, 2, 2), told)
        started[0].wait_for("rank 1 on node 1 was killed by SIGKILL")

        for generation, lost in ((3, 1), (4, 0)):
            before = int((tmp_path / "step-0").read_text())
            started[lost].process.kill()
            started[lost].process.wait()
            started[1 - lost].wait_for(f"node {lost} was lost: it has closed the connection")
            started.append(started[lost])
            started[lost] = Agent(words[lost])
            until(stepped(tmp_path, generation, 2), told)
            assert int((tmp_path / "step-0").read_text()) >= before

        os.kill(started[1].process.pid, signal.SIGSTOP)
        started[0].wait_for("node 1 was lost: it has said nothing for 2.")
        assert not (tmp_path / "5-0").exists()
        os.kill(started[1].process.pid, signal.SIGCONT)
        until(stepped(tmp_path, 5, 2), told)
        assert len(list(tmp_path.glob("[0-9]*-*"))) == 10  # no generation twice

        started[0].process.send_signal(signal.SIGTERM)
        assert [agent.wait() for agent in started[:2]] == [128 + signal.SIGTERM] * 2


@needs_a_lab
@pytest.mark.extra
def test_of_a_cut_network_one_side_goes_on_with_a_spare_and_the_other_never_again(
    tmp_path: Path,
) -> None:
    (tmp_path / "count.py").write_text(COUNTS)
    program = ["--", str(tmp_path / "count.py"), str(tmp_path), "100000"]
    token = make_token(tmp_path)
    with lifetime.lab_for(Lab(state.new_name(), 4, 1, "100mbit")) as lab:
        nodes = [f"{lab.address(index)}:29400" for index in range(4)]
        listed = words_of_nodes(nodes[:3], token, "--ranks-per-node", "1")
        spare = words_of_nodes([*nodes[:2], nodes[3]], token, "--ranks-per-node", "1")[2]

        def agent(words: list[str], node: int) -> Agent:
            around = running.in_node(lab, node, [])
            return Agent([*words, *program], around, **running.environment(lab, node))

        started = [agent(words, index) for index, words in enumerate(listed)]
        try:

            def told() -> str:
                return "\n".join(one.text for one in started)

            until(stepped(tmp_path, 1, 3), told)
            network.set_link(lab, 2, up=False)
            began = time.monotonic()
            for one, lost in ((started[0], 2), (started[1], 2), (started[2], 0)):
                one.wait_for(f"node {lost} was lost: it has said nothing for")
            assert time.monotonic() - began < 5.0
            started[2].wait_for("this side has 1 of the 3 agents of generation")
            until(lambda: not is_alive(pid_of(tmp_path, 1, 2)), told)

            started.append(agent(spare, 3))
            until(stepped(tmp_path, 2, 3), told)
            network.set_link(lab, 2, up=True)
            assert started[2].wait() == 1
            assert "another agent has taken the place of node 2" in started[2].said[-1]
            os.kill(pid_of(tmp_path, 2, 2), signal.SIGKILL)  # the others still go on
            until(stepped(tmp_path, 3, 3), told)
        finally:
            for one in started:
                one.process.kill()
                one.process.wait()


def test_agents_with_another_token_or_other_arguments_stay_outside(tmp_path: Path) -> None:
    nodes, token = free_addresses(2), make_token(tmp_path)
    other = make_token(tmp_path, "a token of another job")
    program = ["--", "sh", "-c", "sleep 1"]
    first, second = words_of_nodes(nodes, token, "--ranks-per-node", "1")
    _, forged = words_of_nodes(nodes, other, "--ranks-per-node", "1", "--spare-wait", "3")
    _, unlike = words_of_nodes(nodes, token, "--ranks-per-node", "2")
    with agents([*first, *program], [*forged, *program]) as (agent, stranger):
        assert stranger.wait() == 1
        assert f"node(s) 0 ({nodes[0]}) did not come within 3 s" in stranger.said[-1]
        assert "node 1 is there" not in agent.text
        with agents([*unlike, *program]) as (second_stranger,):
            assert second_stranger.wait() == 1
            refused = "refuses this node: node 1 was started with other --ranks-per-node: 2, not 1"
            assert refused in second_stranger.text
        with agents([*second, *program]) as (friend,):
            assert friend.wait() == 0
        assert agent.wait() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Agents of several nodes need a secret"),
        (["--token-file", "open"], "The token of the job is no secret"),
        (["--token-file", "short"], "too short to be a secret"),
        (["--token-file", "absent"], "cannot be read"),
        (["--token-file", "good", "--node-index", "2"], "must name every node once"),
        (["--token-file", "good", "--listen", "nowhere"], "what is no address of one node"),
        (["--token-file", "good", "--min-nodes", "3"], "and --nodes names 2"),
        (["--token-file", "good", "--degrade-after", "3"], "--min-nodes 1 as well"),
        (
            ["--token-file", "good", "--min-nodes", "1", "--spare-wait", "9"],
            "would end before it could go on with fewer nodes",
        ),
    ],
)
def test_what_several_nodes_need_is_asked_for(
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text, mode in (
        ("open", "x" * 40, 0o644),
        ("short", "x", 0o600),
        ("good", "x" * 40, 0o600),
    ):
        Path(name).write_text(text)
        Path(name).chmod(mode)
    nodes = ",".join(free_addresses(2))
    code = main(["run", "--ranks-per-node", "1", "--nodes", nodes, *options, "--", "true"])
    assert code == 1
    assert words in capsys.readouterr().err
