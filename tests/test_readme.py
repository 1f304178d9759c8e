"""The documents say what is true: their code runs, their files and commands exist."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import tyro
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.commands import VERBS

ROOT = Path(__file__).parents[1]
PAGES = sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES]
README_LINES = 150


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for of, block in found if of == language]


def side(diff: str, sign: str) -> str:
    """One side of a diff: "-" before, "+" after."""
    lines = diff.splitlines()
    return "\n".join(line[2:] for line in lines if line[:1] in (sign, " ", ""))


FROM_FSDP2, FROM_DDP = blocks("README.md", "diff")
PYTHON = [(document, code) for document in DOCUMENTS for code in blocks(document, "python")]
AVERAGING = [code for _, code in PYTHON if "mics.EMA(" in code]
SKIPPING = [code for _, code in PYTHON if "mics.Verdicts(" in code]
COMPARING = [code for _, code in PYTHON if "mics.stragglers(" in code]
OWNING = [code for _, code in PYTHON if "mics.owned(" in code]
DEALT_STEPS = [code for _, code in PYTHON if "mics.DealtStep(" in code]
GATHERING = [code for _, code in PYTHON if "mics.gathered(" in code]
TRACING = [code for _, code in PYTHON if "mics.trace(" in code]
SCRIPTS = [code for _, code in PYTHON if "dist.init_process_group()" in code]
COUNTING = [code for _, code in PYTHON if "mics.ledger(" in code and code not in SCRIPTS]
ACCUMULATING = [
    code
    for _, code in PYTHON
    if ".backward()" in code
    and code not in AVERAGING + DEALT_STEPS + SKIPPING + TRACING + SCRIPTS + OWNING
]
SAVING = [
    code
    for _, code in PYTHON
    if "mics.save(" in code and code not in AVERAGING + DEALT_STEPS + OWNING
]
DEALING = [code for _, code in PYTHON if "mics.deal(" in code]
FEWER_BITS = [code for _, code in PYTHON if "hop_two=" in code]
PLANNING = [code for _, code in PYTHON if "mics.plan(" in code]
TOKENS = [code for _, code in PYTHON if "tokens.json" in code]


def test_the_readme_is_two_screens_and_some() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_index_of_the_documents_names_every_page() -> None:
    linked = re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs" / "README.md").read_text())
    assert {f"docs/{page}" for page in linked} == set(PAGES) - {"docs/README.md"}


# -- code ----------------------------------------------------------------------------------------


def test_python_in_documents_compiles() -> None:
    code = [block for document in DOCUMENTS for block in blocks(document, "python")]
    for diff in (FROM_FSDP2, FROM_DDP):
        code += [side(diff, "-"), side(diff, "+")]
    for block in code:
        compile(block, "document", "exec")


def test_every_block_of_python_is_run_by_a_test() -> None:
    backends = [code for document, code in PYTHON if document == "CONTRIBUTING.md"]
    assert len(backends) == 1  # run in test_backend.py, the others here
    run = ACCUMULATING + AVERAGING + SAVING + PLANNING + SKIPPING + COMPARING
    run += GATHERING + DEALING + DEALT_STEPS + TRACING + TOKENS + SCRIPTS + OWNING + FEWER_BITS
    assert len(run) + 1 == len(PYTHON)
    assert ACCUMULATING and AVERAGING and SAVING and PLANNING and SKIPPING and COMPARING


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1))


def _batch(rank: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three micro-batches, other ones on every rank."""
    torch.manual_seed(torch.distributed.get_rank() if rank is None else rank)
    return [(x, x.sum(dim=1, keepdim=True)) for x in torch.randn(3, 16, 8)]


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().detach().clone() for p in model.parameters()]  # type: ignore[attr-defined]


