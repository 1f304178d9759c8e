"""mics train as a user meets it: processes, signals, launchers, the README's own commands."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hatching import start_verb
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TINY = """
[run]
folder = "{folder}"
steps = {steps}
[data]
source = "{source}"
sequence = 16
held_out = 0.2
[batch]
micro_batch = 2
[parallel]
ranks = {ranks}
partition = 2
gpus_per_node = 2
collectives = "flat"
dtype = "fp32"
[evaluation]
every = 0
sequences = 4
sample = 3
[checkpoint]
every = 2
[log]
tensorboard = false
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"{number} is a number, and so is {number + 1}. " * 9)
    return folder


def configuration(tmp_path: Path, corpus: Path, *, ranks: int = 2, steps: int = 4) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(TINY.format(folder=tmp_path / "run", steps=steps, source=corpus, ranks=ranks))
    return file


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mics", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def run(*words: str, expect: int = 0) -> tuple[str, str]:
    process = start(*words)
    out, err = process.communicate(timeout=200)
    assert process.returncode == expect, out + err
    return out, err


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    metrics = folder / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no steps")


def living(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in entry.read_bytes().decode(errors="replace"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.slow
@pytest.mark.extra
def test_training_exporting_and_loading_with_transformers(tmp_path: Path, corpus: Path) -> None:
    out, err = run("train", str(configuration(tmp_path, corpus)))
    assert "counted = predicted, every rank, stage and link: 4 of 4 steps" in out
    assert "partition 2: as asked" in err
    out, _ = run("export", str(tmp_path / "run"), str(tmp_path / "exported"), "--check")
    assert "logits of transformers and of the checkpoint: equal" in out
    assert "transformer.wte.weight" in load_file(tmp_path / "exported" / "model.safetensors")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer("ab\xe9").input_ids == [97, 98, 0xC3, 0xA9]


@pytest.mark.slow
def test_a_run_chooses_its_partition_and_compares_what_was_predicted(
    tmp_path: Path, corpus: Path
) -> None:
    file = configuration(tmp_path, corpus, steps=20)
    file.write_text(file.read_text().replace("partition = 2\n", ""))
    process = start_verb(["train", str(file), "--parallel.node", "p4d"], environment())
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    # The node is named, so times are known and the fastest is taken, with the planner's reason.
    assert re.search(r"p = \d: \d+\.\d of [\d.]+ GiB, .*; \d would .*as long per token", err), err
    (line,) = [line for line in err.splitlines() if "after 20 steps, predicted against" in line]
    figures = r"step \d+\.\d+ s, \d+\.\d+ s; memory for training \d+\.\d+ MiB, .*; between nodes"
    assert re.search(figures, line), line


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.extra),
        pytest.param(signal.SIGQUIT, marks=pytest.mark.extra),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.extra),
    ],
)
def test_a_signal_saves_and_ends_cleanly_and_the_same_command_goes_on(
    number: int, tmp_path: Path, corpus: Path
) -> None:
    words = ["train", str(configuration(tmp_path, corpus, steps=100_000))]
    process = start(*words)
    wait_for_steps(tmp_path / "run", 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "next        the same command goes on from there" in out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])["step"]
    assert (tmp_path / "run" / f"step-{last:08d}").is_dir()
    again = start_verb([*words, "--run.steps", str(last + 1)], environment())
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert f"goes on from {tmp_path / 'run' / f'step-{last:08d}'}, step {last}" in err
    assert f"step {last + 1}/{last + 1}  loss" in out


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("live", ["off", "on"])
def test_a_terminal_that_is_closed_saves(live: str, tmp_path: Path, corpus: Path) -> None:
    words = ["train", str(configuration(tmp_path, corpus, steps=100_000)), "--log.live", live]
    outer, inner = pty.openpty()
    process = start_verb(words, environment(), inner)
    os.close(inner)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        if select.select([outer], [], [], 0.1)[0]:
            os.read(outer, 1 << 16)
    os.close(outer)
    assert process.wait(timeout=100) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (tmp_path / "run" / f"step-{last:08d}" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.extra
def test_killing_the_parent_leaves_no_rank_behind_and_a_checkpoint(
    tmp_path: Path, corpus: Path
) -> None:
    process = start("train", str(configuration(tmp_path, corpus, steps=100_000)))
    wait_for_steps(tmp_path / "run", 3, process)
    assert len(living(tmp_path)) == 3
    process.kill()
    process.communicate(timeout=60)
    for _ in range(200):
        if not living(tmp_path):
            break
        time.sleep(0.1)
    assert not living(tmp_path)
    assert list((tmp_path / "run").glob("step-*[0-9]"))


@pytest.mark.slow
@pytest.mark.extra
def test_a_second_job_in_the_folder_is_refused_and_the_first_goes_on(
    tmp_path: Path, corpus: Path
) -> None:
    words = ["train", str(configuration(tmp_path, corpus, steps=100_000))]
    first = start(*words)
    wait_for_steps(tmp_path / "run", 2, first)
    _, err = run(*words, expect=1)
    assert err.rstrip().endswith("Write: --run.folder <another folder>, or end that job first")
    assert f"{tmp_path / 'run'} is in use by another job" in err
    assert first.poll() is None
    first.terminate()
    first.communicate(timeout=60)


@pytest.mark.extra
def test_under_torchrun_an_error_is_said_once_and_nothing_hangs(
    tmp_path: Path, corpus: Path
) -> None:
    file = configuration(tmp_path, corpus, ranks=2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m", "mics", "train"]
    done = subprocess.run(
        [*launch, str(file), "--data.source", "/nowhere"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("There is no text in data.source '/nowhere'") == 1
    done = subprocess.run(
        [*launch, str(file)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout


@pytest.mark.extra
def test_pretrained_weights_give_the_loss_they_had(tmp_path: Path, corpus: Path) -> None:
    """Export, then start from there: the first loss is as good as the last."""
    file = configuration(tmp_path, corpus, steps=30)
    run("train", str(file), "--optimizer.learning-rate", "0.01")
    run("export", str(tmp_path / "run"), str(tmp_path / "exported"))
    words = ["--run.folder", str(tmp_path / "more"), "--run.steps", "1"]
    words += ["--model.weights", str(tmp_path / "exported")]
    run("train", str(file), *words)
    run("import", str(tmp_path / "exported"), str(tmp_path / "imported"))
    words = ["--run.folder", str(tmp_path / "third"), "--run.steps", "1"]
    _, err = run("train", str(file), *words, "--run.resume", str(tmp_path / "imported"))
    assert "it has no optimizer state" in err

    def first_loss(folder: str) -> float:
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return next(float(e["loss"]) for e in map(json.loads, lines) if e["kind"] == "step")

    assert first_loss("run") > 5
    assert first_loss("more") < 3
    assert first_loss("third") == first_loss("more")


# -- the README's commands -------------------------------------------------------------------------


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M)
    block = next(text for _, text in blocks if text.startswith("mics train"))
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.mark.extra
def test_the_readmes_commands_run(tmp_path: Path, corpus: Path) -> None:
    """As they stand, but for fewer steps and folders of their own."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "big.toml").write_text(
        configuration(tmp_path, corpus, ranks=8).read_text().replace("ranks = 8\n", "")
    )
    seen = []
    for words in commands():
        if words[:2] == ["mics", "train"] and "--dry-run" not in words:
            words += ["--run.steps", "2", "--evaluation.sample", "2"]
        if words[0] == "torchrun":
            words[0:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            words[4:4] = ["--local-addr", "127.0.0.1"]
        else:
            if words[1] == "run":  # else the run that torchrun has finished is found, and done
                words += ["--run.folder", str(tmp_path / "survived")]
            words[0:1] = [sys.executable, "-m", "mics"]
        done = subprocess.run(
            words,
            env=environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        seen.append(done.stdout)
    train, torchrun, agent, dry_run, export = seen
    assert "counted = predicted, every rank, stage and link: 2 of 2 steps" in train
    assert "step 4/4" in torchrun
    assert "step 4/4" in agent
    assert "10.08 B parameters in 127 blocks" in dry_run
    assert "equal" in export


def test_make_demo_is_the_readmes_first_command() -> None:
    assert "mics train examples/demo.toml" in (ROOT / "Makefile").read_text()
    assert commands()[0] == ["mics", "train", "examples/demo.toml"]
