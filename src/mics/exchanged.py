"""Reduce-scatter on the CPU as an exchange and a local sum: half of what Gloo's own sends.

Gloo reduce-scatters by an all-reduce whose other rows are thrown away: a rank sends 2 M (n-1)/n.
Here every rank sends each other one its row and adds up what it gets: M (n-1)/n, the volume of
``traffic.py``. All of it goes to its addressee directly, so this is for the two stages, whose ranks
share one node or sit on one node each; among several ranks on several nodes a ring crosses the slow
link less often. The flat form stays the backend's, and with it FSDP2's results to the bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from mics import compat


def reduce_scatter(
    output: torch.Tensor,  # [n]
    input: torch.Tensor,  # [ranks * n]
    op: compat.ReduceOp,
    group: dist.ProcessGroup,
) -> None:
    """Reduce-scatter over a group whose ranks share a node, or sit on a node each.

    Sums are rounded once, however many ranks; accelerators and other operations take the backend's
    own. Complete on return on the CPU.
    """
    averages = op == dist.ReduceOp.AVG
    if input.device.type != "cpu" or not (averages or op == dist.ReduceOp.SUM):
        compat.reduce_scatter(output, input, op, group)
        return
    rows = torch.empty_like(input)
    dist.all_to_all_single(rows, input, group=group)
    table = rows.view(group.size(), -1)
    torch.sum(table, dim=0, out=output)
    if averages:
        output.div_(group.size())
