"""What is known of the labs of this machine: one small file each, so that any process finds them.

A lab is its switch, a namespace with a bridge, and its nodes, a namespace each. All names begin
with ``mics-<lab>-``, so that nothing else is ever touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from mics.errors import LabError
from mics.ranks.files import write_whole

PREFIX = "mics-"
FOLDER = "MICS_LAB_FOLDER"
_NAME = re.compile(r"[a-z0-9]{1,8}")


@dataclass(frozen=True)
class Lab:
    """A lab's shape.

    Its addresses, ``10.213.0.x``, are private to its own namespaces: labs do not see each other's.

    Args:
        name: 1 to 8 lower-case letters and digits.
        nodes: how many, a namespace each.
        gpus_per_node: ranks of a job in each of them.
        link: the rate of a node's cable in each direction, as ``tc`` writes it: 200mbit.
        latency_ms: milliseconds that a frame is under way between a node and the switch.
    """

    name: str
    nodes: int
    gpus_per_node: int
    link: str
    latency_ms: float = 0.0

    @property
    def switch(self) -> str:
        """Name the namespace with the bridge."""
        return f"{PREFIX}{self.name}-switch"

    def node(self, index: int) -> str:
        """Name the namespace of a node."""
        return f"{PREFIX}{self.name}-node{index}"

    @property
    def namespaces(self) -> list[str]:
        """Name all of its namespaces."""
        return [self.switch, *(self.node(index) for index in range(self.nodes))]

    def address(self, index: int) -> str:
        """Return the address of a node."""
        return f"10.213.0.{index + 1}"

    def node_index(self, text: str) -> int:
        """Return the index of ``node2`` or ``2``.

        Raises:
            LabError: there is no such node.
        """
        digits = text.removeprefix("node")
        if not digits.isdigit() or int(digits) >= self.nodes:
            raise LabError(
                f"Lab {self.name} has no node {text!r}.",
                numbers=f"It has {self.nodes}: node0 to node{self.nodes - 1}.",
                write="node0",
            )
        return int(digits)


def new_name() -> str:
    """Make up a name that no other lab has."""
    return secrets.token_hex(3)


def check_name(name: str) -> None:
    """Check that a name can be part of a namespace's and an interface's name.

    Raises:
        LabError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise LabError(
            f"A lab cannot be called {name!r}.",
            write="1 to 8 lower-case letters and digits, such as --name slow",
        )


def folder() -> Path:
    """Return where labs are noted for this user; ``unprivileged.py`` says where from within."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path(f"/run/mics-lab-{os.geteuid()}")
    # Not in the public temporary folder, where others could put something under this name first;
    # a home may be that of many machines.
    home = os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache"
    return Path(home) / f"mics-lab-{socket.gethostname()}"


def note(lab: Lab, *, holder: int | None = None) -> IO[str]:
    """Note a lab. Its owner holds a lock on the file, until it is to be kept (``keep``).

    Args:
        lab: the one to be noted.
        holder: the process it lives as long as, if it is an ordinary user's.

    Returns:
        The locked file: it must stay open as long as the owner lives.

    Raises:
        LabError: there is a lab of that name.
    """
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder())
    path = _path(lab)
    owner = os.getpid() if holder is None else holder
    table = {
        "lab": asdict(lab),
        "keep": False,
        "owner": owner,
        "began": _began(owner),
        "held": holder is not None,
    }
    # It gets its name when it is written and locked: nobody may take a lab that begins for dead.
    unnamed = path.with_suffix(f".{os.getpid()}")
    file = unnamed.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump(table, file)
    file.flush()
    try:
        os.link(unnamed, path)
    except FileExistsError:
        file.close()
        raise LabError(
            f"There is a lab {lab.name!r} already.",
            write=f"another --name, or mics lab down {lab.name}",
        ) from None
    finally:
        unnamed.unlink()
    return file


def _check_owner(path: Path) -> None:
    """Check that a folder of notes is ours: processes noted in somebody else's would be ended."""
    owner = path.stat().st_uid
    if owner not in (os.geteuid(), os.getuid()):
        raise LabError(
            f"{path} belongs to another user.",
            numbers=f"Its owner is {owner}, this is {os.geteuid()}.",
            write=f"{FOLDER}=<a folder of your own>",
        )


