"""mics train with some of its ranks away: the same samples in every step, the same losses."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import errors_of_ranks, run_ranks
from test_training import elsewhere, lines, losses, settings

from mics.errors import ConfigError
from mics.training import loop
from mics.training.batching import Batching, solve
from mics.training.config import BatchConfig, SourceConfig, TrainConfig
from mics.training.data import Batch
from mics.training.optimisation import check_dealt
from mics.training.setup import Run

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"),
    pytest.mark.usefixtures("memory"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{at} and {at * at}." for at in range(2000)))
    return file


def train(config: TrainConfig, job: str, full: int, dies_after: int = 99) -> int:
    """Train as one of the ranks of a job, and write down which sequences each step was of."""
    os.environ |= {"MICS_JOB": job, "MICS_FULL_WORLD": str(full)}
    seen = (config.run.folder.parent / f"{job}.{dist.get_rank()}").open("a")
    plain = Run.micro_batches

    def watched(run: Run, position: int) -> Iterator[Batch]:
        step = position // run.batch.global_batch + 1
        if step > dies_after:
            raise KeyboardInterrupt
        for batch in plain(run, position):
            for inputs, labels in zip(batch.inputs, batch.labels, strict=True):
                if (labels != -100).any():
                    name = hashlib.sha256(bytes(inputs.view(torch.uint8).tolist())).hexdigest()
                    seen.write(f"{step} {name}\n")
            yield batch
        seen.flush()

    Run.micro_batches = watched  # type: ignore[method-assign]
    return loop.train(config)


def samples(folder: Path, job: str) -> Counter[str]:
    """How often each sequence was seen in each step, by all ranks of all attempts."""
    files = folder.glob(f"{job}.*")
    return Counter(line for file in files for line in file.read_text().splitlines())


@pytest.mark.extra
def test_losses_and_samples_are_those_of_all_ranks(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings(
        tmp_path,
        text,
        run={"steps": 6},
        batch={"global_batch": 32, "micro_batch": 2},  # 2 micro-steps, 3 with 6 ranks
        optimizer={"eps": 1e-3, "clip": 1.0},
        evaluation={"every": 1, "sample": 0, "sequences": 5},
    )
    whole = elsewhere(config, "whole")
    assert run_ranks(train, 8, whole, "whole", 8, ranks_per_node=2) == [0] * 8
    errors_of_ranks(train, 8, config, "parts", 8, 2, ranks_per_node=2)
    capfd.readouterr()
    errors = errors_of_ranks(train, 6, config, "parts", 8, 4, ranks_per_node=2)
    written = capfd.readouterr()
    assert "goes on from memory, step 2" in written.err, errors[0]
    assert "RANKS TRAIN" not in written.err
    words = "6 of 8 ranks: the same samples per step, in 3 micro-step(s) instead of 2, 2 ranks are"
    assert " ".join(written.out.split()).count(words) == 1, written.out
    assert run_ranks(train, 8, config, "parts", 8, ranks_per_node=2) == [0] * 8
    assert samples(tmp_path, "parts") == samples(tmp_path, "whole")
    assert [entry["step"] for entry in lines(config)] == [1, 2, 3, 4, 5, 6]
    assert [entry["ranks"] for entry in lines(config)] == [8, 8, 6, 6, 8, 8]
    assert all(entry["traffic_as_predicted"] for entry in lines(config))
    for kind in ("step", "evaluation"):
        for one, other in zip(lines(config, kind), lines(whole, kind), strict=True):
            assert one["step"] == other["step"]
            assert abs(one["loss"] - other["loss"]) < 1e-6
    for one, other in zip(lines(config), lines(whole), strict=True):
        assert (one["tokens"], one["learning_rate"]) == (other["tokens"], other["learning_rate"])
        assert one["norm"] == pytest.approx(other["norm"], rel=1e-5)


@pytest.mark.parametrize("keeps", [True, False])
def test_steps_of_another_size_are_said(
    keeps: bool, tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on fewer ranks where nobody has told how many the job has in full."""
    config = settings(
        tmp_path,
        text,
        run={"steps": 2},
        batch={"global_batch": None, "micro_batch": 2, "micro_steps": 2},
        parallel={"partition": 1, "gpus_per_node": 1},
        checkpoint={"every": 1, "memory": keeps},
    )
    if keeps:
        errors_of_ranks(train, 2, config, "parts", 2, 1)
    else:
        run = dataclasses.replace(config.run, steps=1)
        run_ranks(train, 2, dataclasses.replace(config, run=run), "parts", 2)
    assert "STEPS HAVE ANOTHER SIZE" not in capfd.readouterr().err
    run_ranks(train, 1, config, "parts", 1)
    said = capfd.readouterr().err
    assert ("goes on from memory, step 1" in said) == keeps, said
    words = "those so far were of 8 sequences, on 2 rank(s) in full; from now on 4 sequences"
    assert said.count(words) == 1, said
    assert "MICS_FULL_WORLD=2 keeps the steps as they were" in said


