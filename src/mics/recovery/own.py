"""What a rank has beyond its shard: random numbers, buffers, the position in its data.

Replicas have the same shards, but not the same random numbers, so a rank that takes its shard from
another one's memory cannot take this from there as well. It is small; every replica keeps it of all
(``agreeing.py``). As bytes it is JSON.
"""

from __future__ import annotations

import base64
import json
import random
import re
import sys
from array import array
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from mics.checkpoint.manifest import Json, dtype_of
from mics.checkpoint.randomness import generator_states, set_generator_states
from mics.checkpoint.values import decode, encode
from mics.errors import CheckpointError, RecoveryError
from mics.quantities import dtype_name

_EXTRAS, _RANDOM = "extras", "random"
_NAME = re.compile(r"(\d+)(?:@(\d+))?")


@dataclass(frozen=True)
class Own:
    """Values and small tensors by name, and the states of generators and extras."""

    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]
    random: Mapping[str, Any]
    extras: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """All of it as text.

        Raises:
            CheckpointError: something in it cannot be kept.
        """
        inside: dict[str, torch.Tensor] = dict(self.tensors)
        table = {
            "tensors": sorted(self.tensors),
            "values": dict(self.values),
            _RANDOM: encode(_RANDOM, self.random, inside),
            _EXTRAS: encode(_EXTRAS, self.extras, inside),
        }
        packed = {name: _pack(tensor) for name, tensor in inside.items()}
        return json.dumps([table, packed]).encode()


def own_of(parsed: Any) -> Own:
    """The reverse of ``Own.to_bytes``, of its text as Python's objects.

    Raises:
        ValueError: it is not what that writes.
    """
    table, packed = parsed
    inside = {name: _unpack(*one) for name, one in packed.items()}
    return Own(
        {name: inside[name] for name in table["tensors"]},
        table["values"],
        decode(table[_RANDOM], inside.__getitem__),
        decode(table[_EXTRAS], inside.__getitem__),
    )


def _pack(tensor: torch.Tensor) -> list[Json]:
    data = base64.b64encode(bytes_of(tensor)).decode()
    return [dtype_name(tensor.dtype), list(tensor.shape), data]


def bytes_of(tensor: torch.Tensor) -> bytearray:
    """A copy of the values of a tensor, as they are in memory."""
    local = tensor.detach().cpu().contiguous()
    data = bytearray(local.nbytes)
    if data:
        torch.frombuffer(data, dtype=torch.uint8).copy_(local.reshape(-1).view(torch.uint8))
    return data


def _unpack(dtype: str, shape: list[int], text: str) -> torch.Tensor:
    data = bytearray(base64.b64decode(text, validate=True))
    if len(data) != prod(shape) * dtype_of(dtype).itemsize:
        raise ValueError(f"{len(data)} bytes for {dtype} {shape}")
    if not data:
        return torch.empty(shape, dtype=dtype_of(dtype))
    return torch.frombuffer(data, dtype=dtype_of(dtype)).view(shape)


def resting_name(rank: int, step: int) -> str:
    """The name of what a rank had of its own after a step, beside what others have of a later."""
    return f"{rank}@{step}"


def ranks_and_steps(names: Iterable[str], step: int) -> list[tuple[int, int]]:
    """The reverse of ``resting_name``; a rank without a step is of ``step``."""
    found = map(_NAME.fullmatch, names)
    return [(int(one[1]), int(one[2] or step)) for one in found if one is not None]


# -- random numbers --------------------------------------------------------------------------------


def random_now() -> dict[str, Any]:
    """The states of all generators that a program commonly draws from: Python, NumPy, torch."""
    version, numbers, gauss = random.getstate()
    python = [version, array("L", numbers).tobytes(), gauss]
    state: dict[str, Any] = {"python": python, **generator_states()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        _, keys, position, has_gauss, number = numpy.random.get_state()
        state["numpy"] = [keys.tobytes(), position, has_gauss, number]
    return state


def restore_random(state: Mapping[str, Any]) -> None:
    """Set the generators to states that ``random_now`` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(array("L", numbers)), gauss))
    set_generator_states(state)
    if "numpy" in state:
        import numpy

        keys, *rest = state["numpy"]
        numpy.random.set_state(("MT19937", numpy.frombuffer(keys, dtype=numpy.uint32), *rest))


# -- the user's own --------------------------------------------------------------------------------


def extras_now(extras: Mapping[str, Any]) -> dict[str, Any]:
    """The states of a user's own things, by their names."""
    return {
        name: one.state_dict() if hasattr(one, "state_dict") else dict(one)
        for name, one in extras.items()
    }


def check_extras(extras: Mapping[str, Any]) -> None:
    """Raise where one has no state that could be kept and set.

    Raises:
        RecoveryError: which one, and why.
    """
    for name, one in extras.items():
        both = all(callable(getattr(one, f, None)) for f in ("state_dict", "load_state_dict"))
        if not both and not isinstance(one, MutableMapping):
            raise RecoveryError(
                f"{name} cannot be kept: it has no state_dict and load_state_dict, and is no "
                "dictionary.",
                numbers=f"It is a {type(one).__name__}.",
                write=f'{name}={{"epoch": 0}}, whose entries you set and read, or an object with '
                "both",
            )


def restore_extras(
    extras: Mapping[str, Any], state: Mapping[str, Any], without: Collection[str] = ()
) -> None:
    """Give a user's own things the states that were kept; some have none, and stay as they are.

    Raises:
        CheckpointError: other things were kept.
    """
    if extras.keys() != {*state, *without}:
        raise CheckpointError(
            "Other things were kept than this program keeps.",
            numbers=f"They were {sorted(state)}, and are {sorted(extras)}.",
            write="the same names as before, or another name for the job: MICS_JOB=<name>",
        )
    for name in state:
        one = extras[name]
        if hasattr(one, "load_state_dict"):
            one.load_state_dict(state[name])
        else:
            one.clear()
            one.update(state[name])
