"""What agents decide: budgets, hung ranks, sides of a cut. No processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mics.agent.budget import Budget, Failure, describe_exit
from mics.agent.going_on import Record
from mics.agent.hangs import find_hang
from mics.agent.membership import Membership, split_address
from mics.agent.pulse import Pulse, Wrist
from mics.ranks.heartbeat import Heart, make_file, read_beat

# -- budgets -------------------------------------------------------------------------------------


def killed(step: int | None, rank: int = 0, cause: str = "SIGSEGV") -> Failure:
    return Failure("it died", rank=rank, cause=cause, step=step)


def test_restarts_are_counted_within_the_window() -> None:
    budget = Budget(2, 10.0)
    assert [budget.spend(Failure("lost"), now) for now in (0.0, 5.0, 11.0, 16.0)] == [None] * 4
    verdict = budget.spend(Failure("lost"), 17.0)
    assert verdict is not None
    assert verdict.startswith("3 failures within 10 s")


def test_the_same_step_three_times_in_a_row_is_a_verdict() -> None:
    budget = Budget(100, 3600.0)
    steps = [812, 812, 813, 812, 812]
    assert [budget.spend(killed(step, 3), 0.0) for step in steps] == [None] * 5
    assert (
        budget.spend(killed(812, 3), 0.0) == "step 812 kills rank 3 with SIGSEGV: 3 times in a row"
    )


@pytest.mark.parametrize(
    ("failures", "ends"),
    [
        ([killed(5, rank) for rank in (0, 1, 2)], True),  # whichever rank meets it first
        ([killed(5, rank, "SIGKILL") for rank in (0, 1, 2)], False),  # from outside
        ([killed(5, 1, "SIGKILL")] * 3, True),  # for want of memory
        ([killed(None, 1, "SIGKILL")] * 3, False),  # in no step that is known
        ([killed(0, 1, "SIGKILL")] * 3, False),  # while it begins again
        ([killed(0, 1, "ImportError")] * 3, True),
        ([killed(5, 1, "hung")] * 3, True),
        ([killed(5), Failure("node 1 was lost"), killed(5), killed(5)], False),
    ],
)
def test_what_kills_the_same_step_again(failures: list[Failure], ends: bool) -> None:
    budget = Budget(100, 3600.0)
    assert any(budget.spend(failure, 0.0) is not None for failure in failures) == ends


def test_the_end_of_a_process_in_words() -> None:
    assert describe_exit(3) == ("ended with exit code 3", "exit code 3", 3)
    assert describe_exit(-11) == ("was killed by SIGSEGV", "SIGSEGV", 139)


# -- hung ranks ----------------------------------------------------------------------------------


def pulses(*changes: dict[str, Any]) -> list[Pulse]:
    usual = {"step": 7, "micro_step": 1, "issued": 50, "waits": "the sum", "still": 12.0}
    return [
        Pulse(**{"rank": r, "node": r // 2, "is_long": False, **usual, **change})
        for r, change in enumerate(changes)
    ]


def culprit(*changes: dict[str, Any]) -> int | None:
    hang = find_hang(pulses(*changes), 10.0)
    return None if hang is None else hang.culprit.rank


def test_the_rank_that_waits_for_nobody_is_the_culprit() -> None:
    assert culprit({}, {}, {"waits": "", "issued": 49}, {}) == 2
    assert culprit({}, {"waits": "", "issued": 50}, {"waits": "", "issued": 49}, {}) == 2
    assert culprit({"issued": 40}, {"waits": ""}, {}, {}) == 1  # also where others issue fewer


def test_where_all_wait_it_is_the_one_that_left_out_a_collective() -> None:
    assert culprit({}, {"issued": 49}, {}, {}) == 1
    assert culprit({}, {"waits": "another sum"}, {}, {}) == 1


def test_a_rank_that_ended_is_waited_for_in_vain() -> None:
    hang = find_hang(pulses({}, {"ended": True, "waits": "", "issued": 60}, {}, {}), 10.0)
    assert hang is not None
    assert str(hang).startswith("rank 1 on node 0 has ended its program with exit code 0")


def test_who_is_not_called_hung() -> None:
    assert culprit({}, {"waits": "", "still": 9.0}, {}, {}) is None  # not for long enough
    assert culprit({}, {"waits": "", "is_long": True}, {}, {}) is None  # it saves, say
    assert culprit({}, {"waits": "", "slow_step": 3.0}, {}, {}) is None  # five slow steps
    assert culprit({}, {"still": None}, {}, {}) is None  # of one rank nothing is seen
    assert culprit({"still": 1.0}, {"issued": 49}, {}, {}) is None  # one of them still works


def test_the_words_name_rank_node_step_and_collective() -> None:
    hang = find_hang(pulses({}, {}, {"waits": "", "issued": 49, "during": "mics.steps"}, {}), 10.0)
    assert str(hang) == (
        "rank 2 on node 1 has stood still for 12 s (limit 10 s): micro-step 1 of step 7, in "
        "mics.steps, in no collective, after 49 of them"
    )


def test_a_pulse_is_what_the_heart_wrote(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    make_file(path)
    wrist = Wrist(path, 3, 1)
    assert wrist.feel() == Pulse(3, 1)
    heart = Heart(str(path))
    heart.at_step(41)
    for steps in (1, 2, 3):
        heart.in_step(steps, 2)
        pulse = wrist.feel()
        time.sleep(0.02)
    assert (pulse.step, pulse.micro_step, pulse.is_long) == (43, 2, False)
    assert 0.02 <= pulse.slow_step < 1.0
    before = heart.enter("mics.save")
    heart.issue()
    heart.wait(("sum", 4, "group"), "the sum of 4 bytes among ranks 0-3")
    pulse = wrist.feel()
    assert (pulse.during, pulse.issued, pulse.is_long) == ("mics.save", 1, True)
    assert pulse.waits == "the sum of 4 bytes among ranks 0-3"
    heart.go_on()
    heart.leave(before)
    pulse = wrist.feel()
    assert (pulse.during, pulse.waits) == ("", "")
    for number in range(1000):  # more names than there is room for
        heart.wait(number, f"place {number}")
        assert wrist.feel().waits == f"place {number}"
    heart.wait(2, "place 2")
    assert wrist.feel().waits == "place 2"
    assert oct(path.stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize(
    "act",
    [
        lambda heart: heart.issue(),
        lambda heart: heart.wait("another", "another place"),
        lambda heart: heart.go_on(),
        lambda heart: heart.in_step(1, 2),
        lambda heart: heart.leave(heart.enter("mics.save")),
        lambda heart: heart.take_long(1),
    ],
    ids=["issue", "wait", "go on", "micro-step", "call", "long"],
)
def test_whatever_a_rank_does_is_a_sign_of_life(
    act: Callable[[Heart], object], tmp_path: Path
) -> None:
    path = tmp_path / "heartbeat"
    make_file(path)
    heart, wrist = Heart(str(path)), Wrist(path, 0, 0)
    heart.in_step(1, 1)
    heart.wait("one", "a place")
    wrist.feel()
    time.sleep(0.02)
    assert wrist.feel().still
    act(heart)
    assert wrist.feel().still == 0.0


def test_the_largest_partition_that_a_rank_has_told_counts(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    make_file(path)
    assert read_beat(path.read_bytes()).partition == 0
    heart = Heart(str(path))
    for partition, told in ((2, 2), (4, 4), (2, 4)):
        heart.hold_in(partition)
        assert read_beat(path.read_bytes()).partition == told


def test_a_pause_waits_for_a_kept_step_and_for_what_is_written_beside_the_program(
    tmp_path: Path,
) -> None:
    path = tmp_path / "heartbeat"
    make_file(path)
    heart, wrist, seen = Heart(str(path)), Wrist(path, 0, 0), []

    def finish() -> None:
        seen.append(wrist.feel())
        wrist.ask_for_pause(wanted=False)  # so that nothing waits here

    heart.keep_steps(finish)
    heart.in_step(1, 1)
    wrist.ask_for_pause(wanted=True)
    heart.end_step(1, kept=False)
    heart.rest()
    heart.in_step(2, 1)
    assert not seen
    heart.end_step(2, kept=True)
    heart.rest()
    assert not seen  # what belongs to the step may go on behind its keeping
    heart.in_step(3, 1)
    assert [(pulse.step, pulse.pauses, pulse.is_long) for pulse in seen] == [(2, False, True)]


# -- sides of a cut ------------------------------------------------------------------------------

NODES = ["a:1", "b:1", "c:1"]


def together(nodes: list[str]) -> list[Membership]:
    """Nodes in generation 1."""
    members = [Membership(index, [*nodes], {}) for index in range(len(nodes))]
    for one in members:
        for other in members:
            if one is not other:
                assert one.admit(other.hello()) is None
                one.linked(other.me, other.hello())
    for one in members:
        one.begin(Record(1, one.present), "job")
    return members


def test_most_of_the_nodes_are_a_side_that_goes_on() -> None:
    first, second, third = together(NODES)
    second.lost(0)
    third.lost(0)
    first.lost(1)
    first.lost(2)
    assert [one.has_majority for one in (first, second, third)] == [False, True, True]


def test_of_two_halves_the_one_with_node_0_goes_on() -> None:
    members = together(["a:1", "b:1"])
    members[0].lost(1)
    members[1].lost(0)
    assert [one.has_majority for one in members] == [True, False]


def test_a_replacement_from_elsewhere_is_taken_by_one_side_and_the_old_node_by_none() -> None:
    first, second, third = together(NODES)
    for one, lost in ((first, 2), (second, 2), (third, 0), (third, 1)):
        one.lost(lost)
    elsewhere = Membership(2, ["a:1", "b:1", "elsewhere:1"], {})
    refusal = third.admit(Membership(1, ["a:1", "elsewhere:1", "c:1"], {}).hello())
    assert refusal is not None
    assert "only the side with most of the nodes" in refusal.why
    for one in (first, second):
        assert one.admit(elsewhere.hello()) is None
        one.linked(2, elsewhere.hello())
        assert one.nodes[2] == "elsewhere:1"
        assert one.addresses[2] == ("elsewhere", 1)
        old = one.admit(third.hello())
        assert old is not None
        assert old.final
    elsewhere.linked(0, first.hello())
    elsewhere.learn(first.knowledge)
    assert (elsewhere.generation, elsewhere.job) == (1, "job")


def test_a_replacement_at_the_same_address_is_taken_also_by_the_smaller_side() -> None:
    first, _, _ = together(NODES)
    first.lost(1)
    first.lost(2)
    assert not first.has_majority
    assert first.admit(Membership(1, [*NODES], {}).hello()) is None


@pytest.mark.parametrize(
    "text", ["host", ":1", "host:", "host:x", "host:70000", "0.0.0.0:1", "[::]:1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError):
        split_address(text)


def test_an_address_may_be_of_ipv6() -> None:
    assert split_address("[fe80::1]:29400") == ("fe80::1", 29400)
