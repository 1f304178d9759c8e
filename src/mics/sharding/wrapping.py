"""DistributedDataParallel around a sharded model, refused in words.

It would add up what mics has reduced already, and cannot take shards apart, which it says in words
about strides. It asks a module which parameters to leave alone before all else.
"""

from __future__ import annotations

from collections.abc import Iterator

from mics.errors import ShardError


class LeavesNone:
    """Stands where DistributedDataParallel looks for what it is to leave alone."""

    def __iter__(self) -> Iterator[str]:
        raise ShardError(
            "DistributedDataParallel around a model that mics shards: mics reduces its gradients.",
            write="the model without it. Accelerate: `from mics.integrations.accelerate import "
            "Accelerator`. transformers: `from mics.integrations.transformers import with_mics`, "
            "then with_mics(Trainer)(...). See docs/tools.md",
        )