@pytest.mark.extra
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_checkpoints_go_from_few_ranks_to_many_and_back(
    kind: str, tmp_path: Path, text: Path
) -> None:
    """Without memory; a masked model has other numbers of targets in every micro-batch."""
    config = settings(
        tmp_path,
        text,
        kind,
        batch={"global_batch": 16, "micro_batch": 1},
        optimizer={"eps": 1e-3, "decay": "none"},
        checkpoint={"every": 1, "memory": False},
    )
    whole = elsewhere(config, "whole")
    assert run_ranks(train, 8, whole, "whole", 8, ranks_per_node=2) == [0] * 8
    for ranks, steps in ((6, 1), (8, 2), (4, 3), (2, 4)):
        run = dataclasses.replace(config.run, steps=steps)
        shorter = dataclasses.replace(config, run=run)
        assert run_ranks(train, ranks, shorter, "parts", 8, ranks_per_node=2) == [0] * ranks
    assert samples(tmp_path, "parts") == samples(tmp_path, "whole")
    assert [entry["ranks"] for entry in lines(config)] == [6, 8, 4, 2]
    assert losses(config) == pytest.approx(losses(whole), abs=1e-6)


def test_dealt_states_train_as_plain_ones_and_go_on_from_either(tmp_path: Path, text: Path) -> None:
    config = settings(
        tmp_path,
        text,
        run={"steps": 4},
        batch={"global_batch": 8, "micro_batch": 1},
        optimizer={"eps": 1e-3, "decay": "none", "clip": 0.5},
        parallel={"partition": 2, "gpus_per_node": 2},
        checkpoint={"every": 2, "memory": False},
    )
    dealt = dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, dealt_states=True)
    )
    whole = elsewhere(config, "whole")
    assert run_ranks(train, 4, whole, "whole", 4) == [0] * 4
    two = dataclasses.replace(config.run, steps=2)
    assert run_ranks(train, 4, dataclasses.replace(dealt, run=two), "parts", 4) == [0] * 4
    assert run_ranks(train, 4, dealt, "parts", 4) == [0] * 4  # goes on from its own
    assert all(entry["traffic_as_predicted"] for entry in lines(config))
    assert losses(config) == pytest.approx(losses(whole), abs=1e-6)
    norms = [[entry["norm"] for entry in lines(one)] for one in (config, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"checkpoint": {"memory": True}}, "--checkpoint.no-memory"),
        ({"parallel": {"dealt_states": True, "hop_two": "fp8"}}, "parallel.hop_two is fp8"),
    ],
)
def test_what_dealt_states_are_not_for_is_refused(
    changed: dict[str, dict[str, Any]], words: str, tmp_path: Path, text: Path
) -> None:
    asked: dict[str, dict[str, Any]] = {
        "parallel": {"dealt_states": True},
        "checkpoint": {"memory": False},
    }
    with pytest.raises(ConfigError, match=words):
        check_dealt(settings(tmp_path, text, **(asked | changed)))


@pytest.mark.slow
def test_a_mixture_trains_on_the_same_samples_at_another_layout_and_after_a_resume(
    tmp_path: Path, text: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{at};" for at in range(9000)))
    config = settings(
        tmp_path,
        text,
        data={"source": None, "sources": weighted(text, other)},
        run={"steps": 3},
        batch={"global_batch": 6, "micro_batch": 1},
        optimizer={"eps": 1e-3, "decay": "none"},
        parallel={"partition": 1, "gpus_per_node": 1},
        checkpoint={"every": 1, "memory": False},
    )
    whole = elsewhere(config, "whole")
    assert run_ranks(train, 2, whole, "whole", 2) == [0, 0]
    for ranks, steps in ((1, 2), (3, 3)):
        run = dataclasses.replace(config.run, steps=steps)
        assert (
            run_ranks(train, ranks, dataclasses.replace(config, run=run), "parts", ranks)
            == [0] * ranks
        )
    assert samples(tmp_path, "parts") == samples(tmp_path, "whole")
    assert losses(config) == pytest.approx(losses(whole), abs=1e-6)


def weighted(*files: Path) -> tuple[SourceConfig, ...]:
    return tuple(SourceConfig(str(file), 2.0 - at) for at, file in enumerate(files))


# -- arithmetic ------------------------------------------------------------------------------------


def test_every_micro_batch_is_dealt_once_and_everybody_has_as_many() -> None:
    for full, steps in ((8, 2), (8, 1), (4, 3), (16, 5)):
        batch = Batching(full * steps * 3, 3, steps, full)
        for ranks in range(1, 20):
            dealt = [batch.dealt(rank, ranks) for rank in range(ranks)]
            assert {len(one) for one in dealt} == {-(-full * steps // ranks)}
            numbers = [number for one in dealt for number in one if number is not None]
            assert sorted(numbers) == list(range(full * steps))
    assert Batching(48, 3, 2, 8).dealt(5, 8) == [5, 13]


def test_it_is_said_what_a_step_is_on_fewer_ranks() -> None:
    batch = solve(BatchConfig(global_batch=32, micro_batch=2), 8)
    assert batch.on(8) == ""
    assert batch.on(4).startswith("4 of 8 ranks: the same samples per step, in 4 micro-step(s) ins")
    assert "to rounding, not to the bit" in batch.on(6)
    assert "2 ranks are idle in the last one" in batch.on(6)


def _told(full: str) -> None:
    os.environ["MICS_FULL_WORLD"] = full.replace("RANK", str(4 + dist.get_rank()))
    loop.train(settings(Path("/nowhere"), Path("/nowhere"), model={"name": "gpt2-tiny"}))


@pytest.mark.parametrize(
    ("full", "words"),
    [
        ("four", "MICS_FULL_WORLD is the number of ranks"),
        ("0", "MICS_FULL_WORLD is the number of ranks"),
        ("RANK", "disagree on ranks of the full job"),
        ("3", "global_batch cannot be shared out evenly"),
    ],
)
def test_a_full_job_that_makes_no_sense_is_refused_by_all(full: str, words: str) -> None:
    for error in errors_of_ranks(_told, 2, full):
        assert words in error
