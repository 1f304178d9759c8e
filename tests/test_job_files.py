"""Job files: what is in them, that their makers' checks pass, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mics.__main__ import main
from mics.training.jobs.templates import TEMPLATES

TINY = """
[run]
folder = "runs/tiny"
steps = 4
[data]
source = "stdlib"
sequence = 16
limit = 50000
[batch]
global_batch = 4
[evaluation]
every = 0
sample = 0
[checkpoint]
every = 0
[log]
live = "off"
"""
KINDS = {
    "slurm": "",
    "kubernetes": "--container registry.io/team/mics:1 --mount data:/data --folder /data/runs/big",
    "skypilot": "--mount fs-1.efs.us-east-1.amazonaws.com:/:/data --folder /data/runs/big",
    "ray": "--folder /data/runs/big",
    "parallelcluster": "--folder /fsx/runs/big",
    "torchrun": "",
}


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(TINY)


def new(words: str) -> dict[str, str]:
    """The files that ``mics new`` writes."""
    out = Path("made")
    for file in out.glob("*") if out.exists() else ():
        file.unlink()
    out.mkdir(exist_ok=True)
    assert main(["new", *words.split(), "--out", str(out)]) == 0
    return {file.name: file.read_text() for file in sorted(out.iterdir())}


def refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["new", *words.split()]) in (1, 2)
    return capsys.readouterr().err


# -- linted, and checked against schemas ---------------------------------------------------------

SCRIPTS = [
    f"{kind} {options} {more} --nodes {nodes} --node {node}"
    for kind, options in KINDS.items()
    if kind in ("slurm", "parallelcluster", "torchrun")
    for more in ("", "--launcher mics-run", "--launcher torchrun")
    for nodes, node in ((1, "p5"), (8, "p4d"))
] + ["slurm --nodes 4 --network infiniband --container a/b:1 --mount /x:/x --folder /x/y"]


@pytest.mark.parametrize("words", SCRIPTS)
def test_scripts_pass_bash_and_shellcheck(words: str) -> None:
    for name, text in new(words).items():
        if name.endswith(".yaml"):
            continue
        check_script(text)


def check_script(text: str) -> None:
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    for command in (["bash", "-n"], [shellcheck, "--shell=bash", "-"]):
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("nodes", [1, 8])
def test_what_runs_in_pods_and_machines_passes_shellcheck(nodes: int) -> None:
    job = documents(f"kubernetes {KINDS['kubernetes']} --nodes {nodes} --node p5")["TrainJob"]
    (script,) = job["spec"]["trainer"]["args"]
    check_script(script)
    sky = yaml.safe_load(new(f"skypilot {KINDS['skypilot']} --nodes {nodes} --node p5")["sky.yaml"])
    check_script(sky["run"])
    check_script(sky["setup"])


def documents(words: str) -> dict[str, dict[str, Any]]:
    text = new(words)["trainjob.yaml"]
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.mark.parametrize("node", ["--node p5", "--node p4d", "--network infiniband"])
@pytest.mark.parametrize("nodes", [1, 16])
def test_a_trainjob_has_the_fields_of_kubeflows_schema_and_no_others(node: str, nodes: int) -> None:
    """The models are generated from the schema; they drop a field that they do not know."""
    from kubeflow_trainer_api import models

    made = documents(f"kubernetes {KINDS['kubernetes']} {node} --nodes {nodes} --queue team")
    for kind in ("TrainJob", "TrainingRuntime"):
        model = getattr(models, f"TrainerV1alpha1{kind}")
        assert model.from_dict(made[kind]).to_dict() == made[kind]
    assert (
        made["TrainJob"]["spec"]["runtimeRef"]["name"]
        == (made["TrainingRuntime"]["metadata"]["name"])
    )
    volumes = made["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"][0]
    pod = volumes["template"]["spec"]["template"]["spec"]
    assert {one["name"] for one in pod["volumes"]} == {
        one["name"] for one in pod["containers"][0]["volumeMounts"]
    }


def test_a_trainjob_with_a_wrong_field_does_not_pass_the_schema() -> None:
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob as Model

    job = documents(f"kubernetes {KINDS['kubernetes']}")["TrainJob"]
    job["spec"]["trainer"]["nodes"] = 2
    assert Model.from_dict(job).to_dict() != job
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        Model.from_dict(job)


# The part of SkyPilot's schema that is used, in words of our own: field to type, or to fields.
SKY: dict[str, Any] = {
    "name": str,
    "num_nodes": int,
    "resources": {
        "infra": str,
        "instance_type": str,
        "network_tier": str,
        "image_id": str,
        "job_recovery": {"max_restarts_on_errors": int},
    },
    "workdir": str,
    "file_mounts": dict,
    "envs": dict,
    "setup": str,
    "run": str,
}
# The same of ParallelCluster's.
CLUSTER: dict[str, Any] = {
    "Region": str,
    "Image": {"Os": str},
    "HeadNode": {
        "InstanceType": str,
        "Networking": {"SubnetId": str},
        "Ssh": {"KeyName": str},
    },
    "Scheduling": {
        "Scheduler": str,
        "SlurmQueues": [
            {
                "Name": str,
                "Networking": {"SubnetIds": [str], "PlacementGroup": {"Enabled": bool}},
                "ComputeResources": [
                    {
                        "Name": str,
                        "InstanceType": str,
                        "MinCount": int,
                        "MaxCount": int,
                        "DisableSimultaneousMultithreading": bool,
                        "Efa": {"Enabled": bool},
                    }
                ],
            }
        ],
    },
    "SharedStorage": [
        {
            "MountDir": str,
            "Name": str,
            "StorageType": str,
            "FsxLustreSettings": {
                "StorageCapacity": int,
                "DeploymentType": str,
                "PerUnitStorageThroughput": int,
                "DeletionPolicy": str,
            },
        }
    ],
}


def check_schema(value: Any, schema: Any, at: str = "") -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict) and set(value) <= set(schema), at
        for key, one in value.items():
            check_schema(one, schema[key], f"{at}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, at
        for one in value:
            check_schema(one, schema[0], f"{at}[]")
    else:
        assert type(value) is schema, (at, value)


@pytest.mark.parametrize("more", [False, True])
def test_a_task_of_skypilot_has_its_fields(more: bool) -> None:
    mounts = "--mount fs-1.efs.us-east-1.amazonaws.com:/:/data" + " s3://bucket:/in" * more
    container = "--container a/b:1" * more
    words = f"skypilot {mounts} --folder /data/runs/big --nodes 4 --node p5 {container}"
    text = new(words)["sky.yaml"]
    task = yaml.safe_load(text)
    check_schema(task, SKY)
    assert all(isinstance(value, str) for value in task["envs"].values())
    assert ("image_id" in task["resources"]) is more is ("file_mounts" in task)
    assert "nfs4" in task["setup"]


@pytest.mark.parametrize(("node", "efa"), [("p5", True), ("p4d", True), ("p6-b300", True)])
def test_a_cluster_of_parallelcluster_has_its_fields(node: str, efa: bool) -> None:
    files = new(f"parallelcluster {KINDS['parallelcluster']} --nodes 4 --node {node}")
    assert sorted(files) == ["cluster.yaml", "job.sbatch"]
    cluster = yaml.safe_load(files["cluster.yaml"])
    check_schema(cluster, CLUSTER)
    (queue,) = cluster["Scheduling"]["SlurmQueues"]
    assert f"#SBATCH --partition={queue['Name']}\n" in files["job.sbatch"]
    assert queue["ComputeResources"][0]["Efa"]["Enabled"] is efa
    assert cluster["SharedStorage"][0]["MountDir"] == "/fsx"


# -- what is in them -----------------------------------------------------------------------------


@pytest.mark.parametrize(("node", "efa"), [("p4d", 4), ("p4de", 4), ("p5", 32), ("p5en", 16)])
def test_nodes_with_efa_are_told_and_asked_for_all_of_it(node: str, efa: int) -> None:
    script = new(f"slurm --nodes 2 --node {node}")["job.sbatch"]
    assert "export FI_PROVIDER=efa\nexport FI_EFA_USE_HUGE_PAGE=0\n" in script
    assert f'if [ "$found" -lt {efa} ]; then' in script
    assert "libnccl-net-ofi.so" in script
    job = documents(f"kubernetes {KINDS['kubernetes']} --nodes 2 --node {node}")["TrainJob"]
    asked = job["spec"]["trainer"]["resourcesPerNode"]
    for one in asked.values():
        assert one["vpc.amazonaws.com/efa"] == str(efa) and one["nvidia.com/gpu"] == "8"


def test_infiniband_is_not_left_for_tcp_and_ethernet_is_told_nothing() -> None:
    infiniband = new("slurm --nodes 2 --network infiniband")["job.sbatch"]
    assert "export NCCL_NET=IB\n" in infiniband and 'if [ "$found" -lt 1 ]' in infiniband
    assert "FI_PROVIDER" not in infiniband and "libnccl" not in infiniband
    ethernet = new("slurm --nodes 2")["job.sbatch"]
    assert "NCCL_" not in ethernet and "FI_" not in ethernet and "infiniband" not in ethernet


def test_slurm_is_asked_for_what_the_options_say() -> None:
    words = "slurm --nodes 8 --node p5 --partition gpus --account team --time 2-12 --name big"
    lines = new(f"{words} --restarts 5")["job.sbatch"].splitlines()
    asked = [line[8:] for line in lines if line.startswith("#SBATCH ")]
    assert asked == [
        "--job-name=big",
        "--nodes=8",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--exclusive",
        "--time=2-12:00:00",
        "--partition=gpus",
        "--account=team",
        "--output=%x-%j.out",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@300",
    ]
    assert "for attempt in $(seq 0 5); do" in lines
    assert lines[1] == (
        "# Made by: mics new slurm --nodes 8 --node p5 --time 2-12 --queue gpus --account team "
        "--name big --restarts 5"
    )


@pytest.mark.parametrize(
    ("time", "asked"),
    [
        ("90", "0-01:30:00"),
        ("30:00", "0-00:30:00"),
        ("01:30:30", "0-01:31:00"),
        ("1-0", "1-00:00:00"),
        ("1-02:03", "1-02:03:00"),
        ("1-02:03:04", "1-02:04:00"),
    ],
)
def test_a_time_limit_is_written_as_slurm_writes_it(time: str, asked: str) -> None:
    assert f"#SBATCH --time={asked}\n" in new(f"slurm --time {time}")["job.sbatch"]


def test_in_a_container_every_step_sees_the_folder() -> None:
    words = "--container nvcr.io/a/b:1 --mount /fsx:/data --folder /data/runs/x"
    script = new(f"slurm --nodes 2 --network infiniband {words}")["job.sbatch"]
    assert script.count("--container-image=nvcr.io/a/b:1\n") == 2
    assert script.count('--container-mounts="$PWD:$PWD,/fsx:/data"') == 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_job_examines_its_ranks_first_and_then_trains_in_the_folder(kind: str) -> None:
    files = new(f"{kind} {KINDS[kind]} --nodes 2 --node p5")
    text = next(text for name, text in files.items() if name != "cluster.yaml")
    if kind == "ray":
        assert text.index("    examine_worker()") < text.index("    train_as_worker(")
    else:
        assert text.index("mics doctor") < text.index("mics train")
        folder = "runs/tiny" if "--folder" not in KINDS[kind] else KINDS[kind].split()[-1]
        assert f"--run.folder {folder}" in text
    assert "mics run" not in text


def test_mics_run_may_start_the_ranks_where_its_agents_can_reach_each_other() -> None:
    for kind in ("slurm", "parallelcluster", "torchrun"):
        files = new(f"{kind} {KINDS[kind]} --nodes 2 --node p5 --launcher mics-run")
        text = next(text for name, text in files.items() if name != "cluster.yaml")
        assert "mics run --ranks-per-node 8" in text and "--token-file" in text


def test_the_settings_go_into_the_pods_to_the_letter() -> None:
    for text in (TINY, TINY.strip(), "# tab\there\n" + TINY, "# \u00e9\n" + TINY, " # x\n" + TINY):
        Path("job.toml").write_text(text)
        made = documents(f"kubernetes {KINDS['kubernetes']}")["ConfigMap"]
        assert made["data"] == {"job.toml": text}


def test_without_out_files_are_printed_one_behind_the_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["new", "parallelcluster", "--folder", "/fsx/runs/x", "--node", "p5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# ---- cluster.yaml\n") and "\n# ---- job.sbatch\n" in printed


ROOT = Path(__file__).parents[1]
SHOWN = re.findall(r"^mics new (.*)$", (ROOT / "docs" / "launching.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("words", SHOWN)
def test_commands_of_the_page_work_as_they_stand(words: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert main(["new", *words.split()]) == 0


def test_the_page_has_a_command_for_every_job() -> None:
    assert {words.split()[0] for words in SHOWN} == set(KINDS) == set(TEMPLATES)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("slurm --nodes 0", "--nodes must be a whole number from 1 to 10,000, got 0"),
        ("slurm --nodes -3", "--nodes must be a whole number from 1 to 10,000, got -3"),
        ("slurm --gpus-per-node 99999999999999", "--gpus-per-node must be a whole number from 1"),
        ("slurm --restarts -1", "--restarts must be a whole number from 0 to 1,000"),
        ("slurm --node p9", "There is no node 'p9' in the catalogue"),
        ("slurm --node p5 --gpus-per-node 16", "A p5 has fewer GPUs."),
        ("slurm --node p5 --network infiniband", "AWS joins its p5.48xlarge by EFA."),
        ("slurm --config none.toml", "There is no none.toml, the run to write a job for"),
        ("slurm --time soon", "--time must be 10 minutes to a year"),
        ("slurm --time 5", "--time must be 10 minutes to a year"),
        ("slurm --time 999-0", "--time must be 10 minutes to a year"),
        ("slurm --name Big_Job", "--name cannot be written into a job file"),
        ("slurm --queue a;b", "--queue cannot be written into a job file"),
        ("slurm --account $(id)", "--account cannot be written into a job file"),
        ("slurm --folder runs/../..", "--folder cannot be written into a job file"),
        ("slurm --folder runs/../..", "._/@+-, without ..: /fsx/runs/big"),
        ("slurm --folder runs/`id`", "--folder cannot be written into a job file"),
        ("slurm --container a/b:1;x", "--container cannot be written into a job file"),
        (
            "slurm --mount /a:/b",
            "--mount would have no effect on a job of slurm without --container",
        ),
        ("slurm --container a --mount /a", "--mount is SOURCE:/path"),
        ("slurm --container a --mount /a:/b /c:/b --folder /b/x", "Two mounts have one path"),
        ("slurm --container a --folder /b/x", "and so inside the container"),
        ("kubernetes --folder /data/x", "/data/x is in none of the mounts"),
        ("kubernetes --mount c:/data --folder /data/x", "A pod needs an image"),
        ("kubernetes --account a", "--account would have no effect on a job of kubernetes"),
        ("kubernetes --launcher srun", "Ranks of kubernetes are not started by srun"),
        ("skypilot --node p5", "runs/tiny is no absolute path"),
        ("skypilot --node p5 --mount s3://b:/data --folder /data/x", "s3://b is a bucket"),
        ("skypilot --mount a:/:/data --folder /data/x", "SkyPilot rents machines"),
        ("skypilot --time 10:00", "--time would have no effect on a job of skypilot"),
        ("ray --folder runs/x", "runs/x is no absolute path"),
        ("ray --container a", "--container would have no effect on a job of ray"),
        ("ray --launcher mics-run", "Ranks of ray are not started by mics-run"),
        ("parallelcluster --folder /fsx/x", "A cluster is made of nodes, and none is named"),
        ("parallelcluster --folder /fsx --node p5", "where the cluster's shared storage would"),
        ("torchrun --queue a", "--queue would have no effect on a job of torchrun"),
        ("torchrun --launcher srun", "Ranks of torchrun are not started by srun"),
        ("slurm --out nowhere", "There is no folder nowhere."),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(words, capsys)
    assert said in err
    assert "Traceback" not in err
    assert sorted(path.name for path in Path().iterdir()) == ["job.toml"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ranks = 8", "parallel.ranks = 8, but 2 nodes x 8 GPUs are 16 ranks."),
        ("gpus_per_node = 4", "parallel.gpus_per_node = 4, but 2 nodes x 8 GPUs"),
        ("partition = 3", "3"),
        ("partition = 0", "parallel.partition is out of range"),
    ],
)
def test_settings_for_another_cluster_are_refused(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("job.toml").write_text(f"{TINY}\n[parallel]\n{line}\n")
    assert said in refused("slurm --nodes 2", capsys)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "There is no data.source: the source of Python itself would be trained on"),
        ('source = ""', "data.source is empty"),
    ],
)
def test_a_job_that_does_not_say_what_it_trains_on_is_refused(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("job.toml").write_text(TINY.replace('source = "stdlib"', line))
    err = refused("slurm --nodes 2", capsys)
    assert "The run does not say what it trains on" in err and said in err
    assert 'source = "stdlib" to try' in err
    several = '[[data.sources]]\nsource = "stdlib"\n[batch]'
    Path("job.toml").write_text(TINY.replace('source = "stdlib"', "").replace("[batch]", several))
    assert new("slurm --nodes 2")


def test_files_that_are_there_are_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.sbatch").write_text("mine")
    assert "has job.sbatch already" in refused("slurm --out .", capsys)
    assert Path("job.sbatch").read_text() == "mine"


def test_a_node_of_ones_own_brings_its_gpus_and_its_instance() -> None:
    Path("mine.toml").write_text(
        '[mine]\ninstance = "x9.metal"\nefa = 2\ngpu = "H100"\ngpus_per_node = 4\n'
        "intra = { bandwidth = 100, latency = 3 }\ninter = { bandwidth = 10, latency = 30 }\n"
    )
    script = new("slurm --nodes 2 --node mine.toml")["job.sbatch"]
    assert "#SBATCH --gpus-per-node=4\n" in script and 'if [ "$found" -lt 2 ]' in script


def test_the_command_in_the_head_makes_the_same_file_again() -> None:
    words = "slurm --nodes 2 --node p5 --container a/b:1 --mount /x:/x --folder /x/y --time 60"
    first = new(words)["job.sbatch"]
    again = first.splitlines()[1].removeprefix("# Made by: mics new ")
    assert new(again)["job.sbatch"] == first


def test_a_program_for_ray_holds_what_was_asked() -> None:
    text = new(f"ray {KINDS['ray']} --nodes 2 --node p5 --restarts 7")["ray_train.py"]
    compile(text, "ray_train.py", "exec")
    assert "WORKERS = 16\n" in text and "max_failures=7" in text
    assert json.dumps("/data/runs/big") in text
