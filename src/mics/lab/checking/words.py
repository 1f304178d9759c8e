"""What a check has found, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from mics.lab.checking.costs import Costs
from mics.lab.checking.evidence import Evidence
from mics.lab.checking.flows import Row
from mics.lab.checking.verdict import Verdict
from mics.quantities import first_of, milliseconds


def as_text(evidence: Evidence, verdict: Verdict, costs: Costs) -> str:
    """The report for people."""
    lines = [
        _subject(evidence, verdict),
        "",
        verdict.headline,
        "",
        *_table(verdict.rows),
        "",
        *_answers(evidence, verdict, costs),
    ]
    for number, finding in enumerate(verdict.findings, 1):
        lines += ["", f"{number}. {finding.what}", f"   {finding.numbers}"]
        lines += [f"   Write: {finding.write}"]
    lines += [f"\nNote: {note}" for note in verdict.notes]
    read_as = evidence.reports[0].read_as
    if read_as:
        lines += ["", "There is no GPU here, so some words were read otherwise:"]
        lines += [f"  {words}" for words in read_as]
    return "\n".join(lines)


def as_json(evidence: Evidence, verdict: Verdict, costs: Costs) -> dict[str, Any]:
    """The report for programs: sizes in bytes, times in seconds."""
    document = asdict(verdict)
    del document["needless"]
    found, needed = document.pop("all_reduces")
    return {
        **document,
        "all_reduces": {"found": found, "needed": needed},
        "steps": evidence.num_steps,
        "ranks": len(evidence.reports),
        "engines": evidence.engines,
        "read_as": evidence.reports[0].read_as,
        "costs": asdict(costs),
    }


def _subject(evidence: Evidence, verdict: Verdict) -> str:
    world, k = len(evidence.reports), evidence.gpus_per_node
    engines = " and ".join(evidence.engines) or "no wrapper"
    shape = ""
    if verdict.replicas:
        shape = f"; p = {verdict.partition}, {verdict.replicas} replicas"
        shape = shape if verdict.replicas > 1 else f"; p = {verdict.partition}, one copy"
    else:
        sizes = sorted({len(one.ranks) for one in evidence.copies})
        shape = f"; parameters have {' or '.join(map(str, sizes))} copies"
    return (
        f"{engines} on {world} ranks that stand for {world // k} nodes of {k}{shape}. "
        f"{evidence.num_steps} steps watched, micro-steps in the last: {verdict.micro_steps}."
    )


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """A line per kind of collective."""
    head = ("collectives of a step", "group", "calls", "bytes inside a node", "to other nodes")
    yield f"{head[0]:<34}{head[1]:<20}{head[2]:>6}{head[3]:>21}{head[4]:>18}"
    for row in rows:
        where = f"{row.ranks} on {row.nodes} nodes" if row.nodes > 1 else f"{row.ranks} of a node"
        yield _line(row.what, where, row.calls, row.intra_bytes, row.inter_bytes)
    inside, between = [
        sum(row.calls for row in rows if (row.nodes > 1) == wide) for wide in (False, True)
    ]
    yield _line(
        "all",
        f"{inside} in, {between} out",
        inside + between,
        sum(row.intra_bytes for row in rows),
        sum(row.inter_bytes for row in rows),
    )
    yield "(calls of one rank; bytes that one node's ranks send, as rings like NCCL's)"


def _line(what: str, where: str, calls: int, inside: int, between: int) -> str:
    return f"{what:<34}{where:<20}{calls:>6}{inside:>21,}{between:>18,}"


def _answers(evidence: Evidence, verdict: Verdict, costs: Costs) -> Iterator[str]:
    found, needed = verdict.all_reduces
    yield f"all-reduces between copies        {found} found, {needed} needed"
    whole = verdict.unsharded_bytes
    yield f"unsharded gradients kept          {f'{whole:,} bytes on a rank' if whole else 'none'}"
    names = [n for f in verdict.findings if f.kind == "parameters without hop 2" for n in f.names]
    listed = f"{len(names)}: {first_of(names)}" if names else "none"
    yield f"parameters without hop 2          {listed}"
    far = verdict.copies_apart
    equal = "equal to the bit" if evidence.shared else "there is one copy"
    yield f"copies after the steps            {f'differ by up to {far:.2g}' if far else equal}"
    needless = f", {milliseconds(costs.needless)} of it for nothing" if costs.needless else ""
    unknown = f"; {costs.unknown} other collectives not in it" if costs.unknown else ""
    yield (
        f"a step on {costs.cluster}: hop 1 {milliseconds(costs.hop_1)}, "
        f"hop 2 {milliseconds(costs.hop_2)}{needless}{unknown}"
    )
