"""A plain loop of Accelerate with mics: beside DDP, counted, saved, resumed, with adapters."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from models import weights
from parity import quiet
from ranks import collect_ranks, run_ranks
from safetensors import safe_open
from small_models import MAKERS, UNITS, gpt, tokens_of
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import mics
from mics.errors import CheckpointError, ConfigError, MicroStepError, ShardError
from mics.integrations.accelerate import Accelerator

# peft asks transformers for a name that it has replaced.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

WORLD, PARTITION, ACCUMULATION = 4, 2, 4
SIZE = 44  # on 4 ranks, 2 a micro-batch: 6 micro-batches, the last step of an epoch has 2


def ours(**keywords: Any) -> Any:
    return Accelerator(**settings(keywords), mics={"partition": PARTITION})


def plain(**keywords: Any) -> Any:
    return accelerate.Accelerator(**settings(keywords))


def settings(others: dict[str, Any]) -> dict[str, Any]:
    # Accelerate's own way to an order of samples that a resumed run finds again.
    order = accelerate.DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    fixed = {"cpu": True, "gradient_accumulation_steps": ACCUMULATION}
    return fixed | {"dataloader_config": order} | others


class Run:
    """The loop of Accelerate's own documentation, and what came of it."""

    def __init__(
        self, accelerator: Any, kind: str, *, dropout: float = 0.0, size: int = SIZE
    ) -> None:
        self.accelerator = accelerator
        torch.manual_seed(dist.get_rank())
        model = MAKERS[kind](dropout)
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
        loader = DataLoader(tokens_of(kind, size), batch_size=2, shuffle=True)
        self.model, self.optimizer, self.loader, self.scheduler = accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.hops: list[int] = []

    def epochs(self, first: int, last: int, skip: int = 0, stop: int | None = None) -> None:
        for epoch in range(first, last):
            self.loader.set_epoch(epoch)
            loader = self.accelerator.skip_first_batches(self.loader, skip)
            skip = 0
            for number, batch in enumerate(loader):
                self.micro_step(batch)
                if number + 1 == stop:
                    return

    def micro_step(self, batch: Any) -> None:
        accelerator, model = self.accelerator, self.model
        view = mics.ledger(model) if isinstance(model, FSDPModule) else None
        if view is not None:
            view.reset()
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                self.norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.losses.append(float(accelerator.gather(loss.detach()).mean()))
        if view is not None:
            counts = view.traffic().counts.items()
            self.hops.append(sum(count.calls for key, count in counts if key.hop == 2))


# -- beside DDP ----------------------------------------------------------------------------------


def _beside_ddp(kind: str) -> tuple[Run, Run]:
    runs = []
    for make in (plain, ours):
        run = Run(make(), kind)
        run.epochs(0, 2)
        runs.append((run.losses, run.norms, run.hops))
    return runs[0], runs[1]  # type: ignore[return-value]


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", MAKERS)
def test_losses_are_those_of_ddp_and_hop_2_runs_once_a_step(kind: str) -> None:
    for right, found in run_ranks(quietly, WORLD, _beside_ddp, kind):
        assert len(found[0]) == 12
        assert _apart(right[0], found[0]) < 1e-5
        assert _apart(right[1], found[1]) < 1e-5
        assert found[2] == 2 * [0, 0, 0, UNITS[kind], 0, UNITS[kind]]


def quietly(function: Any, *args: Any) -> Any:
    return quiet(lambda: function(*args))


# -- saved and resumed ---------------------------------------------------------------------------


def _resume(kind: str, folder: str) -> dict[str, Any]:
    whole = Run(ours(), kind, dropout=0.1)
    whole.epochs(0, 1, stop=4)
    whole.accelerator.save_state(folder)
    whole.accelerator.save_state(folder)  # over what is there
    before = len(whole.losses)
    whole.epochs(0, 2, skip=4)

    resumed = Run(ours(), kind, dropout=0.1)
    torch.manual_seed(99 + dist.get_rank())
    with torch.no_grad():
        for param in resumed.model.parameters():
            if param.requires_grad:
                param.zero_()
    resumed.accelerator.load_state(folder)
    resumed.epochs(0, 2, skip=4)
    mine, its = weights(whole.model), weights(resumed.model)
    return {
        "losses": (whole.losses[before:], resumed.losses),
        "norms": (whole.norms[1:], resumed.norms),
        "other weights": [name for name in mine if not torch.equal(mine[name], its[name])],
        "rate": (whole.scheduler.get_last_lr(), resumed.scheduler.get_last_lr()),
    }


