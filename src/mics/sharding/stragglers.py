"""Who is slow: the times of all ranks brought together, without a wait for anybody."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from mics.communication.pace import pace_of
from mics.communication.same_steps import same_steps_of
from mics.ranks.issuing import Handle, all_gather
from mics.ranks.lateness import Lateness, judge
from mics.ranks.mesh import ranks_of
from mics.ranks.times import ROW, Places, RankTimes, from_row
from mics.sharding.units import units_of


class Comparison:
    """One comparison of the ranks of a model, under way from when it is made.

    Every rank makes it at the same point of its program.

    Args:
        model: sharded by mics.

    Raises:
        ShardError: the model was not sharded by mics.
    """

    def __init__(self, model: nn.Module) -> None:
        groups = max((u.groups for u in units_of(model)), key=lambda one: one.whole.size())
        ranks = tuple(groups.whole.mesh.flatten().tolist())
        self._places = Places(ranks, groups.shard.size(), groups.gpus_per_node)
        self._mine = pace_of(groups).times()
        self._work: Handle | None = None
        if len(ranks) == 1:
            return
        control = same_steps_of(groups).group
        self._in_order = ranks_of(control)
        self._sent = torch.tensor(self._mine.as_row(), dtype=torch.float64)  # until it is over
        self._rows = torch.empty(len(ranks) * ROW, dtype=torch.float64)
        self._work = all_gather(
            self._rows, self._sent, control, async_op=True, name="comparison of the ranks' times"
        )

    def result(self) -> Lateness:
        """Wait for the times of the others, and judge. The same on every rank."""
        times: dict[int, RankTimes] = {dist.get_rank(): self._mine}
        if self._work is not None:
            self._work.wait()
            rows = self._rows.view(-1, ROW).tolist()
            by_rank = dict(zip(self._in_order, rows, strict=True))
            times = {rank: from_row(by_rank[rank]) for rank in self._places.ranks}
        return judge(times, self._places)


def stragglers(model: nn.Module) -> Lateness:
    """Compare the ranks' times of the latest steps: who, or which link, do the others wait for?

    ::

        if step % 20 == 0:
            late = mics.stragglers(model)             # on every rank
            if late.named and dist.get_rank() == 0:
                print(late)                           # a table, and who is slow

    Measured is the time since the end of the last steps, so also what lies between them: input,
    the optimizer. What a rank waits for in collectives of ``torch.distributed`` itself is taken
    for time of its own. Sends some hundred bytes per rank, on the host. Collective.

    Args:
        model: sharded by mics.

    Returns:
        Times, rates and who is slow, the same on every rank. Rates are of what was sent by TCP
        since the last call; nothing is known of other networks.

    Raises:
        ShardError: the model was not sharded by mics.
    """
    return Comparison(model).result()
