"""Reduce-scatter on the CPU as an exchange and a local sum: half of what Gloo's own sends.

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


class Exchange:
    """A reduce-scatter under way on the CPU; sums are rounded once, however many ranks.

    Args:
        output: [n], complete after ``finish``.
        input: [ranks * n], not to be changed until ``finish``.
        op: SUM or AVG.
        group: whose ranks share a node, or sit on a node each.
    """

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
        work = dist.all_to_all_single(self._rows, input, group=group, async_op=True)
        assert work is not None
        self.work: dist.Work = work

    @staticmethod
    def can(input: torch.Tensor, op: compat.ReduceOp) -> bool:
        """Whether this is the form for such a message; if not, it is the backend's."""
        return input.device.type == "cpu" and op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM)

    def add_up(self) -> None:
        """Sum what has come, once ``work`` has been waited for."""
        torch.sum(self._rows.view(self._ranks, -1), dim=0, out=self._output)
        if self._averages:
            self._output.div_(self._ranks)


def reduce_scatter(
    output: torch.Tensor,  # [n]
    input: torch.Tensor,  # [ranks * n]
    op: compat.ReduceOp,
    group: dist.ProcessGroup,
) -> None:
    """Reduce-scatter over a group whose ranks share a node, or sit on a node each.

    Accelerators and operations other than SUM and AVG take the backend's own. Complete on return on
    the CPU.
    """
    if not Exchange.can(input, op):
        compat.reduce_scatter(output, input, op, group)
        return
    exchange = Exchange(output, input, op, group)
    exchange.work.wait()
    exchange.add_up()
