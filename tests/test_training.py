"""mics train on the ranks of a test: parity, resuming, bad steps, what is seen, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What every rank imports that trains, saves and plots: here once, for the ranks of all tests.
import matplotlib.backends.backend_agg  # noqa: F401
import PIL.Image
import pytest
import torch
import torch.distributed as dist
import transformers.models.bert.modeling_bert
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.roberta.modeling_roberta  # noqa: F401
from parity import quiet
from ranks import RankFailed, errors_of_ranks, run_ranks
from test_checkpoint_damage import forge

import mics
from mics.checkpoint import writing
from mics.training import keeping, loop
from mics.training import step as step_module
from mics.training.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mics.training.schedules import learning_rate
from mics.training.settings import read_settings
from mics.training.signals import StopRequest

PIL.Image.preinit()
pytestmark = [
    # transformers' models return views, of which FSDP2 warns; nothing edits an output in place
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"),
]

TINY = {
    "bert": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
    "roberta": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "llama": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
}
COMMON = {"num_attention_heads": 2, "max_position_embeddings": 18, "vocab_size": 260}
FULL = Path("/dev/full")
MASK_ID = 258  # of the bytes tokenizer
NO_DROPOUT = dict.fromkeys(
    [
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "attention_dropout",
    ],
    0.0,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        words = " ".join(f"{number} times {other} is {number * other}." for other in range(30))
        (folder / f"{number:02}.txt").write_text(words)
    return folder


def model_file(folder: Path, kind: str, **more: Any) -> str:
    sizes = TINY[kind] | ({} if kind == "gpt2" else COMMON) | {"vocab_size": 260}
    file = folder / f"{kind}.json"
    file.write_text(json.dumps({"model_type": kind, **sizes, **NO_DROPOUT, **more}))
    return str(file)


def settings(folder: Path, corpus: Path, kind: str = "gpt2", **tables: dict[str, Any]) -> Any:
    tables = {name: dict(values) for name, values in tables.items()}
    own: dict[str, dict[str, Any]] = {
        "run": {"folder": folder / "run", "steps": 4},
        "model": {"name": tables.get("model", {}).get("name") or model_file(folder, kind)},
        "data": {"source": str(corpus), "sequence": 16, "held_out": 0.2},
        "batch": {"global_batch": 8},
        "optimizer": {"learning_rate": 0.01},
        "parallel": {"dtype": "fp32", "partition": 2, "gpus_per_node": 2, "collectives": "flat"},
        "evaluation": {"every": 0, "sample": 0, "sequences": 4},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False},
    }
    for name, values in tables.items():
        own[name] |= values
    kinds = {
        "run": RunConfig,
        "model": ModelConfig,
        "data": DataConfig,
        "batch": BatchConfig,
        "optimizer": OptimizerConfig,
        "parallel": ParallelConfig,
        "evaluation": EvaluationConfig,
        "checkpoint": CheckpointConfig,
        "log": LogConfig,
    }
    return TrainConfig(**{name: kinds[name](**values) for name, values in own.items()})


def train(config: TrainConfig) -> int:
    return quiet(lambda: loop.train(config))


def train_each(*configs: TrainConfig) -> None:
    for config in configs:
        assert train(config) == 0


def lines(config: TrainConfig, kind: str = "step") -> list[dict[str, Any]]:
    text = (config.run.folder / "metrics.jsonl").read_text()
    return [entry for entry in map(json.loads, text.splitlines()) if entry["kind"] == kind]


def losses(config: TrainConfig) -> list[float]:
    return [entry["loss"] for entry in lines(config)]


def elsewhere(config: TrainConfig, name: str, **tables: dict[str, Any]) -> TrainConfig:
    """The same run in another folder, with some options changed."""
    changed = {
        table: dataclasses.replace(getattr(config, table), **values)
        for table, values in tables.items()
    }
    run = changed.get("run", config.run)
    folder = config.run.folder.parent / name
    return dataclasses.replace(config, **changed | {"run": dataclasses.replace(run, folder=folder)})


# -- parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "gpt2",
        "llama",
        *(pytest.param(kind, marks=pytest.mark.extra) for kind in ("bert", "roberta")),
    ],
)
def test_every_family_has_the_losses_of_a_single_process(
    kind: str, tmp_path: Path, corpus: Path
) -> None:
    config = settings(tmp_path, corpus, kind, batch={"global_batch": 8, "micro_steps": 2})
    alone = elsewhere(config, "alone", parallel={"partition": 1, "gpus_per_node": 1})
    assert run_ranks(train, 4, config) == [0] * 4
    assert run_ranks(train, 1, alone) == [0]
    assert losses(config) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(config)[-1] < losses(config)[0]
    assert all(entry["traffic_as_predicted"] for entry in lines(config))


def test_four_micro_steps_equal_one_big_batch(tmp_path: Path, corpus: Path) -> None:
    """Token-weighted, so that it holds for masked models too, whose targets vary."""
    config = settings(tmp_path, corpus, "bert", batch={"global_batch": 16, "micro_steps": 4})
    one = elsewhere(config, "one", batch={"global_batch": 16, "micro_steps": 1})
    run_ranks(train_each, 2, config, one)
    assert losses(config) == pytest.approx(losses(one), rel=1e-6)


def test_two_runs_with_one_seed_are_the_same_to_the_bit(tmp_path: Path, corpus: Path) -> None:
    dropout = model_file(tmp_path, "gpt2", resid_pdrop=0.1, embd_pdrop=0.1)
    config = settings(tmp_path, corpus, model={"name": dropout})
    again = elsewhere(config, "again")
    other = elsewhere(config, "other", run={"seed": 1})
    for one in (config, again, other):
        run_ranks(train, 2, one)
    assert losses(config) == losses(again)
    assert losses(config) != losses(other)


def test_partitions_that_span_nodes_train_the_same(tmp_path: Path, corpus: Path) -> None:
    config = settings(tmp_path, corpus)
    spanning = elsewhere(
        config,
        "spanning",
        parallel={"partition": 4, "gpus_per_node": 2, "collectives": "hierarchical"},
    )
    run_ranks(train_each, 4, config, spanning)
    assert losses(config) == pytest.approx(losses(spanning), rel=1e-5)
    assert lines(config)[0]["bytes_between_nodes"] > 0
    assert all(entry["traffic_as_predicted"] for entry in lines(spanning))


def test_activations_computed_again_or_kept_on_the_host_change_no_loss(
    tmp_path: Path, corpus: Path
) -> None:
    config = settings(tmp_path, corpus)
    recomputing = elsewhere(config, "again", parallel={"activation_checkpointing": True})
    both = {"activation_checkpointing": True, "activation_offload": "on"}
    leaving = elsewhere(config, "host", parallel=both)
    run_ranks(train_each, 2, config, recomputing, leaving)
    for other in (recomputing, leaving):
        assert losses(config) == losses(other)
        assert all(entry["traffic_as_predicted"] for entry in lines(other))


def test_bf16_stays_within_its_rounding(tmp_path: Path, corpus: Path) -> None:
    config = settings(tmp_path, corpus)
    rounded = elsewhere(config, "bf16", parallel={"dtype": "bf16"})
    run_ranks(train_each, 2, config, rounded)
    assert losses(config) != losses(rounded)
    assert losses(config) == pytest.approx(losses(rounded), rel=2**-6)


# -- going on --------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(
    tmp_path: Path, corpus: Path
) -> None:
    """To the bit at the same layout, to rounding at another; with dropout at the same one."""
    dropout = model_file(tmp_path, "gpt2", resid_pdrop=0.1, embd_pdrop=0.1)
    straight = settings(tmp_path, corpus, model={"name": dropout}, run={"steps": 6})
    parted = elsewhere(straight, "parted", run={"steps": 6}, checkpoint={"every": 3})
    run_ranks(train, 2, straight)
    run_ranks(_train_and_stop_after, 2, parted, 3)
    assert len(losses(parted)) == 3
    run_ranks(train, 2, parted)
    assert losses(parted) == losses(straight)
    assert [entry["tokens"] for entry in lines(parted)] == [
        entry["tokens"] for entry in lines(straight)
    ]


def test_another_layout_goes_on_from_the_same_checkpoint(tmp_path: Path, corpus: Path) -> None:
    straight = settings(tmp_path, corpus, run={"steps": 6})
    parted = elsewhere(straight, "parted")
    run_ranks(train, 2, straight)
    run_ranks(_train_and_stop_after, 2, parted, 3)
    wider = dataclasses.replace(
        parted,
        parallel=dataclasses.replace(parted.parallel, partition=4),
        batch=BatchConfig(global_batch=8, micro_steps=2),
    )
    run_ranks(train, 4, wider)
    assert losses(parted) == pytest.approx(losses(straight), rel=1e-5)


def _train_and_stop_after(config: TrainConfig, steps: int) -> int:
    with _stopping_after(steps):
        return train(config)


@contextmanager
def _stopping_after(steps: int) -> Iterator[None]:
    """As if SIGTERM came while the last of these steps ran: on one rank only."""
    take_step = loop.take_step

    def stopping(*args: Any, **keywords: Any) -> Any:
        asked = keywords["step"] == steps and dist.get_rank() == dist.get_world_size() - 1
        count = keywords["count"]
        asking = {"count": lambda: {**count(), "stops": float(asked)}}
        return take_step(*args, **keywords | asking)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        yield


@pytest.mark.parametrize(
    "name", ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
)
def test_every_signal_that_asks_to_end_is_a_wish_to_stop(name: str) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopRequest() as asked:
        assert not asked.stop
        signal.raise_signal(number)
        assert asked.stop
    assert signal.getsignal(number) is before


def test_a_closed_terminal_is_no_wish_to_stop_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked.stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_wish_to_stop_on_one_rank_saves_on_all(tmp_path: Path, corpus: Path) -> None:
    config = settings(tmp_path, corpus, run={"steps": 50})
    assert run_ranks(_train_and_stop_after, 2, config, 2) == [0, 0]
    assert len(losses(config)) == 2
    assert [f.name for f in config.run.folder.glob("step-*")] == ["step-00000002"]


def test_a_run_that_is_complete_says_so_and_takes_no_step(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, corpus)
    run_ranks(train, 2, config)
    capfd.readouterr()
    assert run_ranks(loop.train, 2, config) == [0, 0]
    assert "no step was taken: the run is at step 4 of 4" in capfd.readouterr().out
    assert len(losses(config)) == 4


def test_this_runs_options_hold_and_not_those_of_the_checkpoint(
    tmp_path: Path, corpus: Path
) -> None:
    config = settings(tmp_path, corpus, run={"steps": 2})
    run_ranks(train, 2, config)
    more = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, steps=3),
        optimizer=OptimizerConfig(learning_rate=0.5, weight_decay=0.7, decay="none"),
    )
    groups = run_ranks(_options_after, 2, more)[0]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
    assert [group["lr"] for group in groups] == [0.5, 0.5]


def _options_after(config: TrainConfig) -> list[dict[str, Any]]:
    seen: list[Any] = []
    take_step = loop.take_step

    def watching(model: Any, optimizer: Any, *args: Any, **keywords: Any) -> Any:
        outcome = take_step(model, optimizer, *args, **keywords)
        seen[:] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", watching)
        train(config)
    return seen


@pytest.mark.parametrize(
    ("name", "value"), [("step", -5), ("step", 2**60), ("position", 1.5), ("tokens", True)]
)
def test_a_checkpoint_that_is_nowhere_is_refused(
    tmp_path: Path, corpus: Path, name: str, value: Any
) -> None:
    config = _alone(settings(tmp_path, corpus, run={"steps": 3}))
    run_ranks(_train_and_stop_after, 1, config, 2)
    (checkpoint,) = config.run.folder.glob("step-*")
    forge(checkpoint, lambda t: t["extra"].update({name: value}))
    with pytest.raises(RankFailed, match="says that the run is where no run can be"):
        run_ranks(loop.train, 1, config)


def test_one_more_step_at_the_last_rate_is_no_jump(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _alone(settings(tmp_path, corpus, run={"steps": 3}))
    run_ranks(loop.train, 1, config)
    more = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=4))
    run_ranks(loop.train, 1, more)
    assert "THE LEARNING RATE JUMPS" not in capfd.readouterr().err


def test_a_learning_rate_that_jumps_is_announced(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _alone(settings(tmp_path, corpus, run={"steps": 3}))
    optimizer = OptimizerConfig(learning_rate=3e-4)
    config = dataclasses.replace(config, optimizer=optimizer)
    run_ranks(_train_and_stop_after, 1, config, 2)
    run_ranks(loop.train, 1, config)
    assert "THE LEARNING RATE JUMPS" not in capfd.readouterr().err, "the same schedule"
    more = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=6))
    run_ranks(loop.train, 1, more)
    said = capfd.readouterr().err
    assert "THE LEARNING RATE JUMPS: step 3 was taken with 3.0e-05, step 4 is with 1.2e-04" in said
    assert "as 6 steps, decay cosine and peak 3.0e-04 have it" in said
    advice = "--optimizer.learning-rate 3e-05 --optimizer.decay none --optimizer.warmup 0"
    assert f"To go on without a jump: {advice}" in said
    # At step 3 of 6 the rate would be 1.65e-4: the schedule begins 3e-5 / 1.65e-4 as high.
    lower = said.partition("or, falling as cosine does: --optimizer.learning-rate ")[2].split()[0]
    scaled = dataclasses.replace(optimizer, learning_rate=float(lower))
    assert learning_rate(scaled, 3, 6) == pytest.approx(3e-5, rel=1e-3)
    rates = [entry["learning_rate"] for entry in lines(config)]
    assert rates[2:4] == pytest.approx([3e-5, 1.23e-4], rel=0.01), "what was said is what is done"


# -- a folder that is deleted ----------------------------------------------------------------------


def _train_and_delete_at(config: TrainConfig, step: int, *, taken: bool = False) -> int:
    take_step = loop.take_step

    def deleting(*args: Any, **keywords: Any) -> Any:
        outcome = take_step(*args, **keywords)
        if keywords["step"] == step and dist.get_rank() == 0:
            shutil.rmtree(config.run.folder)
            if taken:
                config.run.folder.write_text("something else")
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", deleting)
        return loop.train(config)


def test_a_folder_that_is_deleted_is_an_alarm_and_the_run_goes_on_in_another(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saving = {"every": 2, "asynchronous": False}  # so that nothing is written while it is deleted
    config = settings(tmp_path, corpus, run={"steps": 5}, checkpoint=saving)
    assert run_ranks(_train_and_delete_at, 2, config, 3) == [0, 0]
    said = capfd.readouterr().err
    assert "!!!!!!!!" in said
    assert f"THE FOLDER OF THE RUN IS GONE: {config.run.folder} was deleted or moved by" in said
    assert said.count("THE FOLDER OF THE RUN IS GONE") == 1
    assert [entry["step"] for entry in lines(config)] == [3, 4, 5]
    names = {file.name for file in config.run.folder.iterdir()}
    assert {".lock", "config.toml", "plot.png", "step-00000004", "step-00000005"} <= names
    assert read_settings(config.run.folder / "config.toml") == config
    assert "process " in (config.run.folder / ".lock").read_text()


def _delete_for_good(config: TrainConfig) -> int:
    return _train_and_delete_at(config, 2, taken=True)


def test_a_folder_that_cannot_be_made_again_is_an_alarm_and_no_traceback(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _alone(settings(tmp_path, corpus))
    assert run_ranks(_delete_for_good, 1, config) == [1]
    said = capfd.readouterr().err
    assert "and cannot be made again: " in said
    assert "CHECKPOINT NOT WRITTEN" in said
    assert "there is none before it" in said


def test_old_checkpoints_are_pruned(tmp_path: Path, corpus: Path) -> None:
    config = settings(tmp_path, corpus, checkpoint={"every": 1, "keep": 2})
    run_ranks(train, 2, config)
    names = sorted(f.name for f in config.run.folder.glob("step-*"))
    assert names == ["step-00000003", "step-00000004"]


def test_a_damaged_checkpoint_is_named_and_the_older_one_used(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, corpus, checkpoint={"every": 2})
    run_ranks(train, 2, config)
    file = config.run.folder / "step-00000004" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    more = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=5))
    capfd.readouterr()
    assert run_ranks(loop.train, 2, more) == [0, 0]
    said = capfd.readouterr().err
    assert "CHECKPOINT NOT WRITTEN" not in said
    names = sorted(f.name for f in config.run.folder.glob("step-*"))
    assert names == [
        "step-00000002",
        "step-00000004",
        "step-00000004.damaged",
        "step-00000005",
    ]
    assert f"skipping a checkpoint: {file} is damaged: it has another size" in said
    assert f"goes on from {config.run.folder / 'step-00000002'}, step 2" in said


# -- bad steps -------------------------------------------------------------------------------------


def _train_with_bad_steps(config: TrainConfig, bad: list[int]) -> int:
    """The loss of one rank is not a number in some steps, and so is its gradient."""
    current = 0
    take_step, losses = loop.take_step, step_module.losses

    def counting(*args: Any, **keywords: Any) -> Any:
        nonlocal current
        current = keywords["step"]
        return take_step(*args, **keywords)

    def spoiling(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        loss, balance = losses(*args)
        return loss * (math.nan if current in bad and dist.get_rank() == 1 else 1.0), balance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", counting)
        patch.setattr(step_module, "losses", spoiling)
        return train(config)


def test_a_step_that_is_not_finite_is_skipped_by_every_rank_alike(
    tmp_path: Path, corpus: Path
) -> None:
    config = settings(tmp_path, corpus, run={"steps": 5})
    assert run_ranks(_train_with_bad_steps, 2, config, [2]) == [0, 0]
    assert [entry["taken"] for entry in lines(config)] == [True, False, True, True, True]
    assert lines(config)[1]["loss"] is None
    assert all(math.isfinite(loss) for i, loss in enumerate(losses(config)) if i != 1)


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_newest_checkpoint_named(
    tmp_path: Path, corpus: Path
) -> None:
    config = settings(
        tmp_path, corpus, run={"steps": 9}, checkpoint={"every": 2}, optimizer={"rollbacks": 0}
    )
    for text in errors_of_ranks(_train_with_bad_steps, 2, config, [2, 4, 5, 6]):
        assert "Loss or gradient norm was not finite in 3 steps in a row" in text
        assert "Steps 4 to 6 of 2 ranks" in text
        assert "step-0000000" in text


def _train_with_bad_steps_and_a_slow_disk(config: TrainConfig, bad: list[int]) -> int:
    def slowly(*args: Any) -> Any:
        time.sleep(2)
        return write(*args)

    write = writing.write_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_tensors", slowly)
        return _train_with_bad_steps(config, bad)


def test_the_checkpoint_that_is_named_may_have_been_under_way(tmp_path: Path, corpus: Path) -> None:
    config = settings(tmp_path, corpus, run={"steps": 9}, checkpoint={"every": 2})
    config = dataclasses.replace(config, optimizer=OptimizerConfig(bad_steps=1, rollbacks=0))
    for text in errors_of_ranks(_train_with_bad_steps_and_a_slow_disk, 2, config, [3]):
        assert f"the newest checkpoint is {config.run.folder / 'step-00000002'}" in text


# -- a save that fails -----------------------------------------------------------------------------


def _train_without_room(config: TrainConfig) -> int:
    def full(path: Path, tensors: Any) -> Any:
        if "step-00000002" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return write(path, tensors)

    write = writing.write_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_tensors", full)
        return loop.train(config)


def test_a_full_disk_is_a_loud_alarm_and_training_goes_on(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, corpus, checkpoint={"every": 1, "keep": 1})
    assert run_ranks(_train_without_room, 2, config) == [0, 0]
    said = capfd.readouterr().err
    assert "!!!!!!!!" in said
    assert "CHECKPOINT NOT WRITTEN: Rank 0 cannot write" in said
    assert "No space left on device" in said
    assert "step-00000001 is kept. Training goes on." in said
    assert [f.name for f in config.run.folder.glob("step-*")] == ["step-00000004"]


def test_when_the_last_save_fails_the_exit_code_says_so(tmp_path: Path, corpus: Path) -> None:
    config = settings(tmp_path, corpus, run={"steps": 2})
    assert run_ranks(_train_without_room, 2, config) == [1, 1]


def _train_with_a_full_metrics_disk(config: TrainConfig) -> int:
    from mics.training import reporting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "_open_to_append", lambda path: FULL.open("a"))
        return loop.train(config)


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_metrics_that_cannot_be_written_are_said_and_counted(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, corpus)
    (config.run.folder).mkdir()
    (config.run.folder / "metrics.jsonl").write_text("")
    assert run_ranks(_train_with_a_full_metrics_disk, 1, _alone(config)) == [0]
    said = capfd.readouterr().err
    assert "The beginning cannot be recorded: [Errno 28] No space left on device" in said
    assert said.count("cannot be recorded") == 1
    assert "could not be written" in said


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_picture_that_cannot_be_written_is_said_and_the_run_has_ended_well(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, corpus)
    (config.run.folder).mkdir()
    (config.run.folder / "plot.png").symlink_to(FULL)
    assert run_ranks(loop.train, 1, _alone(config)) == [0]
    out, err = capfd.readouterr()
    assert "plot.png cannot be written: [Errno 28] No space left on device" in err
    assert "\nplot " not in out
    assert f"\npage        {config.run.folder / 'run.html'}\n" in out
    assert "next        mics export" in out


def _alone(config: TrainConfig) -> TrainConfig:
    parallel = dataclasses.replace(config.parallel, partition=1, gpus_per_node=1)
    return dataclasses.replace(config, parallel=parallel)


# -- what is seen ----------------------------------------------------------------------------------


def test_header_lines_and_end_say_what_happened(
    tmp_path: Path,
    corpus: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # room for the whole line of a step
    config = settings(
        tmp_path, corpus, evaluation={"every": 2, "sample": 5, "sequences": 4, "prompt": "7 times"}
    )
    assert run_ranks(loop.train, 4, config) == [0] * 4
    out, err = capfd.readouterr()
    assert "partition 2: as asked" in err
    assert "Group map: partition 2, 2 replicas" in out
    assert 'source = "' in out, "the resolved configuration"
    assert "batch   8 sequences = 2 x 1 micro-step(s) x 4 rank(s)" in out
    for step in range(1, 5):
        assert f"step {step}/4  loss " in out
    for word in ("bits/byte", "tok/s", "/GPU)", "MFU n/a", "mem ", "hop 1", "exposed", "ETA"):
        assert word in out
    assert "held out after step 2: loss " in out
    assert "held out after step 4: loss " in out
    assert "sample\n  | 7 times" in out
    assert "counted = predicted, every rank, stage and link: 4 of 4 steps" in out
    assert f"next        mics export {config.run.folder / 'step-00000004'}" in out
    assert (config.run.folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    # Full sharding: 3/4 of a message where hop 1 of 2 ranks sends 1/2; two of four links cross.
    begin = lines(config, "begin")[0]
    between, inside = (begin[f"full_sharding_{link}_nodes"] for link in ("between", "inside"))
    assert between == inside
    assert between + inside == pytest.approx(1.5 * begin["predicted_inside_nodes"], rel=1e-3)
    assert read_settings(config.run.folder / "config.toml") == config


def test_metrics_hold_every_step_and_evaluation_and_survive_a_torn_line(
    tmp_path: Path, corpus: Path
) -> None:
    config = settings(tmp_path, corpus, evaluation={"every": 1})
    config.run.folder.mkdir()
    (config.run.folder / "metrics.jsonl").write_text('{"kind": "step", "st')
    run_ranks(train, 2, config)
    text = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    assert text[0] == '{"kind": "step", "st'
    entries = [json.loads(line) for line in text[1:]]
    assert [e["step"] for e in entries if e["kind"] == "step"] == [1, 2, 3, 4]
    assert [e["step"] for e in entries if e["kind"] == "evaluation"] == [1, 2, 3, 4]
    begin, first, last = entries[0], entries[1], entries[-1]
    assert first["bits_per_byte"] == pytest.approx(
        first["loss"] / math.log(2) / _bytes_per_token(config), rel=1e-9
    )
    assert (begin["kind"], begin["step"], last["kind"], last["step"]) == ("begin", 0, "end", 4)
    assert [e["step"] for e in entries if e["kind"] == "save"] == [4]
    times = [entry["time"] for entry in entries]
    assert times == sorted(times)
    # One partition of all ranks is full sharding.
    assert begin["full_sharding_inside_nodes"] == begin["predicted_inside_nodes"] > 0


def test_throughput_counts_every_token_of_a_masked_model_and_not_the_masked_ones(
    tmp_path: Path, corpus: Path
) -> None:
    """The model computes them all, so utilisation would be a seventh of what it is."""
    config = settings(tmp_path, corpus, kind="bert")
    run_ranks(train, 2, config)
    for entry in lines(config):
        assert entry["tokens_per_second"] * entry["seconds"] == pytest.approx(8 * 16)
        assert entry["tokens_per_second_per_gpu"] == pytest.approx(entry["tokens_per_second"] / 2)
    assert lines(config)[-1]["tokens"] < 4 * 8 * 16 / 2, "those predicted"


def test_generation_settings_of_the_model_stay_with_its_checkpoints(
    tmp_path: Path, corpus: Path
) -> None:
    """From the folder that the model is named by, and on from a checkpoint that has them."""
    folder = tmp_path / "model"
    folder.mkdir()
    Path(model_file(tmp_path, "gpt2")).rename(folder / "config.json")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    first = settings(tmp_path, corpus, model={"name": str(folder)})
    run_ranks(train, 2, first)
    begun = first.run.folder / "step-00000004"
    more = {"folder": tmp_path / "more", "steps": 5, "resume": begun}
    second = settings(tmp_path, corpus, run=more)  # a config.json alone
    run_ranks(train, 2, second)
    for checkpoint in (begun, tmp_path / "more" / "step-00000005"):
        file = checkpoint / "assets" / "model" / "generation_config.json"
        assert json.loads(file.read_text()) == {"temperature": 0.5}


def test_a_masked_model_that_is_asked_nothing_has_no_loss(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"masked": 1e-9}  # no token of these is chosen
    config = settings(tmp_path, corpus, kind="bert", data=data, evaluation={"every": 2})
    run_ranks(train, 2, config)
    assert [e["loss"] for e in lines(config) + lines(config, "evaluation")] == [None] * 6
    out = capfd.readouterr().out
    assert out.count("loss n/a  lr") == 4
    assert out.count(": loss n/a") == 2


def _bytes_per_token(config: TrainConfig) -> float:
    meta = json.loads(next((config.run.folder / "data").glob("*/meta.json")).read_text())["facts"]
    return float(meta["text_bytes"]["train"] / meta["tokens"]["train"])


def test_an_evaluation_changes_nothing(tmp_path: Path, corpus: Path) -> None:
    """Neither the losses, nor the bytes of the next step, nor the random state of dropout."""
    dropout = model_file(tmp_path, "gpt2", resid_pdrop=0.1, embd_pdrop=0.1)
    config = settings(tmp_path, corpus, model={"name": dropout})
    evaluating = elsewhere(config, "evaluating", evaluation={"every": 1, "sample": 3})
    run_ranks(train, 2, config)
    run_ranks(train, 2, evaluating)
    assert losses(config) == losses(evaluating)
    assert all(entry["traffic_as_predicted"] for entry in lines(evaluating))


def test_tensorboard_gets_the_numbers_of_the_metrics_file(tmp_path: Path, corpus: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(tmp_path, corpus, log={"tensorboard": True}, evaluation={"every": 2})
    run_ranks(train, 1, _alone(config))
    events = EventAccumulator(str(config.run.folder / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(shown) == [1, 2, 3, 4]
    assert list(shown.values()) == pytest.approx(losses(config), rel=1e-6)
    assert [event.step for event in events.Scalars("held_out/loss")] == [2, 4]


def test_without_held_out_text_there_is_no_evaluation(tmp_path: Path, corpus: Path) -> None:
    config = settings(tmp_path, corpus, data={"held_out": 0.0}, evaluation={"every": 1})
    run_ranks(train, 1, _alone(config))
    assert lines(config, "evaluation") == []


# -- bad input -------------------------------------------------------------------------------------


def refusals(config: TrainConfig, world: int = 2) -> list[str]:
    return errors_of_ranks(train, world, config)


def test_bad_input_is_one_message_on_every_rank(tmp_path: Path, corpus: Path) -> None:
    short = tmp_path / "short.json"
    model_file(tmp_path, "gpt2", n_positions=8)
    short.write_text((tmp_path / "gpt2.json").read_text())
    model_file(tmp_path, "gpt2")
    small = tmp_path / "small.json"
    small.write_text((tmp_path / "gpt2.json").read_text().replace("260", "100"))
    config = settings(tmp_path, corpus)
    cases = {
        "sequence": (
            elsewhere(config, "a", model={"name": str(short)}),
            ["longer than the model has positions", "data.sequence = 16, the model has 8"],
        ),
        "vocabulary": (
            elsewhere(config, "b", model={"name": str(small)}, data={"sequence": 8}),
            ["ids that the model has no embedding for", "259 ids", "vocabulary is 100"],
        ),
        "empty corpus": (
            elsewhere(config, "c", data={"source": str(tmp_path / "*.none")}),
            ["There is no text in data.source"],
        ),
        "batch": (
            elsewhere(config, "d", batch={"global_batch": 7}),
            ["cannot be shared out evenly", "global_batch = 7, 2 ranks", "--batch.global-batch 8"],
        ),
        "unwritable": (
            dataclasses.replace(
                config, run=RunConfig(folder=tmp_path / "gpt2.json" / "run", steps=2)
            ),
            ["Rank 0 cannot write", "Not a directory", "a folder that every rank can write to"],
        ),
        "mask": (
            elsewhere(
                config, "f", model={"name": model_file(tmp_path, "bert", pad_token_id=MASK_ID)}
            ),
            ["takes the tokenizer's mask for padding", f"mask_token has id {MASK_ID}"],
        ),
        "partition": (
            elsewhere(config, "e", parallel={"partition": 3}),
            ["partition = 3", "Partition sizes possible"],
        ),
    }
    for name, (bad, words) in cases.items():
        for text in refusals(bad):
            for word in words:
                assert word in text, (name, text)


def test_a_checkpoint_of_other_data_or_never_to_be_resumed_is_refused(
    tmp_path: Path, corpus: Path
) -> None:
    config = settings(tmp_path, corpus)
    run_ranks(train, 2, config)
    more = dataclasses.replace(config.run, steps=6)
    never = dataclasses.replace(config, run=dataclasses.replace(more, resume="never"))
    for text in refusals(never):
        assert "run.resume is never: two runs would mix" in text
        assert "The newest is step-00000004" in text
    other = dataclasses.replace(config, run=more, data=dataclasses.replace(config.data, sequence=8))
    for text in refusals(other):
        assert "was trained on other sequences than this run would go on with" in text
    named = dataclasses.replace(
        other, run=dataclasses.replace(more, resume=config.run.folder / "step-00000004")
    )
    assert run_ranks(train, 2, named) == [0, 0]
    assert [entry["step"] for entry in lines(config)] == [1, 2, 3, 4, 5, 6]


def test_an_older_checkpoint_of_the_same_folder_is_not_overtaken(
    tmp_path: Path, corpus: Path
) -> None:
    config = settings(tmp_path, corpus, checkpoint={"every": 2})
    run_ranks(train, 2, config)
    older = config.run.folder / "step-00000002"
    back = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=older))
    for text in refusals(back):
        assert "has newer checkpoints than the one to go on from" in text
        assert "run.resume is step-00000002, the newest is step-00000004" in text
    elsewhere_from_there = elsewhere(back, "elsewhere")
    assert run_ranks(train, 2, elsewhere_from_there) == [0, 0]
    assert losses(elsewhere_from_there) == losses(config)[2:]


def test_a_checkpoint_from_elsewhere_starts_a_folder_once(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Started again by a scheduler, it would begin anew and find the place of every save taken."""
    first = settings(tmp_path, corpus, run={"steps": 2})
    run_ranks(train, 2, first)
    from_there = elsewhere(
        first, "second", run={"steps": 6, "resume": first.run.folder / "step-00000002"}
    )
    capfd.readouterr()
    assert run_ranks(_stop_loudly_after, 2, from_there, 4) == [0, 0]
    assert "the same command with --run.resume auto goes on from there" in capfd.readouterr().out
    for text in refusals(from_there):
        assert "has checkpoints, and run.resume names one elsewhere: two runs would mix" in text
        assert "the newest is step-00000004" in text
        assert "--run.resume auto to go on from the newest" in text
    run = dataclasses.replace(from_there.run, resume="auto")
    assert run_ranks(train, 2, dataclasses.replace(from_there, run=run)) == [0, 0]
    assert [entry["step"] for entry in lines(from_there)] == [3, 4, 5, 6]


def _stop_loudly_after(config: TrainConfig, steps: int) -> int:
    with _stopping_after(steps):
        return loop.train(config)


def _keep_weights_only(config: TrainConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "save", lambda path, *, optimizer, **more: mics.save(path, **more))
        train(config)


def test_weights_without_an_optimizer_are_fallen_back_to_and_nothing_is_in_the_way(
    tmp_path: Path, corpus: Path
) -> None:
    config = settings(tmp_path, corpus, run={"steps": 1})
    run_ranks(_keep_weights_only, 2, config)
    (config.run.folder / "step-00000001").rename(config.run.folder / "step-00000000")
    damaged = config.run.folder / "step-00000002"
    damaged.mkdir()
    more = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2))
    assert run_ranks(train, 2, more) == [0, 0]
    assert (damaged / "manifest.json").is_file()
    assert (config.run.folder / "step-00000002.damaged").is_dir()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, corpus: Path) -> None:
    config = settings(tmp_path, corpus)
    run_ranks(train, 2, config)
    model_file(tmp_path, "gpt2", n_embd=32)
    for text in refusals(config):
        assert "is of another model: shapes or dtypes differ" in text
        assert "transformer.wte.weight is float32 [260, 24] there, float32 [260, 32] here" in text
