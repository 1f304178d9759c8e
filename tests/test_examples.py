"""The examples run as their first lines say, and train as the scripts they replace."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def torchrun(script: Path, ranks: int, scratch: Path) -> str:
    """Run ``script`` on ``ranks`` ranks to a clean end; return what it printed."""
    done = launched(script, ranks, scratch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def launched(script: Path, ranks: int, scratch: Path) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MICS_PROFILE": str(scratch / "profile.json"),
    }
    return subprocess.run(
        [*launch, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def losses(output: str) -> list[float]:
    found = [float(number) for number in re.findall(r"loss (\S+)", output)]
    assert len(found) == 20, output
    return found


def without_mics(example: Path) -> str:
    """The script as it was: lines marked "# +" taken out, lines marked "# -" put back."""
    lines = [line for line in example.read_text().splitlines() if not line.endswith("  # +")]
    return "\n".join(re.sub(r"^( *)# - ", r"\1", line) for line in lines) + "\n"


@pytest.mark.parametrize("name", ["from_fsdp2", "from_ddp", "own_loop", "survive"])
def test_taking_the_marked_lines_back_leaves_a_script_without_mics(name: str) -> None:
    before = without_mics(EXAMPLES / f"{name}.py")
    compile(before, name, "exec")
    code = re.sub(r'""".*?"""|#.*', "", before, flags=re.DOTALL)
    assert "mics" not in code


def test_own_loop_changes_the_model_and_one_line_of_the_trainer() -> None:
    trainer = (EXAMPLES / "own_loop.py").read_text().split("class Trainer", 1)[1]
    trainer = trainer.split("def main", 1)[0]
    added = [line.strip() for line in trainer.splitlines() if "  # +" in line]
    assert added == ["with mics.micro_step(self.model, last=last):  # +"]


def test_surviving_takes_four_lines_beside_the_import_and_the_mesh() -> None:
    added = [x for x in (EXAMPLES / "survive.py").read_text().splitlines() if "  # +" in x]
    assert len(added) == 6


def test_from_fsdp2_changes_one_line() -> None:
    added = [x for x in (EXAMPLES / "from_fsdp2.py").read_text().splitlines() if "  # +" in x]
    assert added == ["from mics import fully_shard  # +"]


@pytest.mark.extra
@pytest.mark.slow
def test_what_changes_from_hsdp_and_its_bytes_are_shown_as_the_documents_say() -> None:
    command = [sys.executable, str(EXAMPLES / "before_and_after.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in (ROOT / "docs" / "check.md").read_text()
    (hop_2,) = re.findall(r"hop 2.* 20 -> 5 .* ([\d,]+) -> ([\d,]+)$", done.stdout, re.MULTILINE)
    before, after = (int(number.replace(",", "")) for number in hop_2)
    assert before == 4 * after  # once in four micro-steps
    # Two replicas send all gradients once around: 4 blocks and the last layer, over two ranks.
    assert after == 4 * (4 * (2 * 64 + 64 * 256 + 256 + 256 * 64 + 64) + 2 * (64 + 1))


@pytest.mark.extra
def test_hsdp_on_mics_has_the_losses_of_hsdp(tmp_path: Path) -> None:
    before, after = (torchrun(EXAMPLES / f"{n}.py", 4, tmp_path) for n in ("hsdp", "hsdp_on_mics"))
    assert losses(after) == pytest.approx(losses(before), abs=2e-4)  # printed with four decimals


@pytest.mark.extra
@pytest.mark.parametrize("name", ["from_fsdp2", "from_ddp", "own_loop", "survive"])
def test_an_example_has_the_losses_of_the_script_it_replaces(name: str, tmp_path: Path) -> None:
    example = EXAMPLES / f"{name}.py"
    (tmp_path / "before.py").write_text(without_mics(example))
    # Plain DDP on Gloo aborts at exit now and then, after its last step; its losses are all there.
    before = losses(launched(tmp_path / "before.py", 4, tmp_path).stdout)
    after = losses(torchrun(example, 4, tmp_path))
    assert after == pytest.approx(before, abs=2e-4)  # printed with four decimals
    assert after[-1] < after[0] / (2 if name == "survive" else 10)


@pytest.mark.extra
def test_any_number_of_ranks_has_the_same_losses(tmp_path: Path) -> None:
    example = EXAMPLES / "fewer_ranks.py"
    four, two = (losses(torchrun(example, ranks, tmp_path)) for ranks in (4, 2))
    assert len(four) == 20 and four == pytest.approx(two, abs=2e-4)  # printed with four decimals
    assert four[-1] < four[0] / 2


@pytest.mark.extra
def test_the_transformers_example_learns_and_its_bytes_are_those_predicted(
    tmp_path: Path,
) -> None:
    output = torchrun(EXAMPLES / "transformers_model.py", 8, tmp_path)
    bits = losses(output)
    assert 7.5 < bits[0] < 8.5, "an untrained model knows nothing of 256 bytes"
    assert max(bits[-3:]) < 5.5
    table = output[output.index("bytes node 0 sends") :].strip()
    assert table.endswith("counted = predicted, every stage and link: 8 of 8 ranks")
    for predicted, counted in re.findall(r"([\d,]{4,}) +([\d,]{4,})$", table, re.MULTILINE):
        assert predicted == counted
