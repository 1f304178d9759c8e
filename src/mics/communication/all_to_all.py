"""A reduce-scatter as an exchange and a local sum: half of what Gloo's own sends.

Gloo reduce-scatters by an all-reduce whose other rows are thrown away: a rank sends 2 M (n-1)/n.
Here every rank sends each other one its row and adds up what it gets: M (n-1)/n, the volume of
``traffic.py``. All of it goes to its addressee directly, so this is for ranks that share one node
or sit on one node each: the two stages, and with ``overlap`` a partition group inside a node. Among
several ranks on several nodes a ring crosses the slow link less often. Without ``overlap`` the flat
form stays the backend's, and with it FSDP2's results to the bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from mics import compat
from mics.ranks.issuing import exchange


class Exchange:
    """A reduce-scatter under way; sums are rounded once, however many ranks.

    Args:
        output: [n], complete after ``finish``.
        input: [ranks * n], not to be changed until then.
        op: one of ``OPS``.
        group: its ranks share a node, or sit on a node each.
    """

    OPS = (dist.ReduceOp.AVG, dist.ReduceOp.SUM)

    def __init__(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        op: compat.ReduceOp,
        group: dist.ProcessGroup,
    ) -> None:
        self._output = output
        self._averages = op == dist.ReduceOp.AVG
        self._ranks = group.size()
        self._rows = torch.empty_like(input)
        self.work = exchange(self._rows, input, group)

    def finish(self) -> None:
        """Wait for the rows of the others, and add them up."""
        self.work.wait()
        torch.sum(self._rows.view(self._ranks, -1), dim=0, out=self._output)
        if self._averages:
            self._output.div_(self._ranks)