def test_the_readmes_lines_from_fsdp2_train_as_the_lines_they_replace() -> None:
    def sgd(params: Any) -> torch.optim.Optimizer:  # AdamW would not see gradients 3 times as large
        return torch.optim.SGD(params, lr=0.1)

    def run(sign: str) -> Any:
        names: dict[str, Any] = {
            "model": _model(),
            "mesh": mics.init_mesh(partition=2),
            "torch": SimpleNamespace(optim=SimpleNamespace(AdamW=sgd)),
            "loader": [_batch()] * 5,
            "loss": nn.functional.mse_loss,
        }
        exec(side(FROM_FSDP2, sign), names)
        return _weights(names["model"])

    before, after = run_ranks(run, 4, "-")[0], run_ranks(run, 4, "+")[0]
    start = [p.detach() for p in _model().parameters()]
    for old, new, first in zip(before, after, start, strict=True):
        assert not torch.allclose(old, first, atol=1e-4)
        assert torch.allclose(old, new, rtol=1e-5, atol=1e-6)


def test_the_readmes_line_from_fsdp2_runs() -> None:
    def run() -> Any:
        names: dict[str, Any] = {
            "model": _model(),
            "mesh": mics.init_mesh(partition=1),
            "torch": torch,
            "loader": [_batch()],
            "loss": nn.functional.mse_loss,
        }
        exec(side(FROM_FSDP2, "+"), names)
        return mics.ledger(names["model"]).traffic().hop(2).inter_messages

    # Partition 1: two replicas; three units, each sends 2 messages in its all-reduce.
    assert run_ranks(run, 2, ranks_per_node=1) == [6, 6]


def test_the_readmes_lines_from_ddp_train() -> None:
    def run() -> Any:
        batch = _batch()
        seen = []

        def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            value = nn.functional.mse_loss(output, y)
            seen.append(value.item())
            return value

        names = {
            "model": _model(),
            "mics": mics,
            "torch": torch,
            "loader": [batch] * 30,
            "loss": loss,
        }
        exec(side(FROM_DDP, "+"), names)
        return seen[0], seen[-3], _weights(names["model"])

    (first, last, weights), (_, _, others) = run_ranks(run, 2)
    assert last < first
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_every_loop_of_the_documents_trains_as_one_process_and_as_the_others() -> None:
    """Two replicas of two ranks; to the bit, but where mics divides in place of the loss."""

    def run(code: str) -> Any:
        model = mics.shard(_model(), partition=2, mp_policy=MixedPrecisionPolicy())
        names: dict[str, Any] = {"model": model, "mics": mics, "batch": _batch()}
        names["loss"] = nn.functional.mse_loss
        names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
        names["print"] = lambda *_: None
        for _ in range(2):
            exec(code, names)
            names["optimizer"].zero_grad()
        return _weights(model)

    first, *others = [run_ranks(run, 4, code)[0] for code in ACCUMULATING]
    for ours, alone in zip(first, _trained_alone(2), strict=True):
        assert torch.allclose(ours, alone, rtol=1e-5, atol=1e-6)
    for code, weights in zip(ACCUMULATING[1:], others, strict=True):
        rtol, atol = (1e-5, 1e-6) if "normalise=" in code else (0, 0)
        assert all(
            torch.allclose(a, b, rtol=rtol, atol=atol) for a, b in zip(first, weights, strict=True)
        )


def test_the_lines_that_count_are_among_those_that_train() -> None:
    (code,) = COUNTING
    assert code in ACCUMULATING and "mics.predict_traffic(" in code


@pytest.mark.slow
def test_the_script_of_the_first_five_minutes_prints_what_they_show() -> None:
    (script,), (shown,) = SCRIPTS, [b for b in blocks("docs/start.md", "text") if b[:3] == "hop"]
    assert shown in blocks("docs/ledger.md", "text")

    def run() -> list[str]:
        printed: list[str] = []
        group = r"^dist\.(init|destroy)_process_group\(\)$"  # the ranks of tests have one
        code, lines = re.subn(group, "", script, flags=re.MULTILINE)
        assert lines == 2
        exec(code, {"print": lambda one: printed.append(str(one))})
        return printed

    (loss, counted), *others = run_ranks(run, 4)
    assert float(loss.split()[1]) < 0.9
    assert counted.splitlines() == shown.strip().splitlines()
    assert others == [[]] * 3


