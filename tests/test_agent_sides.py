"""Who goes on when nodes are lost, and that never two sides do. No processes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulated_agents import Net

from mics.agent.gathering import Pause
from mics.agent.going_on import History, Record, Shape, joined, who_goes_on
from mics.agent.pulse import Pulse
from mics.ranks.heartbeat import PAUSE

FULL = {0: [0, 1], 1: [2, 3], 2: [4, 5], 3: [6, 7]}
Make = Callable[..., Net]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes nodes of two ranks that have made a step."""

    def begin(count: int = 4, partition: int = 2, **options: float) -> Net:
        net = Net(
            tmp_path, count, monkeypatch, **{"min_nodes": 2, "degrade_after": 30.0, **options}
        )
        net.settle()
        assert len(net.worlds) == count
        net.step(41, partition)
        net.settle()
        return net

    return begin


def test_eight_ranks_go_on_as_six_and_grow_back(make: Make) -> None:
    net = make()
    assert net.worlds == FULL
    net.kill(2)
    net.settle(20.0)
    assert net.worlds == {0: [], 1: [], 3: []}
    assert "3 of 4 nodes go on if no other node has come within 30 s" in net.said[0][-1]
    net.settle(10.0)
    assert net.worlds == {0: [0, 1], 1: [2, 3], 3: [4, 5]}
    told = net.environments(3)[0]
    assert (told["WORLD_SIZE"], told["MICS_FULL_WORLD"]) == ("6", "8")
    assert (told["GROUP_RANK"], told["GROUP_WORLD_SIZE"]) == ("2", "3")
    words = "node 2 is lost; 3 of 4 nodes go on: 6 of 8 ranks, 3 of 4 partition groups"
    assert all(f"generation 2: {words}" in net.said[index] for index in (0, 1, 3))
    net.step(42)
    net.settle(10_000.0)  # --spare-wait is over
    net.start(2)
    net.settle()
    assert net.worlds[2] == []  # not before a step has ended
    net.step(43)
    net.settle()
    assert "node 2 is back: growing back after step 42; all ranks begin again" in net.said[1]
    assert net.worlds == FULL
    assert net.environments(0)[0]["MICS_GENERATION"] == "3"


def test_a_replacement_that_comes_in_time_leaves_the_job_whole(make: Make) -> None:
    net = make()
    net.kill(0)
    net.settle(20.0)
    net.start(0)
    net.settle()
    assert net.worlds == FULL


@pytest.mark.parametrize("lost", [0, 3])
def test_what_is_lost_while_degraded_costs_more_nodes_down_to_the_least(
    make: Make, lost: int
) -> None:
    net = make(spare_wait=100.0)
    for count, node in ((3, lost), (2, 1)):
        net.kill(node)
        net.settle(29.0)
        assert net.going_on == []
        net.settle(1.0)
        assert len(net.going_on) == 1
        assert sum(map(len, net.worlds.values())) == 2 * count
    first, second = sorted(net.agents)
    net.kill(second)
    net.settle(90.0)
    assert net.worlds == {first: []}
    agent = net.agents[first]
    net.settle(20.0)
    assert agent.code == 1
    side = "agents of generation 3, not the most, and goes on with all nodes only"
    few = "1 of 4 nodes are there; --min-nodes is 2"
    assert net.said[first][-1].endswith((side, few))


@pytest.mark.parametrize(
    ("sides", "goes_on"),
    [([[0, 1], [2, 3]], 0), ([[0, 1, 2], [3]], 0), ([[0], [1, 2, 3]], 1), ([[0, 3], [1, 2]], 0)],
)
def test_of_a_cut_one_side_goes_on_and_takes_the_other_back(
    make: Make, sides: list[list[int]], goes_on: int
) -> None:
    net = make(min_nodes=1)
    net.cut(*sides)
    net.settle(31.0)
    net.settle(100.0)
    assert len(net.going_on) == 1
    assert [index for index, ranks in net.worlds.items() if ranks] == sides[goes_on]
    waits = "not the most, and goes on with all nodes only: it waits for them"
    for index in sides[1 - goes_on]:
        assert any(waits in line for line in net.said[index])
    net.step(42)
    net.cut([0, 1, 2, 3])
    net.settle()
    net.step(43)
    net.settle()
    assert net.worlds == FULL


def test_of_two_nodes_the_first_goes_on_alone_and_the_second_never(make: Make) -> None:
    net = make(2, min_nodes=1)
    net.cut([0], [1])
    net.settle(31.0)
    assert net.worlds == {0: [0, 1], 1: []}


