"""The collectives of a unit, as the communication objects that FSDP2 asks for.

FSDP2 calls these objects on its own streams (``_fsdp_collectives.py``): whatever is issued here is
ordered on the current stream when the call returns, unless a ``Work`` is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from mics import compat
from mics.communication import two_stages
from mics.communication.backend import (
    Issue,
    Program,
    at_once,
    backend_of_mesh,
    run,
    with_handle,
)
from mics.communication.landing import Landing
from mics.communication.ledger import Ledger, Span
from mics.ranks import issuing
from mics.ranks.mesh import Groups, StageGroups, ranks_of, stage_groups
from mics.topology import Ranks
from mics.traffic import Collective, Form, Stage, StageMessage, stages

Decide = Callable[[Collective, Ranks, int, torch.dtype], Form]
"""Flat or hierarchical, for (collective, ranks of the group, message bytes, dtype)."""


class AllGather:
    """The all-gather of one unit (``torch``'s ``AllGather`` interface).

    It only moves bytes, of any dtype, uint8 included. It works for every group FSDP2 passes, also
    the smaller one of ``reshard_after_forward=int``.

    Args:
        groups: of the unit.
        ledger: counts the calls.
        decide: chooses the form.
        issued: called with every call.
        prepared: called with every call, of what FSDP2 has let parameters send before it.
    """

    def __init__(
        self,
        groups: Groups,
        ledger: Ledger,
        decide: Decide,
        issued: Callable[[], None] | None = None,
        prepared: Callable[[], None] | None = None,
    ) -> None:
        self._plans = Plans("all_gather", groups, ledger, decide)
        self._issued = issued
        self._prepared = prepared
        self._backend = backend_of_mesh(groups)

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Take the output buffer from the caching allocator."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [world * n], row r is rank r's shard
        input_tensor: torch.Tensor,  # [n], a view of this rank's row
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> issuing.Handle | None:
        """Gather; with ``async_op`` return a handle whose ``wait`` completes both stages."""
        if self._issued is not None:
            self._issued()
        if self._prepared is not None:
            self._prepared()
        planned = self._plans.of(output_tensor, group)
        program = partial(self._program, output_tensor, input_tensor, group, planned)
        if async_op and planned.pair is None and not self._backend.blocks:
            planned.span("flat")  # counted, and on a stream of the backend's own already
            return issuing.all_gather(output_tensor, input_tensor, group, async_op=True)
        if async_op:
            return self._backend.beside(program, output_tensor.device, "gathers")
        run(program(at_once))
        return None

    def _program(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        group: dist.ProcessGroup,
        planned: Planned,
        issue: Issue,
    ) -> Program:
        if planned.pair is not None:
            spans = planned.span("inter"), planned.span("intra")
            return two_stages.all_gather(output, input, planned.pair, spans, issue, self._backend)
        return issue(
            planned.span("flat"),
            lambda async_op: issuing.all_gather(output, input, group, async_op=async_op),
        )


class ReduceScatter:
    """The reduce-scatter of one unit (``torch``'s ``ReduceScatter`` interface).

    ``op`` may be AVG, SUM or PREMUL_SUM.

    Args:
        groups: of the unit.
        ledger: counts the calls.
        decide: chooses the form.
        issued: called with every call.
        before_reduce: called before FSDP2 touches ``.grad``. FSDP2 offers no other moment: over a
            group of one rank it asks for buffers and never calls this object, and its all-reduce
            hook, which has no getter, is the user's.
        landing: lets results land beside the backward pass; without it a call is complete on
            return.
    """

    def __init__(
        self,
        groups: Groups,
        ledger: Ledger,
        decide: Decide,
        issued: Callable[[], None] | None = None,
        before_reduce: Callable[[], None] | None = None,
        landing: Landing | None = None,
    ) -> None:
        self._issued = issued
        self._before_reduce = before_reduce
        self._landing = landing
        self._backend = backend_of_mesh(groups)
        self._exchanges = landing is not None and landing.in_node
        self.by_all_reduce = self._backend.reduces_by_all_reduce and not self._exchanges
        """Whether its flat form is an all-reduce of which all but one row is thrown away."""
        self._plans = Plans(
            "reduce_scatter", groups, ledger, decide, by_all_reduce=self.by_all_reduce
        )

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Take an input or output buffer from the caching allocator."""
        if self._before_reduce is not None:
            self._before_reduce()
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,  # [n]
        input_tensor: torch.Tensor,  # [world * n]
        group: dist.ProcessGroup,
        op: compat.ReduceOp,
        async_op: bool = False,
    ) -> None:
        """Reduce-scatter; the result is ordered on the current stream, or lands later."""
        if self._issued is not None:
            self._issued()
        planned = self._plans.of(input_tensor, group)
        begin = partial(self._program, input_tensor, op, group, planned)
        if self._landing is not None and self._landing.reduce(
            output_tensor, op, partial(begin, with_handle)
        ):
            return
        run(begin(at_once, output_tensor))

    def _program(
        self,
        input: torch.Tensor,
        op: compat.ReduceOp,
        group: dist.ProcessGroup,
        planned: Planned,
        issue: Issue,
        output: torch.Tensor,
    ) -> Program:
        if planned.pair is not None:
            spans = planned.span("inter"), planned.span("intra")
            return two_stages.reduce_scatter(
                output, input, op, planned.pair, spans, issue, self._backend
            )
        if self._exchanges:
            return self._backend.reduce([(output, input)], op, group, planned.span("flat"), issue)
        return issue(
            planned.span("flat"),
            lambda async_op: issuing.reduce_scatter(output, input, op, group, async_op=async_op),
        )


# -- what one call does --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    """How one collective runs: its stages and, if it is hierarchical, their groups."""

    collective: Collective
    device: torch.device
    ledger: Ledger
    messages: dict[Stage, StageMessage]
    pair: StageGroups | None

    def span(self, stage: Stage) -> Span:
        """Count a stage, and return the span that times it."""
        return self.ledger.issue(1, self.collective, self.messages[stage], self.device)


class Plans:
    """How the collectives of a unit run that are of one kind.

    What follows from a size and a form is worked out once. The form is asked for every time where
    there are two: what other units have measured may be nearer by now.

    Args:
        collective: the kind.
        groups: of the unit.
        ledger: counts the calls.
        decide: chooses the form.
        by_all_reduce: see ``traffic.stages``.
    """

    def __init__(
        self,
        collective: Collective,
        groups: Groups,
        ledger: Ledger,
        decide: Decide,
        *,
        by_all_reduce: bool = False,
    ) -> None:
        self._collective: Collective = collective
        self._groups = groups
        self._ledger = ledger
        self._decide = decide
        self._by_all_reduce = by_all_reduce
        self._stages: dict[dist.ProcessGroup, tuple[Ranks, StageGroups | None]] = {}
        self._known: dict[tuple[dist.ProcessGroup, int, torch.device, Form], Planned] = {}

    def of(self, gathered: torch.Tensor, group: dist.ProcessGroup) -> Planned:
        """Choose the form of one collective, and what of it is counted.

        Args:
            gathered: its whole message.
            group: its ranks.
        """
        if group not in self._stages:
            ranks = ranks_of(group)
            self._stages[group] = ranks, stage_groups(self._groups, ranks)
        ranks, pair = self._stages[group]
        form: Form = "flat"
        if pair is not None:
            form = self._decide(self._collective, ranks, gathered.nbytes, gathered.dtype)
        key = group, gathered.nbytes, gathered.device, form
        planned = self._known.get(key)
        if planned is None:
            planned = self._known[key] = self._plan(*key)
        return planned

    def _plan(
        self, group: dist.ProcessGroup, message_bytes: int, device: torch.device, form: Form
    ) -> Planned:
        ranks, pair = self._stages[group]
        messages = stages(
            ranks,
            dist.get_rank(),
            message_bytes,
            self._groups.gpus_per_node,
            form,
            by_all_reduce=self._by_all_reduce,
        )
        by_stage = {message.stage: message for message in messages}
        two_stages_of = pair if form == "hierarchical" else None
        return Planned(self._collective, device, self._ledger, by_stage, two_stages_of)
