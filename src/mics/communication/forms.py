"""Flat or hierarchical: decided by a short measurement, once, the same on every rank.

On slow links the hierarchical form wins by the bytes it saves; on fabrics of hundreds of GB/s per
node flat can win for large messages. Nothing but a measurement on the links at hand can tell, so
each (group, collective, size class, dtype) is timed once before the first step, the slowest rank's
times are agreed on, and the outcome is kept in a profile file for the next run. All-reduces are
timed as hop 2 comes, several under way together (``in_a_row.py``).

[Note: alike beside each other]
With tensor parallelism several meshes stand beside each other, and each has copies of what is not
spread over its axis: norms, biases, embeddings. The two forms add up in another order. Where one
mesh ran flat and its neighbour in two stages, copies would drift apart bit by bit. So the first
mesh of a job to choose chooses for all, through the store of the job, and nobody waits for it.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.distributed as dist

from mics.communication.collectives import Decide
from mics.communication.in_a_row import IN_A_ROW, ROUNDS
from mics.communication.timing import time_in_turn
from mics.communication.two_stages import (
    all_reduces_in_a_row,
    hierarchical_all_gather,
    hierarchical_reduce_scatter,
)
from mics.errors import ShardError
from mics.quantities import dtype_name, size
from mics.ranks import issuing
from mics.ranks.agreement import first_word, gather_text
from mics.ranks.console import say
from mics.ranks.device import HOST, device_name, on_accelerator
from mics.ranks.files import read_small, write_whole
from mics.ranks.mesh import Groups, PerMesh, StageGroups, stage_groups
from mics.topology import Ranks, nodes_of
from mics.traffic import Collective, Form

Collectives = Literal["auto", "flat", "hierarchical"]
"""How a user asks for it: measured, or forced."""


class Choice(NamedTuple):
    """What flat or hierarchical is decided for."""

    collective: Collective
    nodes: int
    ranks_per_node: int
    size_class: int  # messages up to 2 ** size_class bytes
    dtype: str


def _none_yet(_: Groups) -> dict[Choice, Form]:
    return {}


choices_of = PerMesh(_none_yet)
"""What has been decided for a mesh."""

_REPEATS = 5
_MARGIN = 0.03  # a tie goes to flat: one collective instead of two, no extra buffer
_FORMAT = 1


def decide_by(groups: Groups, collectives: Collectives) -> Decide:
    """The function the communication objects ask: forced, or what ``measure`` found.

    Raises:
        ShardError: ``collectives`` is none of the three words.
    """
    if collectives not in ("auto", "flat", "hierarchical"):
        raise ShardError(
            f"collectives = {collectives!r} is not a choice.",
            write='collectives="auto", "flat" or "hierarchical"',
        )

    def decide(
        collective: Collective, ranks: Ranks, message_bytes: int, dtype: torch.dtype
    ) -> Form:
        if collectives != "auto":
            return collectives
        return _nearest(groups, choice_of(groups, collective, ranks, message_bytes, dtype))

    return decide


def measure(
    groups: Groups,
    group: dist.ProcessGroup,
    ranks: Ranks,
    collective: Collective,
    message_bytes: int,
    dtype: torch.dtype,
) -> None:
    """Time both forms of one collective, unless it is known already, and keep the faster.

    Collective over the whole mesh; every rank ends with the same choice.
    """
    pair = stage_groups(groups, ranks)
    if pair is None or message_bytes == 0:
        return
    choice = choice_of(groups, collective, ranks, message_bytes, dtype)
    if choice in choices_of(groups):
        return
    if (known := _of_profile(groups, choice)) is not None:
        choices_of(groups)[choice] = _first_word(groups, choice, known)
        return
    numel = 2**choice.size_class // dtype.itemsize // group.size() * group.size()
    numel = max(numel, group.size())
    flat, hierarchical = _time_forms(groups, group, pair, collective, numel, dtype)
    choices_of(groups)[choice] = _first_word(groups, choice, _faster(flat, hierarchical))
    _write_profile(groups, choice, flat, hierarchical)
    message = size(2**choice.size_class, "g", least="KiB", most="MiB")
    say(
        f"{collective} of {message} {choice.dtype} over "
        f"{choice.nodes} nodes x {choice.ranks_per_node}: {choices_of(groups)[choice]} "
        f"(flat {flat * 1e3:.2f} ms, hierarchical {hierarchical * 1e3:.2f} ms)"
    )


def keep(groups: Groups, choice: Choice, flat: float, hierarchical: float) -> None:
    """Choose by two times in seconds, for this run and, in the profile, for the next ones."""
    choices_of(groups)[choice] = _faster(flat, hierarchical)
    _write_profile(groups, choice, flat, hierarchical)


def _faster(flat: float, hierarchical: float) -> Form:
    return "hierarchical" if hierarchical < flat * (1 - _MARGIN) else "flat"


def _first_word(groups: Groups, choice: Choice, mine: Form) -> Form:
    """What the first mesh of the job to choose has chosen. See [Note: alike beside each other]."""
    name = f"mics form of {_key(choice)} on {_cluster(groups)}"
    return cast(Form, first_word(name, mine))


def profile_path() -> Path:
    """Where measurements are kept: ``$MICS_PROFILE``, else the user's cache folder."""
    named = os.environ.get("MICS_PROFILE")
    if named:
        return Path(named)
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # an account without a home, as in many containers
        cache = ".cache"  # of the working folder: in the public one others may have been first
    return Path(cache) / "torch-mics" / "profile.json"


