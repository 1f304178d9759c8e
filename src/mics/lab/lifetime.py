"""When labs begin and end: up, down, for the time of a job, and the leftovers of the dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mics.errors import LabError
from mics.lab import network, state, unprivileged
from mics.lab.state import PREFIX, Lab
from mics.lab.system import check_system


def bring_up(lab: Lab) -> None:
    """Build a lab that stays until it is taken down.

    Raises:
        LabError: this machine cannot, or there is one of that name.
    """
    check_system()
    _check(lab)
    holder = unprivileged.leave_a_holder() if unprivileged.is_user_root() else None
    with state.note(lab, keep=True, holder=holder):
        _build(lab)


def take_down(lab: Lab) -> None:
    """End a lab, what runs in it included."""
    network.take_down(lab)
    state.forget(lab)


def let_go(noted: state.Noted) -> None:
    """Take down a lab that was left up, and end the process that held it."""
    take_down(noted.lab)
    if noted.held:
        os.kill(noted.owner, signal.SIGTERM)


@contextmanager
def lab_for(lab: Lab) -> Iterator[Lab]:
    """A lab for as long as this is entered, however it is left.

    SIGTERM ends it as an exception would; after SIGKILL ``clean`` finds what is left.

    Raises:
        LabError: this machine cannot, or there is one of that name.
    """
    check_system()
    _check(lab)
    clean()
    before = signal.signal(signal.SIGTERM, _as_exception)
    try:
        with state.note(lab, keep=False):
            try:
                _build(lab)
                yield lab
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                take_down(lab)
    finally:
        signal.signal(signal.SIGTERM, before)


def clean() -> list[str]:
    """Take down the labs whose owners are dead, and namespaces of ours that no lab owns.

    Returns:
        The names of what was removed.
    """
    known = state.noted()
    dead = [one.lab for one in known if not one.alive]
    alive = {one.lab.name for one in known if one.alive}
    orphans = {
        name.removeprefix(PREFIX).split("-")[0]
        for name in network.namespaces()
        if name.startswith(PREFIX)
    } - alive
    names = sorted(orphans | {lab.name for lab in dead})
    for name in names:
        take_down(Lab(name, 0, 0, ""))
    return names


def clean_unprivileged() -> list[str]:
    """The same for an ordinary user, whose namespaces end with the last process in them."""
    names = [one.lab.name for one in state.noted() if not one.alive]
    for name in names:
        unprivileged.kill_ranks(name)
        state.forget(Lab(name, 0, 0, ""))
    return names


def _check(lab: Lab) -> None:
    state.check_name(lab.name)
    network.bits_per_second(lab.link)
    for what, number, most in (("nodes", lab.nodes, 250), ("gpus-per-node", lab.gpus_per_node, 64)):
        if not 1 <= number <= most:
            raise LabError(f"A lab cannot have {number} {what}.", write=f"--{what} 1 to {most}")


def _build(lab: Lab) -> None:
    try:
        network.build(lab)
    except BaseException:
        take_down(lab)
        raise


def _as_exception(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
