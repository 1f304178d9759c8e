"""A cluster of AWS ParallelCluster, and the batch script that runs on it.

Fields are those of its "Cluster configuration file": a head node, one queue of Slurm with EFA in a
placement group, and Lustre that all nodes share.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from mics.errors import ConfigError
from mics.training.jobs.job import File, Job
from mics.training.jobs.shell import head
from mics.training.jobs.slurm import render_slurm

_HEAD_NODE = "m6i.2xlarge"


def render_parallelcluster(job: Job) -> tuple[File, ...]:
    """Write ``cluster.yaml`` and ``job.sbatch``.

    Raises:
        ConfigError: nobody has said which nodes.
    """
    if job.instance is None:
        raise ConfigError("A cluster is made of nodes, and none is named.", write="--node p5")
    shared = PurePosixPath("/", job.folder.parts[1])
    lines = [
        *head(
            job,
            f"Fill in what is <so>, and: pcluster create-cluster --cluster-name {job.name} "
            "--cluster-configuration cluster.yaml",
        ),
        "Region: <us-east-1>",
        "Image:",
        "  Os: ubuntu2204",
        "HeadNode:",
        f"  InstanceType: {_HEAD_NODE}",
        "  Networking:",
        "    SubnetId: <subnet-11111111111111111>",
        "  Ssh:",
        "    KeyName: <key>",
        "Scheduling:",
        "  Scheduler: slurm",
        "  SlurmQueues:",
        f"    - Name: {job.queue}",
        "      Networking:",
        "        SubnetIds:",
        "          - <subnet-22222222222222222>",
        "        PlacementGroup:",
        "          Enabled: true",
        "      ComputeResources:",
        f"        - Name: {job.instance.name.split('.')[0]}",
        f"          InstanceType: {job.instance.name}",
        "          MinCount: 0",
        f"          MaxCount: {job.nodes}",
        "          DisableSimultaneousMultithreading: true",
        *_efa(job),
        "SharedStorage:",
        f"  - MountDir: {shared}",
        "    Name: shared",
        "    StorageType: FsxLustre",
        "    FsxLustreSettings:",
        "      StorageCapacity: 4800",
        "      DeploymentType: PERSISTENT_2",
        "      PerUnitStorageThroughput: 250",
        "      DeletionPolicy: Retain",
    ]
    return (File("cluster.yaml", "\n".join(lines) + "\n"), *render_slurm(job))


def _efa(job: Job) -> list[str]:
    return ["          Efa:", "            Enabled: true"] if job.network == "efa" else []
