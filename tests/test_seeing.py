"""What a run shows and where it is recorded: lines, live table, trackers, the picture."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mics.quantities import count, size
from mics.training.config import LogConfig
from mics.training.display import History, drawn, open_display
from mics.training.lines import evaluation_line, step_line
from mics.training.page.entries import read_history
from mics.training.plot import plot_run
from mics.training.record import EvaluationRecord, StepRecord
from mics.training.trackers import open_trackers


def a_step(step: int = 3, **more: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "loss": 2.5,
        "router_loss": None,
        "bits_per_byte": 1.25,
        "learning_rate": 1e-3,
        "norm": 0.75,
        "taken": True,
        "seconds": 0.5,
        "tokens": 4096,
        "tokens_per_second": 8192.0,
        "tokens_per_second_per_gpu": 1024.0,
        "mfu": 0.415,
        "memory_bytes": 3 << 30,
        "bytes_between_nodes": 5 << 20,
        "bytes_inside_nodes": 2048,
        "bytes_on_wire": None,
        "traffic_as_predicted": True,
        "hop_1_seconds": 0.25,
        "hop_1_exposed": None,
        "hop_2_seconds": 0.125,
        "hop_2_exposed": 0.0625,
        "seconds_left": 3725.0,
        "ranks": 8,
    }
    return StepRecord(**values | more)


def test_a_line_says_everything_where_there_is_room_and_guesses_nothing_that_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    line = step_line(a_step(), 100)
    assert line == (
        "step   3/100  loss 2.5000  1.250 bits/byte  lr 1.0e-03  norm 0.75  8,192 tok/s  "
        "(1,024/GPU)  MFU 41.5%  mem 3.00 GiB  sent between nodes 5.00 MiB, inside 2.00 KiB  "
        "hop 1 0.25 s (n/a exposed)  hop 2 0.12 s (0.06 s exposed)  ETA 1:02:05"
    )
    unknown = step_line(a_step(mfu=None, memory_bytes=None, seconds_left=None), 9)
    assert "MFU n/a  mem n/a" in unknown
    assert unknown.endswith("ETA n/a")
    assert step_line(a_step(slow="rank 5"), 9).endswith("ETA 1:02:05\n  SLOW: rank 5")


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (60, "step   3/100  loss 2.5000  8,192 tok/s  ETA 1:02:05"),
        (
            80,
            "step   3/100  loss 2.5000  1.250 bits/byte  8,192 tok/s  MFU 41.5%  ETA 1:02:05",
        ),
        (
            120,
            "step   3/100  loss 2.5000  1.250 bits/byte  lr 1.0e-03  norm 0.75  8,192 tok/s  "
            "MFU 41.5%  mem 3.00 GiB  ETA 1:02:05",
        ),
    ],
)
def test_a_line_is_no_wider_than_the_terminal_and_leaves_out_what_matters_least(
    columns: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert len(line) <= columns
    assert step_line(a_step(), 100) == line
    slow = step_line(a_step(slow="rank 5 (node 2) is slow: " + 9 * "397.8 ms of its own, "), 100)
    assert all(len(each) <= columns for each in slow.split("\n"))
    assert "SLOW: rank 5" in slow


def test_a_history_has_a_sign_for_as_many_losses_as_there_must_be() -> None:
    assert drawn([3.0, 2.0, 1.0], 8, "abc") == "cba"
    assert drawn([4.0, 2.0, 1.0, 1.0], 2, "abc") == "ca"
    assert drawn([1.0, 1.0], 8, "abc") == "aa"


def test_a_history_is_bounded_and_keeps_first_last_and_means() -> None:
    history = History()
    for number in range(1500):
        history.add(float(number))
    assert (history.first, history.last) == (0.0, 1499.0)
    values = history.values
    assert len(values) < 512
    assert values == sorted(values)
    assert values[:2] == [1.5, 5.5]


def test_numbers_that_are_not_finite_become_null() -> None:
    entry = json.loads(a_step(loss=float("nan"), norm=float("inf")).as_json())
    assert entry["loss"] is None
    assert entry["norm"] is None


def test_a_loss_of_nothing_is_not_zero_anywhere(tmp_path: Path) -> None:
    step = a_step(loss=None, bits_per_byte=None)
    held_out = EvaluationRecord(3, None, None)
    assert "loss n/a  " in step_line(step, 9)
    assert evaluation_line(held_out) == "held out after step 3: loss n/a"
    lines = [step.as_json(), held_out.as_json()]
    assert [json.loads(line)["loss"] for line in lines] == [None, None]
    assert "train/loss" not in step.as_scalars()
    assert held_out.as_scalars() == {}
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join([a_step(2, bits_per_byte=None).as_json(), *lines]) + "\n")
    assert plot_run(metrics, tmp_path / "plot.png", "a masked model")
    live = open_display("on", steps=9, first=1, every=1)
    live.step(step)
    live.evaluation(held_out)
    live.close()


def test_lines_come_every_so_often_but_a_skipped_step_always(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = open_display("off", steps=25, first=1, every=10)
    for step in range(1, 26):
        display.step(a_step(step, taken=step != 7))
    display.close()
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["7/25", "10/25", "20/25", "25/25"]


def test_the_live_table_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    display = open_display("on", steps=100, first=1, every=10)
    display.step(a_step())
    display.evaluation(EvaluationRecord(3, 2.0, 1.0))
    display.step(a_step(4, traffic_as_predicted=False, taken=False, skipped="not finite: loss nan"))
    display.say("words that stay")
    display.close()
    out = capsys.readouterr().out
    for word in ("2.5000, 1.250 bits/byte", "8,192 tokens/s, 1,024 per GPU, MFU 41.5%"):
        assert word in out
    shown = " ".join(out.split())
    for word in ("loss so far 2.500 ", "tokens seen 4.10 k", "elapsed 0:00"):
        assert word in shown
    assert "NOT as predicted" in out
    assert "SKIPPED (not finite: loss nan)" in out
    assert "held out after step 3: loss 2.0000  1.000 bits/byte" in out
    assert "words that stay" in out


def test_sizes_and_counts() -> None:
    assert [size(n) for n in (12, 2048, 3 << 20, 5 << 30)] == [
        "12 B",
        "2.00 KiB",
        "3.00 MiB",
        "5.00 GiB",
    ]
    assert [count(n) for n in (12, 1500, 3_340_000, 10_081_767_688)] == [
        "12",
        "1.50 k",
        "3.34 M",
        "10.08 B",
    ]


# -- the picture -----------------------------------------------------------------------------------


def test_the_picture_takes_the_later_of_two_lines_and_skips_torn_ones(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    entries = [a_step(n).as_json() for n in (1, 2, 3)]
    entries += ['{"kind": "st', a_step(2, loss=1.0).as_json(), EvaluationRecord(3, 2, 1).as_json()]
    metrics.write_text("\n".join(entries) + "\n")
    history = read_history(metrics)
    steps, evaluations = history.steps, history.evaluations
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert [entry["loss"] for entry in steps] == [2.5, 1.0, 2.5]
    assert len(evaluations) == 1
    assert plot_run(metrics, tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_every_set_that_is_measured(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    entries = [a_step(n).as_json() for n in (1, 2, 3)]
    entries += [EvaluationRecord(3, 2, 1.234).as_json()]
    entries += [EvaluationRecord(3, 2, 1.567, 0.1, "prose").as_json()]
    metrics.write_text("\n".join(entries) + "\n")
    assert plot_run(metrics, tmp_path / "p.svg", "title")  # which has its words as comments
    shown = re.findall("<!-- (.*?) -->", (tmp_path / "p.svg").read_text())
    assert {"training", "held out", "prose", "1.234", "1.567"} <= set(shown)


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert not plot_run(tmp_path / "metrics.jsonl", tmp_path / "p.png", "title")
    assert not (tmp_path / "p.png").exists()


# -- trackers --------------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            self.calls.append((name, (args, keywords)))
            return self

        return call


def test_wandb_and_mlflow_get_settings_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, mlflow = Recorder(), Recorder()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=wandb.init))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    config = LogConfig(tensorboard=False, wandb="project", mlflow="experiment")
    trackers = open_trackers(config, tmp_path, {"run": {"steps": 3}})
    for tracker in trackers:
        tracker.log(3, a_step().as_scalars())
        tracker.close()
    assert [name for name, _ in wandb.calls] == ["init", "log", "finish"]
    assert wandb.calls[0][1][1]["project"] == "project"
    assert wandb.calls[0][1][1]["config"] == {"run": {"steps": 3}}
    logged = wandb.calls[1][1]
    assert logged[1] == {"step": 3}
    assert logged[0][0]["train/loss"] == 2.5
    assert "train/hop_1_exposed" not in logged[0][0], "unknown is left out"
    assert [name for name, _ in mlflow.calls] == [
        "set_experiment",
        "start_run",
        "log_params",
        "log_metrics",
        "end_run",
    ]
    assert mlflow.calls[2][1][0] == ({"run.steps": "3"},)
