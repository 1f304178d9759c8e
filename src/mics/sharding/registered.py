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
from mics.quantities import first_of


def check_registered(groups: Sequence[Any]) -> None:
    """Refuse parameters that were replaced, tied, removed or reparametrised after sharding.

    ``load_state_dict(assign=True)`` and ``model.to(...)`` replace them too, but tell FSDP2; before
    the first forward it takes any DTensor.

    Raises:
        ShardError: some were; or the dtype changed, or the values are gone.
    """
    seen: dict[int, str] = {}
    odd: list[str] = []
    for group in groups:
        known = compat.lazily_initialised(group)
        if known:
            _refuse_another_kind(group)
            if compat.is_untouched(group):
                continue
        found = compat.registered_params(group)
        for i, expected in enumerate(compat.expected_params(group)):
            if known and found[i] is expected:
                continue
            name, twin = compat.param_names(group)[i], seen.get(id(found[i]))
            if known or twin is not None or not isinstance(found[i], DTensor):
                odd.append(name if twin is None else f"{name} (tied to {twin})")
            seen.setdefault(id(found[i]), name)
    if odd:
        raise ShardError(
            "Parameters were replaced after the model was sharded; the next gather would "
            "overwrite what was put there.",
            numbers=f"{len(odd)}: {first_of(odd)}.",
            write="the change (a new parameter, a tie, a parametrisation, pruning) before "
            "mics.shard; or model.load_state_dict(..., assign=True) for new values",
        )


def _refuse_another_kind(group: Any) -> None:
    """Refuse parameters that went elsewhere: FSDP2 has made its buffers for others."""
    param, dtype = compat.first_param(group), compat.first_dtype(group)
    if param.dtype == dtype and not param.is_meta:
        return
    now = "the meta device" if param.is_meta else str(param.dtype)
    raise ShardError(
        f"The model went to {now} after its first forward; FSDP2 goes on with buffers of before.",
        numbers=f"{compat.param_names(group)[0]} and others were {dtype} then.",
        write="model.to(...) before the first forward",
    )
