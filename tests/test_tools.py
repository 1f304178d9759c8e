"""What docs/tools.md shows: each diff trains as the lines it replaces, and versions are true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import weights
from parity import quiet
from ranks import run_ranks
from small_models import gpt, table_of_tokens, tokenizer, tokens_of
from test_readme import blocks, side

ROOT = Path(__file__).parents[1]
TOOLS = ("accelerate", "transformers", "fabric", "lightning", "trl", "torchtitan")
DIFFS = dict(zip(TOOLS, blocks("docs/tools.md", "diff"), strict=True))


def test_a_diff_changes_at_most_three_lines() -> None:
    for diff in DIFFS.values():
        assert 1 <= sum(line[:1] == "+" for line in diff.splitlines()) <= 3


def _module(model: Any) -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Module()


def _train(tool: str, sign: str, folder: str) -> Any:
    model = gpt()
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "loader": torch.utils.data.DataLoader(tokens_of("gpt", 44), batch_size=2),
        "dataset": tokens_of("gpt", 44),
    }
    if tool == "trl":
        names |= {"dataset": table_of_tokens(44), "tokenizer": tokenizer()}
    if tool == "lightning":
        names["module"] = _module(model)
    code = side(DIFFS[tool], sign).replace('"out', f'"{folder}').replace('"state"', f'"{folder}/s"')
    quiet(lambda: exec(code, names))
    if tool == "fabric":
        return float(names["loss"].detach()), weights(model)
    if tool == "lightning":
        return float(names["trainer"].callback_metrics["loss"]), weights(model)
    if tool == "accelerate":
        return float(names["loss"].detach()), weights(
            names["accelerator"].unwrap_model(names["model"])
        )
    (told,) = [one for one in names["trainer"].state.log_history if "train_loss" in one]
    return told["train_loss"], weights(names["trainer"].model)


@pytest.mark.extra
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory:UserWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("tool", [one for one in DIFFS if one != "torchtitan"])  # it has its own
def test_the_lines_of_a_diff_train_as_those_they_replace(tool: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning" if tool == "fabric" else tool)
    before, after = (run_ranks(_train, 4, tool, sign, str(tmp_path / sign)) for sign in "-+")
    for (loss, old), (own, new) in zip(before, after, strict=True):
        assert abs(loss - own) < 1e-5
        assert old.keys() == new.keys()
        moved = max(float((old[n] - p.detach()).abs().max()) for n, p in gpt().named_parameters())
        assert moved > 1e-5
    if tool == "transformers":
        assert (tmp_path / "+" / "final" / "model.safetensors").exists()
    if tool == "lightning":
        kept = torch.load(tmp_path / "+" / "weights.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(kept["model.transformer.wpe.weight"], new["transformer.wpe.weight"])


def test_the_versions_are_those_of_the_environment() -> None:
    files = ("constraints.txt", "benchmarks/environments/torchtitan.txt")
    texts = "".join((ROOT / file).read_text() for file in files)
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", texts, re.M))
    told = re.findall(r"^\| .* \| (\w+) ([\d.]+) \| ", (ROOT / "docs/tools.md").read_text(), re.M)
    assert len(told) == 6
    for name, version in told:
        assert pinned[name] == version
