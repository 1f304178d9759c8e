"""transformers' Trainer with mics: beside DDP, counted, saved, resumed, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from models import weights
from parity import quiet
from ranks import collect_ranks, run_ranks
from small_models import MAKERS, UNITS, gpt, tokens_of
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainingArguments

import mics
from mics.errors import CheckpointError, ConfigError, ShardError
from mics.integrations.transformers import with_mics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

WORLD, PARTITION = 4, 2
SIZE = 44  # on 4 ranks, 2 a micro-batch: 6 micro-batches, the last step of an epoch has 2


def arguments(folder: str, **others: Any) -> TrainingArguments:
    fixed = {
        "output_dir": folder,
        "use_cpu": True,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_grad_norm": 0.5,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(**(fixed | others))


class Hops(TrainerCallback):
    """Counts all-reduces between replicas, of every micro-step."""

    def __init__(self) -> None:
        self.counted: list[int] = []

    def _count(self, model: Any) -> None:
        view = mics.ledger(model)
        counts = view.traffic().counts.items()
        self.counted.append(sum(count.calls for key, count in counts if key.hop == 2))
        view.reset()

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        mics.ledger(model).reset()

    def on_substep_end(self, *_: Any, model: Any, **__: Any) -> None:
        self._count(model)

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self._count(model)


def quietly(function: Any, *args: Any) -> Any:
    transformers.utils.logging.disable_progress_bar()
    return quiet(lambda: function(*args))


def history(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _beside_ddp(kind: str, folder: str) -> tuple[Any, ...]:
    data = {"train_dataset": tokens_of(kind, SIZE), "eval_dataset": tokens_of(kind, 13)}
    right = Trainer(model=MAKERS[kind](), args=arguments(folder), **data)
    right.train()
    hops = Hops()
    args = arguments(folder)
    # The adopting diff: Trainer(...) is with_mics(Trainer, partition=2)(...).
    found = with_mics(Trainer, partition=PARTITION)(
        model=MAKERS[kind](), args=args, callbacks=[hops], **data
    )
    found.train()
    assert isinstance(found.model, FSDPModule)
    return (
        [(history(one, "loss"), history(one, "grad_norm")) for one in (right, found)],
        [one.evaluate()["eval_loss"] for one in (right, found)],
        hops.counted,
    )


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", MAKERS)
def test_losses_are_those_of_ddp_and_hop_2_runs_once_a_step(kind: str, tmp_path: Path) -> None:
    for (right, found), evaluated, hops in run_ranks(
        quietly, WORLD, _beside_ddp, kind, str(tmp_path)
    ):
        assert len(found[0]) == 4
        assert _apart(right[0], found[0]) < 1e-5
        assert _apart(right[1], found[1]) < 1e-5
        assert abs(evaluated[0] - evaluated[1]) < 1e-5
        assert hops == 2 * [0, 0, 0, UNITS[kind], 0, UNITS[kind]]


def _resume(kind: str, folder: str) -> dict[str, Any]:
    keeping = {"save_strategy": "steps", "save_steps": 1, "seed": 5}
    data = {"train_dataset": tokens_of(kind, SIZE), "eval_dataset": tokens_of(kind, 13)}
    trainer = with_mics(Trainer, partition=PARTITION)
    whole = trainer(model=MAKERS[kind](0.1), args=arguments(folder, **keeping), **data)
    whole.train()
    found = {"losses": history(whole, "loss"), "norms": history(whole, "grad_norm")}
    for step in (1, 2):  # in the middle of an epoch, and between two
        resumed = trainer(model=MAKERS[kind](0.1), args=arguments(folder + "2", seed=5), **data)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{step}")
        mine, its = weights(whole.model), weights(resumed.model)
        found[step] = {
            "losses": history(resumed, "loss"),
            "norms": history(resumed, "grad_norm"),
            "other weights": [name for name in mine if not torch.equal(mine[name], its[name])],
        }
    whole.save_model(f"{folder}/saved")
    tokens = tokens_of("gpt", 1)[0]["input_ids"][None]
    whole.model.eval()
    with torch.no_grad():
        found["logits"] = whole.model(input_ids=tokens).logits
    return found


@pytest.mark.parametrize("kind", ["gpt", "lora"])
def test_resuming_equals_not_stopping_to_the_bit_and_weights_load_elsewhere(
    kind: str, tmp_path: Path
) -> None:
    found = run_ranks(quietly, WORLD, _resume, kind, str(tmp_path / "run"))
    for one in found:
        for step in (1, 2):
            assert len(one["losses"]) == 4
            assert one[step]["losses"] == one["losses"]
            assert one[step]["norms"] == one["norms"]
            assert one[step]["other weights"] == []
    tokens = tokens_of("gpt", 1)[0]["input_ids"][None]
    for name in ("saved", "checkpoint-4"):
        folder = tmp_path / "run" / name
        if kind == "gpt":
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        else:
            model = peft.PeftModel.from_pretrained(gpt(), folder)
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits, found[0]["logits"])


def _smoothed(kind: str, folder: str) -> list[list[float]]:
    found = []
    for trainer in (Trainer, with_mics(Trainer, partition=PARTITION)):
        one = trainer(
            model=MAKERS[kind](),
            args=arguments(folder, label_smoothing_factor=0.1, num_train_epochs=1),
            train_dataset=tokens_of(kind, SIZE),
            eval_dataset=tokens_of(kind, 13),
        )
        one.train()
        found.append([*history(one, "loss"), one.evaluate()["eval_loss"]])
    return found


@pytest.mark.extra
@pytest.mark.parametrize("kind", MAKERS)
def test_smoothed_labels_are_shifted_as_the_trainer_shifts_them(kind: str, tmp_path: Path) -> None:
    # The Trainer asks for the name of the model's class, which FSDP2 changes.
    for right, found in run_ranks(quietly, WORLD, _smoothed, kind, str(tmp_path)):
        assert _apart(right, found) < 1e-5


# -- other ways into it --------------------------------------------------------------------------


def _sharded_before(folder: str) -> list[Any]:
    found: list[Any] = []
    full = torch.distributed.fsdp.MixedPrecisionPolicy()
    data = {"train_dataset": tokens_of("gpt", SIZE)}
    for model in (gpt(), mics.shard(gpt(), partition=PARTITION, mp_policy=full)):
        trainer = with_mics(Trainer, partition=PARTITION)(
            model=model, args=arguments(folder, num_train_epochs=1), **data
        )
        trainer.train()
        found.append(history(trainer, "loss"))
    model = mics.shard(gpt(), partition=PARTITION, mp_policy=full)
    plain = Trainer(model=model, args=arguments(folder), **data)
    with pytest.raises(ShardError, match=r"with_mics\(Trainer\)"):
        plain.train()
    return found


def test_a_sharded_model_trains_and_the_plain_trainer_names_the_way(tmp_path: Path) -> None:
    for first, second in run_ranks(quietly, WORLD, _sharded_before, str(tmp_path)):
        assert first == second


def _best(folder: str) -> tuple[float, float, int]:
    keeping = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
        "learning_rate": 5.0,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    }
    trainer = with_mics(Trainer, partition=PARTITION)(
        model=gpt(),
        args=arguments(folder, **keeping),
        train_dataset=tokens_of("gpt", SIZE),
        eval_dataset=tokens_of("gpt", 13),
    )
    trainer.train()
    losses = history(trainer, "eval_loss")
    return min(losses), trainer.evaluate()["eval_loss"], losses.index(min(losses))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    for best, found, index in run_ranks(quietly, WORLD, _best, str(tmp_path)):
        assert best == found
        assert index != 3, "the best is the last: nothing had to be loaded"


def _elsewhere(folder: str) -> list[list[float]]:
    data = {"train_dataset": tokens_of("gpt", SIZE), "eval_dataset": tokens_of("gpt", 13)}
    keeping = {"save_strategy": "steps", "save_steps": 2}
    right = Trainer(model=gpt(), args=arguments(folder), **data)
    first = with_mics(Trainer, partition=2)(model=gpt(), args=arguments(folder, **keeping), **data)
    first.evaluate()  # which a plain Trainer would take for the end of preparing, without DDP
    other = with_mics(Trainer, partition=4)(model=gpt(), args=arguments(folder), **data)
    right.train()
    first.train()
    other.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return [history(trainer, "loss") for trainer in (right, first, other)]


def test_a_run_goes_on_at_another_p_and_may_be_evaluated_before(tmp_path: Path) -> None:
    for right, first, other in run_ranks(quietly, WORLD, _elsewhere, str(tmp_path)):
        assert _apart(right, first) < 1e-5
        assert _apart(first, other) < 1e-5


def _some_steps(folder: str, accumulation: int, whole: bool) -> list[float]:
    """Train three epochs of two steps, of 16 micro-batches over all ranks each.

    Those that go on begin in the middle of the second.
    """
    args = arguments(
        folder,
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=3,
        num_train_epochs=3,
    )
    trainer = with_mics(Trainer, partition=PARTITION)(
        model=gpt(), args=args, train_dataset=tokens_of("gpt", 64)
    )
    trainer.train(resume_from_checkpoint=None if whole else f"{folder}/checkpoint-3")
    return history(trainer, "loss") + history(trainer, "grad_norm")


@pytest.mark.extra
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_a_run_goes_on_with_another_number_of_ranks(
    before: int, after: int, tmp_path: Path
) -> None:
    whole = run_ranks(quietly, before, _some_steps, str(tmp_path), 16 // before, True)[0]
    assert len(whole) == 12
    for found in run_ranks(quietly, after, _some_steps, str(tmp_path), 16 // after, False):
        assert _apart(whole, found) < 1e-5


def _refusals(folder: str) -> None:
    with pytest.raises(ConfigError, match="no keyword 'partitions'"):
        with_mics(Trainer, partitions=2)
    with pytest.raises(ConfigError, match="which is no Trainer class"):
        with_mics(gpt)
    trainer = with_mics(Trainer, partition=PARTITION)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ConfigError, match="save_only_model=False"):
        trainer(
            model=gpt(),
            args=arguments(folder, save_only_model=True, **best),
            eval_dataset=tokens_of("gpt", 4),
        )
    with pytest.raises(ConfigError, match=r"with_mics\(Trainer, compile=True\)"):
        trainer(model=gpt(), args=arguments(folder, torch_compile=True))
    AcceleratorState._reset_state()
    with pytest.raises(ConfigError, match=r"TrainingArguments\(bf16=True\)"):
        trainer(model=gpt(), args=arguments(folder, fp16=True))
    AcceleratorState._reset_state()
    keeping = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    data = {"train_dataset": tokens_of("gpt", SIZE)}
    with pytest.raises(ShardError, match=r"transformers.Adafactor takes .*\n.*\n.*mics.WholeStep"):
        trainer(model=gpt(), args=arguments(folder, optim="adafactor"), **data).train()
    Trainer(model=gpt(), args=arguments(folder, **keeping), **data).train()
    resumed = trainer(model=gpt(), args=arguments(folder), **data)
    with pytest.raises(CheckpointError, match="no states of mics"):
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-1")


def test_what_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    run_ranks(quietly, 2, _refusals, str(tmp_path))


def _uneven(folder: str, accumulation: int) -> None:
    settings = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "accelerator_config": {"even_batches": False},
        "num_train_epochs": 1,
    }
    data = {"train_dataset": tokens_of("gpt", 6)}  # ranks 0 and 1 have 2, 2 and 3 have 1
    with_mics(Trainer, partition=PARTITION)(
        model=gpt(), args=arguments(folder, **settings), **data
    ).train()


@pytest.mark.parametrize("accumulation", [4, 1])
def test_uneven_loaders_end_in_words(
    accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICS_WAIT_SECONDS", "1")
    said = collect_ranks(quietly, WORLD, _uneven, str(tmp_path), accumulation, stop_at_first=False)
    assert all(kind == "raised" for kind, _ in said)
    assert all("mics.errors" in text for _, text in said), said


class OnOne(TrainerCallback):
    """Wants on one rank what all ranks have to do."""

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.distributed.get_rank() == 1 and hasattr(control, self.wanted):
            setattr(control, self.wanted, True)


def _on_one(folder: str, wanted: str) -> None:
    data = {"train_dataset": tokens_of("gpt", SIZE), "eval_dataset": tokens_of("gpt", 8)}
    trainer = with_mics(Trainer, partition=PARTITION)(
        model=gpt(), args=arguments(folder), callbacks=[OnOne(wanted)], **data
    )
    trainer.train()
    if wanted == "save_model":
        if trainer.is_world_process_zero():
            trainer.save_model(folder)
        trainer.accelerator.wait_for_everyone()


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("should_save", "rank(s) 0, 2-3: 2 micro-batch(es) left; rank(s) 1: in the saving of"),
        ("should_evaluate", "left; rank(s) 1: in an evaluation"),
        ("should_training_stop", "rank(s) 1: 0; rank(s) 0, 2-3: 2."),
        ("save_model", "rank(s) 0: in a gathering of the whole weights; rank(s) 1-3: in wait_for"),
    ],
)
def test_what_one_rank_does_alone_ends_in_words(wanted: str, told: str, tmp_path: Path) -> None:
    said = collect_ranks(quietly, WORLD, _on_one, str(tmp_path), wanted, stop_at_first=False)
    assert all(kind == "raised" and told in text for kind, text in said), said
