"""Every command of the pages is run, page by page and in their order, at a small size.

`NOT_HERE` says which need what a machine of tests does not have; a command that nothing there
matches is run, so a new one cannot be forgotten. `pytest -s` shows what was run, how long it took,
and what was not.
"""

from __future__ import annotations

import json
import re
import runpy
import textwrap
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clone import ended, environment_of_clone
from test_importing_deepspeed import forge_zero2
from test_lab import WHY_NOT
from test_readme import DOCUMENTS, blocks
from test_token_sources import llm_c, megatron

from mics.hardware.lookup import find_node
from mics.models.building import build, load_config
from mics.training.settings import check_settings, read_settings

ROOT = Path(__file__).parents[1]

ELSEWHERE = {
    "docs/walk.md": "test_walk.py",
    "README.md": "test_train_command.py",
}
"""Pages whose commands another test runs."""

NOT_HERE = {
    r"^(make|git) ": "works on the clone itself; CI runs the targets of make",
    r"^pip install |^python -m venv |^/tmp/new/bin/": "a network; test_packaging.py has wheels",
    r"--run\.resume imported": "needs a checkpoint that DeepSpeed has trained a model of "
    "transformers for; test_importing_deepspeed.py reads those of a smaller one",
    r"^mics simulate --validate$": "takes long; test_validation.py compares its figures",
    r"^srun ": "needs Slurm; test_job_launches.py has programs that stand in for it",
    r"--nodes 10\.0\.0\.1:": "needs two machines; test_agent_nodes.py has two addresses of one",
}
"""Commands that are not run, and why."""

REFUSED = {r"--run\.resume never$": "has checkpoints, and run.resume is never"}
"""Commands that a page says are refused, and in which words."""

FEW = "--run.steps 4 --evaluation.every 0 --evaluation.sample 2 --checkpoint.every 2"
OF_TWO_NODES = "mics lab run --nodes 2 --gpus-per-node 2 --link 1gbit -- "
SMALLER = {
    r"torchrun --nproc-per-node 8 -m mics bench": f"{OF_TWO_NODES}mics bench",
    r"--nproc-per-node 8": "--nproc-per-node 2",
    r"--ranks-per-node 8": "--ranks-per-node 2",
    r"^mics lab run --nodes 4 --gpus-per-node 2 -- mics bench": f"{OF_TWO_NODES}mics bench",
    r"^mics lab run .*-- mics bench": f"{OF_TWO_NODES}mics bench",
    r"bench collectives": r"bench collectives --repeats 1",
    r"bench train": "bench train --steps 1 --workload.layers 2 --workload.hidden 64",
    r"bench dilated": "bench dilated --steps 1",
    r"train examples/demo\.toml": rf"\g<0> {FEW} --parallel.ranks 4 --batch.global-batch 16",
    r"train examples/mixture\.toml": rf"\g<0> {FEW}",
    r"openai-community/gpt2": "tokenizer.json --data.sequence 32 --batch.micro-batch 2 "
    f"--run.folder $(mktemp -d) {FEW}",
    r"--run\.steps 4000": "--run.steps 6",
    r"step-00000800": "step-00000004",
    r"--parallel\.partition 16": "--parallel.partition 1",
    r"2\.\.2048": "2..16",
    r"tokenize stdlib ": "tokenize 'docs/*.md' ",
    r"mics lab up": r"mics lab up --name {lab}",
    r"mics lab cut node1": r"mics lab cut node1 --lab {lab}",
    r"mics lab down": r"mics lab down {lab}",
    'llama-8b"  ': 'gpt2-tiny"  ',
    "steps = 2000": "steps = 4\n[evaluation]\nevery = 0\nsample = 2\n[log]\ntensorboard = false",
    "every = 200": "every = 2",
    "sequence = 4096": "sequence = 32",
    "global_batch = 256": "global_batch = 64",
    r"--ranks 64 --gpus-per-node 8 --out": "--ranks 2 --gpus-per-node 2 --out",
    r"--out \.$": "--out $(mktemp -d)",
}
"""What is large in commands and in what pages have one save, and what stands there in the tests."""


def pages() -> list[str]:
    """Every document that has commands which no other test runs."""
    return [d for d in DOCUMENTS if blocks(d, "sh") and d not in ELSEWHERE]


def commands_of(document: str) -> list[str]:
    """Every command of a page's blocks; one that goes on in a second line is one."""
    lines = "\n".join(blocks(document, "sh")).replace("\\\n", " ").splitlines()
    found = [re.sub(r"\s#.*", "", line).strip() for line in lines]
    return [command for command in found if command]


def why_not(command: str) -> str:
    """Why a command is not run; empty if it is."""
    if "mics lab " in smaller(command) and WHY_NOT:
        return WHY_NOT
    return next((why for what, why in NOT_HERE.items() if re.search(what, command)), "")


