"""The communication units of a model: what mics attaches to each sharded module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mics.errors import ShardError
from mics.hop_two import HopTwo
from mics.ledgers import Ledger, LedgerView
from mics.mesh import Groups

_ATTRIBUTE = "_mics_units"


@dataclass
class Unit:
    """One FSDP2 parameter group, the groups it talks to, and what is counted of it."""

    group: Any  # the FSDP2 parameter group, see compat.py
    groups: Groups
    ledger: Ledger
    hop_two: HopTwo | None  # None with one replica


def attach(module: nn.Module, unit: Unit) -> None:
    """Remember a unit on the module that owns it."""
    units_on(module).append(unit)


def units_on(module: nn.Module) -> list[Unit]:
    """The units attached to one module."""
    units: list[Unit] = module.__dict__.setdefault(_ATTRIBUTE, [])
    return units


def units_of(model: nn.Module) -> list[Unit]:
    """All units of a model, in module order.

    Raises:
        ShardError: the model was not sharded by mics.
    """
    units = [unit for module in model.modules() for unit in module.__dict__.get(_ATTRIBUTE, [])]
    if not units:
        raise ShardError(
            f"{type(model).__name__} has no module sharded by mics.",
            write="model = mics.shard(model), or mics.fully_shard(block, mesh=mesh) for each block",
        )
    return units


def ledger(model: nn.Module) -> LedgerView:
    """What ``model`` has communicated since the last reset, by link class, stage and hop.

    Returns:
        A live view: ``traffic()`` compares with ``mics.traffic``, ``seconds()`` gives times,
        ``reset()`` starts anew, ``print`` shows a table.

    Raises:
        ShardError: the model was not sharded by mics.
    """
    return LedgerView(tuple(unit.ledger for unit in units_of(model)))
