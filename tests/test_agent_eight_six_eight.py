"""Eight ranks of mics train that go on as six when a node is lost, and grow back to eight."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, agents, free_addresses, make_token, until, words_of_nodes

pytestmark = [pytest.mark.slow, pytest.mark.extra, pytest.mark.timeout(1000)]

STEPS = 30
TRAINS = """
import hashlib, os, sys, time
from pathlib import Path
import torch
from mics.__main__ import main
from mics.training.setup import Run

folder, plain = Path(sys.argv[1]), Run.micro_batches

def watched(run, position):
    step = position // run.batch.global_batch + 1
    fewer = os.environ["WORLD_SIZE"] != os.environ["MICS_FULL_WORLD"]
    time.sleep(1.0 if fewer else 0.1)  # the node is to be back before the end
    name = f"samples-{os.environ['MICS_GENERATION']}-{os.environ['RANK']}"
    with (folder / name).open("a", buffering=1) as seen:
        for batch in plain(run, position):
            for inputs, labels in zip(batch.inputs, batch.labels, strict=True):
                if (labels != -100).any():
                    digest = hashlib.sha256(bytes(inputs.view(torch.uint8).tolist())).hexdigest()
                    seen.write(f"{step} {digest}\\n")
            yield batch

Run.micro_batches = watched
sys.exit(main(["train", *sys.argv[2:]]))
"""
"""``mics train``, which writes down the samples of every step."""

CONFIG = """
[run]
folder = "{folder}/run"
steps = {steps}
[model]
name = "{folder}/model.json"
[data]
source = "{folder}/text.txt"
sequence = 16
[batch]
global_batch = 32
micro_batch = 2
[optimizer]
eps = 1e-3
clip = 1.0
[parallel]
partition = {partition}
gpus_per_node = 2
dtype = "fp32"
collectives = "flat"
[evaluation]
every = 0
sample = 0
[checkpoint]
every = 0
[log]
tensorboard = false
"""


@pytest.fixture
def memories(tmp_path: Path) -> Iterator[list[Path]]:
    """The memory of each node."""
    found = [Path(f"/dev/shm/mics-test-{os.getpid()}-{index}") for index in range(4)]
    yield found
    for folder in found:
        shutil.rmtree(folder, ignore_errors=True)


class Job:
    """A training on four nodes of two ranks."""

    def __init__(self, folder: Path, memories: list[Path], partition: int) -> None:
        self.folder, self.memories = folder, memories
        folder.mkdir()
        text = " ".join(f"{at} and {at * at}." for at in range(3000))
        (folder / "text.txt").write_text(text)
        config = CONFIG.format(folder=folder, steps=STEPS, partition=partition)
        (folder / "config.toml").write_text(config)
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 260}
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = {"model_type": "gpt2", **sizes, **no_dropout}
        (folder / "model.json").write_text(json.dumps(model))
        (folder / "trains.py").write_text(TRAINS)
        program = ["--", *map(str, (folder / "trains.py", folder, folder / "config.toml"))]
        options = ["--ranks-per-node", "2", "--min-nodes", "2", "--degrade-after", "1"]
        options += ["--hang-seconds", "0"]  # a busy machine is no hang
        words = words_of_nodes(free_addresses(4), make_token(folder), *options)
        self.words = [[*of_node, *program] for of_node in words]

    def start(self, index: int) -> Agent:
        """Start the agent of a node, whose memory is empty if nobody has been there."""
        self.memories[index].mkdir(exist_ok=True)
        return Agent(self.words[index], MICS_MEMORY=str(self.memories[index]))

    def lose(self, index: int, agent: Agent) -> None:
        """Lose a node, with its memory."""
        agent.process.kill()
        agent.process.wait()
        shutil.rmtree(self.memories[index])

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What was written of each step."""
        file = self.folder / "run" / "metrics.jsonl"
        entries = map(json.loads, file.read_text().splitlines()) if file.exists() else []
        return [entry for entry in entries if entry["kind"] == "step"]

    def has_begun(self, step: int, generation: int, rank: int) -> bool:
        """Whether a rank has begun a step."""
        file = self.folder / f"samples-{generation}-{rank}"
        return file.exists() and f"{step} " in {line[:2] for line in file.read_text().splitlines()}

    def samples(self, step: int) -> Counter[str]:
        """How often each sample was seen in a step, by those who were the last to make it."""
        seen: dict[int, Counter[str]] = {}
        for file in self.folder.glob("samples-*-*"):
            generation = int(file.name.split("-")[1])
            for line in file.read_text().splitlines():
                at, _, digest = line.partition(" ")
                if int(at) == step:
                    seen.setdefault(generation, Counter())[digest] += 1
        return seen[max(seen)]


@pytest.mark.parametrize(("partition", "fewer"), [(2, 6), (4, 4)])
def test_losses_and_samples_are_those_of_the_full_job(
    partition: int,
    fewer: int,
    tmp_path: Path,
    memories: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agents.SECONDS", 400.0)
    whole = Job(tmp_path / "whole", memories, partition)
    with agents() as started:
        started += [whole.start(index) for index in range(4)]
        assert [agent.wait() for agent in started] == [0] * 4, started[0].text

    job = Job(tmp_path / "parts", memories, partition)
    with agents() as started:
        started += [job.start(index) for index in range(4)]

        def told() -> str:
            return "\n".join(agent.text for agent in started)

        # In the midst of step 4, so that 3 is kept.
        until(lambda: all(job.has_begun(4, 1, rank) for rank in range(8)), told)
        job.lose(2, started[2])
        started[0].wait_for(f"{fewer // 2} of 4 nodes go on: {fewer} of 8 ranks")
        until(lambda: sum(step["ranks"] == fewer for step in job.steps) >= 3, told)
        started.append(started[2])
        started[2] = job.start(2)
        started[0].wait_for("growing back after step")
        assert [agent.wait() for agent in started[:4]] == [0] * 4, told()

    assert [step["step"] for step in job.steps] == list(range(1, STEPS + 1))
    ranks = [step["ranks"] for step in job.steps]
    assert [a for a, b in zip(ranks, [*ranks[1:], 0], strict=True) if a != b] == [8, fewer, 8]
    for one, other in zip(job.steps, whole.steps, strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-6, (one, other)
        assert one["tokens"] == other["tokens"]
        assert job.samples(one["step"]) == whole.samples(one["step"])
