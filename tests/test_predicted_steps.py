"""Steps on Gloo, from a profile that was measured on it: the figures that are published."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mics.__main__ import main
from mics.hardware.lookup import find_gpu
from mics.hardware.measured import measured_node

ROOT = Path(__file__).parents[1]
STORED = json.loads((ROOT / "benchmarks" / "results" / "predicted_steps.json").read_text())


def benchmark() -> Any:
    path = ROOT / "benchmarks" / "predicted_steps.py"
    spec = importlib.util.spec_from_file_location("predicted_steps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["predicted_steps"] = module  # where its dataclasses look up their types
    spec.loader.exec_module(module)
    return module


def test_the_committed_predictions_are_what_the_simulator_says(tmp_path: Path) -> None:
    document = {name: STORED[name] for name in ("collectives", "runs")}
    benchmark().compare(document, tmp_path)
    assert document["inside_in_a_step"] == pytest.approx(STORED["inside_in_a_step"])
    for row, stored in zip(document["rows"], STORED["rows"], strict=True):
        for figure in ("predicted_seconds", "seconds_without_the_factor", "predicted_bytes"):
            assert row[figure] == pytest.approx(stored[figure]), row["case"]


def test_predictions_on_gloo_are_within_what_is_published() -> None:
    predicted = [row for row in STORED["rows"] if row["used"] == "predicted"]
    assert len(predicted) == 10
    assert max(abs(row["error"]) for row in predicted) == pytest.approx(0.075, abs=0.0005)
    alone = [row["seconds_without_the_factor"] / row["measured_seconds"] - 1 for row in predicted]
    assert (min(alone), max(alone)) == pytest.approx((-0.165, -0.024), abs=0.0005)


def profile(folder: Path, **changed: Any) -> Path:
    path = folder / "collectives.json"
    path.write_text(json.dumps(STORED["collectives"] | changed))
    return path


def test_a_profile_of_cpus_is_simulated_in_the_order_of_gloo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "simulate",
        "--model",
        "gpt2-tiny",
        "--nodes",
        "4",
        "--partition",
        "4",
        "--gpu",
        "H100",
    ]
    words += [
        "--micro-batch",
        "1",
        "--engines",
        "mics",
        "fsdp2",
        "--trace",
        str(tmp_path / "t.json"),
    ]
    streams, speeds = [], []
    for device in ("cpu", "cuda"):
        assert main([*words, "--profile", str(profile(tmp_path, device=device))]) == 0
        out = capsys.readouterr().out
        said = "mics is simulated as it runs on Gloo, fsdp2 as on GPUs" in " ".join(out.split())
        assert said == (device == "cpu")
        events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
        streams.append({e["args"]["name"] for e in events if e["ph"] == "M"})
        speeds.append(
            [line.split()[2] for line in out.splitlines() if line.split()[1:2] == ["mics"]]
        )
    assert any(name.startswith("hop 1, reductions") for name in streams[0])
    assert not any(name.startswith("hop 1, reductions") for name in streams[1])
    assert speeds[0] != speeds[1]


def test_a_stage_inside_a_node_is_as_slow_in_a_step_as_the_profile_says(tmp_path: Path) -> None:
    node = measured_node(profile(tmp_path, inside_in_a_step=8.0), find_gpu("H100"))
    assert (node.gloo, node.inside) == (True, 8.0)
    assert measured_node(profile(tmp_path), find_gpu("H100")).inside == 1.0


@pytest.mark.parametrize("factor", [0, -1.0, "fast", None])
def test_a_factor_that_cannot_be_is_refused(
    factor: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = profile(tmp_path, inside_in_a_step=factor)
    assert main(["plan", "--model", "gpt2-tiny", "--profile", str(path), "--gpu", "H100"]) == 1
    assert "is no result of mics bench collectives" in capsys.readouterr().err
