"""Gradient sync that is switched off keeps whole gradients, which no schedule of ours reduces."""

from __future__ import annotations

from collections.abc import Sequence

from mics import compat
from mics.errors import MicroStepError
from mics.quantities import MIB
from mics.sharding.units import Unit


def refuse_unreduced(units: Sequence[Unit]) -> None:
    """Refuse a model whose gradient sync was switched off.

    Raises:
        MicroStepError: it was.
    """
    unreduced = [unit for unit in units if not compat.wants_reduce(unit.group)]
    if not unreduced:
        return
    size = sum(
        compat.trainable_shard_numel(unit.group)
        * unit.groups.shard.size()
        * compat.reduce_dtype(unit.group).itemsize
        for unit in unreduced
    )
    raise MicroStepError(
        "set_requires_gradient_sync(False) is in force: it keeps whole gradients on every rank "
        "instead of shards, which is the memory MiCS saves.",
        numbers=f"{len(unreduced)} group(s), {size / MIB:.2f} MiB of unsharded gradients.",
        write="model.set_requires_gradient_sync(True); micro_steps defers hop 2 by itself",
    )
