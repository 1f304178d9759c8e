"""Lightning's Fabric and Trainer with mics: beside DDP, counted, saved, resumed, with adapters."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from models import full, weights
from parity import quiet
from ranks import collect_ranks, run_ranks
from small_models import MAKERS, UNITS, gpt, tokens_of
from torch.utils.data import DataLoader, IterableDataset

import mics
from mics.errors import (
    CheckpointError,
    ConfigError,
    MicroStepError,
    MicsWarning,
    ShardError,
)
from mics.integrations.whole import whole_state_dict

pytest.importorskip("lightning", reason="pip install 'torch-mics[dev]'")

from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from mics.integrations import fabric as for_fabric
from mics.integrations import lightning as for_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WORLD, PARTITION, ACCUMULATION = 4, 2, 4
SIZE = 44  # on 4 ranks, 2 a micro-batch: 6 micro-batches, the last step of an epoch has 2


def quietly(function: Any, *args: Any) -> Any:
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return quiet(lambda: function(*args))


def hops_of(model: Any) -> int:
    """All-reduces between replicas since the last time."""
    view = mics.ledger(model)
    counts = view.traffic().counts.items()
    view.reset()
    return sum(count.calls for key, count in counts if key.hop == 2)


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


# -- Fabric --------------------------------------------------------------------------------------


class Run:
    """A loop of Fabric's own documentation, and what came of it."""

    def __init__(self, kind: str, strategy: Any = None, dropout: float = 0.0) -> None:
        strategy = strategy or for_fabric.MicsStrategy(partition=PARTITION)
        self.fabric = fabric = Fabric(accelerator="cpu", devices=WORLD, strategy=strategy)
        fabric.launch()
        torch.manual_seed(dist.get_rank())
        model = MAKERS[kind](dropout)
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.model, self.optimizer = fabric.setup(model, optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
        loader = DataLoader(tokens_of(kind, SIZE), batch_size=2, shuffle=True)
        self.loader = fabric.setup_dataloaders(loader)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.hops: list[int] = []

    def epochs(self, first: int, last: int, skip: int = 0, stop: int | None = None) -> None:
        for epoch in range(first, last):
            self.loader.sampler.set_epoch(epoch)
            for number, batch in enumerate(self.loader._dataloader):
                if number >= skip:
                    self.micro_step(number, batch)
                if number + 1 == stop:
                    return
            skip = 0

    def micro_step(self, number: int, batch: Any) -> None:
        fabric, model = self.fabric, self.model
        is_accumulating = (number + 1) % ACCUMULATION != 0 and number + 1 < len(self.loader)
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = model(**batch).loss
            fabric.backward(loss / ACCUMULATION)
        if not is_accumulating:
            norm = fabric.clip_gradients(model, self.optimizer, max_norm=0.5)
            self.norms.append(float(norm))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.losses.append(float(fabric.all_reduce(loss.detach())))
        if isinstance(fabric.strategy, for_fabric.MicsStrategy):
            self.hops.append(hops_of(model))

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "step": len(self.losses),
        }


def _fabric_beside_ddp(kind: str) -> list[Any]:
    runs = []
    for strategy in ("ddp", None):
        run = Run(kind, strategy)
        run.epochs(0, 2)
        runs.append((run.losses, run.norms, run.hops))
    return runs


@pytest.mark.parametrize("kind", MAKERS)
def test_fabric_has_the_losses_of_ddp_and_one_hop_2_a_step(kind: str) -> None:
    for right, found in run_ranks(quietly, WORLD, _fabric_beside_ddp, kind):
        assert len(found[0]) == 12
        assert apart(right[0], found[0]) < 1e-5
        assert apart(right[1], found[1]) < 1e-5
        assert found[2] == 2 * [0, 0, 0, UNITS[kind], 0, UNITS[kind]]


def _fabric_resumes(kind: str, folder: str) -> dict[str, Any]:
    whole = Run(kind, dropout=0.1)
    whole.epochs(0, 1, stop=4)
    whole.fabric.save(folder, whole.state())
    whole.fabric.save(folder, whole.state())  # over what is there
    torch.manual_seed(dist.get_rank())
    whole.epochs(0, 2, skip=4)

    resumed = Run(kind, dropout=0.1)
    with torch.no_grad():
        for param in resumed.model.parameters():
            if param.requires_grad:
                param.zero_()
    state = resumed.state()
    left = resumed.fabric.load(folder, state)
    torch.manual_seed(dist.get_rank())
    resumed.epochs(0, 2, skip=4)
    mine, its = weights(whole.model), weights(resumed.model)
    return {
        "step": state["step"],
        "left": left,
        "losses": (whole.losses[4:], resumed.losses),
        "norms": (whole.norms[1:], resumed.norms),
        "other weights": [name for name in mine if not torch.equal(mine[name], its[name])],
        "rate": (whole.scheduler.get_last_lr(), resumed.scheduler.get_last_lr()),
    }


