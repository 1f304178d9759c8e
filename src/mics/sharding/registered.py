"""Are the parameters that a forward is about to use still the ones that were sharded?

FSDP2 registers its own parameters before and after every pass. What somebody put in their place
would be overwritten without a word, or, before the first forward, taken for a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import DTensor

from mics import compat
from mics.errors import ShardError


def check_registered(groups: Sequence[Any]) -> None:
    """Refuse parameters that were replaced, tied, removed or reparametrised after sharding.

    ``load_state_dict(assign=True)`` and ``model.to(...)`` replace them too, but tell FSDP2; before
    the first forward it takes any DTensor.

    Raises:
        ShardError: some were; or the dtype changed, or the values are gone.
    """
    for group in groups:
        _refuse_another_kind(group)
    seen: dict[int, str] = {}
    odd: list[str] = []
    for group in groups:
        known = compat.lazily_initialised(group)
        found = compat.registered_params(group)
        for i, (there, expected) in enumerate(
            zip(found, compat.expected_params(group), strict=True)
        ):
            if there is expected and known:
                continue
            name = compat.param_names(group)[i]
            if not known and isinstance(there, DTensor) and id(there) not in seen:
                seen[id(there)] = name
                continue
            twin = seen.get(id(there))
            odd.append(name if twin is None else f"{name} (tied to {twin})")
    if odd:
        named = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        raise ShardError(
            "Parameters were replaced after the model was sharded; the next gather would "
            "overwrite what was put there.",
            numbers=f"{len(odd)}: {named}.",
            write="the change (a new parameter, a tie, a parametrisation, pruning) before "
            "mics.shard; or model.load_state_dict(..., assign=True) for new values",
        )


def _refuse_another_kind(group: Any) -> None:
    if not compat.lazily_initialised(group):
        return
    for param, dtype in zip(compat.sharded_params(group), compat.first_dtypes(group), strict=True):
        if param.dtype != dtype or param.is_meta:
            now = "the meta device" if param.is_meta else str(param.dtype)
            raise ShardError(
                f"The model went to {now} after its first forward; FSDP2 would go on with buffers "
                "of before.",
                numbers=f"{compat.param_names(group)[0]} and others were {dtype} then.",
                write="model.to(...) before the first forward",
            )
