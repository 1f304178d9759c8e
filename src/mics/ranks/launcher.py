"""What the launcher told this process: rank, world and the ranks of this node.

torchrun, Slurm, MPI and others each use variables of their own; this is the one place they are
read. What they say is checked before anybody is waited for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mics.errors import MicsError, TopologyError

MOST_LOCAL_RANKS = 1024
"""More are not started on one machine: each is a process of some hundred megabytes."""


@dataclass(frozen=True)
class Launch:
    """Where this process stands, and who said so.

    ``knows_nodes`` is false where nobody said how many ranks share a node: all of them, we guess.
    """

    source: str
    rank: int
    world: int
    local_rank: int
    ranks_per_node: int
    knows_nodes: bool = True

    @property
    def one_node(self) -> bool:
        """Whether the launcher has said that all ranks are of this machine."""
        return self.world == 1 or (self.knows_nodes and self.ranks_per_node == self.world)


_INTEGER = re.compile(r"-?[0-9]{1,30}")

Names = tuple[str, str, str, str]
"""The variables of a launcher: rank, world, local rank, ranks of the node."""

_MOST_RANKS = 2**20
"""More than any job has."""

AGENT_GENERATION = "MICS_GENERATION"
"""What the agents of ``mics run`` add to torchrun's variables: how many times all ranks began."""

FULL_WORLD = "MICS_FULL_WORLD"
"""The same, of the ranks of the full job: more than the world while nodes of it are lost."""

_TORCHRUN: Names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SLURM: Names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE")
_FLUX: Names = ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "FLUX_JOB_NNODES")
# An inner launcher knows better than the allocation it runs in, so Slurm and Flux come last.
_MPI: dict[str, Names] = {
    "LSF": (
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
    ),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MVAPICH2": (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    "MVAPICH": (
        "MVP_COMM_WORLD_RANK",
        "MVP_COMM_WORLD_SIZE",
        "MVP_COMM_WORLD_LOCAL_RANK",
        "MVP_COMM_WORLD_LOCAL_SIZE",
    ),
}
_HYDRA: Names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_CRAY: Names = ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
# What some say of a rank, beside variables of MPI that a program without MPI is not given.
_WITHOUT_SIZE = {"PMIx": "PMIX_RANK", "PALS": "PALS_RANKID", "ALPS": "ALPS_APP_PE"}
_NAMES = _MPI | {
    "torchrun": _TORCHRUN,
    "mics run": _TORCHRUN,
    "Slurm": _SLURM,
    "Flux": _FLUX,
    "MPICH": _HYDRA,
    "Cray MPICH": _CRAY,
}


def read_launch(environment: Mapping[str, str] | None = None) -> Launch | None:
    """Read the launcher's variables; ``None`` when no launcher started this process.

    torchrun wins over MPI, MPI over Slurm: an inner launcher knows better than the allocation.

    Raises:
        TopologyError: a launcher is recognised but its variables are incomplete, make no sense or
            contradict each other, or nodes differ.
    """
    env = os.environ if environment is None else environment
    launch = _told(env)
    if launch is not None:
        _check(launch)
    return launch


def read_outer(environment: Mapping[str, str]) -> Launch | None:
    """What MPI or a scheduler says of this process, whoever else has started ranks inside of it.

    Nobody, where that makes no sense, and in a script or shell that is none of several tasks.
    """
    try:
        launch = _mpi(environment) or _pmi(environment)
        if launch is None and any(name.startswith("SLURM_STEP") for name in environment):
            launch = _scheduler(environment)
    except TopologyError:
        return None
    return launch


def ranks_per_node_told() -> int | None:
    """Ranks per node as the launcher tells it, right or wrong; ``None`` if there was no launcher.

    For ranks that have met: what one of them complains of alone, the others would wait for. Some
    tools start processes with a half of torchrun's variables, and bring them together themselves.
    """
    launch = _told(os.environ, met=True)
    return None if launch is None else launch.ranks_per_node


def _told(env: Mapping[str, str], *, met: bool = False) -> Launch | None:
    if "RANK" in env and "WORLD_SIZE" in env:
        return _torchrun(env)
    launch = _mpi(env) or _pmi(env) or _scheduler(env)
    if met:
        return launch
    _check_half_of_torchrun(env, launch)
    for source, rank in _WITHOUT_SIZE.items():
        if launch is None and rank in env:
            raise TopologyError(
                f"{source} started this process, but nothing says how many others it has started.",
                numbers=f"{rank} = {env[rank][:80]}; there is no size beside it.",
                write="mpirun, srun or torchrun ... mics ...",
            )
    return launch


