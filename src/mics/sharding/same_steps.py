"""Do all ranks run the same number of micro-steps? If not, their collectives pair up wrongly.

Replicas that run another number would end with different weights, and a partition group would mix
the gather of one micro-step with that of the next, both without a word. So at the beginning of
every micro-step each rank says whether another one follows; the answers travel while it computes,
over a Gloo group of their own, and are compared when it has ended.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

from mics.errors import MicroStepError
from mics.ranks.mesh import Groups

_control_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = (
    weakref.WeakKeyDictionary()
)


class MicroStepsAgree:
    """One question to all ranks of a mesh: does another micro-step follow?

    Args:
        groups: of the mesh. The first question over a mesh makes a group, collectively.
        index: of the micro-step under way, from 0.
        more: this rank's answer.
    """

    def __init__(self, groups: Groups, index: int, *, more: bool) -> None:
        self._index = index
        self._more = more
        self._most = torch.tensor([more, not more], dtype=torch.int32)
        group = _control_group(groups)
        self._work = dist.all_reduce(self._most, dist.ReduceOp.MAX, group=group, async_op=True)

    def check(self) -> None:
        """Compare the answers.

        Raises:
            MicroStepError: on every rank, when they differ.
        """
        if self._work is not None:
            self._work.wait()
        some_go_on, some_end = self._most.tolist()
        if some_go_on and some_end:
            ran = self._index + 1
            raise MicroStepError(
                "Ranks were given different numbers of micro-batches for one step.",
                numbers=f"After {ran} micro-step(s) some ranks have more and others have not; rank "
                f"{dist.get_rank()} has {'more' if self._more else 'no more'}.",
                write="the same number of batches on every rank; pad the last one, or drop it",
            )


def _control_group(groups: Groups) -> dist.ProcessGroup:
    if groups.shard not in _control_groups:
        made = dist.new_group(
            groups.whole.mesh.flatten().tolist(),
            backend="gloo",
            use_local_synchronization=True,
            group_desc="mics_control",
        )
        assert made is not None
        _control_groups[groups.shard] = made
    return _control_groups[groups.shard]