def test_a_cut_between_two_nodes_only_leaves_out_one_of_them(make: Make) -> None:
    net = make()
    net.unlink(0, 3)
    net.settle(31.0)
    net.settle(5.0)
    assert net.worlds == {0: [0, 1], 1: [2, 3], 2: [4, 5], 3: []}


def test_who_is_cut_off_from_most_leaves_them_to_themselves(make: Make) -> None:
    net = make(min_nodes=3)
    net.unlink(0, 1)
    net.unlink(0, 2)
    net.settle(31.0)
    assert net.going_on == []
    net.settle(10.0)
    assert net.worlds == {0: [], 1: [0, 1], 2: [2, 3], 3: [4, 5]}


def test_votes_that_went_to_two_plans_are_asked_for_anew(make: Make) -> None:
    net = make(min_nodes=3)
    net.unlink(0, 1)
    net.settle(0.0)
    for voter, other in ((2, 1), (3, 0)):
        agents = {i: a._members.incarnation for i, a in net.agents.items() if i != other}
        plan = {"kind": "plan", "record": Record(2, agents).as_json()}
        net.agents[voter]._peers.heard(1 - other, plan)
    net.settle(31.0)
    for _ in range(5):
        net.settle(3.0)
    assert net.worlds == {0: [0, 1], 1: [], 2: [2, 3], 3: [4, 5]}


def test_a_replacement_from_elsewhere_is_taken_while_degraded_and_the_old_node_never(
    make: Make,
) -> None:
    net = make()
    net.cut([0, 1, 2], [3])
    net.settle(31.0)
    net.step(42)
    old = net.agents.pop(3)
    net.cut([0, 1, 2, 3])
    net.start(3, [*net.nodes[:3], "elsewhere:1"])
    net.settle()
    net.step(43)
    net.settle()
    assert net.worlds == FULL
    assert net.agents[1]._members.nodes[3] == "elsewhere:1"
    refusal = net.agents[1]._peers.admit(old._peers.hello())
    assert refusal is not None
    assert refusal.final


def test_only_the_larger_side_takes_a_replacement_from_elsewhere(make: Make) -> None:
    net = make()
    net.cut([0, 1, 2], [3])
    net.settle(31.0)
    stranger = net.hello_of(2, [*net.nodes[:2], "elsewhere:1", net.nodes[3]])
    refusal = net.agents[3]._peers.admit(stranger)
    assert refusal is not None
    assert "only the side with most of the nodes takes it" in refusal.why


def test_a_job_that_needs_all_nodes_waits_for_them(make: Make) -> None:
    net = make(min_nodes=0)
    net.kill(2)
    agent = net.agents[0]
    net.settle(31.0)
    assert net.going_on == []
    net.settle(600.0)
    assert agent.code == 1
    assert net.said[0][-1] == (
        "node(s) 2 (node2:1) did not come within 600 s, which --spare-wait says"
    )


def test_a_job_begins_with_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(tmp_path, 4, monkeypatch, min_nodes=2, degrade_after=1.0)
    net.kill(3)
    net.settle()
    agent = net.agents[0]
    net.settle(601.0)
    assert agent.code == 1
    assert net.said[0][-1].endswith("a job begins with all its nodes")


# -- partition groups of several nodes -----------------------------------------------------------


def test_nodes_that_are_no_whole_group_wait_and_are_used_at_once(make: Make) -> None:
    net = make(6, 4)
    net.kill(1)
    net.settle(31.0)
    assert net.worlds == {0: [], 2: [0, 1], 3: [2, 3], 4: [4, 5], 5: [6, 7]}
    assert any("node 0 waits without ranks" in line for line in net.said[0])
    net.kill(4)
    net.settle()
    assert net.worlds == {0: [0, 1], 2: [2, 3], 3: [4, 5], 5: [6, 7]}
    assert len(net.going_on) == 1


def test_nodes_that_hold_the_same_half_wait_for_the_other_half(make: Make) -> None:
    net = make(6, 4, spare_wait=100.0)
    for node in (1, 3, 5):
        net.kill(node)
    net.settle(31.0)
    assert net.going_on == []
    assert "the job waits: 3 of 6 nodes are there, and none" in net.said[0][-1]
    agent = net.agents[0]
    net.start(3)  # a new agent: perhaps on another machine, with nothing in memory
    net.settle(31.0)
    assert net.going_on == []
    net.settle(50.0)
    assert agent.code == 1
    assert net.said[0][-1].endswith("is known to hold shard(s) 2-3 of the model's state")