def test_the_lines_that_deal_train_alike_on_any_number_of_ranks() -> None:
    (code,) = DEALING

    def batch(step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + index))
        return x, x.sum(dim=1, keepdim=True)

    def run() -> Any:
        model = mics.shard(_model(), partition=1, mp_policy=MixedPrecisionPolicy())
        names: dict[str, Any] = {"model": model, "mics": mics, "batch": batch}
        names["loss"] = nn.functional.mse_loss
        names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            exec(code, names | {"step": step, "total": 0.0})
        return _weights(model)

    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        for x, y in (batch(step, index) for index in range(16)):
            (nn.functional.mse_loss(model(x), y) / 16).backward()
        optimizer.step()
    for ranks in (2, 3):
        for ours, alone in zip(run_ranks(run, ranks)[0], model.parameters(), strict=True):
            assert torch.allclose(ours, alone, rtol=1e-5, atol=1e-6)


def test_the_lines_that_ask_for_fewer_bits_say_what_is_sent() -> None:
    (code,) = FEWER_BITS

    def run() -> list[str]:
        printed: list[str] = []
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
        exec(code, {"model": model, "mics": mics, "print": lambda one: printed.append(str(one))})
        return printed

    for (printed,) in run_ranks(run, 4, ranks_per_node=2):
        assert "all_to_all" in printed


def _trained_alone(steps: int) -> list[torch.Tensor]:
    """One process, the mean over the micro-batches of 4 ranks."""
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [micro_batch for rank in range(4) for micro_batch in _batch(rank)]
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [nn.functional.mse_loss(model(x), y) for x, y in batches]
        torch.stack(losses).mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_the_lines_that_skip_and_that_compare_ranks_run() -> None:
    (skipping,), (comparing,) = SKIPPING, COMPARING

    def run() -> Any:
        model = mics.shard(_model(), partition=2, mp_policy=MixedPrecisionPolicy())
        good, bad = _batch(), [(x * float("nan"), y) for x, y in _batch()]
        loader = [good, bad if torch.distributed.get_rank() == 1 else good, good]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        names = {"mics": mics, "torch": torch, "model": model, "loader": loader}
        names |= {"loss": nn.functional.mse_loss, "optimizer": optimizer}
        exec(skipping, names)
        exec(comparing, names)
        rule = names["verdicts"].state_dict()
        return len(rule["norm"]), str(names["late"]), [w.tolist() for w in _weights(model)]

    answers = run_ranks(run, 4)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == 2
    assert "nobody is slow" in answers[0][1]
    assert all(math.isfinite(n) for w in answers[0][2] for n in torch.tensor(w).flatten().tolist())


def test_the_lines_that_trace_write_a_file_and_say_what_was_waited_for(tmp_path: Path) -> None:
    (code,) = TRACING

    def run() -> Any:
        os.chdir(tmp_path)
        model = mics.shard(_model(), partition=2, mp_policy=MixedPrecisionPolicy())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        names = {"mics": mics, "model": model, "loader": _batch() * 7, "optimizer": optimizer}
        exec(code, names | {"loss": nn.functional.mse_loss})
        return Path("trace.json.gz").stat().st_size

    assert all(size > 1000 for size in run_ranks(run, 2))


