"""A plan becomes a configuration, that a dry run and a run: the same figures in all of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from mics.__main__ import main
from mics.training import loop
from mics.training.config import TrainConfig
from mics.training.settings import read_settings

FIGURES = re.compile(
    r"p = (\d+), micro-batch (\d+), micro-steps (\d+), sequence (\d+), ([\d.]+ [GM]iB) of a GPU"
)
NODE = """
[two]
gpu = "A100-40GB"
gpus_per_node = 2
intra = { bandwidth = 200, latency = 10 }
inter = { bandwidth = 20, latency = 20 }
"""
# One way each, so that little is traced; figures of memory do not depend on what else was tried.
QUICK = ["--micro-batch", "2", "--checkpointing", "full"]
LARGE = {
    "llama-3.1-8b": ["--node", "p4d", "--nodes", "4", "--partition", "16"],
    "qwen3-4b": ["--node", "p4d", "--nodes", "2", "--partition", "8", "--stack", "fused"],
    "13b": ["--memory", "80", "--intra", "300", "--inter", "40", "--nodes", "4"],
    "bert-10b": ["--node", "p3dn", "--nodes", "8", "--partition", "32", "--offload", "full"],
}


def planned(folder: Path, model: str, options: list[str]) -> Path:
    """The configuration that ``mics plan`` writes."""
    file = folder / "job.toml"
    assert main(["plan", "--model", model, *QUICK, *options, "--toml", str(file)]) == 0
    return file


def figures(text: str) -> tuple[str, ...]:
    """The five figures of a text, of which there may be several, all the same."""
    found = set(FIGURES.findall(" ".join(text.split())))
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=() if m == "13b" else pytest.mark.extra) for m in LARGE]
)
def test_a_dry_run_of_a_job_has_the_figures_of_its_plan(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = planned(tmp_path, model, LARGE[model])
    plan = figures(capsys.readouterr().out)
    assert figures(file.read_text()) == plan
    assert main(["train", str(file), "--dry-run"]) == 0
    assert figures(capsys.readouterr().out) == plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "partition", "more"),
    [("gpt2-tiny", "4", []), ("llama-tiny", "4", []), ("llama-tiny", "2", ["--dealt-states"])],
)
def test_a_run_of_a_job_has_the_figures_of_its_plan(
    model: str,
    partition: str,
    more: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "two.toml").write_text(NODE)
    where = ["--node", str(tmp_path / "two.toml"), "--nodes", "2", "--partition", partition, *more]
    file = planned(tmp_path, model, [*where, "--tokens", "2000"])
    out = capfd.readouterr().out
    plan = figures(out)
    assert plan[:4] == (partition, "2", "4", "128")
    assert f"mics train {file} --dry-run" in out
    assert "Fill in what it is to train on, source in its [data]" in " ".join(out.split())
    assert 'source = ""  # fill in: files' in file.read_text()
    assert "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 --nproc-per" in out
    assert main(["train", str(file), "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert figures(out) == plan
    assert "data.source is empty, and has to be filled in before the run" in out
    assert main(["train", str(file)]) == 1
    assert "The run does not say what it trains on" in capfd.readouterr().err
    job = read_settings(file)
    assert job.run.steps == 1  # of 4096 tokens
    assert (job.parallel.dealt_states, job.checkpoint.memory) == (bool(more), not more)
    assert run_ranks(loop.train, 4, here(job, tmp_path)) == [0] * 4
    out = capfd.readouterr().out
    assert figures(out) == plan
    assert "steps   1 to 1, " in out


def here(job: TrainConfig, folder: Path) -> Any:
    """The job on some text, in a folder of its own, without what takes long."""
    (folder / "text.txt").write_text("One is a number, and so is two. " * 999)
    return replace(
        job,
        run=replace(job.run, folder=folder / "run"),
        data=replace(job.data, source=str(folder / "text.txt"), held_out=0.0),
        evaluation=replace(job.evaluation, sample=0),
        checkpoint=replace(job.checkpoint, memory=False),
        log=replace(job.log, tensorboard=False),
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prefetch", "2"], "--prefetch 2"),
        (["--optimizer", "sgd", "--reduce-dtype", "bf16"], "--optimizer sgd, --reduce-dtype bf16"),
        (["--fragmentation", "1.2"], "--fragmentation 1.2"),
        (["--stack", "mics-paper"], "--stack mics-paper"),
    ],
)
def test_a_job_that_mics_train_cannot_be_told_of_is_refused(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.toml"
    assert main(["plan", "--model", "gpt2-tiny", *options, "--toml", str(file)]) == 1
    assert f"mics train cannot be told to run so.\n  {words}." in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize(("positions", "sequence"), [("8192", 4096), ("64", 64)])
def test_plan_dry_run_and_run_choose_one_sequence(positions: str, sequence: int) -> None:
    from mics.anatomy.recipe import default_sequence
    from mics.training.batching import sequence_length

    assert sequence_length(0, int(positions)) == default_sequence(int(positions)) == sequence
    assert sequence_length(0, None) == default_sequence(None) == 4096