def test_who_holds_what_is_known_to_agents_that_come_later(make: Make) -> None:
    net = make(6, 4)
    net.kill(1)
    net.settle(31.0)
    net.step(42, 4)
    net.settle()
    net.start(1)
    net.settle()
    others = [agent._members.holding for agent in net.agents.values()]
    assert all(one == others[0] and len(one) == 1 for one in others)
    assert len(others[0][0].agents) == 4


def test_a_spare_that_is_lost_costs_nothing(make: Make) -> None:
    net = make(6, 4)
    net.kill(1)
    net.settle(31.0)
    before, worlds = net.going_on, net.worlds
    net.kill(0)
    net.settle(31.0)
    assert net.going_on == before
    assert net.worlds == {index: ranks for index, ranks in worlds.items() if index}
    assert any(line.endswith("it had no ranks") for line in net.said[2])


def test_a_rank_that_dies_while_degraded_is_begun_again_at_once(make: Make) -> None:
    net = make()
    net.kill(2)
    net.settle(31.0)
    net.settle(1000.0)
    net.fail(3)
    net.settle()
    assert net.worlds == {0: [0, 1], 1: [2, 3], 3: [4, 5]}
    assert net.environments(0)[0]["MICS_GENERATION"] == "3"


def test_without_word_of_the_partition_group_nobody_goes_on_with_several_nodes(make: Make) -> None:
    net = make(4, 0)
    net.kill(2)
    net.settle(31.0)
    assert net.going_on == []
    why = "no rank has said how many of them hold one copy of the model together"
    assert why in net.said[0][-1]


def who(there: list[int], partition: int, least: int = 2, gone: int | None = None) -> list[int]:
    places = {index: index for index in range(6) if index != gone}
    return [*who_goes_on(there, [places], Shape(6, 2, least), partition).nodes]


def test_whole_groups_are_left_and_one_copy_of_the_model_is_among_them() -> None:
    assert who([0, 1, 2, 3, 4, 5], 12) == [0, 1, 2, 3, 4, 5]
    assert who([1, 2, 3, 4, 5], 2) == [1, 2, 3, 4, 5]
    assert who([0, 2, 3, 4, 5], 4) == [2, 3, 4, 5]
    assert who([0, 3, 5], 4) == [0, 3]
    assert who([0, 2, 5], 4) == [0, 5]  # 0 and 2 hold the same half
    assert who([1, 2, 3, 5], 6) == [1, 2, 3]
    assert who([0, 3, 4, 5], 6) == [3, 4, 5]
    assert who([0, 1, 2, 3], 12) == []
    assert who([0, 1, 2], 4, least=3) == []
    assert who([0, 1, 3, 4, 5], 4, gone=1) == [0, 3, 4, 5]  # another machine came for node 1


def test_nobody_goes_on_without_a_whole_copy_of_the_model() -> None:
    assert who([0, 2, 4], 4) == []
    assert who([1, 3, 5], 4) == []
    assert who([0, 1, 3, 4, 5], 4, gone=1) == [0, 3, 4, 5]
    assert who([0, 1, 2], 4, gone=1) == []
    why = who_goes_on([0, 2], [{0: 0, 2: 2}], Shape(4, 1, 2), 2).why
    assert why.endswith("none of them is known to hold shard(s) 1 of the model's state")
    # A later generation, in other places, of which nobody knows whether its ranks had states.
    first, second = {2: 2, 3: 3, 5: 5}, {2: 1, 3: 2, 5: 3}
    assert who_goes_on([2, 3, 5], [first], Shape(6, 1, 2), 2).nodes == (2, 3)
    assert who_goes_on([2, 3, 5], [first, second], Shape(6, 1, 2), 2).nodes == (2, 3)
    assert who_goes_on([3, 5], [first, second], Shape(6, 1, 2), 2).nodes == ()


def test_words_say_why_nobody_goes_on() -> None:
    shape = Shape(6, 2, 3)
    why = who_goes_on([0, 1, 2], [], shape, 4).why
    assert why == (
        "3 of 6 nodes are there, of which whole partition groups, of 2 nodes each, use 2; "
        "--min-nodes is 3"
    )
    assert who_goes_on([0, 1], [], Shape(6, 2, 1), 0).nodes == (0, 1)


