"""A batch script for Slurm: ``srun`` starts a task for every rank, or one launcher per node.

What it relies on, by Slurm's manual pages: ``--signal=B:USR1@300`` tells the batch shell alone;
``scancel --signal`` tells the steps, and not that shell; ``scontrol requeue`` begins the script
again; ``srun --kill-on-bad-exit`` ends a step when a task fails. Containers are those of pyxis
(``srun --container-image``).
"""

from __future__ import annotations

import shlex

from mics.training.jobs.job import SECONDS_TO_SAVE, File, Job
from mics.training.jobs.network import probe
from mics.training.jobs.shell import (
    DOCTOR,
    DOCTOR_PORT,
    ELASTIC,
    PORT,
    exports,
    function,
    head,
    is_finished,
    torchrun,
    variables,
)


def render_slurm(job: Job) -> tuple[File, ...]:
    """Write ``job.sbatch``."""
    several = job.launcher != "srun"
    more = ELASTIC if job.launcher == "torchrun" else {}
    sections = [
        ["#!/bin/bash", *head(job, "Submit it: sbatch job.sbatch"), *_requests(job)],
        ["set -euo pipefail", *exports(variables(job, **more))],
        _steps(job),
        _addresses(job) if several else [],
        _probe(job),
        _doctor(job),
        _launch(job),
        is_finished(job),
        _telling(),
        _attempts(job),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return (File("job.sbatch", text + "\n"),)


def _requests(job: Job) -> list[str]:
    tasks = job.gpus_per_node if job.launcher == "srun" else 1
    days, minutes = divmod(job.minutes, 24 * 60)
    asked = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": job.gpus_per_node,
        "exclusive": "",
        "time": f"{days}-{minutes // 60:02}:{minutes % 60:02}:00",
        "partition": job.queue,
        "account": job.account,
        "output": "%x-%j.out",
        "open-mode": "append",
        "requeue": "",
        "signal": f"B:USR1@{SECONDS_TO_SAVE}",
    }
    flags = ("exclusive", "requeue")
    return [
        f"#SBATCH --{name}" + ("" if name in flags else f"={value}")
        for name, value in asked.items()
        if value != "" or name in flags
    ]


def _steps(job: Job) -> list[str]:
    tasks = job.gpus_per_node
    per_node = job.launcher != "srun" or bool(probe(job))
    per_rank = job.launcher != "torchrun"
    return [
        "# Steps with one task per node, which gets all of it, or with one per rank.",
        *(_step("per_node", job, 1, '"$SLURM_CPUS_ON_NODE"') if per_node else []),
        *(
            _step("per_rank", job, tasks, f'"$((SLURM_CPUS_ON_NODE / {tasks}))"')
            if per_rank
            else []
        ),
    ]


def _step(name: str, job: Job, tasks: int, processors: str) -> list[str]:
    lines = [
        f"{name}=(srun --nodes={job.nodes} --ntasks={job.nodes * tasks} --ntasks-per-node={tasks}",
        f"--cpus-per-task={processors} --kill-on-bad-exit=1",
    ]
    if job.container:
        mounts = ",".join(["$PWD:$PWD", *(f"{one.source}:{one.target}" for one in job.mounts)])
        lines += [
            f"--container-image={shlex.quote(job.container)}",
            f'--container-mounts="{mounts}" --container-workdir="$PWD"',
        ]
    return [*"\n    ".join(lines).splitlines(), ")"]


def _addresses(job: Job) -> list[str]:
    lines = ['mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")']
    if job.launcher == "mics-run" and job.nodes > 1:
        token = shlex.quote(str(job.folder / "token"))
        lines += [
            f'agents=$(printf "%s:{PORT}," "${{hosts[@]}}")',
            "export agents",
            "# The agents' secret, which only its owner may read.",
            f"mkdir -p {shlex.quote(str(job.folder))}",
            f"(umask 077; head -c 32 /dev/urandom | base64 > {token})",
        ]
    elif job.launcher == "torchrun":
        lines.append("head=${hosts[0]}")
    return lines if len(lines) > 1 else []


