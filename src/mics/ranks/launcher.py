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


Names = tuple[str, str, str, str]
"""The variables of a launcher: rank, world, local rank, ranks of the node."""

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
    if launch is None and "PMIX_RANK" in env:
        raise TopologyError(
            "PMIx started this process, but nothing says how many others it has started.",
            numbers=f"PMIX_RANK = {env['PMIX_RANK']}; there is no size beside it.",
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


def allocated_tasks() -> int:
    """Tasks of a Slurm allocation in whose shell this process was started, without srun; else 0."""
    tasks = os.environ.get("SLURM_NTASKS", "")
    return int(tasks) if tasks.isdecimal() and "SLURM_PROCID" not in os.environ else 0


def more_ranks(launch: Launch, wanted: int) -> str:
    """Return what to write for another number of ranks than the launcher has started."""
    if launch.source == "Slurm":
        nodes = max(1, launch.world // launch.ranks_per_node)
        each = wanted // nodes if wanted % nodes == 0 else "<GPUs per node>"
        return f"srun --ntasks-per-node={each} mics ..."
    if launch.source == "torchrun":
        return f"torchrun --nproc-per-node {wanted} -m mics ..."
    if launch.source == "mics run":
        nodes = max(1, launch.world // launch.ranks_per_node)
        each = wanted // nodes if wanted % nodes == 0 else "<GPUs per node>"
        return f"mics run --ranks-per-node {each} ... -- mics ..."
    return f"mpirun -n {wanted} mics ..."


def export_torch_variables(launch: Launch) -> None:
    """Set the variables ``torch.distributed`` reads, where the launcher did not.

    Raises:
        TopologyError: the address of rank 0 is unknown, or its port is none.
    """
    os.environ.setdefault("RANK", str(launch.rank))
    os.environ.setdefault("WORLD_SIZE", str(launch.world))
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    if launch.knows_nodes:
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(launch.ranks_per_node))
    if not os.environ.get("MASTER_ADDR"):
        os.environ["MASTER_ADDR"] = _master_address(launch)
    if not os.environ.get("MASTER_PORT"):
        # One port per Slurm job, so that two jobs on one node do not meet.
        job = _integer(os.environ, "SLURM_JOB_ID", "Slurm") if "SLURM_JOB_ID" in os.environ else 0
        os.environ["MASTER_PORT"] = str(29500 + job % 10000)
    _check_port(os.environ["MASTER_PORT"])


def _check_port(text: str) -> None:
    if not text.isdecimal() or not 0 < int(text[:9]) < 2**16:
        raise TopologyError(
            "MASTER_PORT is no port that rank 0 could listen on.",
            numbers=f"MASTER_PORT = {text!r}; ports are 1 to 65535.",
            write="export MASTER_PORT=29500",
        )


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
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        return _slurm(env)
    if "FLUX_TASK_RANK" in env and "FLUX_JOB_SIZE" in env:
        return _flux(env)
    return None


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


def _master_address(launch: Launch) -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes and not launch.one_node:
        return first_host(nodes)
    if launch.one_node:
        return "127.0.0.1"
    raise TopologyError(
        f"{launch.source} does not say where rank 0 listens.",
        numbers=f"{launch.world} ranks, "
        + (f"{launch.ranks_per_node} per node, " if launch.knows_nodes else "")
        + "MASTER_ADDR is not set.",
        write="export MASTER_ADDR=<host of rank 0>",
    )


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: ``gpu[07-09,12],x`` is ``gpu07``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodelist.strip())
    if match is None:
        raise TopologyError(
            "Slurm's node list is empty.", write="export MASTER_ADDR=<host of rank 0>"
        )
    return match[1] + (match[2] or "") + match[3]


def _integer(env: Mapping[str, str], name: str, source: str) -> int:
    try:
        return int(env[name])
    except KeyError:
        raise TopologyError(
            f"{source} started this process but {name} is not set.", write=f"export {name}=..."
        ) from None
    except ValueError:
        raise TopologyError(f"{name} must be an integer, got {env[name]!r}.") from None
