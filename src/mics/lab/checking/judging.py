"""What is wrong with a script, judged by what its ranks have seen; no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mics.lab.checking.copies import ROUNDING, Copies, apart, has_gradient, unreduced
from mics.lab.checking.evidence import Evidence, reduces_of
from mics.lab.checking.flows import flow_of, rows_of
from mics.lab.checking.report import Seen, Step
from mics.lab.checking.verdict import Finding, Kind, Verdict
from mics.quantities import first_of

_SHARE_OF_GRADIENTS = 0.1  # less than that is not what gradients are


def judge(evidence: Evidence) -> Verdict:
    """Judge a script by what its ranks have seen."""
    labels = evidence.labels(evidence.last)
    verdict = Verdict(rows=rows_of(evidence.last, evidence.gpus_per_node, labels))
    verdict.micro_steps = max(step.micro_steps for step in evidence.last)
    _count_sizes(evidence, verdict)
    _find_no_gradients(evidence, verdict)
    _find_unreduced(evidence, verdict)
    _find_early_allreduces_of(evidence, verdict)
    _find_unsharded(evidence, verdict)
    _find_drift(evidence, verdict)
    _find_alone(evidence, verdict)
    _note_data(evidence, verdict)
    _note_partition(evidence, verdict)
    verdict.kind, verdict.headline = _headline(evidence, verdict)
    return verdict


def _count_sizes(evidence: Evidence, verdict: Verdict) -> None:
    sizes = {len(one.ranks) for one in evidence.copies}
    if len(sizes) == 1:
        verdict.replicas = sizes.pop()
        verdict.partition = len(evidence.reports) // verdict.replicas


# -- what is wrong -------------------------------------------------------------------------------


def _find_early_allreduces_of(evidence: Evidence, verdict: Verdict) -> None:
    """Hop 2 in micro-steps behind which others follow."""
    steps = [step for number in range(evidence.num_steps) for step in evidence.step(number)]
    early = [_early(evidence, step) for step in steps]
    last = evidence.last[0]
    found = sum(n for seen, n in last.calls if evidence.is_hop_2(seen.call))
    needless = _early(evidence, last)
    once = found - sum(n for _, n in needless)
    missing = {name for finding in verdict.findings for name in finding.names}
    apart_from_units = {one.name for one in evidence.shared if not one.spread}
    reduces = sum(n for seen, n in reduces_of(last) if seen.micro_step == last.micro_steps)
    stops_early = bool(found and reduces and not once)
    needed = max(once, reduces) if stops_early or missing - apart_from_units else once
    verdict.all_reduces = found, needed + len(missing & apart_from_units)
    if not any(early):
        return
    if stops_early:
        verdict.findings.append(_never_at_the_end(evidence, verdict))
        return
    verdict.needless = [(seen.call, n) for seen, n in needless]
    verdict.needless_bytes = _node_bytes(evidence)
    verdict.findings.append(
        Finding(
            "hop 2 in every micro-step",
            f"Copies all-reduce their gradients in micro-steps behind which others follow: "
            f"{found} {_messages(evidence)} a step, {verdict.all_reduces[1]} needed.",
            f"{verdict.micro_steps} micro-steps; {verdict.needless_bytes:,} bytes leave each node "
            "for nothing in every step.",
            _how_to_defer(evidence.engines),
        )
    )


def _never_at_the_end(evidence: Evidence, verdict: Verdict) -> Finding:
    """Hop 2 that runs, but not behind the last micro-step."""
    last = verdict.micro_steps
    at = max(seen.micro_step for seen, _ in _early(evidence, evidence.last[0]))
    behind = f"micro-step {last} has" if at + 1 == last else f"micro-steps {at + 1} to {last} have"
    return Finding(
        "parameters without hop 2",
        f"Copies all-reduce their gradients in micro-step {at} of {last}, and not in the last one: "
        "what is reduced behind it does not reach the optimizer in this step.",
        f"That is what {behind} computed; FSDP2 keeps it back and adds it to a later step.",
        _how_to_defer(evidence.engines),
        tuple(dict.fromkeys(one.name for one in evidence.shared if one.spread)),
    )


def _early(evidence: Evidence, step: Step) -> list[tuple[Seen, int]]:
    """Hop 2 behind which another micro-step follows; a few metrics that are summed are none."""
    found = [
        (seen, number)
        for seen, number in step.calls
        if seen.when == "backward"
        and seen.micro_step < step.micro_steps
        and evidence.is_hop_2(seen.call)
    ]
    carried = sum(seen.call.numel * number for seen, number in found)
    return found if carried >= _SHARE_OF_GRADIENTS * evidence.shared_numel else []


def _node_bytes(evidence: Evidence) -> int:
    """What the node with most sends to others for nothing in the last step."""
    by_node: dict[int, float] = {}
    for rank, step in enumerate(evidence.last):
        for seen, number in _early(evidence, step):
            flow = flow_of(seen.call, rank, evidence.gpus_per_node)
            node = rank // evidence.gpus_per_node
            by_node[node] = by_node.get(node, 0) + number * float(flow.inter_bytes)
    return round(max(by_node.values(), default=0))


def _how_to_defer(engines: Sequence[str]) -> str:
    if "DDP" in engines:
        return "with model.no_sync(): around all micro-steps but the last"
    if "mics" in engines:
        return "for batch in mics.micro_steps(model, batches): in the place of your own loop"
    if "FSDP1" in engines:
        return "fully_shard of FSDP2: FSDP1 can defer only by keeping whole gradients"
    return (
        "model.set_requires_all_reduce(last) in front of each forward, last being whether it is "
        "the step's last micro-step; or mics.fully_shard and mics.micro_steps(model, batches)"
    )


def _find_unsharded(evidence: Evidence, verdict: Verdict) -> None:
    """Micro-steps that reduce nothing: whole gradients wait for the last one."""
    for step in (step for n in range(evidence.num_steps) for step in evidence.step(n)):
        reduced = {seen.micro_step for seen, _ in reduces_of(step)}
        skipped = [n for n in range(1, step.micro_steps) if n not in reduced]
        if not skipped or step.micro_steps not in reduced:
            continue
        last = [(s.call, n) for s, n in reduces_of(step) if s.micro_step == step.micro_steps]
        whole = sum(call.message_bytes * n for call, n in last)
        shard = sum(call.message_bytes * n // len(call.ranks) for call, n in last)
        verdict.unsharded_bytes = whole
        write = (
            "model.set_requires_all_reduce(last) in the place of set_requires_gradient_sync(last)"
            "; or mics.fully_shard and mics.micro_steps(model, batches)"
        )
        if "FSDP1" in evidence.engines:
            write = "fully_shard of FSDP2 in the place of FSDP1 and its no_sync()"
        verdict.findings.append(
            Finding(
                "unsharded gradients",
                f"{len(skipped)} of {step.micro_steps} micro-steps reduce no gradient: every rank "
                "keeps whole gradients until the last one.",
                f"They are {whole:,} bytes on each rank; its shard of them would be {shard:,}.",
                write,
            )
        )
        return


def _find_unreduced(evidence: Evidence, verdict: Verdict) -> None:
    """Copies whose optimizers are given other gradients."""
    worst: dict[str, float] = {}
    held: dict[str, Copies] = {}
    lacking = _lacking(evidence)
    for one in evidence.shared:
        far = max(unreduced(one, evidence.step(number)) for number in range(evidence.num_steps))
        if far or one in lacking:
            worst[one.name] = max(worst.get(one.name, 0.0), far)
            held[one.name] = one
    if not worst:
        return
    names = tuple(worst)
    one = held[names[0]]
    far = max(worst.values())
    numbers = (
        f"Their gradients on ranks that hold the same values differ by up to {far:.2g} of the "
        "largest."
        if far
        else "All ranks were given the same data, so the copies are alike; other data parts them."
    )
    all_of_them = " (all of them)" if len(names) == len({c.name for c in evidence.copies}) else ""
    verdict.findings.append(
        Finding(
            "parameters without hop 2",
            f"{len(names)} parameters{all_of_them} reach the optimizer without being all-reduced "
            f"between their copies: {first_of(names)}.",
            f"{numbers} {one.name} has copies on ranks {', '.join(map(str, one.ranks))}.",
            _how_to_reduce(one, evidence),
            names,
        )
    )


def _lacking(evidence: Evidence) -> list[Copies]:
    """Copies that nothing has joined, where all ranks were given the same data.

    Their gradients are alike then, so elements are counted: what all-reduces carry in the last
    micro-step against what copies need. Groups of few ranks are counted first, as an all-reduce
    over them does nothing for what has more copies. Blocks that are gathered were exchanged before.
    """
    if not evidence.same_data(range(len(evidence.reports))):
        return []
    steps = evidence.step(0)
    needing = [one for one in evidence.shared if has_gradient(one, steps)]
    found: list[Copies] = []
    short = 0
    for ranks in sorted({one.ranks for one in needing}, key=len):
        step = steps[ranks[0]]
        within = [one for one in needing if ranks[0] in one.ranks and set(one.ranks) <= set(ranks)]
        carried = sum(
            evidence.carried(seen.call) * n
            for seen, n in step.calls
            if seen.micro_step == step.micro_steps and set(seen.call.ranks) <= set(ranks)
        )
        missing = sum(one.numel for one in within) - carried
        if missing > short:
            found += [one for one in needing if one.ranks == ranks]
            short = missing
    return found


def _find_no_gradients(evidence: Evidence, verdict: Verdict) -> None:
    """Optimizers that are given no gradient at all."""
    steps = [evidence.step(number) for number in range(evidence.num_steps)]
    without = [one for one in evidence.copies if not any(has_gradient(one, s) for s in steps)]
    names = tuple(dict.fromkeys(one.name for one in without))
    if not names:
        return
    if len(without) < len(evidence.copies):
        verdict.notes.append(
            f"{len(names)} parameters never had a gradient: {first_of(names)}. That is right if "
            "nothing uses them."
        )
        return
    verdict.findings.append(
        Finding(
            "parameters without hop 2",
            f"No parameter has a gradient when the optimizer steps, all {len(names)} stay as they "
            "are.",
            f"{verdict.micro_steps} micro-steps, {sum(n for _, n in reduces_of(evidence.last[0]))} "
            "reduce-scatters, no all-reduce between copies: FSDP2 keeps back what was not "
            "all-reduced.",
            "model.set_requires_all_reduce(True) and set_requires_gradient_sync(True) in front of "
            "a step's last micro-step",
            names,
        )
    )


def _how_to_reduce(one: Copies, evidence: Evidence) -> str:
    if one.spread:
        return (
            "a mesh of two axes for these parameters, (replicate, shard), with "
            "set_requires_all_reduce(True) in the last micro-step; or mics.fully_shard"
        )
    if evidence.engines:
        return (
            "fully_shard of these modules on a mesh of their own, instead of ignored_params; or "
            f"dist.all_reduce of their .grad over ranks {', '.join(map(str, one.ranks))} in front "
            "of optimizer.step()"
        )
    return "mics.shard(model), or DistributedDataParallel(model)"


def _find_drift(evidence: Evidence, verdict: Verdict) -> None:
    """Copies that are apart at the end."""
    far = {one: apart(one, evidence.latest, "after") for one in evidence.shared}
    verdict.copies_apart = max(far.values(), default=0.0)
    names = tuple(dict.fromkeys(one.name for one, f in far.items() if f > ROUNDING))
    if not names:
        if verdict.copies_apart:
            verdict.notes.append(
                f"Copies differ by {verdict.copies_apart:.1g} of their largest value: rounding."
            )
        return
    apart_ones = [one for one in evidence.shared if one.name in names]
    begun = [one for one in apart_ones if apart(one, evidence.first, "before") > ROUNDING]
    unreduced_names = {name for finding in verdict.findings for name in finding.names}
    if begun:
        why = f"{begun[0].name} differs before the first step already."
        write = "the same seed on every rank when the model is made, or a broadcast from rank 0"
    elif set(names) <= unreduced_names:
        why = "Their gradients differ, see above."
        write = "what is said above"
    else:
        why = "Their gradients are alike, so the optimizers, or edits of the weights, are not."
        write = "the same steps, learning rate and edits of weights on every rank"
    ranks = ", ".join(map(str, apart_ones[0].ranks))
    verdict.findings.append(
        Finding(
            "replicas differ",
            f"After {evidence.num_steps} steps {len(names)} parameters differ between ranks that "
            f"should hold the same: {first_of(names)}.",
            f"By up to {max(far.values()):.2g} of the largest value, on ranks {ranks}. {why}",
            write,
            names,
        )
    )


def _find_alone(evidence: Evidence, verdict: Verdict) -> None:
    """Ranks that talk about no gradient at all."""
    if len(evidence.reports) == 1 or verdict.findings:
        return
    steps = [step for number in range(evidence.num_steps) for step in evidence.step(number)]
    calls = [seen.call for step in steps for seen, _ in step.calls]
    if any(not call.small or evidence.is_in_blocks(call) for call in calls):
        return
    verdict.findings.append(
        Finding(
            "ranks alone",
            "No gradient leaves a rank: every rank trains a model of its own.",
            f"{len(evidence.reports)} ranks, no collective of more than a few elements.",
            "mics.shard(model), or DistributedDataParallel(model)",
        )
    )


def _note_data(evidence: Evidence, verdict: Verdict) -> None:
    ranks = range(len(evidence.reports))
    if len(ranks) > 1 and evidence.same_data(ranks) and evidence.step(0)[0].data:
        verdict.notes.append(
            "The model was given the same data on every rank: as many ranks do the work of one."
        )


def _note_partition(evidence: Evidence, verdict: Verdict) -> None:
    """What full sharding would send to other nodes if a node held the whole model."""
    world, k = len(evidence.reports), evidence.gpus_per_node
    step = evidence.last[0]
    whole = sum(
        seen.call.message_bytes * n
        for seen, n in reduces_of(step)
        if seen.micro_step == step.micro_steps and len(seen.call.ranks) == world
    )
    if verdict.partition != world or k in (1, world) or not whole:
        return
    nodes = world // k
    now = sum(row.inter_bytes for row in verdict.rows)
    verdict.notes.append(
        f"A node sends {now:,} bytes to others in a step. With p = {k}, a copy of the model on "
        f"every node, and hop 2 once a step it would send {2 * whole * (nodes - 1) // nodes:,}, "
        "if a node can hold the model (mics plan tells)."
    )


# -- in one sentence -----------------------------------------------------------------------------


def _headline(evidence: Evidence, verdict: Verdict) -> tuple[Kind, str]:
    if verdict.findings:
        kinds = dict.fromkeys(finding.kind for finding in verdict.findings)
        return verdict.findings[0].kind, f"Wrong: {', '.join(kinds)}."
    if not evidence.shared:
        return "full sharding", (
            f"Full sharding: {len(evidence.reports)} ranks hold one copy of the model, so there "
            "is no hop 2. Nothing is wrong."
        )
    found = verdict.all_reduces[0]
    way = "micro-steps" if verdict.micro_steps != 1 else "micro-step"
    return "right", (
        f"Right: {verdict.micro_steps} {way} a step, gradients are all-reduced between copies "
        f"once ({found} {_messages(evidence)}, {found} needed), and the copies are equal "
        "afterwards."
    )


def _messages(evidence: Evidence) -> str:
    in_blocks = any(evidence.is_in_blocks(seen.call) for seen, _ in evidence.last[0].calls)
    return "all-reduces and messages in blocks" if in_blocks else "all-reduces"
