"""From which step everybody goes on, and what a slot in memory is worth."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mics import compat
from mics.recovery import slot as slots
from mics.recovery.comparing import minority
from mics.recovery.healing import _least
from mics.recovery.holders import Held, Seat, choose, missing, next_generation, trusted
from mics.recovery.job import Job
from mics.recovery.slot import Layout, Slot
from mics.recovery.words import not_survived

SEATS = [Seat(0, "a", "k0"), Seat(1, "a", "k1"), Seat(2, "b", "k0"), Seat(3, "b", "k1")]


def held(
    rank: int, step: int, *, digest: int = 7, generation: int = 1, owns: str = "", world: int = 4
) -> Held:
    seat = SEATS[rank]
    known = tuple(int(one) for one in owns) or (rank,)
    return Held(
        seat.host, f"{seat.key}.{rank}", seat.key, rank, generation, step, digest, known, world
    )


def everybody(step: int, but: int = -1) -> list[Held]:
    return [held(rank, step) for rank in range(4) if rank != but]


def test_the_newest_step_that_all_have_is_taken() -> None:
    choice = choose(SEATS, everybody(4) + everybody(5))
    assert choice is not None and choice.step == 5
    assert {rank: one.rank for rank, one in choice.shards.items()} == {0: 0, 1: 1, 2: 2, 3: 3}


def test_a_step_that_one_rank_lacks_is_taken_from_its_replica() -> None:
    five = [held(0, 5), held(1, 5, owns="13"), held(2, 5)]
    choice = choose(SEATS, everybody(4) + five)
    assert choice is not None and choice.step == 5
    assert (choice.shards[3].rank, choice.owns[3].rank) == (1, 1)


def test_a_step_is_not_taken_without_what_a_rank_has_of_its_own() -> None:
    choice = choose(SEATS, everybody(4) + everybody(5, but=3))
    assert choice is not None and choice.step == 4
    alone = replace(held(3, 5), key="")
    choice = choose(SEATS, [*everybody(4), *everybody(5, but=3), alone])
    assert choice is not None and choice.step == 5
    assert (choice.shards[3].rank, choice.owns[3].rank) == (1, 3)


def test_a_shard_that_nobody_has_leaves_nothing_to_go_on_from() -> None:
    left = [held(0, 5, owns="0123"), held(2, 5)]
    assert choose(SEATS, left) is None
    assert missing(SEATS, left) == [1, 3]


def test_two_that_differ_are_both_left_out() -> None:
    five = [held(0, 5), held(1, 5), held(2, 5, digest=8), held(3, 5)]
    choice = choose(SEATS, everybody(4) + five)
    assert choice is not None and choice.step == 4


def test_of_three_that_differ_most_are_right() -> None:
    seats = [Seat(rank, "a", "k") for rank in range(3)]
    five = [Held("a", f"k.{r}", "k", r, 1, 5, 7 if r != 1 else 8, (0, 1, 2), 3) for r in range(3)]
    choice = choose(seats, five)
    assert choice is not None and {one.digest for one in choice.shards.values()} == {7}
    assert minority({0: 7, 1: 8, 2: 7}) == [1]
    assert minority({0: 7, 1: 8}) == []


def test_without_comparing_the_own_state_is_taken() -> None:
    five = [held(0, 5), held(1, 5), held(2, 5, digest=8), held(3, 5)]
    choice = choose(SEATS, everybody(4) + five, compare=False)
    assert choice is not None and choice.step == 5
    assert (choice.shards[0].digest, choice.shards[2].digest) == (7, 8)


def test_what_is_brought_takes_the_place_of_what_is_worth_least(tmp_path: Path) -> None:
    job, mine = Job("j", tmp_path), SEATS[3]
    first, second = (path.name for path in job.slots(mine.key, mine.rank))
    four = Held(mine.host, first, mine.key, 3, 1, 4, 7, (3,), 4)
    assert _least(job, [four], mine).path.name == second
    assert _least(job, [four, replace(four, name=second, step=3)], mine).path.name == second
    assert _least(job, [], mine).path.name == first


def test_a_history_that_was_left_is_not_gone_back_to() -> None:
    old = [held(rank, 9, generation=1) for rank in range(4)]
    new = [held(rank, 5, generation=2) for rank in range(4)]
    choice = choose(SEATS, old + new)
    assert choice is not None and choice.step == 5
    mixed = [held(0, 6, generation=1), *(held(rank, 6, generation=2) for rank in (1, 3))]
    choice = choose(SEATS, mixed + new)
    assert choice is not None and choice.step == 5


# -- other numbers of ranks ------------------------------------------------------------------------

SIX = [Seat(rank, "abc"[rank // 2], f"k{rank % 2}") for rank in range(6)]
FOUR = SIX[:4]


def of(seats: list[Seat], step: int, generation: int = 1, digest: int = 7) -> list[Held]:
    """What ranks keep, each with the own states of all ranks that have its shard."""
    found = []
    for seat in seats:
        owns = tuple(other.rank for other in seats if other.key == seat.key)
        name = f"{seat.key}.{seat.rank}.0"
        kept = generation, step, digest
        found.append(Held(seat.host, name, seat.key, seat.rank, *kept, owns, len(seats)))
    return found


def test_fewer_ranks_take_the_newest_step_and_what_the_others_had_rests() -> None:
    left = [one for one in of(SIX, 5) if one.host != "a"]
    seats = [Seat(0, "b", "k0"), Seat(1, "b", "k1"), Seat(2, "c", "k0"), Seat(3, "c", "k1")]
    choice = choose(seats, left)
    assert choice is not None and (choice.step, choice.world) == (5, 6)
    assert {rank: one.host for rank, one in choice.shards.items()} == dict(enumerate("bbcc"))
    assert (choice.newcomers, choice.away) == ([], [4, 5])
    assert {rank: step for rank, (step, _) in choice.rests.items()} == {4: 5, 5: 5}


def test_newcomers_take_a_step_that_they_have_not_done() -> None:
    known = [replace(one, rests=((4 + one.rank % 2, 3),)) for one in of(FOUR, 9, generation=2)]
    choice = choose(SIX, known)
    assert choice is not None and (choice.step, choice.world) == (9, 4)
    assert (choice.newcomers, choice.away) == ([4, 5], [])
    assert {rank: step for rank, (step, _) in choice.rests.items()} == {4: 3, 5: 3}
    assert {choice.shards[4].key, choice.shards[5].key} == {"k0", "k1"}


def test_one_that_has_lost_its_own_state_is_no_newcomer() -> None:
    five = [replace(one, owns=(one.rank,)) for one in of(SIX, 5) if one.rank != 5]
    choice = choose(SIX, of(SIX, 4) + five)
    assert choice is not None and choice.step == 4


def test_the_same_step_of_another_generation_is_never_mixed_in() -> None:
    """Step 5 was done by six ranks, and again by four, in another order of sums."""
    old, new = of(SIX, 5, digest=7), of(FOUR, 5, generation=2, digest=8)
    left = [one for one in old if one.key == "k1"] + [one for one in new if one.key == "k0"]
    assert choose(SIX, left) is None
    choice = choose(SIX, [*of(SIX, 4), *left])
    assert choice is not None and choice.step == 4  # of which all shards are of one history
    choice = choose(SIX, old + new)
    assert choice is not None and {one.digest for one in choice.shards.values()} == {8}


def test_a_generation_that_nobody_alive_knows_of_gets_another_number() -> None:
    old = of(SIX, 4, generation=next_generation([], 1000.0))
    first, second = (next_generation(old, now) for now in (2000.0, 3000.5))
    assert old[0].generation < first < second < next_generation(of(SIX, 5, first), 2500.0)
    lost, back = of(SIX, 6, first), of(SIX, 5, second)
    choice = choose(SIX, [*old, *lost, *back])
    assert choice is not None and choice.step == 5


def test_copies_of_one_ranks_state_have_one_vote() -> None:
    one, other = (
        Held("a", "k.0.0", "k", 0, 1, 5, 7, (0, 1), 2),
        Held("b", "k.1.0", "k", 1, 1, 5, 8, (0, 1), 2),
    )
    copies = [replace(one, name=f"k.{rank}.0", host="c") for rank in (3, 4)]
    assert trusted([one, other, *copies]) == []
    assert len(trusted([one, *copies])) == 3


def test_states_one_step_apart_always_leave_a_step() -> None:
    """Whatever dies when: a step is overwritten only when the next one is whole everywhere."""
    generator = random.Random(0)
    for _ in range(300):
        at = generator.randrange(2, 9)
        left = [held(rank, at, owns="0123") for rank in range(4)]
        left += [held(r, at + 1, owns="0123") for r in range(4) if generator.random() < 0.5]
        dead = generator.choice(["a", "b", ""])
        left = [one for one in left if one.host != dead]
        choice = choose(SEATS, left)
        assert choice is not None and choice.step >= at


# -- slots -----------------------------------------------------------------------------------------


def write(slot: Slot, step: int) -> None:
    head = {
        "job": "j",
        "generation": 1,
        "model": "m",
        "key": "k",
        "rank": 0,
        "world": 1,
        "step": step,
    }
    generator = torch.Generator().manual_seed(step)
    tensors = {f"t{at}": torch.randn(50, 7, generator=generator) for at in range(4)}
    tensors["number"], tensors["none"] = torch.tensor(3), torch.empty(0)
    slot.write(head, Layout(tensors), tensors, [b'{"a": 1}'])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    slot = Slot(tmp_path / "s")
    assert slot.read() is None
    write(slot, 3)
    write(slot, 4)
    reading = Slot(tmp_path / "s").read()
    assert reading is not None and reading.head.step == 4 and reading.others == [{"a": 1}]
    wanted = torch.randn(50, 7, generator=torch.Generator().manual_seed(4))
    assert torch.equal(reading.tensors["t0"], wanted)
    assert reading.tensors["number"].item() == 3 and reading.tensors["none"].numel() == 0
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_a_writer_that_dies_leaves_no_state_or_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(Exception):
        pass

    steps = [(compat, "copy_all"), (Slot, "_crcs"), (slots.zlib, "crc32"), (slots, "_write_head")]
    for owner, name in steps:
        slot = Slot(tmp_path / "s")
        write(slot, 3)
        with monkeypatch.context() as patched:

            def die(*_: object) -> None:
                raise Died

            patched.setattr(owner, name, die)
            with pytest.raises(Died):
                write(slot, 4)
        assert Slot(tmp_path / "s").head() is None and Slot(tmp_path / "s").read() is None


def test_any_bit_that_flips_makes_a_slot_worthless(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write(Slot(path), 3)
    whole = path.read_bytes()
    reading = Slot(path).read()
    assert reading is not None
    end = reading.head.table_at + reading.head.table_bytes
    length = slots._FIXED.unpack_from(whole)[1] + slots._FIXED.size
    generator = random.Random(1)
    values = [range(length), range(4096, 4096 + 1400), range(reading.head.table_at, end)]
    for at in [generator.choice(part) for part in values for _ in range(60)]:
        spoilt = bytearray(whole)
        spoilt[at] ^= 1 << generator.randrange(8)
        path.write_bytes(spoilt)
        assert Slot(path).read() is None, at
    for cut in (0, 10, 4096, end - 5):
        path.write_bytes(whole[:cut])
        assert Slot(path).read() is None


def test_a_slot_that_is_a_link_or_open_to_others_is_not_read(tmp_path: Path) -> None:
    write(Slot(tmp_path / "s"), 3)
    (tmp_path / "link").symlink_to(tmp_path / "s")
    assert Slot(tmp_path / "link").head() is None


def test_what_is_taken_is_a_state_only_at_its_end(tmp_path: Path) -> None:
    source, target = Slot(tmp_path / "s"), Slot(tmp_path / "t")
    write(source, 3)
    write(target, 2)
    assert source.read() is not None
    content = source.content()
    target.begin(content.numel())
    for first in range(0, content.numel(), 5000):
        assert Slot(tmp_path / "t").head() is None
        target.take(first, content[first : first + 5000])
    target.end()
    reading = Slot(tmp_path / "t").read()
    assert reading is not None and reading.head.step == 3


def test_what_a_restart_would_not_survive_is_said_with_what_to_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not_survived(SEATS) == []
    alone = [*SEATS, Seat(4, "c", "k2")]
    assert "shard of rank(s) 4 is in the memory of one node" in not_survived(alone)[0]
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    (words,) = not_survived(SEATS)
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in words
