"""``mics lab``: a cluster on this machine, with links as slow as wished."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from mics.commands.checks import check_folders, write_text
from mics.commands.dashes import parse_with_program
from mics.commands.numbers import check_numbers
from mics.lab import lifetime, network, running, state, unprivileged
from mics.lab.comparing import as_text, compare, scripts_of
from mics.lab.state import Lab
from mics.lab.status import status
from mics.lab.system import check_system
from mics.quantities import Within
from mics.ranks.console import progress, show
from mics.ranks.program import as_command


@dataclass(frozen=True)
class Shape:
    """What a lab is made of."""

    nodes: Annotated[int, Within(1, 250)] = 2
    """Nodes, a network namespace each."""

    gpus_per_node: Annotated[int, Within(1, 64)] = 2
    """Ranks per node (processes; no GPU is needed)."""

    link: str = "200mbit"
    """Rate of each node's cable, in each direction, as tc writes it."""

    latency: str = "0ms"
    """How long a frame is under way between a node and the switch: 0.5ms, 2ms."""

    name: str = ""
    """Name of the lab; one is made up if it is left out."""

    def lab(self) -> Lab:
        """Return the lab that is described."""
        name = self.name or state.new_name()
        latency = network.milliseconds(self.latency)
        return Lab(name, self.nodes, self.gpus_per_node, self.link, latency)


@dataclass(frozen=True)
class RunInLab(Shape):
    """Run a command on every rank of a lab that is there for that time only.

    The command follows `--`: a Python script and its arguments, `mics <verb>`, or any program. Rank
    0's output is shown, every rank's is kept. Bytes at each node's interface are reported.
    """

    logs: Path = Path("lab-logs")
    """Folder for what every rank prints."""

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """The command, after `--`."""


@dataclass(frozen=True)
class CompareInLab(Shape):
    """Run scripts in turn on the same links: step time, bytes and losses side by side.

    They follow `--`, each with its arguments behind it, and are ended when they have taken enough
    steps: optimizer steps of torch.optim, whatever else a script is made of.
    """

    steps: Annotated[int, Within(1, 100_000)] = 5
    """Steps that are timed, behind one that is not."""

    seconds: Annotated[float, Within(1, 1e6)] = 3600.0
    """Seconds in which each script must have taken its steps."""

    logs: Path = Path("lab-logs")
    """Folder for what every rank prints."""

    json: Path | None = None
    """Write the figures here too."""

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """a.py [arguments] b.py [arguments], after `--`."""


@dataclass(frozen=True)
class Up(Shape):
    """Build a lab that stays until `mics lab down`."""


@dataclass(frozen=True)
class Down:
    """Take a lab down, what runs in it included."""

    lab: tyro.conf.Positional[str | None] = None
    """Its name; not needed where one only was left up, and nothing runs in it."""


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
class Restore:
    """Plug a node's cable in again."""

    node: tyro.conf.Positional[str]
    """node0, node1, ..."""

    lab: str | None = None
    """Its name; not needed where there is one only."""


@dataclass(frozen=True)
class Clean:
    """Remove what labs of dead processes left behind; nothing else is touched."""


Config = (
    Annotated[RunInLab, tyro.conf.subcommand("run")]
    | Annotated[CompareInLab, tyro.conf.subcommand("compare")]
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
    check_numbers(config)
    check_system()
    if isinstance(config, CompareInLab):
        scripts_of(config.command)
        check_folders(config.json)
    if isinstance(config, RunInLab | Exec) and not config.command:
        verb = "run" if isinstance(config, RunInLab) else "exec"
        progress(f"mics lab {verb}: no command; write it after `--`")
        return 2
    return _as_root(config) if os.geteuid() == 0 else _as_user(config)


def _as_root(config: Config) -> int:
    match config:
        case RunInLab():
            return _run(config)
        case CompareInLab():
            _compare(config)
        case Exec():
            _exec(config)
        case Up():
            lab = config.lab()
            lifetime.bring_up(lab)
            show(f"lab {lab.name}: {lab.nodes} nodes, {lab.link} each; mics lab down {lab.name}")
        case Down():
            noted = state.find_left_up(config.lab)
            if config.lab is None:
                lifetime.check_unused(noted.lab)
            lifetime.let_go(noted)
            show(f"lab {noted.lab.name} is down")
        case Status():
            show(status())
        case Cut():
            show(f"{_switch(config.lab, config.node, up=False)} is cut")
        case Restore():
            show(f"{_switch(config.lab, config.node, up=True)} is plugged in")
        case Clean():
            _show_removed(lifetime.clean())
    return 0


def _as_user(config: Config) -> int:
    """Do the same inside a user namespace, where the command is root; or, if it can, without."""
    words = sys.argv[2:]
    unprivileged.check_user()
    match config:
        case RunInLab() | CompareInLab() | Up():
            lifetime.clean_unprivileged()  # from within nobody else's processes can be seen
            unprivileged.start_again_in_new(words)
        case Down():
            unprivileged.start_again_in(state.find_left_up(config.lab), words)
        case Exec() | Cut() | Restore():
            unprivileged.start_again_in(state.find(config.lab), words)
        case Status():
            alive = [noted for noted in state.noted() if noted.alive]
            shown = [unprivileged.show_from_within(noted, words).strip() for noted in alive]
            show("\n".join(shown) or "no lab is up")
        case Clean():
            _show_removed(lifetime.clean_unprivileged())
    return 0


def _run(config: RunInLab) -> int:
    with lifetime.lab_for(config.lab()) as lab:
        progress(
            f"lab {lab.name}: {lab.nodes} nodes x {lab.gpus_per_node} ranks, {lab.link} each way; "
            f"{running.shown(config.command)}"
        )
        done = running.run(lab, config.command, config.logs / lab.name)
    show(f"\nlab {lab.name}: {done.seconds:.1f} s; logs in {config.logs / lab.name}")
    for index, counted in enumerate(done.per_node):
        show(f"  node{index}  sent {counted.sent:>15,} bytes  received {counted.received:>15,}")
    if done.code != 0:
        progress(done.words)
    return done.code


def _compare(config: CompareInLab) -> None:
    scripts = scripts_of(config.command)
    with lifetime.lab_for(config.lab()) as lab:
        logs = config.logs / lab.name
        compared = compare(lab, scripts, config.steps, logs, seconds=config.seconds)
    show(as_text(compared, lab))
    if config.json is not None:
        write_text(config.json, json.dumps([asdict(one) for one in compared], indent=1) + "\n")


def _exec(config: Exec) -> NoReturn:
    lab = state.find(config.lab).lab
    index = lab.node_index(config.node)
    words = running.in_node(lab, index, as_command(config.command))
    # The program takes the place of this one, so that a signal to it reaches the program.
    os.execvpe(words[0], words, running.environment(lab, index))


def _switch(name: str | None, node: str, *, up: bool) -> str:
    """Plug a node's cable in or pull it out; returns which cable it is, for people."""
    lab = state.find(name).lab
    network.set_link(lab, lab.node_index(node), up=up)
    return f"lab {lab.name}: the cable of {node}"


def _show_removed(names: Sequence[str]) -> None:
    show(f"removed: {', '.join(names)}" if names else "nothing was left behind")


def parse(words: Sequence[str], **keywords: object) -> Config:
    """Options before `--`, the command as it stands after it."""
    options = list(words)
    scripts = [number for number, word in enumerate(options) if word.endswith(".py")]
    if options[:1] == ["compare"] and "--" not in options and scripts:
        options.insert(scripts[0], "--")
    chosen: Config = parse_with_program(Config, options, **keywords)
    return chosen
