"""What an agent sees go wrong with the ranks of a generation, as failures."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mics.agent.budget import Failure, describe_exit
from mics.agent.membership import Membership
from mics.agent.nursery import Process
from mics.agent.pulse import Pulse
from mics.agent.settings import Settings
from mics.agent.voice import Voice
from mics.agent.world import World

_BEGIN_SECONDS = 5.0  # for the other agents to begin what the leader has begun
_NO_PULSE_SECONDS = 30.0


def failure_of(process: Process, pulse: Pulse) -> Failure:
    """Say how a rank has failed.

    Args:
        process: the rank's; it has ended, or has reported that it ends.
        pulse: what the rank did last.
    """
    raised, words = process.report.get("raised", ""), process.report.get("words", "")
    how, cause, code = describe_exit(1 if process.status is None else process.status)
    if raised:
        how, cause = f"raised {raised}", raised
    tells = pulse.still is not None
    return Failure(
        f"rank {pulse.rank} on node {pulse.node} {how}",
        rank=pulse.rank,
        node=pulse.node,
        cause=cause,
        step=pulse.step if tells else None,
        where=pulse.place if tells else "",
        code=code,
        words=words,
    )


def early_exit(world: World, pulses: Sequence[Pulse], settings: Settings) -> Failure | None:
    """A rank of this node that has ended with 0 long ago, while others still run.

    Args:
        world: the ranks of this node.
        pulses: of all ranks of the job. One that saves, or the like, may take its time.
        settings: how long is long.
    """
    if world.first_end is None:
        return None
    long = any(p.still is not None and p.is_long and not p.ended for p in pulses)
    seconds = time.monotonic() - world.first_end
    if long or seconds <= settings.exit_grace:
        return None
    first = next(process for process in world.ranks.values() if process.status == 0)
    assert first.local_rank is not None
    pulse = world.pulse(first.local_rank)
    return Failure(
        f"rank {pulse.rank} on node {pulse.node} has ended with exit code 0, and others still run "
        f"{seconds:.0f} s later",
        rank=pulse.rank,
        node=pulse.node,
        cause="an early exit",
        step=None if pulse.still is None else pulse.step,
    )


def not_begun(members: Membership, world: World) -> Failure | None:
    """A node that has not begun what this one, which watches, has begun."""
    if not members.watches or time.monotonic() - world.began <= _BEGIN_SECONDS:
        return None
    slow = members.behind
    if not slow:
        return None
    return Failure(f"node {slow[0]} did not begin generation {members.generation}")


def say_if_silent(world: World, pulses: Sequence[Pulse], voice: Voice) -> None:
    """Say once that ranks which write no heartbeats are not seen to hang."""
    silent = all(pulse.still is None for pulse in pulses)
    if silent and time.monotonic() - world.began > _NO_PULSE_SECONDS:
        voice.say_once(
            "the ranks write no heartbeats, as programs do that use mics: a rank that dies is "
            "seen, one that hangs is not"
        )
