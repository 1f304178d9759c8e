"""Who can never come, read from notices alone."""

from __future__ import annotations

import dataclasses

from mics.ranks.board import Notice
from mics.ranks.stuck import circle, crossed, missing
from mics.ranks.verdict import judge, lost, timed_out, whom


def waits(rank: int, group: str, members: list[int], number: int) -> Notice:
    """A rank that waits in collective ``number`` of a group."""
    return Notice(
        rank,
        "waits",
        issued={group: number},
        host=f"node {rank}",  # where the other ranks' processes can not be seen
        group=group,
        members=members,
        number=number,
        what=f"the all-gather of 8 bytes among {group}",
    )


def notices(*of: Notice) -> dict[int, Notice]:
    return {notice.rank: notice for notice in of}


def test_a_collective_to_which_all_have_come_is_no_circle_however_long_it_takes() -> None:
    both = notices(waits(0, "a", [0, 1], 5), waits(1, "a", [0, 1], 5))
    assert circle(both) == crossed(both) == []
    assert judge(both[0], both, 100.0) is None
    assert whom(both[0], both) == "none of them: all have come, and it is under way"


def test_waiting_for_one_that_waits_for_a_running_collective_is_no_circle() -> None:
    running = waits(0, "a", [0, 1], 5), waits(1, "a", [0, 1], 5)
    assert circle(notices(*running, waits(2, "b", [1, 2], 3))) == []


def test_waiting_for_one_that_computes_is_no_circle() -> None:
    some = notices(waits(0, "a", [0, 1], 5), Notice(1, "works", issued={"a": 4}))
    assert circle(some) == []
    assert missing(some[0], some) == [1]
    assert judge(some[0], some, 100.0) is None


def test_a_circle_over_three_groups_is_found_and_who_is_outside_of_it_is_told_too() -> None:
    three = notices(
        waits(0, "a", [0, 1], 5),
        waits(1, "b", [1, 2], 7),
        waits(2, "c", [2, 0], 2),
        waits(3, "d", [3, 0], 1),  # waits for one inside
        Notice(4, "works"),
    )
    assert [notice.rank for notice in circle(three)] == [0, 1, 2, 3]
    verdict = judge(three[3], three, 1.0)
    assert verdict is not None
    assert verdict.evidence is not None  # it has to be seen twice
    assert "ank(s) 1 in the all-gather of 8 bytes among b, for rank(s) 2" in str(verdict.error)


def test_a_later_collective_of_the_same_group_counts_as_having_come() -> None:
    ahead = dataclasses.replace(waits(1, "b", [1, 2], 1), issued={"b": 1, "a": 9})
    assert missing(waits(0, "a", [0, 1], 5), notices(ahead)) == []


def test_one_collective_that_ranks_take_for_different_ones_is_named() -> None:
    one, other = waits(0, "a", [0, 1], 5), waits(1, "a", [0, 1], 5)
    other = dataclasses.replace(other, what="the all-reduce of 4 bytes among a")
    verdict = judge(one, notices(one, other), 1.0)
    assert verdict is not None
    assert str(verdict.error).startswith(
        "Ranks take one and the same collective for different ones.\n  Rank(s) 0 in the all-gather"
    )


def test_an_end_counts_only_where_it_is_needed() -> None:
    mine = waits(0, "a", [0, 1], 5)
    assert judge(mine, notices(mine, Notice(1, "has ended", issued={"a": 5})), 1.0) is None
    assert judge(mine, notices(mine, waits(1, "a", [0, 1], 5), Notice(2, "has ended")), 1.0) is None
    needed = judge(mine, notices(mine, Notice(1, "has ended", issued={"a": 4})), 1.0)
    assert needed is not None
    assert "Rank 1 has ended its program, and the others have not." in str(needed.error)


def test_a_step_that_was_left_counts_only_for_ranks_inside_of_it() -> None:
    left = Notice(1, "has left", during="micro-step 1 of step 3", step=3)
    mine = waits(0, "a", [0, 1], 5)
    for step, is_vain in ((3, True), (4, False), (0, False)):
        inside = dataclasses.replace(mine, step=step)
        assert (judge(inside, notices(inside, left), 1.0) is not None) == is_vain


def test_an_error_that_another_rank_gave_up_with_is_passed_on() -> None:
    mine = waits(0, "a", [0, 1], 5)
    verdict = judge(
        mine, notices(mine, Notice(7, "has given up", error=["Rank 3 has died.", "n", "w"])), 1.0
    )
    assert verdict is not None
    assert str(verdict.error) == "Rank 3 has died.\n  n\n  Write: w"


def test_what_is_not_known_is_said_so() -> None:
    mine = waits(0, "a", [0, 1, 2, 3], 5)
    some = notices(mine, waits(1, "b", [1, 2], 1), Notice(2, "works"))
    text = str(timed_out(mine, some, 1800.0))
    assert text.startswith("Rank 0 has waited 1800 s, the timeout, in the all-gather of 8 bytes")
    assert "rank(s) 1, which waits in the all-gather of 8 bytes among b;" in text
    assert "rank(s) 3, of which nothing has been heard" in text
    text = str(lost(mine, some, "Connection closed by peer\nmore"))
    assert text.startswith("The connection to rank(s) 1-3 was lost, and nothing else was heard.")
    assert "The backend says: Connection closed by peer\n" in text
