"""What gather hooks of a unit communicate themselves, as float8 does to agree on its scales.

[Note: asked once per state]
FSDP2 calls every hook of a unit once before each gather, where nothing of mics stands, and the
gather comes to mics right after. So what the hooks have sent is known at the gather, if it is known
what they send. A hook is asked that without communication (``gathered.py``), again whenever the
state of its tensor is another one: an attribute has come or gone, as scales that were worked out
beforehand, or a plain value has changed. Values of tensors are not looked at, for they are on a
device.
"""

from __future__ import annotations

from typing import Any

import torch

from mics import compat
from mics.communication.apart import Message, count, messages_of
from mics.communication.gathered import ask
from mics.communication.ledger import Ledger
from mics.errors import ShardError

_PLAIN = (bool, int, float, str, torch.dtype, type(None))


class Scales:
    """What is sent before each gather of a unit.

    Args:
        group: the FSDP2 parameter group, see ``compat.py``.
        ledger: counts it.
        device: where the unit communicates.
    """

    def __init__(self, group: Any, ledger: Ledger, device: torch.device) -> None:
        self._group = group
        self._ledger = ledger
        self._device = device
        self._known: dict[int, tuple[tuple[object, ...], list[Message]]] = {}
        self._agreed: dict[int, int] = {}  # by a weight's id, how often it had been written

    def agreed(self, weight: torch.Tensor) -> None:
        """Remember that the scale of a weight was worked out from the values it has now."""
        self._agreed[id(weight)] = _times_written(weight)

    def outdate(self, key: int) -> None:
        """An optimizer steps the weight with this id."""
        if key in self._agreed:
            self._agreed[key] = -1

    def sent(self) -> None:
        """Count what the hooks have sent: a gather follows them.

        Raises:
            ShardError: by scales of other values than the weights have now.
        """
        for one in compat.with_gather_hook(self._group) if self._agreed else ():
            weight = one.sharded_param
            if self._agreed.get(id(weight), written := _times_written(weight)) != written:
                raise ShardError(
                    "A float8 weight was written after its scale had been worked out, and would "
                    "be gathered by the scale of its old values.",
                    numbers=f"It is one of shape {list(weight.shape)}.",
                    write="mics.precompute_scales(model) behind every optimizer.step(), mics.load "
                    "and edit of weights, or nowhere",
                )
        count(self.before_each_gather(), self._ledger, self._device)

    def before_each_gather(self) -> list[Message]:
        """What the hooks send in their present state; nothing, if they cannot be asked yet."""
        return [
            message
            for number, one in enumerate(compat.with_gather_hook(self._group))
            for message in self._of(number, one)
        ]

    def _of(self, number: int, one: Any) -> list[Message]:
        local, arguments = compat.arguments_of_hook(one)
        state = _state(local, arguments)
        known = self._known.get(number)
        if known is not None and known[0] == state:
            return known[1]
        try:
            messages = messages_of(ask(compat.asked_for_gather(one), arguments).apart)
        except Exception:  # a user's code, on a device that has no values
            if not local.is_meta:
                raise
            return []
        self._known[number] = state, messages
        return messages


def _times_written(weight: torch.Tensor) -> int:
    """How often its values were written, by operators on the mesh or on this rank's part."""
    return compat.times_written(weight) + compat.times_written(compat.local_of(weight))


def _state(local: torch.Tensor, arguments: Any) -> tuple[object, ...]:
    """What a hook may decide by, without the values of tensors."""
    module = next((one for one in arguments if isinstance(one, torch.nn.Module)), None)
    attributes = (
        (name, value if isinstance(value, _PLAIN) else type(value))
        for name, value in vars(local).items()
    )
    return type(local), local.is_meta, module is not None and module.training, *attributes
