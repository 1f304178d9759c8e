"""Do the replicas begin with the same weights? Compared once, before the first optimizer step.

Hop 2 gives all replicas the same gradients, so replicas that begin alike stay alike, to the bit,
and those that do not never come together. Weights are made alike when a model is sharded; what
follows may part them: values drawn after sharding by ranks that are seeded unlike, a file that some
ranks have loaded. So at the end of the first step of every unit a checksum of the bits of its
shards is compared by the ranks that hold the same ones. It waits for the device, in that step
alone.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.same_steps import NOBODY, same_steps_of
from mics.communication.used import Used
from mics.errors import MicroStepError
from mics.ranks.agreement import where_they_differ
from mics.ranks.issuing import all_reduce
from mics.ranks.mesh import Groups
from mics.sharding.same_start import fingerprint
from mics.sharding.tensor_parts import plain_parts

_compared: weakref.WeakSet[Used] = weakref.WeakSet()


@torch.no_grad()
def check_same_replicas(groups: Groups, used: Sequence[Used]) -> None:
    """Refuse replicas that hold other weights. Collective over the mesh in the first step.

    It comes when a step is settled, so all ranks have run the same units.

    Args:
        groups: of the mesh.
        used: of all units of the step on that mesh, in one order.

    Raises:
        MicroStepError: on every rank; it names the ranks and the first parameter that differs.
    """
    fresh = [one for one in used if one not in _compared]
    if not fresh or groups.num_replicas == 1:
        return
    _compared.update(fresh)
    prints = _prints(fresh)
    digest = zlib.crc32(repr(list(prints.values())).encode()) & 2**31 - 1
    said = torch.full((2, groups.shard.size()), NOBODY, dtype=torch.int64)
    said[:, groups.shard.rank()] = torch.tensor([digest, -digest])
    control = same_steps_of(groups).group
    all_reduce(said, dist.ReduceOp.MAX, control, name="comparison of the replicas' weights")
    largest, negative = said
    places = torch.nonzero(largest != -negative).flatten().tolist()
    if not places:
        return
    alike = groups.whole.mesh.view(-1, groups.shard.size())[:, places[0]].tolist()
    lines = [f"{name} has checksum {one & 2**32 - 1:08x}" for name, one in prints.items()]
    raise MicroStepError(
        "Replicas begin with other weights: each would train a model of its own.",
        numbers=where_they_differ(lines, alike, control) or "",
        write="what sets weights after sharding with the same values on every rank (one seed, one "
        "file); or before it, where rank 0's are taken",
    )


def _prints(used: Sequence[Used]) -> dict[str, int]:
    """Fingerprints of the shards of every parameter, by name and number: names may be alike."""
    params = (pair for one in used for pair in zip(one.names, one.params, strict=True))
    parts = (part for name, param in params for part in plain_parts(name, compat.local_of(param)))
    return {
        f"{name} (parameter {number})": int(fingerprint(part))
        for number, (name, part) in enumerate(parts)
    }