def choice_of(
    groups: Groups, collective: Collective, ranks: Ranks, message_bytes: int, dtype: torch.dtype
) -> Choice:
    """What is chosen at once: all messages of a collective, group and dtype up to a power of 2."""
    rows = nodes_of(ranks, groups.gpus_per_node)
    size_class = max(0, (message_bytes - 1).bit_length())
    return Choice(collective, len(rows), len(rows[0]), size_class, dtype_name(dtype))


def _nearest(groups: Groups, wanted: Choice) -> Form:
    """The nearest measured choice, for a size that was not measured (part of a group unused)."""
    exact = choices_of(groups).get(wanted)
    if exact is not None:
        return exact
    alike = [c for c in choices_of(groups) if c[:3] == wanted[:3]]
    if not alike:
        return "flat"
    nearest = min(alike, key=lambda c: (abs(c.size_class - wanted.size_class), c))
    return choices_of(groups)[nearest]


def _time_forms(
    groups: Groups,
    group: dist.ProcessGroup,
    pair: StageGroups,
    collective: Collective,
    numel: int,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Median seconds of a flat and of a hierarchical one, of the slowest rank of the mesh."""
    device, total = groups.device, dist.ReduceOp.SUM
    calls: dict[Form, Callable[[], object]]
    repeats, each = _REPEATS, 1
    whole = torch.zeros(numel, dtype=dtype, device=device)
    shard = torch.zeros(numel // group.size(), dtype=dtype, device=device)
    if collective == "all_gather":
        calls = {
            "flat": lambda: issuing.all_gather(whole, shard, group),
            "hierarchical": lambda: hierarchical_all_gather(whole, shard, pair),
        }
    elif collective == "all_reduce":
        repeats, each = ROUNDS, IN_A_ROW
        messages = [whole, *(torch.zeros_like(whole) for _ in range(each - 1))]
        calls = {
            "flat": lambda: all_reduces_in_a_row(messages, total, group),
            "hierarchical": lambda: all_reduces_in_a_row(messages, total, group, pair),
        }
    else:
        calls = {
            "flat": lambda: issuing.reduce_scatter(shard, whole, total, group),
            "hierarchical": lambda: hierarchical_reduce_scatter(shard, whole, total, pair),
        }
    seconds = time_in_turn(calls, repeats, device, groups.axes)
    flat, hierarchical = (statistics.median(seconds[form]) for form in get_args(Form))
    return flat / each, hierarchical / each


# -- the profile file ----------------------------------------------------------------------------


def _cluster(groups: Groups) -> str:
    """What a measurement is valid for."""
    device = groups.device
    name = device_name(device.type) if on_accelerator(device) else HOST
    return f"{dist.get_backend(groups.shard)} on {name}, {dist.get_world_size()} ranks, " + (
        f"{groups.gpus_per_node} per node, torch {torch.__version__}"
    )


def _is_first(groups: Groups) -> bool:
    return groups.shard.rank() == 0 and (groups.replicas is None or groups.replicas.rank() == 0)


def _of_profile(groups: Groups, choice: Choice) -> Form | None:
    """What the first rank's profile says of this choice on this cluster.

    Nothing else is taken over: a mesh that knew more than the one beside it would choose otherwise
    for sizes that neither has measured.
    """
    text = ""
    if _is_first(groups):
        known = _load(profile_path()).get(_cluster(groups), {})
        text = str(known.get(_key(choice), {}).get("form", ""))
    for axis in groups.axes[::-1]:
        text = gather_text(text, axis, groups.device)[0]
    return cast(Form, text) if text else None


def _key(choice: Choice) -> str:
    return " ".join(map(str, choice))


def _write_profile(groups: Groups, choice: Choice, flat: float, hierarchical: float) -> None:
    if not _is_first(groups):
        return
    path = profile_path()
    profile = _load(path)
    profile.setdefault(_cluster(groups), {})[_key(choice)] = {
        "form": choices_of(groups)[choice],
        "flat_seconds": flat,
        "hierarchical_seconds": hierarchical,
    }
    try:
        write_whole(path, json.dumps({"format": _FORMAT, "clusters": profile}, indent=1) + "\n")
    except OSError as error:
        say(f"cannot keep the measurement in {path}: {error}; it will be taken again next time")


def _load(path: Path) -> dict[str, dict[str, dict[str, object]]]:
    try:
        document = json.loads(read_small(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        say(f"cannot read {path}: {error}; measuring again")
        return {}
    try:
        if document["format"] != _FORMAT:
            raise ValueError
        clusters: dict[str, dict[str, dict[str, object]]] = document["clusters"]
        for known in clusters.values():
            for key, entry in known.items():
                _check_entry(key, entry)
    except (AttributeError, KeyError, TypeError, ValueError):
        say(f"{path} is not a profile of format {_FORMAT}; measuring again")
        return {}
    return clusters


def _check_entry(key: str, entry: dict[str, Any]) -> None:
    """Raise a ValueError, KeyError or TypeError unless it is an entry of a profile."""
    collective, nodes, ranks_per_node, size_class, _ = key.split(" ")
    if collective not in get_args(Collective) or entry["form"] not in get_args(Form):
        raise ValueError
    for number in (nodes, ranks_per_node, size_class):
        int(number)
