"""What each rank says about itself, and where ranks contradict each other."""

from __future__ import annotations

import dataclasses
import json
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mics.errors import DisagreementError, MicsError, TopologyError
from mics.ranks.agreement import gather_text
from mics.ranks.device import device_name, num_devices, on_accelerator
from mics.ranks.drawing import ranks_text
from mics.ranks.launcher import Launch
from mics.version import __version__

_PREFIXES = ("NCCL_", "GLOO_", "TORCH_")
_NAMES = ("OMP_NUM_THREADS",)
# Folders and identities: rightly different from node to node.
_MAY_DIFFER = (
    "NCCL_DEBUG_FILE",
    "NCCL_HOSTID",
    "NCCL_TOPO_DUMP_FILE",
    "NCCL_TOPO_FILE",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_HOME",
)


@dataclass(frozen=True)
class Facts:
    """What one rank answers; its mappings are from a name to a text."""

    rank: int
    host: str
    launcher: str
    ranks_per_node: int
    devices: int  # accelerators this rank sees
    device_type: str
    device: str
    backend: str
    versions: Mapping[str, str]
    options: Mapping[str, str]
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Problem:
    """Something wrong: the error that says it, and the ranks it is about ([] when all are)."""

    error: MicsError
    ranks: Sequence[int] = ()


def gather_facts(
    launch: Launch, device_type: str, options: Mapping[str, str], environment: Mapping[str, str]
) -> list[Facts]:
    """Exchange facts with every rank, as JSON. Collective over the world.

    Returns:
        Every rank's facts in rank order, the same list on every rank.
    """
    world = dist.group.WORLD
    assert world is not None
    mine = Facts(
        rank=launch.rank,
        host=socket.gethostname(),
        launcher=launch.source,
        ranks_per_node=launch.ranks_per_node,
        devices=num_devices(device_type),
        device_type=device_type,
        device=device_name(device_type),
        backend=dist.get_default_backend_for_device(device_type),
        versions={
            "mics": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "NCCL": _nccl_version(),
        },
        options=dict(options),
        settings=settings_of(environment),
    )
    texts = gather_text(json.dumps(dataclasses.asdict(mine)), world, torch.device("cpu"))
    return [Facts(**json.loads(text)) for text in texts]


def settings_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Pick the variables that change how ranks communicate or compute, sorted by name."""
    names = sorted(n for n in environment if n.startswith(_PREFIXES) or n in _NAMES)
    return {name: environment[name] for name in names}


def disagreements(facts: Sequence[Facts]) -> list[Problem]:
    """Name each version, option, device or setting that is not the same on all ranks.

    The ranks named are those that differ from the commonest value (on a tie, from rank 0's).
    """
    answers = [_comparable(fact) for fact in facts]
    subjects = list(dict.fromkeys(name for answer in answers for name in answer))
    problems = []
    for subject in subjects:
        values = [answer.get(subject, "not set") for answer in answers]
        if len(set(values)) > 1:
            problems.append(_disagreement(subject, values, facts))
    return problems


def unequal_nodes(facts: Sequence[Facts]) -> Problem | None:
    """Name the ranks of a node on which the launcher started another number of them."""
    common, _ = Counter(fact.ranks_per_node for fact in facts).most_common(1)[0]
    odd = [fact.rank for fact in facts if fact.ranks_per_node != common]
    if not odd:
        return None
    hosts = Counter(fact.host for fact in facts)
    placed = ", ".join(f"{host}: {count}" for host, count in hosts.items())
    error = TopologyError(
        "Nodes have different numbers of ranks; partition groups need equal nodes. "
        f"{_who(odd, facts)} would be an unequal node.",
        numbers=f"Ranks per host: {placed}.",
        write="the same --nproc-per-node on every node, or --gpus-per-node with a size that "
        "divides them all",
    )
    return Problem(error, odd)


def missing_devices(facts: Sequence[Facts]) -> Problem | None:
    """Name the ranks that would share an accelerator, if a device was insisted on."""
    hosts = Counter(fact.host for fact in facts)
    short = [f for f in facts if on_accelerator(f.device_type) and f.devices < hosts[f.host]]
    if not short:
        return None
    first = short[0]
    error = TopologyError(
        f"{_who([f.rank for f in short], facts)} cannot each have a {first.device_type} device.",
        numbers=f"{first.host} runs {hosts[first.host]} ranks, rank {first.rank} sees "
        f"{first.devices} device(s).",
        write="one rank per device, or --device cpu",
    )
    return Problem(error, [f.rank for f in short])


def _nccl_version() -> str:
    if not dist.is_nccl_available():
        return "n/a"
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def _comparable(fact: Facts) -> dict[str, str]:
    settings = {n: repr(v) for n, v in fact.settings.items() if n not in _MAY_DIFFER}
    return {
        **{f"{name} version": version for name, version in fact.versions.items()},
        "launcher": fact.launcher,
        "device": fact.device,
        **{f"--{name}": value for name, value in fact.options.items()},
        **settings,
    }


def _disagreement(subject: str, values: Sequence[str], facts: Sequence[Facts]) -> Problem:
    ranks_by_value: dict[str, list[int]] = {}
    for fact, value in zip(facts, values, strict=True):
        ranks_by_value.setdefault(value, []).append(fact.rank)
    common, _ = Counter(values).most_common(1)[0]
    odd = [fact.rank for fact, value in zip(facts, values, strict=True) if value != common]
    shown = "; ".join(f"{value} on {_who(r, facts)}" for value, r in ranks_by_value.items())
    verb = "differs" if len(odd) == 1 else "differ"
    error = DisagreementError(
        f"Ranks disagree on {subject}: {_who(odd, facts)} {verb} from the rest.",
        numbers=f"{shown}.",
        write=f"the same {subject} on every rank",
    )
    return Problem(error, odd)


def _who(ranks: Sequence[int], facts: Sequence[Facts]) -> str:
    """Write ``ranks 4-7 (gpu01)``; hosts are left out where there are more than two."""
    hosts = list(dict.fromkeys(facts[rank].host for rank in ranks))
    where = f" ({', '.join(hosts)})" if len(hosts) <= 2 else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {ranks_text(ranks)}{where}"
