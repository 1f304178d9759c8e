"""What job files start runs: on one node of two ranks, with stand-ins for what is not here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from clusters import stand_in
from ranks import run_ranks
from test_job_files import TINY

from mics.__main__ import main
from mics.training.signals import StopRequest

PET = {
    "PET_NNODES": "1",
    "PET_NPROC_PER_NODE": "2",
    "PET_NODE_RANK": "0",
    "PET_MASTER_ADDR": "127.0.0.1",
}
SKY = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1"}


def made(folder: Path, kind: str, words: str = "") -> str:
    """The text that is started, for one node of two ranks; ``{}`` in the words is the folder."""
    (folder / "job.toml").write_text(TINY)
    (folder / "made").mkdir()
    options = f"--gpus-per-node 2 --config {folder}/job.toml --out {folder}/made"
    words = words.format(folder)
    assert main(["new", kind, *options.split(), *words.split()]) == 0
    file = {"parallelcluster": "job.sbatch", "kubernetes": "trainjob.yaml"}.get(kind)
    (path,) = [p for p in (folder / "made").iterdir() if file in (None, p.name)]
    return path.read_text()


def run_script(
    folder: Path, script: str, **more: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run it to its end; returns also what Slurm was told."""
    environment = stand_in(folder / "bin") | more
    # Ports of their own: several tests may run at a time.
    script = script.replace("29500", str(20000 + os.getpid() % 10000))
    script = script.replace("29499", str(30000 + os.getpid() % 10000))
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    told = folder / "bin" / "told"
    return done, told.read_text().splitlines() if told.exists() else []


def entries(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_trained(done: subprocess.CompletedProcess[str], run: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok: all 2 ranks agree on versions" in done.stdout, done.stdout
    steps = [entry["step"] for entry in entries(run) if entry["kind"] == "step"]
    assert steps == [1, 2, 3, 4]
    assert entries(run)[-1]["kind"] == "end" and entries(run)[-1]["finished"] is True


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        pytest.param("slurm", "", marks=pytest.mark.slow),
        pytest.param("slurm", "--launcher torchrun", marks=pytest.mark.extra),
        pytest.param("slurm", "--launcher mics-run", marks=pytest.mark.extra),
        pytest.param(
            "parallelcluster", "--node p4d --folder {}/runs/tiny", marks=pytest.mark.extra
        ),
        pytest.param("torchrun", "", marks=pytest.mark.slow),
        pytest.param("torchrun", "--launcher mics-run", marks=pytest.mark.extra),
    ],
)
def test_a_script_starts_its_ranks_and_ends_when_they_have(
    kind: str, words: str, tmp_path: Path
) -> None:
    done, told = run_script(tmp_path, made(tmp_path, kind, words))
    check_trained(done, tmp_path / "runs" / "tiny")
    assert told == []


@pytest.mark.extra
def test_a_pod_starts_its_ranks(tmp_path: Path) -> None:
    words = "--container a/b:1 --mount claim:{0} --folder {0}/run"
    text = made(tmp_path, "kubernetes", words)
    job = next(one for one in yaml.safe_load_all(text) if one["kind"] == "TrainJob")
    (script,) = job["spec"]["trainer"]["args"]
    script = script.replace("/etc/mics", str(tmp_path))  # where a pod has its configuration
    port = str(20000 + os.getpid() % 10000)
    check_trained(run_script(tmp_path, script, PET_MASTER_PORT=port, **PET)[0], tmp_path / "run")


@pytest.mark.extra
def test_a_machine_of_skypilot_starts_its_ranks(tmp_path: Path) -> None:
    text = made(tmp_path, "skypilot", "--node p5 --mount a:/:{0} --folder {0}/run")
    done, _ = run_script(tmp_path, yaml.safe_load(text)["run"], **SKY)
    check_trained(done, tmp_path / "run")


# -- a job that is told to end, and one whose ranks fail -----------------------------------------


