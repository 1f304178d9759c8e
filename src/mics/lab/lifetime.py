"""When labs begin and end: up, down, for the time of a job, and the leftovers of the dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mics.errors import LabError
from mics.lab import network, state, unprivileged
from mics.lab.state import Lab
from mics.lab.system import check_system

_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def bring_up(lab: Lab) -> None:
    """Build a lab that stays until it is taken down.

    Raises:
        LabError: this machine cannot, or there is one of that name.
    """
    check_system()
    _check(lab)
    holder = unprivileged.leave_a_holder() if unprivileged.is_user_root() else None
    try:
        with _ended_as_by_exception(), state.note(lab, holder=holder):
            _build(lab)
            state.keep(lab)
    except BaseException:
        if holder is not None:
            os.kill(holder, signal.SIGTERM)
        raise


def take_down(lab: Lab) -> None:
    """End a lab, what runs in it included."""
    network.take_down(lab)
    state.forget(lab)


def check_unused(lab: Lab) -> None:
    """Check that nothing runs in the nodes of a lab that nobody has named.

    Raises:
        LabError: something does.
    """
    running = [pid for index in range(lab.nodes) for pid in network.processes(lab.node(index))]
    if running:
        raise LabError(
            f"Lab {lab.name} is in use.",
            numbers=f"In its nodes run the processes {', '.join(map(str, running))}.",
            write=f"mics lab down {lab.name}, which ends them",
        )


def let_go(noted: state.Noted) -> None:
    """Take down a lab that was left up, and end the process that held it."""
    take_down(noted.lab)
    if noted.held:
        os.kill(noted.owner, signal.SIGTERM)


@contextmanager
def lab_for(lab: Lab) -> Iterator[Lab]:
    """Hold a lab for as long as this is entered, however it is left.

    SIGTERM, SIGHUP and SIGQUIT end it as an exception would; after SIGKILL ``clean`` finds what is
    left.

    Raises:
        LabError: this machine cannot, or there is one of that name.
    """
    check_system()
    _check(lab)
    if not unprivileged.is_user_root():  # in new namespaces those of other labs cannot be seen
        clean()
    with _ended_as_by_exception(), state.note(lab):
        try:
            _build(lab)
            yield lab
        finally:
            for number in (signal.SIGINT, *_ENDS):
                signal.signal(number, signal.SIG_IGN)
            take_down(lab)


@contextmanager
def _ended_as_by_exception() -> Iterator[None]:
    """Let SIGTERM, SIGQUIT and a closed terminal raise; afterwards all is as before."""
    numbers = (signal.SIGINT, *_ENDS)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in _ENDS:
        signal.signal(number, _as_exception)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clean() -> list[str]:
    """Take down the labs whose owners are dead, and namespaces of ours that no lab owns.

    A lab that is not noted here may be noted elsewhere (MICS_LAB_FOLDER): where something runs in
    its namespaces it is left alone.

    Returns:
        The names of what was removed.
    """
    # In this order: a lab that begins meanwhile is noted before it has a namespace.
    with_namespaces = {lab for name in network.namespaces() if (lab := network.lab_of(name))}
    noted = state.noted()
    dead = {each.lab.name for each in noted if not each.alive}
    alive = {each.lab.name for each in noted if each.alive}
    noted_nowhere = {lab for lab in with_namespaces - alive - dead if not _runs(lab)}
    names = sorted(noted_nowhere | dead)
    for name in names:
        take_down(Lab(name, 0, 0, ""))
    return names


def _runs(lab: str) -> bool:
    return any(
        network.processes(name) for name in network.namespaces() if network.lab_of(name) == lab
    )


def clean_unprivileged() -> list[str]:
    """Forget the dead labs of an ordinary user and end what still runs of them.

    Their namespaces end with the last process in them.
    """
    names = [noted.lab.name for noted in state.noted() if not noted.alive]
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
