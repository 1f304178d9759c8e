"""A task for SkyPilot: torchrun on every machine, told of the others by SkyPilot's variables.

Fields and variables are those of "SkyPilot YAML" and "Distributed Multi-Node Jobs" of its
documentation; ``network_tier: best`` is what asks for EFA on AWS.
"""

from __future__ import annotations

import json

from mics.errors import ConfigError
from mics.training.jobs.job import File, Job
from mics.training.jobs.network import probe
from mics.training.jobs.shell import DOCTOR, DOCTOR_PORT, PORT, block, head, variables


def render_skypilot(job: Job) -> tuple[File, ...]:
    """Write ``sky.yaml``.

    Raises:
        ConfigError: nobody has said which machine is meant.
    """
    if job.instance is None:
        raise ConfigError("SkyPilot rents machines, and none is named.", write="--node p5")
    lines = [
        *head(job, f"Start it: sky jobs launch --name {job.name} sky.yaml"),
        f"name: {job.name}",
        f"num_nodes: {job.nodes}",
        "resources:",
        "  infra: aws",
        f"  instance_type: {job.instance.name}",
        *(["  network_tier: best  # with EFA"] if job.network == "efa" else []),
        *([f"  image_id: docker:{job.container}"] if job.container else []),
        "  job_recovery:  # after a lost machine, and so often after a failure",
        f"    max_restarts_on_errors: {job.restarts}",
        "workdir: .",
        *_buckets(job),
        "envs:",
        *(f"  {n}: {json.dumps(v)}" for n, v in variables(job, MICS_JOB=job.name).items()),
        *(["setup: |", block(_setup(job), 2)] if _setup(job) else []),
        "run: |",
        block(_run(job), 2),
    ]
    return (File("sky.yaml", "\n".join(lines) + "\n"),)


def _buckets(job: Job) -> list[str]:
    lines = [
        f"  {one.target}: {{source: {one.source}, mode: MOUNT}}"
        for one in job.mounts
        if "://" in one.source
    ]
    return ["file_mounts:", *lines] if lines else []


def _setup(job: Job) -> list[str]:
    lines = []
    for one in job.mounts:
        if "://" not in one.source:  # a file system of the network: AWS' "Mounting EFS" says how
            lines += [
                f"sudo mkdir -p {one.target}",
                f"mountpoint -q {one.target} || sudo mount -t nfs4 -o nfsvers=4.1,hard "
                f"{one.source} {one.target}",
            ]
    return lines + ([] if job.container else ["pip install 'torch-mics[train]'"])


def _run(job: Job) -> list[str]:
    return [
        "set -euo pipefail",
        *probe(job),
        "head=$(echo \"$SKYPILOT_NODE_IPS\" | sed -n '1p')",
        "# All ranks are compared, and the links between them timed.",
        f"{_torchrun(job, DOCTOR_PORT)} -m {DOCTOR}",
        "# The launch. It goes on from the newest checkpoint.",
        f"{_torchrun(job, PORT)} -m {job.training()}",
    ]


def _torchrun(job: Job, port: int) -> str:
    return (
        'torchrun --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" '
        f'--nproc-per-node={job.gpus_per_node} --master-addr="$head" --master-port={port}'
    )
