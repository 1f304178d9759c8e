"""The documents say what is true: their code runs, their files and commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

import mics

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/log.md"]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def side(diff: str, sign: str) -> str:
    """One side of a diff: "-" before, "+" after."""
    lines = diff.splitlines()
    return "\n".join(line[2:] for line in lines if line[:1] in (sign, " ", ""))


FROM_FSDP2, FROM_DDP = blocks("README.md", "diff")


def test_python_in_documents_compiles() -> None:
    code = [block for document in DOCUMENTS for block in blocks(document, "python")]
    for diff in (FROM_FSDP2, FROM_DDP):
        code += [side(diff, "-"), side(diff, "+")]
    for block in code:
        compile(block, "document", "exec")


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1))


def test_the_readmes_line_from_fsdp2_runs() -> None:
    def run() -> Any:
        names: dict[str, Any] = {"model": _model(), "mesh": mics.init_mesh(partition=1)}
        exec(side(FROM_FSDP2, "+"), names)
        names["model"](torch.ones(4, 8)).sum().backward()
        return mics.ledger(names["model"]).traffic().hop(2).inter_messages

    # Partition 1: two replicas; three units, each sends 2 messages in its all-reduce.
    assert run_ranks(run, 2, ranks_per_node=1) == [6, 6]


def test_the_readmes_lines_from_ddp_train() -> None:
    def run() -> Any:
        torch.manual_seed(torch.distributed.get_rank())
        batch = [(x, x.sum(dim=1, keepdim=True)) for x in torch.randn(3, 16, 8)]
        seen = []

        def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            value = nn.functional.mse_loss(output, y)
            seen.append(value.item())
            return value

        names = {"model": _model(), "torch": torch, "loader": [batch] * 30, "loss": loss}
        exec(side(FROM_DDP, "+"), names)
        weights = [p.full_tensor() for p in names["model"].parameters()]
        return seen[0], seen[-3], weights

    (first, last, weights), (_, _, others) = run_ranks(run, 2)
    assert last < first
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_named_in_documents_exist(document: str) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|^)make ([a-z]+)", (ROOT / document).read_text(), re.MULTILINE)
    assert set(named) <= set(targets)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert ((ROOT / document).parent / link).exists(), link
    for path in re.findall(r"`((?:tests|benchmarks|docs|examples)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
