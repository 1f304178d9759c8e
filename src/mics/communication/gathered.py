"""What one rank gives to the all-gather of a unit: dtypes and elements of the tensors.

A parameter whose tensor has FSDP2's ``fsdp_pre_all_gather`` (float8, MXFP8 and NF4 of torchao,
tensors of the user's own) says itself what travels: fewer bits, or several tensors. FSDP2 gathers a
unit whose tensors have one dtype in this dtype, and any other unit as bytes. What was gathered once
is known; before that the hook is asked, and what it would communicate is kept from the ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mics import compat
from mics.communication.apart import Apart, apart_of


class Sent(NamedTuple):
    """One tensor of one rank."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Answer(NamedTuple):
    """What a hook gives to the gather of one parameter, and what it communicates before."""

    tensors: tuple[Sent, ...]
    apart: tuple[Apart, ...]


@dataclass(frozen=True)
class Gathered:
    """What one rank gives to the all-gather of one unit.

    Args:
        dtype: of the message.
        shard_bytes: of this rank's part of it, padding included.
    """

    dtype: torch.dtype
    shard_bytes: int


def gathered(group: Any) -> Gathered:
    """What the all-gather of a unit moves.

    A hook that cannot be asked on the meta device is taken to give the parameter as it is.

    Args:
        group: the FSDP2 parameter group, see ``compat.py``.
    """
    sent = [Sent(*one) for one in compat.sent_as_they_are(group)]
    for one in compat.with_gather_hook(group):
        known = compat.gathered_of_hook(group, one)
        sent += [Sent(*pair) for pair in known] if known else _asked(group, one)
    dtypes = {one.dtype for one in sent}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
    return Gathered(dtype, sum(one.nbytes for one in sent))


def _asked(group: Any, one: Any) -> Sequence[Sent]:
    local, arguments = compat.arguments_of_hook(one)
    try:
        return ask(local, arguments).tensors
    except Exception:  # a user's code, on a device that has no values
        if not local.is_meta:
            raise
        return [Sent(*compat.sent_as_it_is(group, one))]


def ask(local: torch.Tensor, arguments: Sequence[Any]) -> Answer:
    """Let a hook say what it would give to an all-gather, while nothing is sent.

    Args:
        local: this rank's part of a parameter, with ``fsdp_pre_all_gather``.
        arguments: mesh, whole size, whole stride, module, policy; older hooks take the mesh alone.
    """
    tensors, apart = given(local, arguments)
    return Answer(tuple(Sent(one.dtype, tuple(one.shape)) for one in tensors), apart)


def given(
    local: torch.Tensor, arguments: Sequence[Any]
) -> tuple[Sequence[torch.Tensor], tuple[Apart, ...]]:
    """What a hook gives to an all-gather, and what it would send by itself; arguments as above."""
    hook: Any = local.fsdp_pre_all_gather  # type: ignore[attr-defined]
    with torch.no_grad(), _KeptBack() as kept:
        tensors, _ = hook(*arguments[: num_arguments(local)])
    return tensors, tuple(kept.apart)


def num_arguments(local: torch.Tensor) -> int:
    """How many arguments the hook of a tensor takes: 1 or 5."""
    return len(inspect.signature(local.fsdp_pre_all_gather).parameters)  # type: ignore[attr-defined]


class _KeptBack(compat.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets collectives do nothing, and notes them; what they would return is made up."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.apart: list[Apart] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("c10d", "_c10d_functional"):
            return func(*args, **kwargs)
        tensors = [one for one in compat.tree_leaves((args, kwargs)) if _is_tensor(one)]
        one = apart_of(func, args, kwargs)
        if one is not None:
            self.apart.append(one)
        out = func(*compat.tree_map(_on_meta, args), **compat.tree_map(_on_meta, kwargs))

        def made_up(one: Any) -> Any:
            if not _is_tensor(one):
                return one
            alike = next((t for t in tensors if t.shape == one.shape), None)
            if alike is not None:
                return alike.clone()
            return torch.zeros(one.shape, dtype=one.dtype, device=tensors[0].device)

        return compat.tree_map(made_up, out)


def _is_tensor(one: Any) -> bool:
    return isinstance(one, torch.Tensor)


def _on_meta(one: Any) -> Any:
    return one.to("meta") if _is_tensor(one) else one
