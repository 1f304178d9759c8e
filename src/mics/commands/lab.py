"""``mics lab``: a cluster on this machine, with links as slow as wished."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mics.lab import lifetime, network, running, state, unprivileged
from mics.lab.state import Lab
from mics.lab.system import check_system


@dataclass(frozen=True)
class Shape:
    """What a lab is made of."""

    nodes: int = 2
    """Nodes, a network namespace each."""

    gpus_per_node: int = 2
    """Ranks per node (processes; no GPU is needed)."""

    link: str = "200mbit"
    """Rate of each node's cable, in each direction, as tc writes it."""

    latency: str = "0ms"
    """How long a frame is under way between a node and the switch: 0.5ms, 2ms."""

    name: str = ""
    """Name of the lab; one is made up if it is left out."""

    def lab(self) -> Lab:
        """The lab that is described."""
        name = self.name or state.new_name()
        latency = network.milliseconds(self.latency)
        return Lab(name, self.nodes, self.gpus_per_node, self.link, latency)


@dataclass(frozen=True)
class Run(Shape):
    """Run a command on every rank of a lab that is there for that time only.

    The command follows `--`: a Python script and its arguments, `mics <verb>`, or any program. Rank
    0's output is shown, every rank's is kept. Bytes at each node's interface are reported.
    """

    logs: Path = Path("lab-logs")
    """Folder for what every rank prints."""

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """The command, after `--`."""


@dataclass(frozen=True)
class Up(Shape):
    """Build a lab that stays until `mics lab down`."""


@dataclass(frozen=True)
class Down:
    """Take a lab down, what runs in it included."""

    lab: tyro.conf.Positional[str | None] = None
    """Its name; not needed where there is one only."""


@dataclass(frozen=True)
class Status:
    """Show the labs, their nodes, cables, counters and processes."""


@dataclass(frozen=True)
class Exec:
    """Run a program in one node of a lab that is up."""

    node: tyro.conf.Positional[str]
    """node0, node1, ..."""

    command: tyro.conf.Positional[tuple[str, ...]]
    """The program, after `--`."""

    lab: str | None = None
    """Its name; not needed where there is one only."""


@dataclass(frozen=True)
class Cut:
    """Pull a node's cable out while a job runs: packets are lost without a word."""

    node: tyro.conf.Positional[str]
    """node0, node1, ..."""

    lab: str | None = None
    """Its name; not needed where there is one only."""


@dataclass(frozen=True)
class Restore(Cut):
    """Plug a node's cable in again."""


@dataclass(frozen=True)
class Clean:
    """Remove what labs of dead processes left behind; nothing else is touched."""


Config = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Up, tyro.conf.subcommand("up")]
    | Annotated[Down, tyro.conf.subcommand("down")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Exec, tyro.conf.subcommand("exec")]
    | Annotated[Cut, tyro.conf.subcommand("cut")]
    | Annotated[Restore, tyro.conf.subcommand("restore")]
    | Annotated[Clean, tyro.conf.subcommand("clean")]
)


def run(config: Config) -> int:
    """Do what was asked.

    Returns:
        0; the exit code of the job or program; 2 when there is no command to run.

    Raises:
        LabError: something is wrong with the lab.
    """
    check_system()
    if os.geteuid() != 0:
        return _do_unprivileged(config)
    if isinstance(config, Run):
        return _run(config)
    if isinstance(config, Up):
        lab = config.lab()
        lifetime.bring_up(lab)
        print(f"lab {lab.name}: {lab.nodes} nodes, {lab.link} each; mics lab down {lab.name}")
    elif isinstance(config, Down):
        noted = state.find(config.lab)
        lifetime.let_go(noted)
        print(f"lab {noted.lab.name} is down")
    elif isinstance(config, Status):
        print(_status())
    elif isinstance(config, Exec):
        lab = state.find(config.lab).lab
        index = lab.node_index(config.node)
        if not config.command:
            print("mics lab exec: no command; write it after `--`", file=sys.stderr)
            return 2
        words = running.in_node(lab, index, config.command)
        return subprocess.run(words, env=running.environment(lab, index), check=False).returncode
    elif isinstance(config, Cut):
        lab = state.find(config.lab).lab
        up = isinstance(config, Restore)
        network.set_link(lab, lab.node_index(config.node), up=up)
        print(f"lab {lab.name}: the cable of {config.node} is {'plugged in' if up else 'cut'}")
    else:
        _say_removed(lifetime.clean())
    return 0


def _do_unprivileged(config: Config) -> int:
    """The same where it is root, or without."""
    words = sys.argv[2:]
    unprivileged.check_user()
    if isinstance(config, Run | Up):
        lifetime.clean_unprivileged()  # from within nobody else's processes can be seen
        unprivileged.start_again_in_new(words)
    if isinstance(config, Down | Exec | Cut):
        unprivileged.start_again_in(state.find(config.lab), words)
    if isinstance(config, Status):
        labs = [one for one in state.noted() if one.alive]
        shown = [unprivileged.show_from_within(one, words).strip() for one in labs]
        print("\n".join(shown) or "no lab is up")
    else:
        _say_removed(lifetime.clean_unprivileged())
    return 0


def _say_removed(names: Sequence[str]) -> None:
    print(f"removed: {', '.join(names)}" if names else "nothing was left behind")


def _run(config: Run) -> int:
    if not config.command:
        print("mics lab run: no command; write it after `--`", file=sys.stderr)
        return 2
    with lifetime.lab_for(config.lab()) as lab:
        print(
            f"lab {lab.name}: {lab.nodes} nodes x {lab.gpus_per_node} ranks, {lab.link} each way; "
            f"{running.shown(config.command)}",
            file=sys.stderr,
        )
        done = running.run(lab, config.command, config.logs / lab.name)
    print(f"\nlab {lab.name}: {done.seconds:.1f} s; logs in {config.logs / lab.name}")
    for index, counted in enumerate(done.per_node):
        print(f"  node{index}  sent {counted.sent:>15,} bytes  received {counted.received:>15,}")
    if done.code != 0:
        print(done.words, file=sys.stderr)
    return done.code


def _status() -> str:
    lines: list[str] = []
    here = network.namespaces()
    for one in state.noted():
        lab = one.lab
        if not one.alive:
            lines.append(f"lab {lab.name}: its owner is dead; mics lab clean")
            continue
        if lab.switch not in here:
            continue  # an ordinary user's, in other namespaces than this process
        if not set(lab.namespaces) <= set(here):
            lines.append(f"lab {lab.name}: begins, ends or is damaged; mics lab down {lab.name}")
            continue
        lines.append(f"lab {lab.name}: {lab.nodes} nodes x {lab.gpus_per_node} ranks, {lab.link}")
        for index, counted in enumerate(network.traffic(lab)):
            cable = "" if network.link_is_up(lab, index) else "  CABLE CUT"
            running_there = len(network.processes(lab.node(index)))
            lines.append(
                f"  node{index}  {lab.address(index)}  sent {counted.sent:,}  received "
                f"{counted.received:,}  processes {running_there}{cable}"
            )
    return "\n".join(lines) or "no lab is up"


def parse(words: Sequence[str], **keywords: object) -> Config:
    """Options before `--`, the command as it stands after it."""
    options = list(words)
    command: list[str] = []
    if "--" in options:
        at = options.index("--")
        options, command = options[:at], options[at + 1 :]
    chosen: Config = tyro.cli(Config, args=[*options, *_quoted(command)], **keywords)  # type: ignore[call-overload]
    return chosen


def _quoted(command: Sequence[str]) -> list[str]:
    return ["--", *command] if command else []
