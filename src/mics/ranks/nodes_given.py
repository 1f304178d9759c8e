"""Nodes that were given to a job, and on which no launcher has started ranks yet.

Schedulers start one process on every node, and leave the ranks to torchrun or ``srun``. Without
it every node would train alone, all of them in one folder. What each of them says of its nodes, and
what starts ranks there, stands here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mics.errors import TopologyError
from mics.ranks.launcher import Launch, is_slurm_shell, read_outer


@dataclass(frozen=True)
class NodesGiven:
    """What somebody has given this process beside its own node.

    Args:
        source: who.
        nodes: how many nodes; where nobody says that, the least.
        told: the variable that says so.
        launch: what starts ranks on all of them.
    """

    source: str
    nodes: int
    told: str
    launch: str


_INDEX = "JOB_COMPLETION_INDEX"
_TORCHRUN = "torchrun --nproc-per-node <GPUs per node>"


@dataclass(frozen=True)
class _Giver:
    source: str
    variable: str
    count: Callable[[str], int]
    launch: str


def _number(text: str) -> int:
    """The number, or the most of a range as torchrun writes one (2:4)."""
    last = text.rpartition(":")[2]
    return int(last[:9]) if last.isascii() and last.isdecimal() else 0


def _up_to(text: str) -> int:
    """How many there are at least, from the number of one of them."""
    return _number(text) + 1 if text.isascii() and text.isdecimal() else 0


def _hosts(text: str) -> int:
    try:
        hosts = json.loads(text)
    except (ValueError, RecursionError):
        return 0
    return len(hosts) if isinstance(hosts, list) else 0


_GIVERS = (
    _Giver("Kubeflow", "PET_NNODES", _number, "torchrun -m mics ..."),
    _Giver(
        "SkyPilot",
        "SKYPILOT_NUM_NODES",
        _number,
        f'{_TORCHRUN} --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" '
        '--master-addr "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" -m mics ...',
    ),
    _Giver(
        "SageMaker",
        "SM_HOSTS",
        _hosts,
        'distribution={"torch_distributed": {"enabled": True}} in the estimator',
    ),
    _Giver(
        "AWS Batch",
        "AWS_BATCH_JOB_NUM_NODES",
        _number,
        f'{_TORCHRUN} --nnodes "$AWS_BATCH_JOB_NUM_NODES" --node-rank '
        '"$AWS_BATCH_JOB_NODE_INDEX" --master-addr "<address of the main node>" -m mics ...',
    ),
    _Giver(
        "LeaderWorkerSet",
        "LWS_GROUP_SIZE",
        _number,
        f'{_TORCHRUN} --nnodes "$LWS_GROUP_SIZE" --node-rank "$LWS_WORKER_INDEX" '
        '--master-addr "$LWS_LEADER_ADDRESS" -m mics ...',
    ),
    # An Indexed Job tells its pods their number, and nobody how many there are.
    _Giver(
        "Kubernetes",
        _INDEX,
        _up_to,
        f'{_TORCHRUN} --nnodes <pods> --node-rank "$JOB_COMPLETION_INDEX" '
        "--master-addr <name of pod 0 in a headless service> -m mics ...",
    ),
    _Giver("Slurm", "SLURM_JOB_NUM_NODES", _number, "srun mics ..."),
)


def nodes_given(environment: Mapping[str, str] | None = None) -> NodesGiven | None:
    """Return who has given several nodes to this process; ``None`` if nobody has.

    For processes that no launcher has started.
    """
    env = os.environ if environment is None else environment
    for giver in _GIVERS:
        nodes = giver.count(env.get(giver.variable, ""))
        if nodes > 1:
            return NodesGiven(giver.source, nodes, giver.variable, giver.launch)
    return None


def check_nodes_given() -> None:
    """Refuse to start ranks on one of several nodes on each of which this program was started.

    Slurm starts a script on the first node only, and a shell, so there nothing is refused.

    Raises:
        TopologyError: names who gave how many, and what starts ranks on all of them.
    """
    given = nodes_given()
    if given is not None and given.source != "Slurm":
        raise TopologyError(
            f"{given.source} has given this job {_count(given)} nodes, and nobody has started "
            "ranks on them: each would train alone.",
            numbers=f"{given.told} = {os.environ[given.told][:200]}; RANK is not set.",
            write=f"{given.launch}; or unset {given.told}, to use this node alone",
        )


def _count(given: NodesGiven) -> str:
    return f"at least {given.nodes}" if given.told == _INDEX else str(given.nodes)


def apart(launch: Launch, environment: Mapping[str, str] | None = None) -> str:
    """Say that torchrun's ranks know of this node alone, where several tasks run torchrun.

    ``srun torchrun`` without ``--nnodes`` is as many jobs as there are tasks, all of them alike.
    Else nothing.
    """
    env = os.environ if environment is None else environment
    if launch.source != "torchrun" or env.get("GROUP_WORLD_SIZE") != "1":
        return ""
    outer = read_outer(env)
    if outer is None or outer.world < 2:
        return ""
    return (
        f"{outer.source} has started {outer.world} tasks, and torchrun knows of this one alone: "
        f"{outer.world} runs of {launch.world} rank(s). For one run write: torchrun --nnodes "
        f"{outer.world} --rdzv-backend c10d --rdzv-endpoint <host of one of them>:29500"
    )


def first_of_pods() -> str:
    """Say that this is pod 0 of an Indexed Job of Kubernetes, whose others are refused; else "".

    A Job of one pod has that number too, and what gives a pod its nodes says so.
    """
    told = any(giver.variable in os.environ for giver in _GIVERS if giver.variable != _INDEX)
    if told or os.environ.get(_INDEX) != "0":
        return ""
    return (
        "this is pod 0 of an Indexed Job of Kubernetes; if it has others, this pod trains alone, "
        "and they refuse to"
    )


def without_srun() -> str:
    """Say that Slurm has given more than this process, which srun has not started; else nothing.

    A shell of ``salloc`` and a batch script are such processes. A script has a task's number, 0,
    and is taken for that task where Slurm says how many there are: then it waits for the others.
    """
    given, tasks = nodes_given(), os.environ.get("SLURM_NTASKS", "1")
    of_step = any(name.startswith("SLURM_STEP") for name in os.environ)
    if of_step and not is_slurm_shell(os.environ):
        return ""
    if tasks.isdecimal() and int(tasks[:9]) > 1:
        what = f"{tasks[:9]} tasks"
    elif given is not None and given.source == "Slurm":
        what = f"{given.nodes} nodes"
    else:
        return ""
    return f"Slurm has allocated {what}, but srun has not started this process"
