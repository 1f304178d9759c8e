"""The labs of this machine as text."""

from __future__ import annotations

from mics.lab import network, state
from mics.lab.state import Lab


def status() -> str:
    """Describe the labs, their nodes, cables, counters and processes."""
    there = network.namespaces()
    lines = [line for noted in state.noted() for line in _describe(noted, there)]
    return "\n".join(lines) or "no lab is up"


def _describe(noted: state.Noted, namespaces: list[str]) -> list[str]:
    lab = noted.lab
    if not noted.alive:
        return [f"lab {lab.name}: its owner is dead; mics lab clean"]
    if lab.switch not in namespaces:
        return []  # an ordinary user's, in other namespaces than this process
    if not set(lab.namespaces) <= set(namespaces):
        return [f"lab {lab.name}: begins, ends or is damaged; mics lab down {lab.name}"]
    return [
        f"lab {lab.name}: {lab.nodes} nodes x {lab.gpus_per_node} ranks, {lab.link}",
        *(_node(lab, index, counted) for index, counted in enumerate(network.traffic(lab))),
    ]


def _node(lab: Lab, index: int, counted: network.Traffic) -> str:
    cable = "" if network.link_is_up(lab, index) else "  CABLE CUT"
    return (
        f"  node{index}  {lab.address(index)}  sent {counted.sent:,}  received "
        f"{counted.received:,}  processes {len(network.processes(lab.node(index)))}{cable}"
    )
