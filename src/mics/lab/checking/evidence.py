"""The steps of all ranks of a checked script, and what each collective was for; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mics.lab.checking.copies import copies_of
from mics.lab.checking.flows import nodes_of_group
from mics.lab.checking.report import Call, Param, RankReport, Seen, Step

_MORE_THAN_METRICS = 1024  # elements
_IN_BLOCKS = ("all_to_all", "all_gather")


class Evidence:
    """The steps of all ranks, and what follows from them at once.

    Args:
        reports: of all ranks, in order.
        gpus_per_node: ranks of a node.
    """

    def __init__(self, reports: Sequence[RankReport], gpus_per_node: int) -> None:
        self.reports, self.gpus_per_node = reports, gpus_per_node
        self.num_steps = min(len(report.steps) for report in reports)
        self.engines = reports[0].engines
        self.copies = copies_of(self.first)
        self.shared = [one for one in self.copies if len(one.ranks) > 1]
        self.shared_numel = sum(one.numel for one in self.shared if 0 in one.ranks)
        self._sets = {one.ranks for one in self.shared}
        calls = [seen.call for report in reports for step in report.steps for seen, _ in step.calls]
        self._rows = {call.numel for call in calls if self._is_of_rows(call)}
        summed = [c for c in calls if self.is_inside(c) and c.collective == "all_to_all"]
        self._rows &= {call.numel // len(call.ranks) for call in summed}
        if "mics" in self.engines:
            self._read_reduces()
        self._shards = {
            seen.call.numel // len(seen.call.ranks)
            for step in self.last
            for seen, _ in reduces_of(step)
        }
        self._data = [" ".join(step.data for step in report.steps) for report in reports]

    def _read_reduces(self) -> None:
        """Count what mics reduces by all-reduces on Gloo as it reduces it on accelerators."""
        shards = {
            seen.call.numel
            for report in self.reports
            for step in report.steps
            for seen, _ in step.calls
            if self._joins_copies(seen.call)
        }
        shards |= self._cut_in_rows()
        for report in self.reports:
            for step in report.steps:
                step.calls = [(self._on_accelerators(seen, shards), n) for seen, n in step.calls]

    def _cut_in_rows(self) -> set[int]:
        """Elements of what is reduced inside nodes, which is padded by less than a rank each."""
        calls = [
            seen.call for report in self.reports for step in report.steps for seen, _ in step.calls
        ]
        inside = [call for call in calls if self.is_inside(call)]
        return {call.numel - padding for call in inside for padding in range(len(call.ranks))}

    def _on_accelerators(self, seen: Seen, shards: set[int]) -> Seen:
        call = seen.call
        if call.collective != "all_reduce" or call.small or self._joins_copies(call):
            return seen
        whole = call.numel // len(call.ranks) in shards or not self._sets
        if not whole or seen.when != "backward" or (not shards and not self._is_large(call)):
            return seen
        return replace(seen, call=replace(call, collective="reduce_scatter"))

    def _joins_copies(self, call: Call) -> bool:
        within = any(set(call.ranks) <= set(ranks) for ranks in self._sets)
        return call.collective == "all_reduce" and call.floating and within

    def _is_large(self, call: Call) -> bool:
        return call.numel >= _MORE_THAN_METRICS

    def step(self, number: int) -> list[Step]:
        """One step of every rank."""
        return [report.steps[number] for report in self.reports]

    @property
    def last(self) -> list[Step]:
        """The last step of every rank."""
        return self.step(self.num_steps - 1)

    @property
    def first(self) -> list[Step]:
        """The first step of every rank, with each parameter as it is when it is stepped first."""
        return [_with_all(report.steps[: self.num_steps][::-1]) for report in self.reports]

    @property
    def latest(self) -> list[Step]:
        """The last step of every rank, with each parameter as it is when it is stepped last."""
        return [_with_all(report.steps[: self.num_steps]) for report in self.reports]

    def same_data(self, ranks: Sequence[int]) -> bool:
        """Whether the model was given the same on these ranks in every step."""
        return len({self._data[rank] for rank in ranks}) == 1

    def is_hop_2(self, call: Call) -> bool:
        """Whether a collective may join gradients of copies.

        Ranks that are given the same data have other reasons to sum: tensor parallelism.
        """
        if self.is_in_blocks(call):
            return True
        if not self._joins_copies(call) or not self._as_large_as_gradients(call):
            return False
        everybody = range(len(self.reports))
        return not self.same_data(call.ranks) or self.same_data(everybody)

    def is_inside(self, call: Call) -> bool:
        """Whether copies of one node sum, or gather, what is all-reduced between nodes by rows.

        That is mics' hop 2 in two stages; the all-reduce is what counts as hop 2.
        """
        if call.collective not in _IN_BLOCKS or call.small or not self._are_some_copies(call):
            return False
        rows = call.numel // len(call.ranks) in self._rows
        return rows and nodes_of_group(call.ranks, self.gpus_per_node) == 1

    def carried(self, call: Call) -> int:
        """Elements of gradients that a collective brings to copies; none if others bring them."""
        if self.is_inside(call):
            return call.numel if call.collective == "all_to_all" else 0
        gathers = call.collective == "all_gather"
        return 0 if gathers or self._is_of_rows(call) or not self.is_hop_2(call) else call.numel

    def _is_of_rows(self, call: Call) -> bool:
        """Whether it is mics' all-reduce of what copies have summed inside of nodes."""
        if not self._joins_copies(call) or not self._are_some_copies(call):
            return False
        return nodes_of_group(call.ranks, self.gpus_per_node) == len(call.ranks)

    def _are_some_copies(self, call: Call) -> bool:
        known = "mics" in self.engines
        return known and any(set(call.ranks) < set(ranks) for ranks in self._sets)

    def is_in_blocks(self, call: Call) -> bool:
        """Whether copies send each other blocks of bytes, as mics' hop 2 of fp8 and int8 does."""
        known = "mics" in self.engines and call.collective in _IN_BLOCKS and not call.floating
        return known and call.ranks in self._sets and self._is_large(call)

    def _as_large_as_gradients(self, call: Call) -> bool:
        """Whether a message may hold gradients, rather than losses and other metrics."""
        if call.numel in self._shards | self._rows and call.floating:
            return True
        sizes = {one.numel for one in self.shared}
        known = call.numel in sizes or 10 * call.numel >= self.shared_numel
        return not call.small and (known or self._is_large(call))

    def labels(self, steps: Sequence[Step]) -> dict[Call, str]:
        """What each collective of these steps is for."""
        return {seen.call: self._label(seen.call) for step in steps for seen, _ in step.calls}

    def _label(self, call: Call) -> str:
        if self.is_inside(call) and call.collective == "all_to_all":  # on accelerators it is one
            return "hop 2: reduce-scatter between copies"
        if self.is_hop_2(call) or self.is_inside(call):
            return f"hop 2: {call.collective.replace('_', '-')} between copies"
        of_shards = call.collective in ("all_gather", "reduce_scatter")
        metrics = call.small or (call.collective == "all_reduce" and not self._is_large(call))
        if metrics and not (of_shards and any(one.spread for one in self.copies)):
            return "small: losses, norms, counts"
        names = {"all_gather": "hop 1: all-gather", "reduce_scatter": "hop 1: reduce-scatter"}
        return names.get(call.collective, f"other: {call.collective.replace('_', '-')}")


def _with_all(steps: Sequence[Step]) -> Step:
    """The last of some steps, with what others have stepped: optimizers may take turns."""
    params: dict[str, Param] = {}
    for step in steps:
        params |= step.params
    return replace(steps[-1], params=params)


def reduces_of(step: Step) -> list[tuple[Seen, int]]:
    """The reduce-scatters of a step, each with how many of it came."""
    return [
        (seen, n)
        for seen, n in step.calls
        if seen.call.collective == "reduce_scatter" and seen.when == "backward"
    ]
