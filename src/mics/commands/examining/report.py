"""What ``mics doctor`` found, as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mics.commands.examining.facts import Facts, Problem
from mics.commands.examining.links import LinkClass, Probe
from mics.errors import DisagreementError
from mics.quantities import size
from mics.ranks.drawing import draw, ranks_text
from mics.ranks.starting import LOCAL
from mics.topology import Topology

_LABEL = 10


@dataclass(frozen=True)
class Report:
    """The outcome of one examination, the same on every rank.

    ``topology`` is ``None`` and ``links`` empty when a problem made it pointless to go on.
    """

    facts: Sequence[Facts] = ()
    topology: Topology | None = None
    links: Mapping[LinkClass, Sequence[Probe]] = field(default_factory=dict)
    problems: Sequence[Problem] = ()

    @property
    def ok(self) -> bool:
        """Tell whether nothing is wrong."""
        return not self.problems

    @property
    def hosts(self) -> dict[str, list[int]]:
        """List the ranks of each host, in the order hosts appear."""
        hosts: dict[str, list[int]] = {}
        for fact in self.facts:
            hosts.setdefault(fact.host, []).append(fact.rank)
        return hosts

    @property
    def shared_hosts(self) -> list[str]:
        """List the hosts that stand for several nodes: what crosses these crosses no network."""
        if self.topology is None:
            return []
        k = self.topology.gpus_per_node
        return [host for host, ranks in self.hosts.items() if len(ranks) > k]


# -- text ----------------------------------------------------------------------------------------


def as_text(report: Report) -> str:
    """Lay the report out for a terminal; problems come last, where they are read first."""
    sections = [_summary(report)]
    if report.topology is None:
        sections.append("\n".join(_host_lines(report)))
    else:
        hosts = [fact.host for fact in report.facts]
        sections.append(draw(report.topology, hosts=hosts))
        sections.append("\n".join(_link_lines(report)))
    sections.append(_problems_as_text(report.problems) if report.problems else _verdict(report))
    return "\n\n".join(sections)


def _problems_as_text(problems: Sequence[Problem]) -> str:
    """Write every problem's message under its kind, as a traceback's last line would show it."""
    return "\n".join(f"{type(p.error).__name__}: {p.error}" for p in problems)


def _summary(report: Report) -> str:
    first, hosts = report.facts[0], report.hosts
    launcher = first.launcher
    if launcher == LOCAL:
        launcher = "none; mics started these ranks here, on the loopback interface"
    world = len(report.facts)
    on = "1 host" if len(hosts) == 1 else f"{len(hosts)} hosts"
    lines = [
        ("ranks", f"{world} on {on}, {first.backend} on {first.device}"),
        ("launcher", launcher),
        ("versions", ", ".join(f"{name} {text}" for name, text in first.versions.items())),
    ]
    settings = [f"{name}={value}" for name, value in first.settings.items()]
    for i, setting in enumerate(settings or ["no NCCL_*, GLOO_*, TORCH_*, OMP_NUM_THREADS set"]):
        lines.append(("" if i else "settings", setting))
    if any(isinstance(problem.error, DisagreementError) for problem in report.problems):
        lines.append(("", "(device, launcher, versions and settings are rank 0's)"))
    return "\n".join(f"{label:<{_LABEL}}{text}" for label, text in lines)


def _host_lines(report: Report) -> Iterator[str]:
    yield "Ranks by host:"
    width = max(map(len, report.hosts))
    for host, ranks in report.hosts.items():
        yield f"  {host:<{width}}  {ranks_text(ranks)}"


def _link_lines(report: Report) -> Iterator[str]:
    assert report.topology is not None
    yield "Links: all-gather, all groups at once, slowest rank; GB/s = 10^9 bytes a second"
    header = ("", "groups", "gathered", "median", "algbw", "busbw", "(min..max)", "per node")
    yield _columns(header)
    for link, probes in report.links.items():
        if not probes:
            yield _columns((link, f"n/a: {_why_missing(link, report.topology)}"))
        for probe in probes:
            low, high = probe.busbw_range
            cells = (
                link,
                f"{probe.num_groups} x {probe.num_ranks} ranks",
                size(probe.message_bytes, ".3g", least="KiB", most="MiB"),
                f"{_figure(probe.median_seconds * 1e3)} ms",
                _figure(probe.algbw),
                _figure(probe.busbw),
                f"({_figure(low)}..{_figure(high)})",
                _figure(_node_rate(link, probe, report.topology)),
            )
            yield _columns(cells)
    if report.shared_hosts:
        hosts = ", ".join(report.shared_hosts[:4])
        yield f"  Nodes are simulated (several on {hosts}), so inter here crosses no network."


def _columns(cells: Sequence[str]) -> str:
    if len(cells) == 2:
        return f"  {cells[0]:<6}  {cells[1]}"
    link, groups, size, median, algbw, busbw, spread, node = cells
    return (
        f"  {link:<6}  {groups:<14} {size:>8}  {median:>9}  {algbw:>7}  {busbw:>7} "
        f"{spread:<18} {node:>8}"
    )


def _node_rate(link: LinkClass, probe: Probe, topology: Topology) -> float | None:
    """Return the GB/s a node puts on the slow link, which all its ranks cross at once."""
    return probe.busbw * topology.gpus_per_node if link == "inter" else None


def _why_missing(link: LinkClass, topology: Topology) -> str:
    if link == "inter":
        return "there is one node"
    return "a node has one rank"


def _verdict(report: Report) -> str:
    world = len(report.facts)
    if world == 1:
        return "ok: one rank, nothing to disagree with"
    return f"ok: all {world} ranks agree on versions, device, options and settings"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


# -- JSON ----------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON types. Bandwidths are GB/s (10^9), times are seconds."""
    first = report.facts[0] if report.facts else None
    return {
        "ok": report.ok,
        "problems": [_problem_json(problem) for problem in report.problems],
        "world": len(report.facts) or None,
        "launcher": first and first.launcher,
        "backend": first and first.backend,
        "device": first and first.device,
        "versions": first and dict(first.versions),
        "settings": first and dict(first.settings),
        "hosts": report.hosts,
        "topology": _topology_json(report),
        "links": {
            link: [_probe_json(link, probe, report) for probe in probes] or None
            for link, probes in report.links.items()
        },
    }


def _problem_json(problem: Problem) -> dict[str, Any]:
    error = problem.error
    return {
        "kind": type(error).__name__,
        "what": error.what,
        "numbers": error.numbers,
        "write": error.write,
        "ranks": list(problem.ranks),
    }


def _topology_json(report: Report) -> dict[str, Any] | None:
    topology = report.topology
    if topology is None:
        return None
    return {
        "nodes": topology.nodes,
        "gpus_per_node": topology.gpus_per_node,
        "partition": topology.partition,
        "replicas": topology.replicas,
        "simulated_nodes": bool(report.shared_hosts),
        "partition_groups": topology.partition_groups(),
        "replication_groups": topology.replication_groups(),
        "inter_groups": topology.inter_groups(),
        "intra_groups": topology.intra_groups(),
    }


def _probe_json(link: LinkClass, probe: Probe, report: Report) -> dict[str, Any]:
    assert report.topology is not None
    low, high = probe.busbw_range
    return {
        "collective": "all_gather",
        "groups": probe.num_groups,
        "ranks": probe.num_ranks,
        "bytes": probe.message_bytes,
        "seconds": list(probe.seconds),
        "algbw": probe.algbw,
        "busbw": probe.busbw,
        "busbw_min": low,
        "busbw_max": high,
        "node_busbw": _node_rate(link, probe, report.topology),
    }
