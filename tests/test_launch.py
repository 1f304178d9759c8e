"""Reading what torchrun, Slurm and MPI say."""

from __future__ import annotations

import pytest

from mics import TopologyError
from mics.ranks.launcher import Launch, export_torch_variables, first_host, read_launch

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


def test_each_launcher_is_recognised_by_its_own_variables() -> None:
    assert read_launch(TORCHRUN) == Launch("torchrun", 5, 8, 1, 4)
    assert read_launch(SLURM) == Launch("Slurm", 9, 16, 1, 8)
    assert read_launch(OPEN_MPI) == Launch("Open MPI", 3, 4, 1, 2)
    mpich = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    assert read_launch(mpich) == Launch("MPICH", 0, 2, 0, 2)
    assert read_launch({}) is None


def test_torchrun_inside_a_slurm_job_wins() -> None:
    launch = read_launch(SLURM | TORCHRUN)
    assert launch is not None and launch.source == "torchrun"


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