def test_the_lines_that_average_train_and_give_average_and_weights_back(tmp_path: Path) -> None:
    (code,) = AVERAGING
    training, loading = code.split("mics.load(")

    def run() -> Any:
        os.chdir(tmp_path)
        printed: list[float] = []
        model = mics.shard(_model(), partition=2, mp_policy=MixedPrecisionPolicy())
        names = {"mics": mics, "torch": torch, "model": model, "loader": [_batch()] * 8}
        names |= {"loss": nn.functional.mse_loss, "print": lambda one: printed.append(one.item())}
        exec(training, names)
        averages = [average.full_tensor() for average in names["ema"].averages.values()]
        names["ema"] = mics.EMA(model)
        exec(f"mics.load({loading}", names)
        there = [average.full_tensor() for average in names["ema"].averages.values()]
        x, y = _batch()[-1]
        last = nn.functional.mse_loss(model(x), y).item()
        return all(map(torch.equal, averages, there)), printed, last

    for equal, (average,), last in run_ranks(run, 4):
        assert equal and average != last


def test_the_lines_that_deal_states_train_as_those_of_all_parameters(tmp_path: Path) -> None:
    training, grouping = OWNING
    plain = training.replace("mics.owned(model)", "model.parameters()")

    def run() -> Any:
        os.chdir(tmp_path)
        ended = []
        for number, code in enumerate((training, plain)):
            model = mics.shard(_model(), partition=2, mp_policy=MixedPrecisionPolicy())
            names = {"mics": mics, "torch": torch, "model": model, "loader": [_batch()] * 4}
            code = code.replace("run/dealt", f"run/{number}")
            exec(code, names | {"loss": nn.functional.mse_loss})
            ended.append(_weights(model))
            exec(grouping, names)
        model = mics.shard(_model(), partition=4, mp_policy=MixedPrecisionPolicy())
        mics.load("run/0", model=model, optimizer=torch.optim.AdamW(mics.owned(model)))
        ended.append(_weights(model))
        return ended

    for dealt, whole, loaded in run_ranks(run, 4):
        torch.testing.assert_close(dealt, whole, rtol=0, atol=1e-6)
        assert all(map(torch.equal, dealt, loaded))


def test_the_documents_lines_of_a_dealt_step_hand_its_momentum_to_every_rank(
    tmp_path: Path,
) -> None:
    (code,) = DEALT_STEPS

    def run() -> Any:
        os.chdir(tmp_path)
        model = mics.shard(_model(), partition=2, mp_policy=MixedPrecisionPolicy())
        x, y = _batch()[0]
        names = {"mics": mics, "torch": torch, "model": model, "x": x, "y": y}
        names |= {"loss": nn.functional.mse_loss, "matrices": [*model.parameters()][::2]}
        exec(code, names)
        states = [names["everywhere"].state[param] for param in names["matrices"]]
        return [bool(state["momentum_buffer"].full_tensor().any()) for state in states]

    assert run_ranks(run, 4) == [[True] * 3] * 4


def test_the_documents_lines_for_an_engine_hand_it_every_weight() -> None:
    (code,) = GATHERING

    def run() -> Any:
        sent: dict[str, torch.Tensor] = {}
        engine = SimpleNamespace(update=sent.__setitem__)
        model = mics.shard(_model(), partition=2, mp_policy=MixedPrecisionPolicy())
        exec(code, {"mics": mics, "torch": torch, "dist": dist, "model": model, "engine": engine})
        return {name: value.dtype for name, value in sent.items()}

    names = dict.fromkeys(_model().state_dict(), torch.bfloat16)
    assert run_ranks(run, 4) == [names, {}, {}, {}]