# -- nodes that come and go meanwhile ------------------------------------------------------------


def test_a_node_that_is_lost_again_while_the_others_pause_lets_them_go_on(make: Make) -> None:
    net = make()
    net.kill(2)
    net.settle(31.0)
    net.step(42)
    before = net.going_on
    net.start(2)
    net.settle()
    assert net.agents[0]._gathering.pauses
    net.kill(2)
    net.settle()
    assert not net.agents[0]._gathering.pauses
    net.step(43)
    net.settle()
    assert net.going_on == before


STANDS = {"during": PAUSE, "still": 0.1, "step": 41}
WAITS = {"waits": "a sum", "still": 2.0, "step": 42, "is_long": False}
WORKS = {"still": 0.1, "step": 41, "is_long": False}
SAVES = {"still": 9.0, "step": 41, "during": "mics.save", "is_long": True}


@pytest.mark.parametrize(
    ("other", "seconds"),
    [(STANDS, 0.0), (WAITS, 0.0), (WORKS, 6.0), (WORKS | {"slow_step": 10.0}, 21.0), (SAVES, 1e9)],
)
def test_ranks_end_when_all_stand_or_wait_for_those_that_do(
    other: dict[str, Any], seconds: float
) -> None:
    pause, pulses = Pause(), [Pulse(0, 0, **STANDS), Pulse(1, 0, **other)]
    if seconds:
        assert pause.look([2], pulses, 100.0) == ""
        assert pause.look([2], pulses, 100.0 + 0.8 * seconds) == ""
    if seconds < 1e9:
        words = "node 2 is back: growing back after step 41"
        assert pause.look([2], pulses, 100.0 + seconds) == words


def test_ranks_that_tell_nothing_have_ten_seconds() -> None:
    pause, pulses = Pause(), [Pulse(0, 0), Pulse(1, 0)]
    assert pause.look([2, 3], pulses, 100.0) == ""
    assert pause.look([2, 3], pulses, 111.0) == "nodes 2, 3 are back: growing back"


def test_ranks_that_beat_and_tell_no_step_have_ten_seconds_too() -> None:
    pause, pulses = Pause(), [Pulse(0, 0, still=0.1), Pulse(1, 0, still=0.1)]
    assert pause.look([2], pulses, 100.0) == ""
    assert pause.look([2], pulses, 111.0) == "node 2 is back: growing back"


def test_a_loop_that_tells_no_micro_steps_is_not_waited_for_once_a_rank_stands() -> None:
    pulses = [Pulse(0, 0, **STANDS), Pulse(1, 0, step=42, still=0.1)]
    pause = Pause()
    assert pause.look([2], pulses, 100.0) == ""
    assert pause.look([2], pulses, 106.0) == "node 2 is back: growing back after step 41"


@pytest.mark.parametrize("lost", [0, 2, 3])
def test_a_node_that_is_lost_while_it_grows_back_leaves_the_rest(make: Make, lost: int) -> None:
    net = make()
    net.kill(2)
    net.settle(31.0)
    net.step(42)
    net.start(2)
    net.settle()
    net.step(43)
    for index in (0, 1, 3):  # the generation ends, and nothing has begun yet
        net.look(index)
    net.kill(lost)
    net.settle(31.0)
    assert sum(map(len, net.worlds.values())) == 6
    assert len(net.going_on) == 1


def test_the_agent_of_the_lost_node_comes_back_while_the_others_begin_without_it(
    make: Make,
) -> None:
    net = make()
    net.cut([0, 1, 3], [2])
    net.settle(20.0)
    net.now += 11.0
    net.look(0)  # asks for votes
    assert net.deliver(0, 1)
    net.cut([0, 1, 2, 3])
    for other in (0, 1, 3):
        net.link(2, other)
    net.settle()
    net.step(42)
    net.settle()
    net.step(43)
    net.settle()
    assert net.worlds == FULL
    assert len(net.going_on) == 1


def test_who_has_ranks_has_no_vote(make: Make) -> None:
    net = make()
    agents = {i: agent._members.incarnation for i, agent in net.agents.items() if i < 3}
    plan = {"kind": "plan", "record": Record(9, agents).as_json()}
    net.agents[1]._peers.heard(0, plan)
    assert not net.waiting[1, 0]
    net.kill(3)
    for node in (0, 1, 2):
        net.ranks(node).reap()
    net.waiting[1, 0].clear()
    net.agents[1]._peers.heard(0, plan)
    assert '"voted"' in net.waiting[1, 0][-1]


