"""A program for Ray Train: its workers run the loop of ``mics train``.

Ray makes the process group and torchrun's variables in every worker ("Get Started with Distributed
Training using PyTorch"), begins all workers again after a failure (``FailureConfig``), and keeps
nothing of its own: the run's folder has the checkpoints.
"""

from __future__ import annotations

import json

from mics.training.jobs.job import File, Job
from mics.training.jobs.shell import variables

_PROGRAM = '''"""Made by: {command}

Start it on the head node of a Ray cluster: python ray_train.py
"""

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

CONFIG = {config}
FOLDER = {folder}
WORKERS = {ranks}
GPUS = True


def work(options: dict[str, str]) -> None:
    """Do what every rank does: be compared with the others, then train."""
    from mics.commands.examining.examination import examine_worker
    from mics.training.launching import train_as_worker

    examine_worker()
    train_as_worker(options["config"], options["folder"])


def main() -> None:
    """Start the workers, again after a failure; a run goes on from its newest state."""
    TorchTrainer(
        work,
        train_loop_config={{"config": CONFIG, "folder": FOLDER}},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if GPUS else "gloo"),
        scaling_config=ScalingConfig(num_workers=WORKERS, use_gpu=GPUS),
        run_config=RunConfig(
            name={name},
            storage_path={storage},
            failure_config=FailureConfig(max_failures={restarts}),
            worker_runtime_env={{"env_vars": {variables}}},
        ),
    ).fit()


if __name__ == "__main__":
    main()
'''


def render_ray(job: Job) -> tuple[File, ...]:
    """Write the program of Ray's driver and of its workers."""
    text = _PROGRAM.format(
        command=job.command.replace("\\", "/"),
        config=json.dumps(str(job.config)),
        folder=json.dumps(str(job.folder)),
        ranks=job.ranks,
        name=json.dumps(job.name),
        storage=json.dumps(str(job.folder.parent / "ray")),
        restarts=job.restarts,
        variables=json.dumps(variables(job, MICS_JOB=job.name)),
    )
    return (File("ray_train.py", text),)
