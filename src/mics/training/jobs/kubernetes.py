"""A TrainJob of Kubeflow Trainer, with the runtime that it runs in and its configuration.

Fields are those of ``trainer.kubeflow.org/v1alpha1`` as published with Kubeflow Trainer 2.3, which
sets torchrun's PET_* variables in every pod. A runtime of its own says what a TrainJob cannot:
restarts of all pods, the time that a pod may take to save, and shared memory. EFA and huge pages
are resources of a pod (AWS' "Run machine learning training on Amazon EKS with Elastic Fabric
Adapter").
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from mics.errors import ConfigError
from mics.training.jobs.job import SECONDS_TO_SAVE, File, Job
from mics.training.jobs.network import probe
from mics.training.jobs.shell import DOCTOR, DOCTOR_PORT, head, variables

_API = "trainer.kubeflow.org/v1alpha1"
_CONFIG = "/etc/mics"
_HUGE_PAGES = "5120Mi"  # what the guide asks for with EFA


def render_kubernetes(job: Job) -> tuple[File, ...]:
    """Write ``trainjob.yaml``.

    Raises:
        ConfigError: there is no image.
    """
    if not job.container:
        raise ConfigError("A pod needs an image.", write="--container registry.io/team/mics:1.0")
    documents = [_configuration(job), _runtime(job), _trainjob(job)]
    how = head(job, "Start it: kubectl apply -f trainjob.yaml")
    text = "\n---\n".join("\n".join(_yaml(document)) for document in documents)
    return (File("trainjob.yaml", "\n".join([*how, text]) + "\n"),)


def _configuration(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name},
        "data": {job.config.name: job.text},
    }


def _runtime(job: Job) -> dict[str, Any]:
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
        "containers": [
            {
                "name": "node",
                "volumeMounts": [
                    {"name": "configuration", "mountPath": _CONFIG},
                    {"name": "memory", "mountPath": "/dev/shm"},
                    *(
                        {"name": f"storage-{index}", "mountPath": one.target}
                        for index, one in enumerate(job.mounts)
                    ),
                ],
                "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
            }
        ],
        "volumes": [
            {"name": "configuration", "configMap": {"name": job.name}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
            *(
                {"name": f"storage-{n}", "persistentVolumeClaim": {"claimName": one.source}}
                for n, one in enumerate(job.mounts)
            ),
        ],
    }
    if job.instance is not None:
        pod["nodeSelector"] = {"node.kubernetes.io/instance-type": job.instance.name}
    replicated = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {"backoffLimit": 0, "template": {"spec": pod}},
        },
    }
    return {
        "apiVersion": _API,
        "kind": "TrainingRuntime",
        "metadata": {
            "name": job.name,
            "labels": {"trainer.kubeflow.org/framework": "torch"},
        },
        "spec": {
            "mlPolicy": {"numNodes": job.nodes, "torch": {}},
            "template": {
                "spec": {
                    "failurePolicy": {"maxRestarts": job.restarts},
                    "replicatedJobs": [replicated],
                }
            },
        },
    }


def _trainjob(job: Job) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": job.name}
    if job.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    return {
        "apiVersion": _API,
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": {
            "runtimeRef": {
                "apiGroup": _API.split("/")[0],
                "kind": "TrainingRuntime",
                "name": job.name,
            },
            "activeDeadlineSeconds": job.minutes * 60,
            "trainer": {
                "image": job.container,
                "numNodes": job.nodes,
                "numProcPerNode": job.gpus_per_node,
                "command": ["bash", "-c"],
                "args": ["\n".join(_command(job)) + "\n"],
                "env": [
                    {"name": name, "value": value}
                    for name, value in variables(job, MICS_JOB=job.name).items()
                ],
                "resourcesPerNode": {
                    # Huge pages are given only beside processors or memory that are asked for.
                    "requests": {"cpu": str(job.gpus_per_node)} | _resources(job),
                    "limits": _resources(job),
                },
            },
        },
    }


def _resources(job: Job) -> dict[str, str]:
    asked = {"nvidia.com/gpu": str(job.gpus_per_node)}
    if job.network == "efa" and job.instance is not None and job.nodes > 1:
        asked |= {"vpc.amazonaws.com/efa": str(job.instance.efa), "hugepages-2Mi": _HUGE_PAGES}
    return asked


def _command(job: Job) -> list[str]:
    return [
        "set -euo pipefail",
        *probe(job),
        "# All ranks are compared, and the links between them timed.",
        f"torchrun --master-port={DOCTOR_PORT} -m {DOCTOR}",
        "# The launch. It goes on from the newest checkpoint.",
        f"exec torchrun -m {job.training(PurePosixPath(_CONFIG, job.config.name))}",
    ]


def _yaml(value: Any, indent: int = 0) -> list[str]:
    """Write dictionaries and lists as blocks; text of several lines as a literal block."""
    pad = " " * indent
    lines: list[str] = []
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        begin = f"{pad}{key}:" if isinstance(value, dict) else f"{pad}-"
        if isinstance(one, str) and "\n" in one and _is_plain(one):
            lines += [
                f"{begin} |",
                *(f"{pad}  {line}" if line else "" for line in one.splitlines()),
            ]
        elif isinstance(one, dict | list) and one and not _is_flat(one):
            inner = _yaml(one, indent + 2)
            if isinstance(value, dict):
                lines += [begin, *inner]
            else:
                lines += [f"{begin} {inner[0].lstrip()}", *inner[1:]]
        else:
            lines.append(f"{begin} {json.dumps(one)}")
    return lines


def _is_flat(value: Any) -> bool:
    """Whether it is short and has nothing inside that has something inside."""
    items = value.values() if isinstance(value, dict) else value
    return not any(isinstance(one, dict | list) for one in items) and len(json.dumps(value)) < 60


def _is_plain(text: str) -> bool:
    """Whether a literal block gives the text back."""
    lines = text.split("\n")
    return (
        all(line.isascii() and line.isprintable() for line in lines)
        and not lines[0].startswith(" ")
        and lines[-1] == ""
        and lines[-2] != ""
    )