def test_votes_that_were_given_bind_although_nothing_came_of_them(make: Make) -> None:
    net = make()
    net.cut([0], [1, 2, 3])
    net.settle(20.0)
    net.now += 11.0
    net.look(1)  # asks for votes, which are given and never arrive
    for node in (2, 3):
        while net.deliver(1, node):
            pass
    net.cut([0, 3], [1, 2])
    net.settle(31.0)
    net.settle(31.0)
    assert net.going_on == []  # 0 and 3 are half with the first, but 1, 2 and 3 may have begun
    net.cut([0, 2, 3], [1])
    net.settle(31.0)
    net.settle(5.0)
    assert net.worlds == {0: [0, 1], 1: [], 2: [2, 3], 3: [4, 5]}


def grow_back(net: Net, node: int, step: int) -> None:
    net.start(node)
    for at in (step, step + 1):
        net.step(at)
        net.settle()


def test_a_node_that_comes_and_goes_ends_no_job_that_can_do_without_it(make: Make) -> None:
    net = make(restarts=2)
    for step in range(100, 500, 100):
        net.kill(3)
        net.settle(31.0)
        assert net.worlds == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
        assert not any("restart 1" in line for line in net.said[0])
        grow_back(net, 3, step)
        if step > 100:  # it was lost before, and has to wait
            assert net.worlds[3] == []
            assert any("node 3 was lost 2 times within 3600 s" in line for line in net.said[0])
            net.settle(60.0 * 2 ** (step / 100 - 2))
            net.step(step + 2)
            net.settle()
        assert net.worlds == FULL


def test_a_loss_that_leaves_too_few_nodes_counts(make: Make) -> None:
    net = make(min_nodes=4, restarts=2)
    agent = net.agents[0]
    for _ in range(3):
        assert agent.code is None
        net.kill(3)
        net.start(3)
        net.settle()
    assert agent.code == 1
    assert any("3 failures within 3600 s" in line for line in net.said[0])


def test_a_dead_gpu_whose_agent_is_started_again_and_again_ends_no_job(make: Make) -> None:
    net = make(restarts=4)
    for step in range(100, 600, 100):
        for _ in range(3):
            net.step(step)
            net.fail(3)
            net.settle()
        assert net.worlds == {0: [0, 1], 1: [2, 3], 2: [4, 5], 3: []}
        net.step(step + 40)
        net.kill(3)
        net.settle(2000.0)
        grow_back(net, 3, step + 41)
        assert net.worlds == FULL


# -- a node whose ranks fail again and again -----------------------------------------------------


def test_a_node_whose_ranks_fail_again_and_again_drops_out_until_its_agent_begins_anew(
    make: Make,
) -> None:
    net = make()
    for _ in range(3):
        assert net.worlds == FULL
        net.fail(2)
        net.settle()
    assert net.worlds == {0: [0, 1], 1: [2, 3], 2: [], 3: [4, 5]}
    assert any("drops out: its ranks were the first to fail 3 times" in s for s in net.said[2])
    assert any("node 2 has dropped out; 3 of 4 nodes go on" in line for line in net.said[0])
    net.step(42)
    net.settle(10_000.0)
    net.step(43)
    net.settle()
    assert net.worlds[2] == []
    net.kill(2)
    net.settle(1.0)
    assert net.said[0][-1].endswith("it had no ranks")
    net.start(2)
    net.settle()
    net.step(44)
    net.settle()
    assert net.worlds == FULL


def test_who_waits_for_a_node_that_dropped_out_says_so(make: Make) -> None:
    net = make(2, min_nodes=1)
    for _ in range(3):
        net.fail(1)
        net.settle()
    net.kill(0)
    net.start(0)
    net.settle()
    for _ in range(2):
        net.settle(11.0)
    assert any("waits for new agents on node 1, dropped out" in line for line in net.said[0])


def test_a_side_of_agents_that_began_anew_is_told_that_these_do_not_count(make: Make) -> None:
    net = make(3)
    net.cut([0, 1], [2])
    net.settle(31.0)
    net.kill(0)
    net.cut([1, 2])
    agent = net.agents[1]
    net.settle(601.0)
    assert agent.code == 1
    words = "this side has 1 of the 2 agents of generation 2, not the most"
    assert words in net.said[1][-1]