def full_world(world: int) -> int:
    """The number of ranks of the full job, of which ``world`` are there.

    Raises:
        TopologyError: the variable that says it is no number.
    """
    text = os.environ.get(FULL_WORLD, "")
    if not text:
        return world
    if not text.isdecimal() or not 0 < int(text[:9]) < 2**24:
        raise TopologyError(
            f"{FULL_WORLD} is the number of ranks that the job has when none are away.",
            numbers=f"It is {text!r}, and {world} are there.",
            write=f"export {FULL_WORLD}=<ranks of the full job>, or unset it",
        )
    return int(text)


def takes_new_nodes(environment: Mapping[str, str] | None = None) -> bool:
    """Whether a node that comes in place of a lost one can join ranks that begin again.

    torchrun's agents share one store with their ranks, and tell in their first round only where it
    is, so a new agent waits in vain (``next_rendezvous`` of torch 2.13's dynamic_rendezvous.py).
    """
    env = os.environ if environment is None else environment
    begins_again = env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and AGENT_GENERATION not in env
    several = env.get("GROUP_WORLD_SIZE", "1") != "1"
    return not (begins_again and several and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def is_first_rank() -> bool:
    """Tell whether this process is rank 0 of its launcher, or has none."""
    try:
        launch = read_launch()
    except MicsError:  # variables that make no sense are every rank's to complain of
        return True
    return launch is None or launch.rank == 0


def more_ranks(launch: Launch, wanted: int) -> str:
    """Return what to write for another number of ranks than the launcher has started."""
    nodes = max(1, launch.world // launch.ranks_per_node)
    if launch.source == "Slurm":  # a job of one task may have many nodes
        allocated = os.environ.get("SLURM_JOB_NUM_NODES", "")
        nodes = max(nodes, int(allocated[:9]) if allocated.isdecimal() else 1)
    each = wanted // nodes if wanted % nodes == 0 else "<GPUs per node>"
    if launch.source == "Slurm":
        # The job's own number of tasks would win over tasks per node.
        return f"srun --ntasks-per-node={each} --ntasks={wanted} mics ..."
    if launch.source == "torchrun":
        return f"torchrun --nproc-per-node {each} -m mics ..."
    if launch.source == "mics run":
        return f"mics run --ranks-per-node {each} ... -- mics ..."
    return f"mpirun -n {wanted} mics ..."


# -- launchers -----------------------------------------------------------------------------------


def _torchrun(env: Mapping[str, str]) -> Launch:
    rank, world = _integer(env, "RANK", "torchrun"), _integer(env, "WORLD_SIZE", "torchrun")
    knows_nodes = "LOCAL_WORLD_SIZE" in env
    local_world = _integer(env, "LOCAL_WORLD_SIZE", "torchrun") if knows_nodes else world
    if "LOCAL_RANK" in env:
        local_rank = _integer(env, "LOCAL_RANK", "torchrun")
    else:
        local_rank = rank % max(1, local_world)
    source = "mics run" if AGENT_GENERATION in env else "torchrun"
    return Launch(source, rank, world, local_rank, local_world, knows_nodes)


def _mpi(env: Mapping[str, str]) -> Launch | None:
    for source, names in _MPI.items():
        if names[0] in env and names[1] in env:
            return _read(env, source, names)
    return None


def _pmi(env: Mapping[str, str]) -> Launch | None:
    """Read PMI's variables, which MPICH's launcher sets, a Cray's, and Slurm's and Flux' too."""
    if "PMI_RANK" not in env or "PMI_SIZE" not in env:
        return None
    if "MPI_LOCALRANKID" not in env:  # this one is MPICH's launcher's alone
        for rank, world, *_ in (_SLURM, _FLUX):
            if (env.get(rank), env.get(world)) == (env["PMI_RANK"], env["PMI_SIZE"]):
                return None
        if "PMI_LOCAL_RANK" in env:
            return _read(env, "Cray MPICH", _CRAY)
    return _read(env, "MPICH", _HYDRA)


def _scheduler(env: Mapping[str, str]) -> Launch | None:
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env and not is_slurm_shell(env):
        return _slurm(env)
    if "FLUX_TASK_RANK" in env and "FLUX_JOB_SIZE" in env:
        return _flux(env)
    return None


def is_slurm_shell(env: Mapping[str, str]) -> bool:
    """Whether this is the shell of ``salloc``, a step with a number of its own (slurm.h)."""
    return env.get("SLURM_STEP_ID") == "4294967290"


def _read(env: Mapping[str, str], source: str, names: Names) -> Launch:
    rank, world, local_rank, ranks_per_node = (_integer(env, name, source) for name in names)
    return Launch(source, rank, world, local_rank, ranks_per_node)


def _slurm(env: Mapping[str, str]) -> Launch:
    layout = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", layout)
    if not counts:
        raise TopologyError(
            "Slurm does not say how many ranks each node has.",
            numbers=f"SLURM_TASKS_PER_NODE = {layout!r}.",
            write="srun --ntasks-per-node=<GPUs per node> ...",
        )
    if len(set(counts)) > 1:
        raise TopologyError(
            "Slurm gave the nodes different numbers of ranks; partition groups need equal nodes.",
            numbers=f"SLURM_TASKS_PER_NODE = {layout}.",
            write=f"srun --ntasks-per-node={min(map(int, counts))} ...",
        )
    rank, world, local_rank = (_integer(env, name, "Slurm") for name in _SLURM[:3])
    return Launch("Slurm", rank, world, local_rank, int(counts[0]))


def _flux(env: Mapping[str, str]) -> Launch:
    rank, world, local_rank, nodes = (_integer(env, name, "Flux") for name in _FLUX)
    if nodes < 1 or world % nodes:
        raise TopologyError(
            "Flux gave the nodes different numbers of ranks; partition groups need equal nodes.",
            numbers=f"FLUX_JOB_SIZE = {world}, FLUX_JOB_NNODES = {nodes}.",
            write="flux run --tasks-per-node=<GPUs per node> ...",
        )
    return Launch("Flux", rank, world, local_rank, world // nodes)


# -- what makes no sense -------------------------------------------------------------------------


def _check(launch: Launch) -> None:
    rank, world, *_ = _NAMES[launch.source]
    wrong = ""
    if launch.world < 1:
        wrong = f"{world} must be at least 1"
    elif launch.world > _MOST_RANKS:
        wrong = f"{world} must be at most {_MOST_RANKS:,}"
    elif not 0 <= launch.rank < launch.world:
        wrong = f"{rank} must be 0 to {launch.world - 1}, one for each of {launch.world} ranks"
    _refuse(launch, wrong)


def check_place(launch: Launch) -> None:
    """Check what the launcher has said of this rank's node.

    For ranks that have not met yet: those that have compare it, and say more of it.

    Raises:
        TopologyError: it makes no sense; it names the variables.
    """
    rank, _, local_rank, of_node = _NAMES[launch.source]
    wrong = ""
    if not 1 <= launch.ranks_per_node <= launch.world:
        wrong = f"{of_node} says that a node has {launch.ranks_per_node} of {launch.world} ranks"
    elif not 0 <= launch.local_rank < launch.ranks_per_node:
        wrong = f"{local_rank} must be 0 to {launch.ranks_per_node - 1} on a node of that many"
    elif launch.local_rank > launch.rank:
        wrong = f"{local_rank} is larger than {rank}, but no rank of a node comes before rank 0"
    _refuse(launch, wrong)


def _refuse(launch: Launch, wrong: str) -> None:
    rank, world, local_rank, _ = _NAMES[launch.source]
    if wrong:
        raise TopologyError(
            f"{launch.source}'s variables make no sense: {wrong}.",
            numbers=f"{rank} = {launch.rank}, {world} = {launch.world}, {local_rank} = "
            f"{launch.local_rank}, ranks of this node = {launch.ranks_per_node}.",
            write="the launcher's own variables, or unset those that were exported by hand",
        )


def _check_half_of_torchrun(env: Mapping[str, str], launch: Launch | None) -> None:
    """Refuse one of RANK and WORLD_SIZE alone, which would be N runs of one rank each."""
    for name, other, said in (
        ("RANK", "WORLD_SIZE", launch and launch.rank),
        ("WORLD_SIZE", "RANK", launch and launch.world),
    ):
        if name not in env:
            continue
        value = _integer(env, name, "torchrun")
        if launch is None and (name, value) != ("WORLD_SIZE", 1):
            raise TopologyError(
                f"{name} is set but {other} is not: this is half of what torchrun says.",
                numbers=f"{name} = {value}.",
                write=f"export {other}=... as well, or unset {name}",
            )
        if launch is not None and value != said:
            raise TopologyError(
                f"{name} contradicts {launch.source}, which started this process.",
                numbers=f"{name} = {value}, {launch.source} says {said}.",
                write=f"unset {name}",
            )


def _integer(env: Mapping[str, str], name: str, source: str) -> int:
    if name not in env:
        raise TopologyError(
            f"{source} started this process but {name} is not set.", write=f"export {name}=..."
        )
    if not _INTEGER.fullmatch(env[name]):  # int() takes more: blanks, 1_0, digits of any script
        raise TopologyError(f"{name} must be an integer, got {env[name][:80]!r}.")
    return int(env[name])