def test_the_lines_that_save_and_load_give_the_weights_back(tmp_path: Path) -> None:
    whole, without_base = SAVING
    assert "\n...  # training goes on\n" in whole
    assert "frozen=False)\nmics.load(" in without_base

    def run(code: str, frozen: bool) -> Any:
        os.chdir(tmp_path)
        made = _model()
        made[0].requires_grad_(not frozen)
        model = mics.shard(made, partition=1)
        optimizer = torch.optim.AdamW(model.parameters())

        def train() -> None:
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()

        train()
        saved = _weights(model)
        names = {"mics": mics, "model": model, "optimizer": optimizer, "train": train}
        exec(
            code.replace("\n...", "\ntrain()").replace("\nmics.load", "\ntrain();mics.load"), names
        )
        return all(torch.equal(a, b) for a, b in zip(saved, _weights(model), strict=True))

    def both() -> list[Any]:
        return [run(whole, False), run(without_base, True)]

    assert run_ranks(both, 2) == [[True, True]] * 2
    for name in ("step-00000100", "adapters-00000100"):
        assert (tmp_path / "run" / name).is_dir()


def test_the_lines_that_plan_print_a_partition_and_both_times(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import LlamaConfig

    (code,) = PLANNING
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
    )
    exec(code, {"mics": mics, "model": config})
    way, other = capsys.readouterr().out.splitlines()
    partition, seconds, reason = way.split(maxsplit=2)
    assert 64 % int(partition) == 0 and float(seconds) > 0 and float(other) > 0
    assert reason.startswith(f"p = {partition}")


@pytest.mark.slow
def test_the_commands_of_the_data_page_tokenise_and_train_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    first, second, training = [words for d, words in COMMANDS if d == "docs/data.md"][:3]
    for words in (first, second, [*training, "--run.steps", "2", "--evaluation.sample", "0"]):
        done = subprocess.run(
            [sys.executable, "-m", "mics", *words],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "tokens/stdlib: 0.7 of the sequences" in done.stdout + done.stderr
    (code,) = TOKENS
    (tmp_path / "tokens" / "tokens.json").symlink_to("stdlib/tokens.json")
    (tmp_path / "tokens" / "train-00000.bin").symlink_to("stdlib/train-00000.bin")
    exec(code, {})
    assert capsys.readouterr().out == "True True\n"


# -- commands ------------------------------------------------------------------------------------


SHELL = (
    *("cd", "git", "make", "mics", "pip", "python", "srun", "torchrun", "/tmp/new/bin/"),
    *("bash ", "kill ", "sed ", "tail ", "wait"),  # of docs/walk.md, which test_walk.py runs
    *("(umask ", "mkdir "),
)


def lines_of(document: str) -> list[str]:
    """Every line of a document's fenced blocks of commands; one that goes on is one line."""
    lines: list[str] = []
    for block in blocks(document, "sh"):
        lines += block.replace("\\\n", " ").splitlines()
    for block in blocks(document, "console"):  # a command and what it prints
        lines.append(block.splitlines()[0].removeprefix("$ "))
    return [part.strip() for line in lines for part in re.split("[#>]", line)[0].split(";")]


def commands_of(document: str) -> list[list[str]]:
    """Every command of mics in a document, as words: alone, under a launcher, or under another."""
    found = []
    for line in lines_of(document):
        if not line.startswith(("mics ", "torchrun ", "srun ")):
            continue
        words = shlex.split(line)
        for place, word in enumerate(words):
            if word == "mics" and (place == 0 or words[place - 1] in ("--", "-m", "srun")):
                found.append(words[place + 1 :])
    return found


COMMANDS = [(d, words) for d in ["README.md", *PAGES] for words in commands_of(d)]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the repository's files and the configurations that pages have one save."""
    for path in ROOT.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (job,) = blocks("docs/trainer.md", "toml")
    for name in ("job.toml", "big.toml", "train.toml"):
        (tmp_path / name).write_text(job)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("document", "words"), COMMANDS, ids=[f"{d} {shlex.join(words)}" for d, words in COMMANDS]
)
def test_commands_of_the_documents_have_the_options_they_are_given(
    document: str, words: list[str], clone: Path
) -> None:
    verb = next(verb for verb in VERBS if verb.name == words[0])
    module = importlib.import_module(f"mics.commands.{verb.options}")
    if hasattr(module, "parse"):
        assert module.parse(words[1:])
    else:
        assert tyro.cli(module.Config, args=words[1:])