def test_a_node_that_is_back_says_what_it_waits_for(make: Make) -> None:
    net = make()
    net.kill(2)
    net.settle(31.0)
    net.step(42)
    net.start(2)
    net.settle()
    net.settle(4.0)
    assert any(line.startswith("generation 2 runs on other nodes") for line in net.said[2])


def test_a_node_0_whose_ranks_fail_drops_out_of_two(make: Make) -> None:
    net = make(2, min_nodes=1)
    for _ in range(3):
        net.fail(0)
        net.settle()
    assert net.worlds == {0: [], 1: [0, 1]}


def test_without_nodes_to_spare_the_budget_decides(make: Make) -> None:
    net = make(min_nodes=0)
    agent = net.agents[1]
    for _ in range(3):
        assert agent.code is None
        net.step(42)
        net.settle()
        net.fail(2)
        net.settle()
    assert agent.code == 1
    assert "step 42 kills rank 4 with exit code 1: 3 times in a row" in net.said[2][-1]


# -- records and votes ---------------------------------------------------------------------------


def test_linked_with_each_other() -> None:
    assert joined({0: [1, 2, 3], 1: [0, 2], 2: [0, 1, 3], 3: [0, 2]}) == [0, 1, 2]
    assert joined({0: [1], 1: []}) == [0]


def record(generation: int, *nodes: int) -> Record:
    return Record(generation, {node: f"agent {node}" for node in nodes})


def test_what_may_have_begun_counts_until_something_later_has() -> None:
    everybody = {node: f"agent {node}" for node in range(4)}
    history = History()
    assert not history.allows(everybody)  # nothing has begun
    history.note(record(1, 0, 1, 2, 3))
    history.has_begun(record(1, 0, 1, 2, 3))
    history.note(record(2, 1, 2, 3))
    assert history.allows({i: everybody[i] for i in (1, 2, 3)})
    assert not history.allows({i: everybody[i] for i in (0, 1)})  # generation 2 may have begun
    history.note(record(3, 1, 2))
    assert [one.generation for one in history.records] == [1, 2, 3]
    history.has_begun(record(3, 1, 2))
    assert [one.generation for one in history.records] == [3]
    history.note(record(2, 1, 2, 3))
    assert [one.generation for one in history.records] == [3]
    assert not history.allows(everybody | {1: "another agent"})


# -- anything, in any order ----------------------------------------------------------------------


def live(net: Net, draw: random.Random, events: int) -> int:
    """Let anything happen in any order; returns how often one side has gone on."""
    nodes, seen = sorted(net.said), set()
    for _ in range(events):
        what = draw.random()
        index = draw.choice(sorted(net.agents)) if net.agents else 0
        if what < 0.55:
            busy = [pair for pair, waiting in net.waiting.items() if waiting]
            if busy:
                net.deliver(*draw.choice(busy))
        elif what < 0.75 and index in net.agents:
            net.look(index, draw.choice([0.0, 0.1, 1.0, 3.0]))
        elif what < 0.85 and index in net.agents:
            net.ranks(index).reap()
        elif what < 0.93:
            a, b = draw.sample(nodes, 2)
            net.link(a, b)
        elif what < 0.96:
            net.unlink(*draw.sample(nodes, 2))
        elif what < 0.97:
            half = draw.sample(nodes, draw.randint(1, len(nodes) - 1))
            net.cut(half, [node for node in nodes if node not in half])
        elif what < 0.98 and index in net.agents:
            net.kill(index)
        elif what < 0.99 and len(net.agents) < len(nodes):
            net.start(draw.choice([node for node in nodes if node not in net.agents]))
        else:
            net.step(draw.randrange(100))
        for dead in [i for i, agent in net.agents.items() if agent.code is not None]:
            net.kill(dead)
        assert len(net.going_on) < 2
        seen |= {*net.going_on}
    return len(seen)


@pytest.mark.parametrize("seed", range(20))
def test_never_two_sides_go_on_whatever_happens_when(make: Make, seed: int) -> None:
    net = make(4 + seed % 2, min_nodes=1, degrade_after=5.0, spare_wait=1e9, restarts=10**6)
    draw = random.Random(seed)
    seen = live(net, draw, 3000)
    assert seen >= 1
    for node in net.said:
        if node not in net.agents:
            net.start(node)
    net.cut([*net.said])
    for step in range(200, 204):
        net.settle(10.0)
        net.step(step)
    net.settle()
    assert all(net.worlds.values())  # and when all is well again, all nodes go on
    assert len(net.going_on) == 1
