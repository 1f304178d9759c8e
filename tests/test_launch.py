"""Reading what torchrun, Slurm and MPI say."""

from __future__ import annotations

import os

import pytest

from mics import TopologyError
from mics.ranks.address import export_torch_variables, first_host
from mics.ranks.launcher import Launch, check_place, more_ranks, read_launch, takes_new_nodes
from mics.ranks.nodes_given import (
    apart,
    check_nodes_given,
    first_of_pods,
    nodes_given,
    without_srun,
)

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_TASKS_PER_NODE": "8(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "8"}
HYDRA = PMI | {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
CRAY = PMI | {"PMI_LOCAL_RANK": "3", "PMI_LOCAL_SIZE": "4"}
FLUX = {"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "3"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}


def of_mpi(prefix: str) -> dict[str, str]:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return {f"{prefix}_{name}": value for name, value in zip(names, "3814", strict=True)}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        pytest.param(TORCHRUN, Launch("torchrun", 5, 8, 1, 4), id="torchrun"),
        pytest.param(
            TORCHRUN | {"MICS_GENERATION": "2"}, Launch("mics run", 5, 8, 1, 4), id="mics run"
        ),
        pytest.param(
            {"RANK": "3", "WORLD_SIZE": "4"},
            Launch("torchrun", 3, 4, 3, 4, knows_nodes=False),
            id="by hand, Kubernetes",
        ),
        pytest.param(SLURM, Launch("Slurm", 9, 16, 1, 8), id="srun"),
        pytest.param(SRUN | PMI, Launch("Slurm", 3, 8, 3, 4), id="srun --mpi=pmi2"),
        pytest.param(SRUN | CRAY, Launch("Slurm", 3, 8, 3, 4), id="srun on a Cray"),
        pytest.param(SRUN | {"PMIX_RANK": "3"}, Launch("Slurm", 3, 8, 3, 4), id="srun --mpi=pmix"),
        pytest.param(
            BATCH | {"SLURM_TASKS_PER_NODE": "4(x2)"} | HYDRA,
            Launch("MPICH", 3, 8, 1, 2),
            id="mpiexec in an allocation",
        ),
        pytest.param(OPEN_MPI, Launch("Open MPI", 3, 4, 1, 2), id="Open MPI"),
        pytest.param(
            OPEN_MPI | {"PMIX_RANK": "3"}, Launch("Open MPI", 3, 4, 1, 2), id="Open MPI 5"
        ),
        pytest.param(HYDRA, Launch("MPICH", 3, 8, 1, 2), id="MPICH, Intel MPI"),
        pytest.param(CRAY, Launch("Cray MPICH", 3, 8, 3, 4), id="mpiexec on a Cray"),
        pytest.param(of_mpi("MV2_COMM_WORLD"), Launch("MVAPICH2", 3, 8, 1, 4), id="MVAPICH2"),
        pytest.param(of_mpi("MVP_COMM_WORLD"), Launch("MVAPICH", 3, 8, 1, 4), id="MVAPICH 3"),
        pytest.param(
            of_mpi("JSM_NAMESPACE") | OPEN_MPI, Launch("LSF", 3, 8, 1, 4), id="jsrun of LSF"
        ),
        pytest.param(
            FLUX | PMI | {"FLUX_JOB_NNODES": "2"}, Launch("Flux", 3, 8, 3, 4), id="flux run"
        ),
        pytest.param({"WORLD_SIZE": "1"}, None, id="a world of one"),
        pytest.param({"SLURM_NTASKS": "8"}, None, id="the shell of salloc"),
        pytest.param(
            SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},
            None,
            id="the shell of salloc as a step",
        ),
        pytest.param(
            {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NUM_NODES": "2"},
            None,
            id="a batch script that asked for nodes alone",
        ),
        # As Slurm 22.05 and MPICH 4.0.2 set them on this project's machines.
        pytest.param(
            SRUN
            | {"SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_TASKS": "8"}
            | {"SLURM_NPROCS": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NNODES": "2"}
            | PMI
            | {"PMI_FD": "11", "PMI_JOBID": "3.2"},
            Launch("Slurm", 3, 8, 3, 4),
            id="srun --mpi=pmi2, all of it",
        ),
        pytest.param(HYDRA | {"PMI_FD": "6"}, Launch("MPICH", 3, 8, 1, 2), id="mpiexec.hydra"),
        pytest.param(
            CRAY | {"PALS_RANKID": "3", "PALS_NODEID": "0", "PALS_LOCAL_RANKID": "3"},
            Launch("Cray MPICH", 3, 8, 3, 4),
            id="mpiexec of PALS",
        ),
        pytest.param(
            TORCHRUN
            | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "1"}
            | {"GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "none"},
            Launch("torchrun", 5, 8, 1, 4),
            id="Kubeflow's TrainJob",
        ),
        pytest.param(
            TORCHRUN | {"NODE_RANK": "1", "ACCELERATE_TORCH_DEVICE": "cpu"},
            Launch("torchrun", 5, 8, 1, 4),
            id="Ray Train",
        ),
        pytest.param(
            TORCHRUN | {"SM_HOSTS": '["algo-1", "algo-2"]', "SM_CURRENT_HOST": "algo-2"},
            Launch("torchrun", 5, 8, 1, 4),
            id="SageMaker with torch_distributed",
        ),
        pytest.param(
            OPEN_MPI | {"SM_HOSTS": '["algo-1", "algo-2"]', "SM_NUM_GPUS": "2"},
            Launch("Open MPI", 3, 4, 1, 2),
            id="SageMaker with MPI",
        ),
        pytest.param(
            SRUN | TORCHRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"},
            Launch("torchrun", 5, 8, 1, 4),
            id="torchrun started by srun",
        ),
        pytest.param({}, None, id="nobody"),
    ],
)
def test_each_launcher_is_recognised_by_its_own_variables(
    environment: dict[str, str], launch: Launch | None
) -> None:
    assert read_launch(environment) == launch


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (TORCHRUN | {"RANK": "-1"}, "RANK must be 0 to 7, one for each of 8 ranks"),
        (TORCHRUN | {"RANK": "8"}, "RANK must be 0 to 7, one for each of 8 ranks"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1"),
        (TORCHRUN | {"WORLD_SIZE": "9" * 20}, "WORLD_SIZE must be at most 1,048,576"),
        (TORCHRUN | {"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be an integer, got '9999"),
        (TORCHRUN | {"WORLD_SIZE": "1_6"}, "WORLD_SIZE must be an integer, got '1_6'"),
        (TORCHRUN | {"RANK": " 1"}, "RANK must be an integer, got ' 1'"),
        (TORCHRUN | {"RANK": ""}, "RANK must be an integer, got ''"),
        (TORCHRUN | {"RANK": "1.0"}, "RANK must be an integer, got '1.0'"),
        (TORCHRUN | {"WORLD_SIZE": "abc"}, "WORLD_SIZE must be an integer, got 'abc'"),
        (of_mpi("MV2_COMM_WORLD") | {"MV2_COMM_WORLD_SIZE": "0"}, "MV2_COMM_WORLD_SIZE must be"),
        (SLURM | {"SLURM_LOCALID": "8"}, "SLURM_LOCALID must be 0 to 7 on a node of that many"),
        (FLUX | {"FLUX_JOB_NNODES": "0"}, "Flux gave the nodes different numbers of ranks"),
        ({"PALS_RANKID": "3"}, "PALS started this process, but nothing says how many"),
        ({"ALPS_APP_PE": "3"}, "ALPS started this process, but nothing says how many"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK must be 0 to 3 on a node of that many"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK must be 0 to 3 on a node of that many"),
        (TORCHRUN | {"RANK": "0"}, "LOCAL_RANK is larger than RANK"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE says that a node has 0 of 8"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE says that a node has 9 of 8"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK must be 0 to 3"),
        (SLURM | {"SLURM_PROCID": "16"}, "SLURM_PROCID must be 0 to 15"),
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not: this is half of what torchrun says"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        (SLURM | {"WORLD_SIZE": "8"}, "WORLD_SIZE contradicts Slurm"),
        (SLURM | {"RANK": "0"}, "RANK contradicts Slurm"),
        ({"PMIX_RANK": "1"}, "PMIx started this process, but nothing says how many"),
        (FLUX | {"FLUX_JOB_NNODES": "3"}, "Flux gave the nodes different numbers of ranks"),
        (PMI, "MPICH started this process but MPI_LOCALRANKID is not set"),
    ],
)
def test_variables_that_make_no_sense_are_refused_by_name(
    environment: dict[str, str], words: str
) -> None:
    with pytest.raises(TopologyError) as caught:
        launch = read_launch(environment)
        assert launch is not None
        check_place(launch)
    assert words in str(caught.value)


@pytest.mark.parametrize("port", ["http", "0", "99999", "-1", "1" * 30, "29500 "])
def test_what_is_no_port_is_refused_before_anybody_is_waited_for(
    port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (TORCHRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    launch = read_launch()
    assert launch is not None
    with pytest.raises(TopologyError, match="MASTER_PORT is no port") as caught:
        export_torch_variables(launch)
    assert f"MASTER_PORT = {port!r}; ports are 1 to 65535." in str(caught.value)
    assert "Write: export MASTER_PORT=29500" in str(caught.value)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:29500", "http://node1", "a b", "node1,node2", "-", "[::1", "x" * 300]
)
def test_what_is_no_host_is_refused_before_anybody_is_waited_for(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (TORCHRUN | {"MASTER_ADDR": host, "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    launch = read_launch()
    assert launch is not None
    with pytest.raises(TopologyError, match="MASTER_ADDR is no host") as caught:
        export_torch_variables(launch)
    assert "the port is MASTER_PORT's" in str(caught.value)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "node-1.cluster.local", "gpu_7", "::1", "fe80::1%eth0"]
)
def test_hosts_are_names_and_addresses(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TORCHRUN | {"MASTER_ADDR": host, "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    launch = read_launch()
    assert launch is not None
    export_torch_variables(launch)


@pytest.mark.parametrize(
    ("launch", "wanted", "words"),
    [
        (Launch("Slurm", 0, 1, 0, 1), 64, "srun --ntasks-per-node=64 --ntasks=64 mics"),
        (Launch("Slurm", 0, 8, 0, 4), 64, "srun --ntasks-per-node=32 --ntasks=64 mics"),
        (Launch("Slurm", 0, 12, 0, 4), 64, "srun --ntasks-per-node=<GPUs per node> --ntasks=64"),
        (Launch("torchrun", 0, 1, 0, 1), 64, "torchrun --nproc-per-node 64 -m mics"),
        (Launch("torchrun", 0, 8, 0, 4), 64, "torchrun --nproc-per-node 32 -m mics"),
        (Launch("mics run", 0, 8, 0, 4), 64, "mics run --ranks-per-node 32 ... -- mics"),
        (Launch("Open MPI", 0, 1, 0, 1), 64, "mpirun -n 64 mics"),
    ],
)
def test_more_ranks_are_the_launchers_to_start(
    launch: Launch, wanted: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    assert more_ranks(launch, wanted).startswith(words)


def test_a_slurm_job_of_one_task_is_told_of_all_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "8")
    told = more_ranks(Launch("Slurm", 0, 1, 0, 1), 64)
    assert told == "srun --ntasks-per-node=8 --ntasks=64 mics ..."


# -- nodes without a launcher --------------------------------------------------------------------

SKY = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
}


@pytest.mark.parametrize(
    ("environment", "source", "words"),
    [
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "Kubeflow", "Write: torchrun -m mics ...;"),
        ({"PET_NNODES": "1:4"}, "Kubeflow", "has given this job 4 nodes"),
        (SKY, "SkyPilot", '--nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK"'),
        ({"SM_HOSTS": '["algo-1", "algo-2"]'}, "SageMaker", '"torch_distributed": {"enabled"'),
        ({"AWS_BATCH_JOB_NUM_NODES": "4"}, "AWS Batch", '"$AWS_BATCH_JOB_NODE_INDEX"'),
        ({"LWS_GROUP_SIZE": "4"}, "LeaderWorkerSet", '--node-rank "$LWS_WORKER_INDEX"'),
        ({"JOB_COMPLETION_INDEX": "2"}, "Kubernetes", "has given this job at least 3 nodes"),
    ],
)
def test_nodes_on_which_nobody_has_started_ranks_do_not_train_alone(
    environment: dict[str, str], source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_launch(environment) is None
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TopologyError) as caught:
        check_nodes_given()
    assert str(caught.value).startswith(f"{source} has given this job ")
    assert words in str(caught.value)
    assert f"unset {next(iter(environment))}" in str(caught.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PET_NNODES": "1"},
        {"PET_NNODES": "two"},
        {"SKYPILOT_NUM_NODES": "1"},
        {"SM_HOSTS": '["algo-1"]'},
        {"SM_HOSTS": "[" * 100_000},
        {"SM_HOSTS": "7"},
        {"JOB_COMPLETION_INDEX": "0"},
        {"JOB_COMPLETION_INDEX": "first"},
    ],
)
def test_one_node_is_one_node(environment: dict[str, str]) -> None:
    assert nodes_given(environment) is None


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ""),
        ({"SLURM_NTASKS": "8"}, "Slurm has allocated 8 tasks, but srun has not started this"),
        ({"SLURM_JOB_NUM_NODES": "2"}, "Slurm has allocated 2 nodes, but srun has not"),
        (
            {"SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            "Slurm has allocated 2 nodes, but srun has not",
        ),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290"}, "Slurm has allocated 8 tasks"),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, ""),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}, ""),
    ],
)
def test_a_process_that_srun_has_not_started_is_told_so(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = without_srun()
    assert said.startswith(words) and bool(said) == bool(words)


@pytest.mark.parametrize(
    ("environment", "is_said"),
    [
        ({"JOB_COMPLETION_INDEX": "0"}, True),
        ({"JOB_COMPLETION_INDEX": "0", "PET_NNODES": "1"}, False),  # Kubeflow's TrainJob
        ({"JOB_COMPLETION_INDEX": "1"}, False),  # it is refused
        ({}, False),
    ],
)
def test_the_first_pod_of_an_indexed_job_says_that_it_may_be_alone(
    environment: dict[str, str], is_said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert bool(first_of_pods()) == is_said


def test_torchrun_inside_a_slurm_job_wins() -> None:
    launch = read_launch(SLURM | TORCHRUN)
    assert launch is not None and launch.source == "torchrun"


ALONE = TORCHRUN | {"GROUP_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("outer", "source"),
    [
        (SLURM | {"SLURM_STEP_ID": "0"}, "Slurm"),
        (OPEN_MPI, "Open MPI"),
        (SLURM, ""),  # the script of a job, which srun has not started
        (SLURM | {"SLURM_STEP_ID": "4294967290"}, ""),  # the shell of salloc
        (SLURM | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, ""),
        ({}, ""),
    ],
)
def test_a_torchrun_in_each_of_several_tasks_is_told_that_it_is_alone(
    outer: dict[str, str], source: str
) -> None:
    launch = read_launch(ALONE | outer)
    assert launch is not None
    said = apart(launch, ALONE | outer)
    assert said.startswith(f"{source} has started") if source else said == ""
    assert apart(launch, ALONE | outer | {"GROUP_WORLD_SIZE": "2"}) == ""


def test_ragged_slurm_nodes_are_refused_with_their_sizes() -> None:
    with pytest.raises(TopologyError) as error:
        read_launch(SLURM | {"SLURM_TASKS_PER_NODE": "8,4"})
    message = str(error.value)
    assert "different numbers of ranks" in message
    assert "SLURM_TASKS_PER_NODE = 8,4" in message
    assert "Write: srun --ntasks-per-node=4" in message


def test_missing_and_malformed_variables_are_named() -> None:
    incomplete = {k: v for k, v in OPEN_MPI.items() if "LOCAL_SIZE" not in k}
    with pytest.raises(TopologyError, match="OMPI_COMM_WORLD_LOCAL_SIZE is not set"):
        read_launch(incomplete)
    with pytest.raises(TopologyError, match="RANK must be an integer, got 'zero'"):
        read_launch(TORCHRUN | {"RANK": "zero"})
    with pytest.raises(TopologyError, match="how many ranks each node has"):
        read_launch({k: v for k, v in SLURM.items() if "TASKS_PER_NODE" not in k})


def test_an_unknown_address_of_rank_0_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what is exported here is taken back at the end.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
    for name in ("MASTER_ADDR", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TopologyError) as error:
        export_torch_variables(Launch("Open MPI", 0, 8, 0, 4))
    assert "Open MPI does not say where rank 0 listens" in str(error.value)
    assert "8 ranks, 4 per node" in str(error.value)
    assert "Write: export MASTER_ADDR=<host of rank 0>" in str(error.value)
    with pytest.raises(TopologyError, match="node list is empty"):
        first_host("")


def test_ranks_started_by_hand_must_say_where_rank_0_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is exported is taken back at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch = read_launch()
    assert launch is not None
    with pytest.raises(TopologyError, match="torchrun does not say where rank 0 listens") as caught:
        export_torch_variables(launch)
    assert "2 ranks, MASTER_ADDR is not set." in str(caught.value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu[07-09,12],x1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("a1,b2", "a1"),
        ("rack2-node[01-04]-ib", "rack2-node01-ib"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


OF_AGENTS = {
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, False),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, True),
        ({"GROUP_WORLD_SIZE": "1"}, True),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, True),
        ({"MICS_GENERATION": "1"}, True),
    ],
)
def test_torchruns_store_keeps_new_nodes_out(changes: dict[str, str], takes: bool) -> None:
    assert takes_new_nodes(OF_AGENTS | changes) is takes
    assert takes_new_nodes({})
