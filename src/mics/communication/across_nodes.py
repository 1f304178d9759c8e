"""Hop 2 where several nodes have several replicas each: the slow link carries each row once.

::

    inside a node     reduce-scatter: each of its m ranks has a row of the node's sum
    between nodes     all-reduce of that row, over the N ranks in the same place of their nodes
    inside a node     all-gather of the rows

A ring of all R = N m ranks sends 2 M (R - 1) / R out of each node, this 2 M (N - 1) / N: what MiCS
does with gathers (section 3.3), for hop 2. A row is summed by one rank of each node and by one
group between them, so replicas stay equal to the bit. Which form is faster is chosen as for gathers
(``forms.py``), for each message by its size: units that are joined are one message.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.averaging import AllReduce, Averaging, Sent, op_of
from mics.communication.backend import Issue, Program, backend_of
from mics.communication.error_feedback import ErrorFeedback
from mics.communication.forms import Collectives, decide_by, measure
from mics.communication.ledger import Ledger, Span
from mics.communication.two_stages import all_reduce, padded_numel
from mics.ranks.mesh import Groups, StageGroups, ranks_of, stage_groups
from mics.topology import has_two_stages
from mics.traffic import Collective, Form, all_reduce_stages

_LARGEST_MEASURED = 2**24
"""Bytes; what is larger takes time in proportion, and on slow links minutes to measure."""


class AcrossNodes:
    """An all-reduce of gradients, flat or in two stages.

    Args:
        flat: the all-reduce over all replicas.
        group: the FSDP2 parameter group.
        groups: of the unit, with several replicas on each of several nodes.
        pair: the groups of the stages.
        ledger: counts what is sent.
        collectives: how the form is chosen.
    """

    errors: ErrorFeedback | None = None

    def __init__(
        self,
        flat: AllReduce,
        group: Any,
        groups: Groups,
        pair: StageGroups,
        ledger: Ledger,
        collectives: Collectives,
    ) -> None:
        assert groups.replicas is not None
        self._flat = flat
        self._group, self._pair, self._ledger = group, pair, ledger
        self._ranks, self._gpus_per_node = ranks_of(groups.replicas), groups.gpus_per_node
        self._collectives = collectives
        self._decide = decide_by(groups, collectives)
        self._backend = backend_of(pair.intra, groups.device)

    @property
    def dtype(self) -> torch.dtype:
        """See ``Averaging.dtype``."""
        return self._flat.dtype

    def kind(self) -> Hashable:
        """Join only what chooses its form alike; see ``Averaging.kind``."""
        return self._flat.kind(), self._collectives

    def form(self, num_bytes: int) -> Form:
        """See ``Averaging.form``."""
        return self._decide("all_reduce", self._ranks, num_bytes, self.dtype)

    def padded(self, num_bytes: int) -> int:
        """See ``Averaging.padded``."""
        if self.form(num_bytes) == "flat":
            return num_bytes
        itemsize = self.dtype.itemsize
        return padded_numel(num_bytes // itemsize, self._pair) * itemsize

    def in_stages(self, num_bytes: int) -> bool:
        """See ``Averaging.in_stages``."""
        return self.form(num_bytes) == "hierarchical"

    def sent(self) -> Sent:
        """See ``Averaging.sent``."""
        return self._flat.sent()

    def program(self, message: torch.Tensor, issue: Issue) -> Program:
        """See ``Averaging.program``."""
        num_bytes = message.nbytes
        if self.form(num_bytes) == "flat":
            yield from self._flat.program(message, issue)
            return
        op, divides = op_of(self._group, message.dtype)
        if divides:
            message.div_(len(self._ranks))
        stages = dict(
            all_reduce_stages(
                self._ranks,
                dist.get_rank(),
                self.padded(num_bytes),
                self._gpus_per_node,
                "hierarchical",
            )
        )

        def span(collective: Collective) -> Span:
            return self._ledger.issue(2, collective, stages[collective], message.device)

        yield from all_reduce(message, op, self._pair, span, issue, self._backend)


def all_reduce_of(
    group: Any,
    groups: Groups,
    ledger: Ledger,
    collectives: Collectives,
    dtype: torch.dtype | None = None,
) -> Averaging:
    """How the replicas of a unit all-reduce: in two stages where there are any and it is faster.

    Collective over the mesh the first time that it is called, or a size of message is met.

    Args:
        group: the FSDP2 parameter group.
        groups: of the unit, with more than one replica.
        ledger: counts what is sent.
        collectives: how the form is chosen.
        dtype: to sum in; by default the one that the unit reduces in.
    """
    assert groups.replicas is not None
    flat = AllReduce(group, groups.replicas, ledger, dtype)
    if collectives == "flat" or not _all_have_two_stages(groups):
        return flat
    ranks = ranks_of(groups.replicas)
    pair = stage_groups(groups, ranks)
    assert pair is not None
    if collectives == "auto":
        num_bytes = compat.trainable_shard_numel(group) * flat.dtype.itemsize
        num_bytes = min(num_bytes, _LARGEST_MEASURED)
        measure(groups, groups.replicas, ranks, "all_reduce", num_bytes, flat.dtype)
    return AcrossNodes(flat, group, groups, pair, ledger, collectives)


def _all_have_two_stages(groups: Groups) -> bool:
    """Whether every replication group of a mesh has: what is measured takes all of its ranks."""
    columns = groups.whole.mesh.t().tolist()
    return all(has_two_stages(column, groups.gpus_per_node) for column in columns)