def _probe(job: Job) -> list[str]:
    lines = probe(job)
    if not lines:
        return []
    return [
        "# A node without its network ends the job here, and not in its first hour.",
        "probe=$(cat <<'END'",
        *lines,
        "END",
        ")",
        '"${per_node[@]}" bash -c "$probe"',
    ]


def _doctor(job: Job) -> list[str]:
    command = {
        "srun": f'"${{per_rank[@]}}" {DOCTOR}',
        "mics-run": f'"${{per_rank[@]}}" {DOCTOR}',
        "torchrun": f'"${{per_node[@]}}" {_torchrun(job, DOCTOR_PORT, 0)} -m {DOCTOR}',
    }[job.launcher]
    return ["# All ranks are compared, and the links between them timed.", command]


def _launch(job: Job) -> list[str]:
    restarting = f"{_torchrun(job, PORT, job.restarts)} -m {job.training()}"
    command = {
        "srun": f'"${{per_rank[@]}}" {job.training()}',
        "torchrun": f'"${{per_node[@]}}" {restarting}',
        "mics-run": '"${per_node[@]}" bash -c "$agent"',
    }[job.launcher]
    waiting = [
        f"{command} &",
        "local step=$! code",
        "while true; do",
        "    code=0",
        '    wait "$step" || code=$?',
        '    if [ "$code" -ne 138 ]; then return "$code"; fi  # USR1 ends the wait, not the step',
        "done",
    ]
    return [
        *(_agent(job) if job.launcher == "mics-run" else []),
        "# The launch. It goes on from the newest state, in memory or in a checkpoint.",
        *function("launch", waiting),
    ]


def _torchrun(job: Job, port: int, restarts: int) -> str:
    return torchrun(job, port, restarts, f'"$SLURM_JOB_ID-{port}"')


def _agent(job: Job) -> list[str]:
    several = ""
    if job.nodes > 1:
        token = shlex.quote(str(job.folder / "token"))
        several = f' --nodes "${{agents%,}}" --node-index "$SLURM_NODEID" --token-file {token}'
    return [
        "# A node's index is known on the node, so the words are put together there.",
        "agent=$(cat <<'END'",
        f'exec mics run --ranks-per-node {job.gpus_per_node} --job "$SLURM_JOB_ID" \\',
        f"    --restarts {job.restarts} --grace {SECONDS_TO_SAVE - 30}{several} \\",
        f"    -- {job.training()}",
        "END",
        ")",
        "",
    ]


def _telling() -> list[str]:
    return [
        f"# Slurm tells this shell {SECONDS_TO_SAVE} s before the time limit. SIGTERM goes on to",
        "# the ranks, which save and end; then the job is queued again.",
        "told=no",
        "trap 'told=yes; scancel --signal=TERM \"$SLURM_JOB_ID\"' USR1",
    ]


def _attempts(job: Job) -> list[str]:
    attempts = job.restarts if job.launcher == "srun" else 0
    return [
        "code=0",
        f"for attempt in $(seq 0 {attempts}); do",
        "    code=0",
        "    launch || code=$?",
        '    if [ "$code" -eq 0 ] && is_finished; then exit 0; fi',
        '    if [ "$told" = yes ]; then',
        '        echo "saved before the time limit; the job is queued again"',
        '        scontrol requeue "$SLURM_JOB_ID"',
        "        exit 0",
        "    fi",
        '    if [ "$code" -eq 0 ]; then',
        '        echo "told to end before the last step; sbatch goes on from there" >&2',
        "        exit 0",
        "    fi",
        '    if [ "$code" -eq 2 ]; then exit 2; fi  # options that make no sense',
        '    echo "attempt $attempt has ended with $code" >&2',
        "done",
        'exit "$code"',
    ]