@pytest.mark.parametrize("document", PAGES)
def test_other_commands_of_the_documents_name_what_there_is(document: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for block in blocks(document, "sh"):
        for line in filter(None, (line.strip() for line in block.splitlines())):
            assert line.startswith((*SHELL, "--")), line
    for line in lines_of(document):
        if line.startswith("python ") and not line.startswith("python -"):
            assert (ROOT / shlex.split(line)[1]).is_file(), line
    text = (ROOT / document).read_text()
    named = {
        name for group in re.findall(r"torch-mics\[([\w,]+)\]", text) for name in group.split(",")
    }
    assert named <= extras.keys()


def told(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mics", *words],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.slow
def test_the_catalogue_that_the_documents_name_is_printed() -> None:
    assert ("docs/planning.md", ["plan", "--list"]) in COMMANDS
    done = told(["plan", "--list"])
    assert done.returncode == 0, done.stderr
    assert "p4d" in done.stdout and "p3dn" in done.stdout


SHOWN = [block[2:].split("\n", 1) for block in blocks("docs/planning.md", "console")]


@pytest.mark.extra
@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_plans_shown_in_the_documents_are_what_the_commands_print(
    command: str, output: str
) -> None:
    done = told(shlex.split(command)[1:])
    printed = done.stdout if done.returncode == 0 else done.stderr
    lines = [line.rstrip() for line in printed.strip().splitlines()]
    progress = ("mics plan: loading PyTorch", "tracing ", "simulating on ")
    assert [line for line in lines if not line.startswith(progress)] == output.strip().splitlines()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_named_in_documents_exist(document: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE)
    assert set(named) <= set(targets)


# -- links and figures ---------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """What a heading is called in a link, as GitHub spells it."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`((?:tests|benchmarks|docs|examples)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


ENGINES = {
    "mics": "mics",
    "mics, p = 1": "mics p=1",
    "FSDP2 full sharding": "fsdp2",
    "FSDP2 HSDP, all-reduce in every micro-step": "hsdp every micro-step",
    "FSDP2 HSDP, all-reduce deferred": "hsdp deferred",
    "FSDP2 HSDP, all-reduce in the last micro-step": "hsdp deferred",
    "DDP, all-reduce deferred": "ddp",
    "DDP, all-reduce in the last micro-step": "ddp",
    "computation alone": "computation",
}
TABLES = [
    ("README.md", "| | GPT of 4.8 M", {1: "lab_inside", 2: "lab_dilated_p3dn_4"}),
    ("docs/slow-links.md", "| engine | step time |", {2: "lab_inside"}),
    ("docs/slow-links.md", "| engine | a BERT", {1: "lab_bert", 2: "lab_inside_rows4"}),
    (
        "docs/slow-links.md",
        "| engine | micro-batch 4",
        {1: "lab_dilated_p3dn_4", 2: "lab_dilated_p3dn"},
    ),
]


@pytest.mark.parametrize(("document", "heading", "columns"), TABLES)
def test_tables_of_step_times_are_those_of_the_result_files(
    document: str, heading: str, columns: dict[int, str]
) -> None:
    after = (ROOT / document).read_text().split(heading, 1)[1]
    rows = [row.strip("| ").split("|") for row in after.split("\n\n", 1)[0].splitlines()[2:]]
    compared = 0
    for name, *cells in rows:
        engine = ENGINES.get(re.sub(r" \([^)]*\)", "", name).strip())
        for column, file in columns.items():
            if engine is None or column > len(cells) or not cells[column - 1].strip():
                continue
            result = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
            ratio = next(e["ratio"] for e in result["engines"] if e["engine"] == engine)["median"]
            written = float(cells[column - 1].split()[0])
            assert written == pytest.approx(ratio, abs=0.0051), (name, file)
            compared += 1
    assert compared >= 7