@pytest.mark.parametrize("kind", ["gpt", "lora"])
def test_resuming_equals_not_stopping_to_the_bit(kind: str, tmp_path: Path) -> None:
    for found in run_ranks(quietly, WORLD, _resume, kind, str(tmp_path / "state")):
        assert len(found["losses"][0]) == 8
        for name in ("losses", "norms", "rate"):
            assert found[name][0] == found[name][1], name
        assert found["other weights"] == []
    assert sorted(path.name for path in (tmp_path / "state").glob("mics*")) == ["mics"]
    assert not list((tmp_path / "state").glob("*model*"))
    assert not list((tmp_path / "state").glob("optimizer*"))


def _some_steps(folder: str, whole: bool) -> tuple[list[float], list[float]]:
    """Train two epochs of two steps, of 16 micro-batches over all ranks each; or their second."""
    accelerator = ours(gradient_accumulation_steps=16 // dist.get_world_size())
    run = Run(accelerator, "gpt", size=64)
    if whole:
        run.epochs(0, 1)
        accelerator.save_state(folder)
    else:
        accelerator.load_state(folder)
    run.epochs(1, 2)
    per_step = torch.tensor(run.losses).reshape(-1, 16 // dist.get_world_size()).mean(1)
    return per_step.tolist()[-2:], run.norms[-2:]


@pytest.mark.extra
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_a_run_goes_on_with_another_number_of_ranks(
    before: int, after: int, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    whole, norms = run_ranks(quietly, before, _some_steps, folder, True)[0]
    for found, own in run_ranks(quietly, after, _some_steps, folder, False):
        assert _apart(whole, found) < 1e-5
        assert _apart(norms, own) < 1e-5


def _save(folder: str) -> tuple[torch.Tensor, ...]:
    run = Run(ours(), "gpt")
    run.epochs(0, 1)
    accelerator, model = run.accelerator, run.model
    accelerator.save_model(model, f"{folder}/plain")
    accelerator.unwrap_model(model).save_pretrained(
        f"{folder}/pretrained",
        state_dict=accelerator.get_state_dict(model),
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
    )
    tokens = tokens_of("gpt", 1)[0]["input_ids"][None]
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_what_is_saved_loads_in_plain_transformers(tmp_path: Path) -> None:
    right = run_ranks(quietly, WORLD, _save, str(tmp_path))[0]
    tokens = tokens_of("gpt", 1)[0]["input_ids"][None]
    one = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained")
    assert type(one) is transformers.GPT2LMHeadModel
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  tied, so kept once
    other = gpt()
    accelerate.load_checkpoint_in_model(other, tmp_path / "plain")
    other.tie_weights()
    for model in (one, other):
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits, right)


def _save_adapters(folder: str) -> torch.Tensor:
    run = Run(ours(), "lora")
    run.epochs(0, 1)
    mics.save_adapters(f"{folder}/adapter", model=run.model)
    tokens = tokens_of("gpt", 1)[0]["input_ids"][None]
    with torch.no_grad():
        return run.model(input_ids=tokens).logits


def test_adapters_alone_load_in_plain_peft(tmp_path: Path) -> None:
    right = run_ranks(quietly, WORLD, _save_adapters, str(tmp_path))[0]
    model = peft.PeftModel.from_pretrained(gpt(), tmp_path / "adapter").eval()
    tokens = tokens_of("gpt", 1)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, right)


# -- what was sharded before, prepared otherwise, or not at all ----------------------------------


def _sharded_before() -> tuple[Any, Any]:
    first = Run(ours(), "gpt")
    first.epochs(0, 1)
    accelerator = ours()
    model = mics.shard(
        gpt(), partition=PARTITION, mp_policy=torch.distributed.fsdp.MixedPrecisionPolicy()
    )
    second = Run(accelerator, "gpt")
    second.model = accelerator.prepare(model)
    second.optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(second.optimizer.optimizer, lambda n: 1 / (1 + n))
    second.scheduler = accelerator.prepare(scheduler)
    second.epochs(0, 1)
    return first.losses, second.losses


def test_a_model_that_is_sharded_already_is_left_as_it_is() -> None:
    for first, second in run_ranks(quietly, WORLD, _sharded_before):
        assert first == second


def _two_models(folder: str) -> tuple[list[float], list[float], list[str]]:
    found = []
    for make in (plain, ours):
        accelerator = make()
        models, data = [gpt(), gpt()], DataLoader(tokens_of("gpt", SIZE), batch_size=2)
        made = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
        one, other, *steppers, loader = accelerator.prepare(*models, *made, data)
        losses = []
        for batch in loader:
            with accelerator.accumulate(one, other):
                loss = one(**batch).loss + 2 * other(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    params = [*one.parameters(), *other.parameters()]
                    losses.append(float(accelerator.clip_grad_norm_(params, 1.0)))
                for optimizer in steppers:
                    optimizer.step()
                    optimizer.zero_grad()
            losses.append(float(loss.detach()))
        found.append(losses)
    accelerator.save_state(folder)
    before = [weights(one), weights(other)]
    with torch.no_grad():
        for param in params:
            param.zero_()
    accelerator.load_state(folder)
    after = [weights(one), weights(other)]
    differ = [n for a, b in zip(before, after, strict=True) for n in a if not a[n].equal(b[n])]
    return found[0], found[1], differ


def test_two_models_in_one_step_are_two_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    for right, found, differ in run_ranks(quietly, WORLD, _two_models, str(folder)):
        assert _apart(right, found) < 1e-5
        assert differ == []
    assert sorted(path.name for path in folder.glob("mics*")) == ["mics", "mics_1"]


def _whole_step() -> list[list[float]]:
    found = []
    for make in (plain, ours):
        accelerator, model, losses = make(), gpt(), []
        optimizer = mics.WholeStep(model.parameters(), torch.optim.Adafactor, lr=1e-2)
        data = DataLoader(tokens_of("gpt", SIZE), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, data)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        found.append(losses)
    return found


def test_a_rule_of_whole_matrices_follows_its_model() -> None:
    for right, found in run_ranks(quietly, WORLD, _whole_step):
        assert _apart(right, found) < 1e-5


def _without_accumulate() -> tuple[list[float], list[float]]:
    found = []
    for make in (plain, ours):
        run = Run(make(), "gpt")
        accelerator, losses = run.accelerator, []
        for number, batch in enumerate(run.loader):
            last = number % 2 == 1
            deferred = contextlib.nullcontext() if last else accelerator.no_sync(run.model)
            with deferred:
                loss = run.model(**batch).loss
                accelerator.backward(loss)
            losses.append(float(accelerator.gather(loss.detach()).mean()))
            if make is ours:  # gradients are shards, in every micro-step
                assert all(isinstance(p.grad, DTensor) for p in run.model.parameters())
            if last:
                run.optimizer.step()
                run.optimizer.zero_grad()
        found.append(losses)
    return found[0], found[1]


def test_no_sync_defers_hop_2() -> None:
    for right, found in run_ranks(quietly, WORLD, _without_accumulate):
        assert _apart(right, found) < 1e-5


def _plain_accelerator(folder: str) -> list[str]:
    said = []
    accelerator = plain()
    model = mics.shard(gpt(), partition=PARTITION)
    with pytest.raises(ShardError, match=r"integrations.accelerate import Accelerator") as wrapped:
        accelerator.prepare(model)
    said.append(str(wrapped.value))
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator = plain()
    optimizer = accelerator.prepare(optimizer)
    tokens = tokens_of("gpt", WORLD)[dist.get_rank()]["input_ids"][None]

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    accelerator.save_state(folder)
    dist.barrier()
    accelerator.load_state(folder)
    try:
        step()
    except CheckpointError as error:
        said.append(str(error))
    return said


def test_accelerates_own_names_the_way_and_its_state_is_refused(tmp_path: Path) -> None:
    found = run_ranks(quietly, WORLD, _plain_accelerator, str(tmp_path / "state"))
    assert [len(said) for said in found] == [1, 2, 1, 2]  # rank 0's shard is that of 0 and 2
    assert "(1,) of the mesh, the file's at (0,)" in found[1][1]


# -- uneven data, and what is refused ------------------------------------------------------------


def _uneven(accumulation: int) -> None:
    accelerator = ours(
        gradient_accumulation_steps=accumulation,
        dataloader_config=accelerate.DataLoaderConfiguration(even_batches=False),
    )
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(tokens_of("gpt", 6), batch_size=1)  # ranks 0 and 1 have 2, 2 and 3 have 1
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.wait_for_everyone()


@pytest.mark.parametrize("accumulation", [4, 1])
def test_uneven_loaders_end_in_words(accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICS_WAIT_SECONDS", "1")
    said = collect_ranks(quietly, WORLD, _uneven, accumulation, stop_at_first=False)
    assert all(kind == "raised" for kind, _ in said)
    assert all("mics.errors" in text for _, text in said), said


class Averages:
    """A moving average of weights, as loops keep it beside a model."""

    def __init__(self, model: Any) -> None:
        self.kept = {name: param.detach().clone() for name, param in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state


def _refusals(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"no keyword 'partitions'.*\n.*\n.*partition="):
        Accelerator(cpu=True, mics={"partitions": 2})
    with pytest.raises(ConfigError, match="fp16"):
        ours(mixed_precision="fp16")
    accelerate.state.AcceleratorState._reset_state()
    accelerator = ours()
    hook = accelerate.DDPCommunicationHookType.POWER_SGD
    handler = accelerate.DistributedDataParallelKwargs(comm_hook=hook)
    with pytest.raises(ConfigError, match="communication hook"):
        ours(kwargs_handlers=[handler])
    with (
        pytest.raises(ConfigError, match=r"mics.steps\(loader\)"),
        accelerator.join_uneven_inputs([]),
    ):
        pass
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    model(
        input_ids=tokens_of("gpt", 1)[0]["input_ids"][None], labels=torch.zeros(1, 12).long()
    ).loss.backward()
    optimizer.step()
    with pytest.raises(ShardError, match="AdamW has state of a model that is not sharded yet"):
        accelerator.prepare(model, optimizer)
    assert not isinstance(model, FSDPModule)

    run = Run(ours(), "gpt")
    (batch, *_) = run.loader
    with (
        pytest.raises(MicroStepError, match=r"1 micro-step.* = 4"),
        run.accelerator.accumulate(run.model),
    ):
        run.accelerator.backward(run.model(**batch).loss)
        run.accelerator.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.optimizer.zero_grad()
    with pytest.raises(CheckpointError, match=r"accelerator.save was given has shards.*\n.*wte"):
        run.accelerator.save({"model": run.model.state_dict()}, f"{folder}/shards.pt")
    stranger = mics.shard(gpt(), partition=2)
    run.accelerator.prepare(torch.optim.AdamW(stranger.parameters()))
    with pytest.raises(CheckpointError, match=r"AdamW steps parameters.*\n.*28 of its 28"):
        run.accelerator.save_state(f"{folder}/nothing")
    run.accelerator.prepare(stranger)
    run.accelerator.register_for_checkpointing(Averages(run.model))
    with pytest.raises(CheckpointError, match="registered Averages has shards"):
        run.accelerator.save_state(f"{folder}/nothing")
    assert not Path(folder, "nothing").exists()
    (Path(folder) / "state").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match="no states of mics"):
        run.accelerator.load_state(f"{folder}/state")


def test_what_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    run_ranks(quietly, 2, _refusals, str(tmp_path))


def _bf16() -> tuple[Any, ...]:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", mics={"partition": PARTITION})
    model = gpt()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    logits = model(input_ids=tokens_of("gpt", 1)[0]["input_ids"][None]).logits
    inside = []
    model.transformer.h[0].register_forward_hook(lambda *a: inside.append(a[2][0].dtype))
    model(input_ids=tokens_of("gpt", 1)[0]["input_ids"][None])
    return logits.dtype, next(model.parameters()).dtype, inside


def test_bf16_computes_in_bf16_and_returns_fp32_as_accelerate_does() -> None:
    outside, kept, inside = run_ranks(quietly, 2, _bf16)[0]
    assert (outside, kept) == (torch.float32, torch.float32)
    assert inside == [torch.bfloat16]