def smaller(text: str, lab: str = "") -> str:
    """A command or a file at the size of a test, on a lab of its own name."""
    for large, small in SMALLER.items():
        text = re.sub(large, small.replace("{lab}", lab), text)
    return text


def saved_by(document: str) -> dict[str, str]:
    """The files that a page has one save, by name."""
    text = (ROOT / document).read_text()
    found = re.findall(
        r"Save this as `([\w.]+)`.*?^```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
    )
    return {name: smaller(content) for name, content in found}


# -- what the pages take as given ------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Make a clone's files, and those that a reader of the pages has: scripts, text, tokens."""
    for path in ("docs", "examples"):
        (folder / path).symlink_to(ROOT / path)
    (script,) = saved_by("docs/start.md").values()
    for name in ("train.py", "old.py", "new.py"):
        (folder / name).write_text(script)
    (job,) = saved_by("docs/trainer.md").values()
    for name in ("job.toml", "big.toml"):
        (folder / name).write_text(job)
    texts = ["One is a number, and so is two. " * n for n in range(1, 60)]
    for name in ("texts", "corpus"):
        (folder / name).mkdir()
    (folder / "corpus" / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts)
    )
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number}.txt").write_text(text)
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    example = runpy.run_path(str(ROOT / "examples" / "small_chat.py"))
    tokenizer = example["tokenizer"](rows)
    tokenizer.save_pretrained(folder / "my-tokenizer")
    (folder / "tokenizer.json").symlink_to("my-tokenizer/tokenizer.json")
    ids = np.arange(20_000) % len(tokenizer)
    llm_c(folder / "fineweb_train_000001.bin", ids)
    megatron(folder / "my-corpus_text_document", list(ids.reshape(20, -1)))
    from_deepspeed(folder)


def from_deepspeed(folder: Path) -> None:
    """Make settings of DeepSpeed and a checkpoint, with its model's small files beside it."""
    settings = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    settings |= {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    (folder / "ds_config.json").write_text(json.dumps(settings))
    model: Any = build(load_config("llama-tiny", vocabulary=512, separator=0), device="cpu")
    forge_zero2(folder / "checkpoint-500", {n: p.detach() for n, p in model.named_parameters()})
    model.config.save_pretrained(folder / "checkpoint-500")


@pytest.fixture
def around(tmp_path: Path) -> Iterator[dict[str, str]]:
    with environment_of_clone(tmp_path) as environment:
        yield environment | {"HOME": str(tmp_path / "home")}


# -- configurations --------------------------------------------------------------------------------

TOML = [
    (document, textwrap.dedent(block))
    for document in DOCUMENTS
    for block in re.findall(
        r"^ *```toml\n(.*?)^ *```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE
    )
]


@pytest.mark.parametrize(("document", "text"), TOML, ids=[document for document, _ in TOML])
def test_the_toml_of_a_page_can_be_read(document: str, text: str, tmp_path: Path) -> None:
    """As a configuration of mics train, or else as a file of nodes."""
    (tmp_path / "it.toml").write_text(text)
    if {"run", "data", "model"} & tomllib.loads(text).keys():
        check_settings(read_settings(tmp_path / "it.toml"))
    else:
        assert find_node(str(tmp_path / "it.toml")).gpus_per_node > 0


def test_no_block_of_a_page_is_of_a_kind_that_nothing_looks_at() -> None:
    kinds = {"console", "diff", "python", "sh", "text", "toml"}
    for document in DOCUMENTS:
        fences = re.findall(r"^ *```(.*)$", (ROOT / document).read_text(), re.MULTILINE)
        assert set(fences[::2]) <= kinds and set(fences[1::2]) <= {""}, document


# -- what is run -----------------------------------------------------------------------------------


@pytest.mark.extra
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("document", pages())
def test_the_commands_of_a_page_run_as_printed(
    document: str, tmp_path: Path, around: dict[str, str]
) -> None:
    folder = tmp_path / "clone"
    folder.mkdir()
    prepare(folder)
    for name, text in saved_by(document).items():
        (folder / name).write_text(text)
    for command in dict.fromkeys(commands_of(document)):
        if why := why_not(command):
            print(f"not run  {command}: {why}")
            continue
        began = time.monotonic()
        run(smaller(command, around["LAB"]), folder, around)
        print(f"{time.monotonic() - began:5.1f} s  {command}")


def run(command: str, folder: Path, around: dict[str, str]) -> None:
    """Run a command, which has to end as its page says."""
    done = ended(command, folder, around, seconds=400)
    said = " ".join((done.stdout + done.stderr).split())
    refused = next((words for what, words in REFUSED.items() if re.search(what, command)), None)
    if refused is None:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    else:
        assert done.returncode != 0 and refused in said, f"{command}\n{said}"
