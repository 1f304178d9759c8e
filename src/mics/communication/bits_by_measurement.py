"""``hop_two="auto"``: fp8 in a unit's hop 2 where that is faster on the links at hand, else exact.

Blocks cost time of the device or the CPU and save time of the link. Which is more, only a
measurement tells: every size is timed once, as its first unit is made, several messages together as
hop 2 comes (``in_a_row.py``), and the slowest rank counts.
A tie goes to what is exact. The first mesh of a job to measure a size chooses for those beside it
too, see [Note: alike beside each other] in ``forms.py``.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from mics import compat
from mics.communication.averaging import Averaging
from mics.communication.fewer_bits import Asked, HopTwoBits, averaging_in
from mics.communication.in_a_row import IN_A_ROW, ROUNDS, run_in_a_row
from mics.communication.ledger import Ledger
from mics.communication.timing import time_in_turn
from mics.quantities import dtype_name, size
from mics.ranks.agreement import first_word
from mics.ranks.console import say
from mics.ranks.mesh import Groups, PerMesh

_MARGIN = 0.1  # part of the all-reduce's time that has to be won: encoding is beside the backward
_CODE: HopTwoBits = "fp8"
_EXACT = "exact"

_chosen_of: PerMesh[dict[str, str]] = PerMesh(lambda _: {})


def settle(asked: Asked, group: Any, groups: Groups) -> Asked:
    """Choose the bits of a unit, where that is left to a measurement.

    Collective over the mesh the first time that a size is met; every rank ends with one choice.

    Args:
        asked: what the user asks of hop 2.
        group: the FSDP2 parameter group.
        groups: of the unit, with more than one replica.
    """
    if asked.bits != "auto":
        return asked
    exact = Asked(None, asked.error_feedback, asked.collectives)
    coded = Asked(_CODE, asked.error_feedback, asked.collectives)
    numel = compat.trainable_shard_numel(group)
    if numel == 0:
        return exact
    dtype = dtype_name(compat.reduce_dtype(group))
    name = f"{numel} of {dtype} over {groups.num_replicas}, {asked.collectives}"
    chosen = _chosen_of(groups)
    if name not in chosen:
        chosen[name] = _measure(name, exact, coded, group, groups)
    return coded if chosen[name] == _CODE else exact


def _measure(name: str, exact: Asked, coded: Asked, group: Any, groups: Groups) -> str:
    ledger = Ledger(rank=dist.get_rank(), gpus_per_node=groups.gpus_per_node)  # of nobody's step
    ways = {
        _EXACT: averaging_in(exact, group, groups, ledger),
        _CODE: averaging_in(coded, group, groups, ledger),
    }
    calls = {
        way: partial(_average, averaging, _messages(averaging, group, groups), groups)
        for way, averaging in ways.items()
    }
    times = time_in_turn(calls, ROUNDS, groups.device, groups.axes)
    seconds = {way: statistics.median(times[way]) / IN_A_ROW for way in ways}
    faster = _CODE if seconds[_CODE] < seconds[_EXACT] * (1 - _MARGIN) else _EXACT
    key = f"mics hop 2 in bits, {name}, {groups.gpus_per_node} per node"
    word = first_word(key, faster)
    message = size(ways[_EXACT].sent().exact, "g", least="KiB", most="MiB")
    say(
        f"hop 2 of {message} over {groups.num_replicas} replicas: {word} "
        f"(exact {seconds[_EXACT] * 1e3:.2f} ms, {_CODE} {seconds[_CODE] * 1e3:.2f} ms)"
    )
    return word


def _messages(averaging: Averaging, group: Any, groups: Groups) -> list[torch.Tensor]:
    numel = compat.trainable_shard_numel(group)
    message = torch.zeros(numel, dtype=averaging.dtype, device=groups.device)
    return [message, *(torch.zeros_like(message) for _ in range(IN_A_ROW - 1))]


@torch.no_grad()
def _average(averaging: Averaging, messages: list[torch.Tensor], groups: Groups) -> None:
    assert groups.replicas is not None
    programs = [partial(averaging.program, message) for message in messages]
    in_stages = averaging.in_stages(messages[0].nbytes)
    run_in_a_row(programs, groups.replicas, groups.device, in_stages=in_stages)
