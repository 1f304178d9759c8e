"""Do all ranks train the same parameters? A rank that froze one alone would reduce other bytes.

Every rank says so when a step begins, over the Gloo group of the questions. The answer travels
during the forward and is read before the first gradient is reduced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from mics import compat
from mics.errors import DisagreementError
from mics.sharding.units import Unit


class SameTrained:
    """One question, of one step and the units of one mesh.

    Args:
        units: in module order, the same on every rank.
        group: of all ranks of the mesh, on the host.
    """

    def __init__(self, units: Sequence[Unit], group: dist.ProcessGroup) -> None:
        self._units = units
        params = [param for unit in units for param in compat.sharded_params(unit.group)]
        self._mine = torch.tensor([p.requires_grad for p in params], dtype=torch.uint8)
        self._some = torch.cat([self._mine, 1 - self._mine])  # train it; have it frozen
        self._work = dist.all_reduce(self._some, dist.ReduceOp.MAX, group=group, async_op=True)

    def check(self) -> None:
        """Read the answer; nothing the second time.

        Raises:
            DisagreementError: on every rank, with the names of the parameters.
        """
        work, self._work = self._work, None
        if work is None:
            return
        work.wait()
        trained, frozen = self._some.chunk(2)
        odd = (trained * frozen).nonzero().flatten().tolist()
        if not odd:
            return
        names = [name for unit in self._units for name in compat.param_names(unit.group)]
        ours = "needs a gradient" if self._mine[odd[0]] else "is frozen"
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise DisagreementError(
            "Some ranks train parameters that others have frozen.",
            numbers=f"{len(odd)}: {', '.join(names[i] for i in odd[:3])}{more}; {names[odd[0]]} "
            f"{ours} on rank {dist.get_rank()}.",
            write="the same requires_grad on every rank",
        )
