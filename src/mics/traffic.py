"""Bytes and messages per link class, predicted with pure arithmetic.

Every formula counts what *one rank sends* when each collective runs as a ring over its group in
rank order, the algorithm of Gloo and of NCCL for large messages. With M the bytes of the gathered
message, n the group size, k ranks per node and N nodes in the group:

=========================  ======================  ==========================================
collective                 bytes sent by a rank    bytes into a node over the slow link
=========================  ======================  ==========================================
all-gather, flat           M (n - 1) / n           M (n - 1) / n    (one edge of the ring)
reduce-scatter, flat       M (n - 1) / n           M (n - 1) / n
all-reduce                 2 M (n - 1) / n         2 M (n - 1) / n
all-gather, hierarchical   inter (M/k)(N - 1)/N    M (N - 1) / N  =  M (n - k) / n
                           intra M (k - 1)/k
reduce-scatter, hier.      the mirror              the mirror
all-reduce, hier.          inter 2(M/m)(N - 1)/N   2 M (N - 1) / N
                           intra 2 M (m - 1)/m     (m ranks of the group on a node)
reduce-scatter, flat, on   2 M (n - 1) / n         2 M (n - 1) / n  (an all-reduce of which all
Gloo                                               but one row is thrown away)
all-to-all                 M (n - 1) / n           k M (n - k) / n
=========================  ======================  ==========================================

Sources: the hierarchical volume is MiCS section 3.3 (``(p - k) M / p`` against ``(p - 1) M / p``),
the two-hop schedule section 3.4, the ring terms the bandwidth-optimal ring of Patarasuk and Yuan,
Gloo's reduce-scatter torch's ``ProcessGroupGloo.cpp`` and an interface's counters
(``benchmarks/results/lab_bytes.json``). Bytes are exact rationals, so a prediction and a count can
be compared with ``==``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias

from mics.topology import Ranks, Topology, has_two_stages, nodes_of

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
Stage = Literal["flat", "inter", "intra"]
Form = Literal["flat", "hierarchical"]


class Key(NamedTuple):
    """Where traffic belongs: hop 1 or 2, which collective, which stage of it.

    Hop 0 is what weights need beside the two: scales of gathers in few bits (all-reduces), whole
    matrices of ``mics.WholeStep`` (all-gathers) and ``mics.DealtStep`` (all-to-alls too).
    """

    hop: int
    collective: Collective
    stage: Stage


@dataclass(frozen=True)
class Flow:
    """What one rank sends over each link class: bytes and messages."""

    intra_bytes: Fraction = Fraction(0)
    inter_bytes: Fraction = Fraction(0)
    intra_messages: int = 0
    inter_messages: int = 0

    def __add__(self, other: Flow) -> Flow:
        return Flow(
            self.intra_bytes + other.intra_bytes,
            self.inter_bytes + other.inter_bytes,
            self.intra_messages + other.intra_messages,
            self.inter_messages + other.inter_messages,
        )

    def __mul__(self, times: int) -> Flow:
        sent = self.intra_bytes * times, self.inter_bytes * times
        return Flow(*sent, self.intra_messages * times, self.inter_messages * times)


@dataclass(frozen=True)
class Count:
    """Calls of one collective, the bytes of its messages, and the flow they cause.

    ``message_bytes`` is the size of the gathered (or reduced) buffer, not what crosses a link.
    """

    calls: int = 0
    message_bytes: int = 0
    flow: Flow = field(default_factory=Flow)

    def __add__(self, other: Count) -> Count:
        message_bytes = self.message_bytes + other.message_bytes
        return Count(self.calls + other.calls, message_bytes, self.flow + other.flow)


@dataclass(frozen=True)
class Traffic:
    """Counts by key, for one rank. Two are equal when every key is."""

    counts: Mapping[Key, Count]

    def __str__(self) -> str:
        """A line per collective and stage: calls, and the bytes this rank sends over each link."""
        lines = [
            f"{'hop':<4}{'collective':<16}{'stage':<7}{'calls':>7}{'bytes intra':>17}{'inter':>17}"
        ]
        for key, count in sorted(self.counts.items()):
            sent = f"{float(count.flow.intra_bytes):>17,.0f}{float(count.flow.inter_bytes):>17,.0f}"
            lines.append(f"{key.hop:<4}{key.collective:<16}{key.stage:<7}{count.calls:>7}{sent}")
        return "\n".join(lines)

    def __add__(self, other: Traffic) -> Traffic:
        mine, more = self.counts, other.counts
        return Traffic({k: mine.get(k, Count()) + more.get(k, Count()) for k in [*mine, *more]})

    @property
    def flow(self) -> Flow:
        """Everything this rank sends."""
        return sum((c.flow for c in self.counts.values()), Flow())

    def hop(self, hop: int) -> Flow:
        """What this rank sends in hop 0, 1 or 2, see ``Key``."""
        return sum((c.flow for key, c in self.counts.items() if key.hop == hop), Flow())


@dataclass(frozen=True)
class UnitBytes:
    """The messages of one unit (an FSDP2 parameter group), sizes in bytes after padding.

    Args:
        gather_bytes: all shards together, in the dtype that is all-gathered.
        reduce_bytes: all shards together, in the dtype that is reduce-scattered.
        sync_bytes: what hop 2 all-reduces; ``reduce_bytes / p`` as a rule, or in two stages a
            little more: as many for each replica of a node.
        gathers: all-gathers over the partition group per micro-step: one per use in forward, one
            more per use in backward when the block is resharded after forward.
        reduces: reduce-scatters per micro-step: one per use, 0 for a frozen block.
        backward_gathers: all-gathers in backward over a smaller group, when the block is resharded
            to ``backward_partition`` ranks after forward.
        backward_partition: that number of ranks; 0 when there is none.
        coded_bytes: what hop 2 exchanges, and gathers, in blocks of few bits.
    """

    gather_bytes: int
    reduce_bytes: int
    sync_bytes: int
    gathers: int = 2
    reduces: int = 1
    backward_gathers: int = 0
    backward_partition: int = 0
    coded_bytes: int = 0


# -- one collective ------------------------------------------------------------------------------


def ring_flow(
    collective: Collective, ranks: Sequence[int], rank: int, message_bytes: int, gpus_per_node: int
) -> Flow:
    """What ``rank`` sends in one ring collective over ``ranks``.

    A rank sends ``n - 1`` chunks of ``message_bytes / n`` to its successor (twice that in an
    all-reduce), so all of it goes over the one link that joins the two.
    """
    n = len(ranks)
    if n == 1:
        return Flow()
    rounds = (2 if collective == "all_reduce" else 1) * (n - 1)
    sent = Fraction(message_bytes * rounds, n)
    successor = ranks[(ranks.index(rank) + 1) % n]
    if successor // gpus_per_node == rank // gpus_per_node:
        return Flow(intra_bytes=sent, intra_messages=rounds)
    return Flow(inter_bytes=sent, inter_messages=rounds)


def exchange_flow(ranks: Sequence[int], rank: int, message_bytes: int, gpus_per_node: int) -> Flow:
    """What ``rank`` sends where each rank has a row of ``message_bytes / n`` for each other one."""
    node = rank // gpus_per_node
    inside = sum(other // gpus_per_node == node for other in ranks) - 1
    outside = len(ranks) - 1 - inside
    row = Fraction(message_bytes, len(ranks))
    return Flow(row * inside, row * outside, inside, outside)


class StageMessage(NamedTuple):
    """One stage of a collective, for one rank: its group and the bytes of its message."""

    stage: Stage
    ranks: Ranks
    message_bytes: int
    repeats: int  # coalesced collectives of message_bytes / repeats each, issued as one call
    by_all_reduce: bool = False  # Gloo's flat reduce-scatter


def stages(
    ranks: Sequence[int],
    rank: int,
    message_bytes: int,
    gpus_per_node: int,
    form: Form,
    *,
    by_all_reduce: bool = False,
) -> list[StageMessage]:
    """The stages of an all-gather or reduce-scatter over ``ranks``, as ``rank`` sees them.

    Hierarchical over N nodes of k ranks: the inter stage moves M / k over N ranks, the intra stage
    is N coalesced collectives of M / N over k ranks. ``by_all_reduce`` says that the flat form is a
    reduce-scatter of Gloo's; its stages are not, on no backend.
    """
    if form == "flat" or not has_two_stages(ranks, gpus_per_node):
        return [StageMessage("flat", tuple(ranks), message_bytes, 1, by_all_reduce)]
    rows = nodes_of(ranks, gpus_per_node)
    row = next(row for row in rows if rank in row)
    column = tuple(other[row.index(rank)] for other in rows)
    return [
        StageMessage("inter", column, message_bytes // len(row), 1),
        StageMessage("intra", row, message_bytes, len(rows)),
    ]


def all_reduce_stages(
    ranks: Sequence[int], rank: int, message_bytes: int, gpus_per_node: int, form: Form
) -> list[tuple[Collective, StageMessage]]:
    """The collectives of an all-reduce in their order; of a form in two stages they are three."""
    found = stages(ranks, rank, message_bytes, gpus_per_node, form)
    if len(found) == 1:
        return [("all_reduce", found[0])]
    inter, inside = found[0], StageMessage("intra", found[1].ranks, message_bytes, 1)
    return [("reduce_scatter", inside), ("all_reduce", inter), ("all_gather", inside)]


def stage_flow(
    collective: Collective, message: StageMessage, rank: int, gpus_per_node: int
) -> Flow:
    """What ``rank`` sends in one stage."""
    size = message.message_bytes // message.repeats
    if collective == "all_to_all":
        return exchange_flow(message.ranks, rank, size, gpus_per_node) * message.repeats
    runs: Collective = "all_reduce" if message.by_all_reduce else collective
    return ring_flow(runs, message.ranks, rank, size, gpus_per_node) * message.repeats


def message_traffic(
    hop: int,
    collective: Collective,
    message: StageMessage,
    calls: int,
    rank: int,
    gpus_per_node: int,
) -> Traffic:
    """Traffic of ``rank`` in so many calls of one stage; none among ranks of which there is one."""
    if not calls or len(message.ranks) == 1:
        return Traffic({})
    flow = stage_flow(collective, message, rank, gpus_per_node) * calls
    count = Count(calls, message.message_bytes * calls, flow)
    return Traffic({Key(hop, collective, message.stage): count})


# -- one step ------------------------------------------------------------------------------------


def mics(
    topology: Topology,
    blocks: _Units,
    micro_steps: int,
    *,
    all_gather: Form = "hierarchical",
    reduce_scatter: Form = "hierarchical",
    all_reduce: Form = "flat",
    hop_2_every_micro_step: bool = False,
    gloo: bool = False,
    rank: int = 0,
) -> Traffic:
    """Traffic of one step of ``rank`` under MiCS (section 3.4).

    Hop 1, every micro-step and block: the all-gathers and the reduce-scatters of the block inside
    the partition group. Hop 2, once a step and block: an all-reduce of the shard over the replicas.
    The collectives are given their forms. ``hop_2_every_micro_step`` gives the schedule the paper
    compares with, ``gloo`` counts flat reduce-scatters as Gloo runs them.
    """
    groups = topology.partition_group_of(rank), topology.replication_group_of(rank)
    total, view = Traffic({}), View(rank, *groups, topology.gpus_per_node)
    for block in blocks:
        total += unit_traffic(
            view,
            block,
            micro_steps,
            micro_steps if hop_2_every_micro_step else 1,
            all_gather=all_gather,
            reduce_scatter=reduce_scatter,
            all_reduce=all_reduce,
            gloo=gloo,
        )
    return total


class View(NamedTuple):
    """The groups of one rank: what its traffic depends on."""

    rank: int
    partition: Ranks
    replicas: Ranks
    gpus_per_node: int


def unit_traffic(
    view: View,
    unit: UnitBytes,
    micro_steps: int,
    hop_2_runs: int,
    *,
    all_gather: Form,
    reduce_scatter: Form,
    all_reduce: Form = "flat",
    gloo: bool,
) -> Traffic:
    """Traffic of one unit in one step, for any partition and replication group."""
    rank, partition, _, k = view
    runs = hop_2_runs * bool(unit.reduces)
    total = hop_2_traffic(view, unit.sync_bytes, unit.coded_bytes, runs, form=all_reduce)

    def add(collective: Collective, messages: list[StageMessage], calls: int) -> None:
        nonlocal total
        for message in messages:
            total += message_traffic(1, collective, message, calls, rank, k)

    gather = stages(partition, rank, unit.gather_bytes, k, all_gather)
    add("all_gather", gather, micro_steps * unit.gathers)
    if unit.backward_gathers:
        first = partition.index(rank) // unit.backward_partition * unit.backward_partition
        smaller = partition[first : first + unit.backward_partition]
        gather = stages(smaller, rank, unit.gather_bytes, k, all_gather)
        add("all_gather", gather, micro_steps * unit.backward_gathers)
    reduce = stages(partition, rank, unit.reduce_bytes, k, reduce_scatter, by_all_reduce=gloo)
    add("reduce_scatter", reduce, micro_steps * unit.reduces)
    return total


def hop_2_traffic(
    view: View, sync_bytes: int, coded_bytes: int = 0, runs: int = 1, *, form: Form = "flat"
) -> Traffic:
    """Traffic of one message of hop 2, of one unit or of several; sizes as in ``UnitBytes``."""
    rank, _, replicas, k = view
    sent = all_reduce_stages(replicas, rank, sync_bytes, k, form) if sync_bytes else []
    if coded_bytes:
        blocks = StageMessage("flat", replicas, coded_bytes, 1)
        sent += [("all_to_all", blocks), ("all_gather", blocks)]
    each = (message_traffic(2, collective, one, runs, rank, k) for collective, one in sent)
    return sum(each, Traffic({}))


def fsdp(
    topology: Topology, blocks: _Units, micro_steps: int, *, gloo: bool = False, rank: int = 0
) -> Traffic:
    """Traffic of one step of ``rank`` under FSDP full shard / ZeRO-3: one partition, the world."""
    world = Topology(topology.nodes, topology.gpus_per_node, topology.world)
    return hsdp(world, blocks, micro_steps, deferred=True, gloo=gloo, rank=rank)


def hsdp(
    topology: Topology,
    blocks: _Units,
    micro_steps: int,
    *,
    deferred: bool,
    gloo: bool = False,
    rank: int = 0,
) -> Traffic:
    """Traffic of one step of ``rank`` under FSDP2's HSDP, with or without a deferred all-reduce."""
    return mics(
        topology,
        blocks,
        micro_steps,
        all_gather="flat",
        reduce_scatter="flat",
        hop_2_every_micro_step=not deferred,
        gloo=gloo,
        rank=rank,
    )


def ddp(
    topology: Topology, blocks: _Units, micro_steps: int, *, deferred: bool, rank: int = 0
) -> Traffic:
    """Traffic of one step of ``rank`` under DDP; ``deferred`` as with ``no_sync``.

    One all-reduce of a block's whole gradient over the world: MiCS with p = 1.
    """
    alone = Topology(topology.nodes, topology.gpus_per_node, 1)
    whole = [replace(b, sync_bytes=b.reduce_bytes, coded_bytes=0) for b in blocks]
    return mics(alone, whole, micro_steps, hop_2_every_micro_step=not deferred, rank=rank)


_Units: TypeAlias = Iterable[UnitBytes]
# What these two were called first; the names are public, so they stay.
Block: TypeAlias = UnitBytes
block_traffic = unit_traffic


def node_inter_bytes(per_rank: Sequence[Traffic]) -> Fraction:
    """Bytes that leave a node over the slow link, given the traffic of each of its ranks."""
    return sum((t.flow.inter_bytes for t in per_rank), Fraction(0))