def keep(lab: Lab) -> None:
    """Note that the lab outlives this process."""
    path = _path(lab)
    table = json.loads(path.read_text()) | {"keep": True}
    write_whole(path, json.dumps(table))


def _path(lab: Lab) -> Path:
    return folder() / f"{lab.name}.json"


def _began(process: int) -> str:
    """Return when a process began, in ticks since the machine did: its number may be reused."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def names_of_nodes(lab: Lab) -> tuple[Path, Path]:
    """Write the files that stand for /etc/hosts and /etc/nsswitch.conf in its nodes.

    Nodes know each other by name. Without the second file every lookup of an address would wait for
    a name server that cannot be reached.
    """
    hosts, switch = folder() / f"{lab.name}.hosts", folder() / "nsswitch.conf"
    lines = [f"{lab.address(index)} node{index}\n" for index in range(lab.nodes)]
    hosts.write_text("".join(["127.0.0.1 localhost\n", *lines]))
    switch.write_text("hosts: files\n")
    return hosts, switch


def profile(lab: Lab) -> Path:
    """Return where measurements of its links are kept, as long as it is there."""
    return folder() / f"{lab.name}.profile"


def forget(lab: Lab) -> None:
    """Forget a lab that is gone."""
    profile(lab).unlink(missing_ok=True)
    (folder() / f"{lab.name}.hosts").unlink(missing_ok=True)
    _path(lab).unlink(missing_ok=True)


@dataclass(frozen=True)
class Noted:
    """A lab that was noted.

    Args:
        lab: its shape.
        alive: whether its owner lives, or it is to be kept.
        owner: the number of the process that it lives as long as.
        held: whether the owner is a process that only keeps its namespaces.
        kept: whether it was left up, and is no run's own.
    """

    lab: Lab
    alive: bool
    owner: int
    held: bool
    kept: bool


def noted() -> list[Noted]:
    """List every lab of this user, dead ones too."""
    labs = []
    for path in sorted(folder().glob("*.json")):
        try:
            with path.open() as file:
                table = json.load(file)
                owner, held = int(table["owner"]), bool(table["held"])
                holds = held and _began(owner) == table["began"] != ""
                kept = bool(table["keep"])
                there = holds if held else kept
                alive = there or not _lockable(file)
                labs.append(Noted(Lab(**table["lab"]), alive, owner, held, kept))
        except FileNotFoundError:
            continue  # taken down meanwhile
        except (ValueError, KeyError, TypeError):  # its owner was killed while it wrote
            lab = Lab(path.stem, 0, 0, "")
            labs.append(Noted(lab, False, 0, False, False))
    return labs


def find(name: str | None) -> Noted:
    """Find a lab by its name, or the only one there is.

    Raises:
        LabError: there is none, or several to choose from.
    """
    labs = {each.lab.name: each for each in noted() if each.alive}
    if name is not None and name in labs:
        return labs[name]
    if name is None and len(labs) == 1:
        return next(iter(labs.values()))
    raise LabError(
        f"There is no lab {name!r}." if name else f"There are {len(labs)} labs.",
        numbers=f"Labs: {', '.join(labs) or 'none'}.",
        write="--lab <one of them>" if labs else "mics lab up --nodes 2",
    )


def find_left_up(name: str | None) -> Noted:
    """Find a lab to take down: by its name, or the only one that was left up.

    Raises:
        LabError: there is none, or several to choose from; or those there are belong to runs.
    """
    alive = [each for each in noted() if each.alive]
    left = [each for each in alive if each.kept]
    if name is None and len(left) == 1:
        return left[0]
    if name is None and not left and alive:
        used = [f"{each.lab.name} by process {each.owner}" for each in alive]
        raise LabError(
            "No lab was left up; those there are belong to runs, and go down with them.",
            numbers=f"In use: {', '.join(used)}.",
            write=f"mics lab down {alive[0].lab.name}, which ends that run",
        )
    return find(name)


def _lockable(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