@pytest.mark.extra
def test_a_job_near_its_time_limit_saves_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    script = made(tmp_path, "slurm")
    (tmp_path / "job.toml").write_text(TINY.replace("steps = 4", "steps = 400"))
    run, bin = tmp_path / "runs" / "tiny", tmp_path / "bin"
    job = subprocess.Popen(
        ["bash", "-c", script], cwd=tmp_path, env=stand_in(bin), stdout=subprocess.DEVNULL
    )
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and '"kind": "step"' in metrics.read_text()):
        assert job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)  # as Slurm does
    assert job.wait(timeout=200) == 0
    assert (bin / "told").read_text().splitlines() == [
        f"--signal=TERM {os.getpid()}",
        f"requeue {os.getpid()}",
    ]
    last = entries(run)[-1]
    assert last["kind"] == "end" and last["finished"] is False
    assert last["step"] < 400 and last["checkpoint"].endswith(f"step-{last['step']:08}")

    (tmp_path / "job.toml").write_text(TINY.replace("steps = 4", f"steps = {last['step'] + 2}"))
    again = subprocess.run(
        ["bash", "-c", script.replace("mics doctor --timeout 600", "true")], cwd=tmp_path,
        env={**os.environ, **stand_in(tmp_path / "bin2")}, timeout=250, check=False,
    )  # fmt: skip
    assert again.returncode == 0
    steps = [entry["step"] for entry in entries(run) if entry["kind"] == "step"]
    assert steps == list(range(1, last["step"] + 3))


def parts_of(script: str) -> str:
    """A script whose steps are a program of the test's, without what comes before them."""
    script = re.sub(r"\nper_rank=\(.*?\n\)\n", "\nper_rank=(./step)\n", script, flags=re.DOTALL)
    return script.replace('"${per_rank[@]}" mics doctor --timeout 600\n', "")


@pytest.mark.parametrize(
    ("codes", "finished", "code", "attempts"),
    [
        ([1, 1, 0], True, 0, 3),  # failed twice, then finished
        ([1, 1, 1, 7], False, 7, 4),  # three restarts and no more
        ([2], False, 2, 1),  # options that make no sense will make none again
        ([0], False, 0, 1),  # told to end by somebody else
        ([9, 0], True, 0, 2),  # what an earlier run has left does not count
    ],
)
def test_ranks_that_fail_begin_again_a_few_times(
    codes: list[int], finished: bool, code: int, attempts: int, tmp_path: Path
) -> None:
    script = parts_of(made(tmp_path, "slurm", "--restarts 3"))
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"finished": true}\n')  # of a shorter run, before
    step = tmp_path / "step"
    step.write_text(
        "#!/bin/bash\necho >> calls; n=$(wc -l < calls)\n"
        f"codes=({' '.join(map(str, codes))}); code=${{codes[n - 1]}}\n"
        f'if [ "$n" = {len(codes)} ]; then echo \'{{"finished": {str(finished).lower()}}}\''
        ' > runs/tiny/metrics.jsonl; fi\nexit "$code"\n'
    )
    step.chmod(0o755)
    done, told = run_script(tmp_path, script)
    assert done.returncode == code, done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == attempts
    assert told == []


# -- Ray -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_of_ray_are_compared_and_train(tmp_path: Path) -> None:
    """Ray runs the function beside its own first thread, in a process group that it has made."""
    program = made(tmp_path, "ray", "--folder {0}/run")
    modules = {name: ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch")}
    asked: dict[str, Any] = {}

    class Record:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            asked.setdefault(type(self).__name__, options)

        def fit(self) -> None:
            asked["fitted"] = True

    for name in ("FailureConfig", "RunConfig", "ScalingConfig"):
        setattr(modules["ray.train"], name, type(name, (Record,), {}))
    for name in ("TorchConfig", "TorchTrainer"):
        setattr(modules["ray.train.torch"], name, type(name, (Record,), {}))

    def work() -> str:
        sys.modules.update(modules)
        names: dict[str, Any] = {"__name__": "ray_train"}
        exec(compile(program, "ray_train.py", "exec"), names)
        names["main"]()
        failed: list[BaseException] = []

        def in_a_thread() -> None:
            try:
                names["work"](asked["TorchTrainer"]["train_loop_config"])
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        return repr(failed) if failed else json.dumps(asked, default=str)

    told = [json.loads(one) for one in run_ranks(work, 2)]
    assert told[0]["fitted"] is True
    assert told[0]["ScalingConfig"] == {"num_workers": 2, "use_gpu": True}
    assert told[0]["TorchConfig"] == {"backend": "cpu:gloo,cuda:nccl"}
    assert told[0]["FailureConfig"] == {"max_failures": 3}
    assert told[0]["RunConfig"]["worker_runtime_env"]["env_vars"]["MICS_JOB"] == "mics"
    assert entries(tmp_path / "run")[-1]["finished"] is True


def test_beside_the_first_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def ask() -> None:
        with StopRequest() as asked:
            seen.append((asked.stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