@pytest.mark.parametrize("kind", ["gpt", "lora"])
def test_fabric_resumes_to_the_bit(kind: str, tmp_path: Path) -> None:
    for found in run_ranks(quietly, WORLD, _fabric_resumes, kind, str(tmp_path / "state")):
        assert (found["step"], found["left"]) == (4, {})
        assert len(found["losses"][0]) == 8
        for name in ("losses", "norms", "rate"):
            assert found[name][0] == found[name][1], name
        assert found["other weights"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "lightning.ckpt",
        "model",
    ]


def _fabric_keeps_weights(folder: str) -> dict[str, torch.Tensor]:
    run = Run("gpt")
    run.epochs(0, 1)
    model = run.model.module
    state = whole_state_dict(model)
    if run.fabric.is_global_zero:
        torch.save(state, f"{folder}/raw.pt")
        model.save_pretrained(f"{folder}/pretrained", state_dict=state)
    run.fabric.barrier()
    before = logits(run.model)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    run.fabric.load_raw(f"{folder}/raw.pt", run.model)
    return {"before": before, "after": logits(run.model)}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens_of("gpt", 1)[0]["input_ids"][None]).logits
    return found


def test_what_fabric_has_trained_loads_in_plain_transformers(tmp_path: Path) -> None:
    found = run_ranks(quietly, WORLD, _fabric_keeps_weights, str(tmp_path))[0]
    assert torch.equal(found["before"], found["after"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained")
    assert torch.equal(logits(plain), found["before"])


def _adapters(folder: str) -> torch.Tensor:
    run = Run("lora")
    run.epochs(0, 1)
    mics.save_adapters(f"{folder}/adapter", model=run.model.module)
    return logits(run.model)


def test_adapters_alone_load_in_plain_peft(tmp_path: Path) -> None:
    right = run_ranks(quietly, WORLD, _adapters, str(tmp_path))[0]
    model = peft.PeftModel.from_pretrained(gpt(), tmp_path / "adapter")
    assert torch.equal(logits(model), right)


def _fabric_refuses(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"no keyword 'partitions'.*\n.*\n.*partition="):
        for_fabric.MicsStrategy(partitions=2)
    fabric = Fabric(
        accelerator="cpu",
        devices=2,
        strategy=for_fabric.MicsStrategy(partition=2),
        plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")),
    )
    fabric.launch()
    with pytest.raises(ConfigError, match="16-mixed"):
        fabric.setup_module(gpt())
    fabric = Fabric(accelerator="cpu", devices=2, strategy=for_fabric.MicsStrategy(partition=2))
    fabric.launch()
    model = gpt()
    late = torch.optim.AdamW(model.parameters())
    model = fabric.setup_module(model)
    late = fabric.setup_optimizers(late)
    batch = tokens_of("gpt", 1)[0]
    batch = {name: value[None] for name, value in batch.items()}
    with fabric.no_backward_sync(model, enabled=True):
        fabric.backward(model(**batch).loss)
    stepping = fabric.setup_optimizers(torch.optim.SGD(model.parameters()))
    fabric.backward(model(**batch).loss)  # the last one, without no_backward_sync around it
    for early in (lambda: fabric.clip_gradients(model, stepping, max_norm=1.0), stepping.step):
        with pytest.raises(
            MicroStepError, match=r"1 micro-step.*\n.*no_backward_sync\(model, enab"
        ):
            early()
    with pytest.raises(MicroStepError, match="between micro-steps"):
        fabric.save(f"{folder}/x", {"model": model})
    with fabric.no_backward_sync(model, enabled=False):
        fabric.backward(model(**batch).loss)
    with pytest.raises(ShardError):
        late.step()
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))
    with pytest.raises(CheckpointError, match="without the model"):
        fabric.save(f"{folder}/x", {"optimizer": optimizer})
    with pytest.raises(CheckpointError, match="filter of 'model'"):
        fabric.save(f"{folder}/x", {"model": model}, filter={"model": lambda *_: True})
    with pytest.raises(
        CheckpointError, match=r"fabric.save was given has shards.*\n.*weights.*wte"
    ):
        fabric.save(f"{folder}/x", {"weights": model.state_dict()})
    if fabric.is_global_zero:
        torch.save({"model": {}, "optimizer": {}}, f"{folder}/ddp.ckpt")
    fabric.barrier()
    with pytest.raises(CheckpointError, match="no states of mics"):
        fabric.load(f"{folder}/ddp.ckpt", {"model": model, "optimizer": optimizer})


