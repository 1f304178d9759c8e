"""How large the shares of a unit are that its replicas own, and how they are reduced to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mics import compat
from mics.communication.backend import backend_of
from mics.ranks.mesh import Groups, ranks_of
from mics.topology import nodes_of
from mics.traffic import StageMessage


@dataclass(frozen=True)
class Sizes:
    """How a unit's message is dealt.

    Args:
        numel: elements of a share.
        whole: of all shares; the message and its padding.
        by_all_reduce: whether its reduce-scatter is an all-reduce of which most is thrown away.
    """

    numel: int
    whole: int
    by_all_reduce: bool

    def message(self, nbytes: int, ranks: tuple[int, ...]) -> StageMessage:
        """The reduce-scatter of all shares."""
        return StageMessage("flat", ranks, nbytes, 1, self.by_all_reduce)


def sizes_of_shares(group: Any, groups: Groups) -> Sizes:
    """How the message of a unit is dealt to its replicas.

    On Gloo a reduce-scatter is an exchange (``all_to_all.py``) where the replicas share a node or
    sit on a node each, and else Gloo's own.

    Args:
        group: the FSDP2 parameter group.
        groups: of the unit, with more than one replica.
    """
    assert groups.replicas is not None
    ranks = ranks_of(groups.replicas)
    share = -(-compat.trainable_shard_numel(group) // len(ranks))
    nodes = len(nodes_of(ranks, groups.gpus_per_node))
    mixed = 1 < nodes < len(ranks)
    gloo = backend_of(groups.replicas, groups.device).reduces_by_all_reduce
    return Sizes(share, share * len(ranks), gloo and mixed)