def test_what_fabric_cannot_do_is_refused(tmp_path: Path) -> None:
    run_ranks(quietly, 2, _fabric_refuses, str(tmp_path))


def _fabric_uneven(accumulation: int) -> None:
    run = Run("gpt")
    for number in range(2 if dist.get_rank() < 2 else 1):
        batch = {n: value[None] for n, value in tokens_of("gpt", 9)[number].items()}
        is_accumulating = (number + 1) % accumulation != 0
        with run.fabric.no_backward_sync(run.model, enabled=is_accumulating):
            run.fabric.backward(run.model(**batch).loss)
        if not is_accumulating:
            run.optimizer.step()
            run.optimizer.zero_grad()
    run.fabric.barrier()


@pytest.mark.parametrize("accumulation", [4, 1])
def test_uneven_data_ends_in_words_with_fabric(
    accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICS_WAIT_SECONDS", "1")
    said = collect_ranks(quietly, WORLD, _fabric_uneven, accumulation, stop_at_first=False)
    assert all(kind == "raised" for kind, _ in said)
    assert all("mics.errors" in text for _, text in said), said


# -- the Trainer ---------------------------------------------------------------------------------


class Module(LightningModule):
    """A model with a loss, and what came of its steps on this rank."""

    def __init__(self, kind: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        torch.manual_seed(0)
        self.model = MAKERS[kind](dropout)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.hops: list[int] = []
        self.evaluated: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(float(self.model(**batch).loss))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        found: torch.Tensor = self.model(**batch).logits
        return found

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, *args, **kwargs)
        # Whole gradients, clipped: what was all-reduced, and by which norm it was divided.
        grads = [full(p.grad) for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    def on_train_batch_end(self, *_: Any) -> None:
        if isinstance(self.trainer.strategy, for_trainer.MicsStrategy):
            self.hops.append(hops_of(self.trainer.strategy.model))

    def configure_optimizers(self) -> Any:
        trained = [param for param in self.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Reseeded(Callback):
    """Dropout that a resumed run finds again; Lightning leaves random states to others."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        torch.manual_seed(100 * trainer.global_step + dist.get_rank())


def trainer_of(strategy: Any = None, **others: Any) -> Any:
    fixed: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": WORLD,
        "strategy": strategy or for_trainer.MicsStrategy(partition=PARTITION),
        "accumulate_grad_batches": ACCUMULATION,
        "gradient_clip_val": 0.5,
        "max_epochs": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(fixed | others))


def loader_of(kind: str, size: int = SIZE, batch_size: int = 2) -> Any:
    return DataLoader(tokens_of(kind, size), batch_size=batch_size)


def _trainer_beside_ddp(kind: str) -> list[Any]:
    runs = []
    for strategy in ("ddp", None):
        module = Module(kind)
        trainer = trainer_of(strategy, val_check_interval=3)
        trainer.fit(module, loader_of(kind), loader_of(kind, 12, 3))
        runs.append((module.losses, module.norms, module.evaluated, module.hops))
    return runs


@pytest.mark.parametrize("kind", MAKERS)
def test_a_trainer_has_the_losses_of_ddp_and_one_hop_2_a_step(kind: str) -> None:
    for right, found in run_ranks(quietly, WORLD, _trainer_beside_ddp, kind):
        assert (len(found[0]), len(found[1]), len(found[2])) == (12, 4, 4)
        assert apart(right[0], found[0]) < 1e-5
        assert apart(right[1], found[1]) < 1e-5
        assert apart(right[2], found[2]) < 1e-5
        assert found[3] == 2 * [0, 0, 0, UNITS[kind], 0, UNITS[kind]]


def _trainer_resumes(kind: str, folder: str) -> dict[str, Any]:
    keeping = {"enable_checkpointing": True, "callbacks": None}

    def callbacks() -> list[Any]:
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        return [keep, Reseeded()]

    whole = Module(kind, 0.1)
    first = trainer_of(**(keeping | {"callbacks": callbacks()}))
    first.fit(whole, loader_of(kind))
    resumed = Module(kind, 0.1)
    with torch.no_grad():
        for param in resumed.parameters():
            if param.requires_grad:
                param.zero_()
    second = trainer_of(**(keeping | {"callbacks": callbacks()}))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        second.fit(resumed, loader_of(kind), ckpt_path=f"{folder}/step=2.ckpt")
    mine, its = weights(whole), weights(resumed)
    return {
        "told": [str(one.message) for one in told if one.category is MicsWarning],
        "losses": (whole.losses[6:], resumed.losses),
        "norms": (whole.norms[2:], resumed.norms),
        "other weights": [name for name in mine if not torch.equal(mine[name], its[name])],
        "rate": [one.optimizers[0].param_groups[0]["lr"] for one in (first, second)],
    }


@pytest.mark.parametrize("kind", ["gpt", "lora"])
def test_a_trainer_resumes_to_the_bit(kind: str, tmp_path: Path) -> None:
    for found in run_ranks(quietly, WORLD, _trainer_resumes, kind, str(tmp_path)):
        # Lightning asks for a checkpoint of the step that it has resumed from once more.
        assert len(found["told"]) == 1
        assert "inside of a step, after 1 of its micro-steps" in found["told"][0]
        assert len(found["losses"][0]) == 6
        for name in ("losses", "norms"):
            assert found[name][0] == found[name][1], name
        assert found["rate"][0] == found["rate"][1]
        assert found["other weights"] == []
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"step={n}.ckpt" for n in ("1", "2", "3-v1", "3", "4-v1", "4")]
    assert sorted(path.name for path in (tmp_path / names[0]).iterdir()) == [
        "lightning.ckpt",
        "mics",
    ]


def _trainer_keeps_weights(folder: str) -> tuple[Any, ...]:
    module = Module("gpt")
    trainer = trainer_of(max_epochs=1)
    trainer.fit(module, loader_of("gpt"))
    trainer.save_checkpoint(f"{folder}/whole.ckpt")  # a folder, that the next one replaces
    trainer.save_checkpoint(f"{folder}/whole.ckpt", weights_only=True)
    rows = loader_of("gpt", 8, 1)
    right = torch.cat(trainer.predict(module, rows))
    again = Module("gpt")
    with torch.no_grad():
        for param in again.parameters():
            param.zero_()
    other = trainer_of()
    found = torch.cat(other.predict(again, rows, ckpt_path=f"{folder}/whole.ckpt"))
    return right, found


def test_weights_of_a_trainer_load_in_plain_torch_and_transformers(tmp_path: Path) -> None:
    answers = run_ranks(quietly, WORLD, _trainer_keeps_weights, str(tmp_path))
    for right, found in answers:
        assert torch.equal(right, found)
    kept = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]
    module = Module("gpt")
    module.load_state_dict(kept)
    module.model.save_pretrained(tmp_path / "pretrained")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained")
    for model in (module.model, plain):
        model.eval()
        with torch.no_grad():
            ids = tokens_of("gpt", 1)[0]["input_ids"][None]
            assert torch.equal(model(input_ids=ids).logits, answers[0][0][:1])


class Some(IterableDataset[Any]):
    """As many samples as this rank is given: Lightning does not share them out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        return (tokens_of("gpt", 9)[n] for n in range(self.size))


def _trainer_uneven(accumulation: int, stage: str) -> None:
    sizes = {"fit": (8, 4), "partly": (7, 5), "predict": (2, 1)}[stage]
    loader = DataLoader(Some(sizes[dist.get_rank() >= 2]), batch_size=1)
    trainer = trainer_of(accumulate_grad_batches=accumulation, max_epochs=1)
    if stage == "predict":
        trainer.predict(Module("gpt"), loader)
    else:
        trainer.fit(Module("gpt"), loader)


@pytest.mark.parametrize(
    ("accumulation", "stage"), [(4, "fit"), (4, "partly"), (1, "fit"), (1, "predict")]
)
def test_uneven_data_ends_in_words_with_a_trainer(
    accumulation: int, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICS_WAIT_SECONDS", "1")
    said = collect_ranks(quietly, WORLD, _trainer_uneven, accumulation, stage, stop_at_first=False)
    assert all(kind == "raised" for kind, _ in said)
    assert all("mics.errors" in text for _, text in said), said


def _saved_alone(tool: str) -> None:
    if tool == "trainer":
        trainer = trainer_of(max_epochs=1)
        trainer.fit(Module("gpt"), loader_of("gpt"))
        if trainer.is_global_zero:
            trainer.save_checkpoint("alone.ckpt")
        trainer.strategy.barrier()
    else:
        run = Run("gpt")
        if run.fabric.is_global_zero:
            run.fabric.save("alone.ckpt", {"model": run.model})
        run.fabric.barrier()


@pytest.mark.parametrize("tool", ["fabric", "trainer"])
def test_what_one_rank_saves_alone_ends_in_words(tool: str) -> None:
    # Lightning's own broadcast of the path would wait for the others, who wait elsewhere.
    told = {"fabric": "in fabric.save", "trainer": "in the saving of a checkpoint"}[tool]
    said = collect_ranks(quietly, WORLD, _saved_alone, tool, stop_at_first=False)
    assert all(kind == "raised" for kind, _ in said)
    assert all(f"rank(s) 1-3: in a barrier; rank(s) 0: {told}." in text for _, text in said), said


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from lightning.pytorch import Trainer
from mics.integrations.lightning import MicsStrategy
from test_lightning import Module, loader_of

if __name__ == "__main__":
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=MicsStrategy(partition=2), max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_train_batches=2,
    )
    module = Module("gpt")
    trainer.fit(module, loader_of("gpt"))
    Path(sys.argv[1], str(trainer.global_rank)).write_text(str(len(module.losses)))
"""


@pytest.mark.extra
@pytest.mark.slow
def test_lightning_may_start_the_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    told = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in told}
    environment["MICS_PROFILE"] = str(tmp_path / "profile.json")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2", "2"]
    assert done.stderr.count("partition 2: as asked") == 1


class Manual(Module):
    automatic_optimization = False


class Searching(torch.optim.SGD):
    """Evaluates its closure twice, as a line search does."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class Twice(Module):
    def configure_optimizers(self) -> Any:
        return Searching(self.parameters(), lr=0.1)


class Averaged(Callback):
    """An average of the weights, kept as mics says, and where shards cannot be."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.ema = mics.EMA(module)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update()

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        checkpoint["average"] = self.ema.averages


def _trainer_refuses(folder: str) -> Any:
    pair = {"devices": 2, "max_epochs": 1, "gradient_clip_val": None}
    loader = loader_of("gpt", 8)
    with pytest.raises(ShardError, match="manual optimization"):
        trainer_of(**(pair | {"accumulate_grad_batches": 1})).fit(Manual("gpt"), loader)
    with pytest.raises(ConfigError, match="second loss in one step"):
        trainer_of(**pair).fit(Twice("gpt"), loader)
    for callback in (EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)):
        with pytest.raises(ConfigError, match=r"cannot average shards.*\n.*mics.EMA"):
            trainer_of(**pair, callbacks=[callback]).fit(Module("gpt"), loader)
    with pytest.raises(ConfigError, match="AsyncCheckpointIO writes when"):
        trainer_of(**pair, plugins=[AsyncCheckpointIO()]).fit(Module("gpt"), loader)
    averaged = trainer_of(**pair, callbacks=[Averaged()])
    averaged.fit(Module("gpt"), loader)
    with pytest.raises(CheckpointError, match=r"a callback .* has shards.*\n.*'average.*wte"):
        averaged.save_checkpoint(f"{folder}/average.ckpt")
    with pytest.raises(MicroStepError, match="use_distributed_sampler=False"):
        averaged.predict(Module("gpt"), loader_of("gpt", 5, 2))
    plain = trainer_of("ddp", **pair)
    plain.fit(Module("gpt"), loader)
    plain.save_checkpoint(f"{folder}/ddp.ckpt")
    with pytest.raises(CheckpointError, match="no states of mics"):
        trainer_of(**pair).fit(Module("gpt"), loader, ckpt_path=f"{folder}/ddp.ckpt")
    module = Module("gpt")
    trainer = trainer_of(**pair, precision="bf16-mixed")
    inside = []
    module.model.transformer.h[0].register_forward_hook(lambda *a: inside.append(a[2][0].dtype))
    trainer.fit(module, loader)
    return inside[0], next(module.parameters()).dtype


def test_what_a_trainer_cannot_do_is_refused_and_bf16_keeps_fp32_weights(tmp_path: Path) -> None:
    for found in run_ranks(quietly, 2, _trainer_refuses, str(tmp_path)):
        assert found == (torch.bfloat16, torch.float32)
