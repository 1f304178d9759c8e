"""FLOPs and MFU: worked by hand, and one number wherever they are shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks

from mics.anatomy.flops import block_forward_flops, hardware_flops, model_flops, utilisation
from mics.anatomy.recipe import Recipe
from mics.errors import PlanError
from mics.hardware.cluster import Cluster
from mics.hardware.lookup import find_gpu, find_node, gpu_that_torch_calls, gpus
from mics.models.building import load_config
from mics.planning.plan import Plan, search
from mics.planning.question import Question
from mics.planning.subject import subject
from mics.ranks.skips import Verdict
from mics.training import meter as meter_module
from mics.training import rates
from mics.training.config import (
    BatchConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mics.training.dry_run import describe
from mics.training.meter import Meter
from mics.training.progress import Progress
from mics.training.setup import Run, set_up
from mics.training.step import Outcome

pytestmark = pytest.mark.filterwarnings(
    "ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"
)

H, LAYERS, SEQUENCE, VOCABULARY = 128, 4, 128, 304
HEAD = H * VOCABULARY
WEIGHTS = {
    "gpt2-tiny": LAYERS * 12 * H * H + HEAD,
    # Two heads of four are shared by keys and values; three matrices of 384 between the layers.
    "llama-tiny": LAYERS * (3 * H * H + 3 * H * 384) + HEAD,
    # Two of eight experts a token, each of three matrices of 192, and the router of eight.
    "qwen3-moe-tiny": LAYERS * (3 * H * H + 8 * H + 2 * 3 * H * 192) + HEAD,
    "bert-tiny": LAYERS * 12 * H * H + H * H + HEAD,  # and the head's own layer
}


def traced(name: str, micro_batch: int = 2) -> Any:
    config = load_config(name, vocabulary=300, separator=0)
    return subject(config).trace(micro_batch, SEQUENCE)


@pytest.mark.parametrize("name", WEIGHTS)
def test_flops_are_three_products_per_weight_and_seven_of_attention(name: str) -> None:
    """Two products of attention in forward and five in backward, half of each where it is causal.

    A product of attention is 2 h s FLOPs per token and layer.
    """
    seen = SEQUENCE if name == "bert-tiny" else SEQUENCE // 2
    per_token = 6 * WEIGHTS[name] + LAYERS * (2 + 5) * 2 * H * seen
    assert model_flops(traced(name)) == 2 * SEQUENCE * per_token


def test_checkpointing_adds_the_forward_of_the_blocks_to_the_hardwares_flops() -> None:
    made = traced("gpt2-tiny")
    blocks = 2 * SEQUENCE * LAYERS * (2 * 12 * H * H + 2 * 2 * H * SEQUENCE // 2)
    assert hardware_flops(made, checkpointing=False) == model_flops(made)
    assert hardware_flops(made, checkpointing=True) == model_flops(made) + blocks
    assert LAYERS * block_forward_flops(made) == blocks


def test_utilisation_is_flops_over_seconds_over_the_peak() -> None:
    assert utilisation(156e12, 2.0, 312e12) == 0.25


# -- one number in the run and in the plan ---------------------------------------------------------

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "vocab_size": 304,
}


def configuration(folder: Path, name: str) -> TrainConfig:
    (folder / "text.txt").write_text("A text of some length. " * 2000)
    if name == "mixtral":
        (folder / "config.json").write_text(json.dumps(MIXTRAL))
        name = str(folder / "config.json")
    return TrainConfig(
        run=RunConfig(folder=folder / "run", steps=1),
        model=ModelConfig(name=name),
        data=DataConfig(source=str(folder / "text.txt"), sequence=64, held_out=0.0),
        batch=BatchConfig(micro_batch=3, micro_steps=2),
        parallel=ParallelConfig(partition=2, gpus_per_node=2, collectives="flat", dtype="bf16"),
        log=LogConfig(tensorboard=False),
    )


def planned(run: Run) -> Plan:
    """The plan of a run's settings on one p4d with two GPUs."""
    node = dataclasses.replace(find_node("p4d"), gpus_per_node=2)
    question = Question(
        Recipe(1, micro_steps=run.batch.micro_steps, sequence=run.sequence),
        micro_batches=(run.batch.micro_batch,),
        partitions=(2,),
        checkpointing=(False,),
    )
    return search(subject(run.shape), Cluster(node, 1), question).plans[0]


def _both(folder: Path, name: str) -> tuple[float | None, float]:
    """MFU of the trainer's meter and of the plan, when the step takes what was planned."""
    with set_up(configuration(folder, name)) as run:
        plan = planned(run)
        watch = mock.Mock(stop=lambda: plan.seconds, left=lambda steps: None)
        with mock.patch.object(meter_module, "Stopwatch", lambda: watch):
            meter = Meter(
                run.model,
                micro_steps=run.batch.micro_steps,
                steps=1,
                tokens=run.batch.global_batch * run.sequence,
                bytes_per_token=None,
                flops=run.flops,
                peak_flops=find_gpu("A100-40GB").peak,
                device=run.device,
            )
        meter.begin()
        taken = Verdict(True, "", 0, 1.0, 1.0)
        outcome = Outcome(1.0, 1, 1.0, 1e-3, taken, sums=meter.count())
        return meter.end(Progress(1), outcome).mfu, plan.mfu


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny", "bert-tiny", "mixtral"])
def test_the_runs_mfu_is_the_plans(tmp_path: Path, name: str) -> None:
    for shown, of_the_plan in run_ranks(_both, 2, tmp_path, name, ranks_per_node=2):
        assert shown == of_the_plan > 0


def test_a_dry_run_shows_the_flops_of_the_plan(tmp_path: Path) -> None:
    config = configuration(tmp_path, "gpt2-tiny")
    config = dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, ranks=2, node="p4d")
    )
    shape = load_config("gpt2-tiny", vocabulary=259, separator=0)
    per_token = model_flops(subject(shape).trace(3, 64)) / (3 * 64)
    per_step = per_token * 3 * 64 * 2 * 2
    words = f"{per_token / 1e9:.3g} GFLOPs per token, {per_step / 1e12:.3g} TFLOPs per step"
    assert words in describe(config)


def _of_a_model_that_is_not_traced(folder: Path) -> object:
    def untraced(*_: object) -> None:
        raise PlanError("It asks a tensor for its value.")

    with (
        mock.patch("mics.anatomy.anatomy.Anatomy.trace", untraced),
        set_up(configuration(folder, "gpt2-tiny")) as run,
    ):
        return run.flops


def test_a_model_that_cannot_be_traced_has_no_mfu(tmp_path: Path) -> None:
    assert run_ranks(_of_a_model_that_is_not_traced, 2, tmp_path, ranks_per_node=2) == [None] * 2


# -- peaks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla V100-SXM2-16GB", "V100-32GB"),
        ("A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
    ],
)
def test_a_gpu_is_found_by_the_name_torch_gives_it(torch_name: str, name: str) -> None:
    assert gpu_that_torch_calls(torch_name) == find_gpu(name)


@pytest.mark.parametrize(
    "torch_name",
    [
        "NVIDIA H200 NVL",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GB200",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA GeForce RTX 4090",
        "AMD Instinct MI300X",
        "CPU",
    ],
)
def test_a_gpu_with_another_peak_is_not_taken_for_one_of_the_catalogue(torch_name: str) -> None:
    assert gpu_that_torch_calls(torch_name) is None


def test_every_gpu_of_the_catalogue_has_a_name_of_its_own_in_torch() -> None:
    names = [name for gpu in gpus().values() for name in gpu.torch_names]
    assert all(gpu.torch_names for gpu in gpus().values())
    assert len(names) == len(set(names))


def test_the_peak_is_of_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(rates, "device_name", lambda kind: "NVIDIA A100-SXM4-40GB")
    assert rates.peak_flops(device, "bf16") == 312e12
    assert rates.peak_flops(device, "fp32") == 19.5e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert rates.peak_flops(device, "fp32") is None  # products are rounded to TF32
    monkeypatch.setattr(rates, "device_name", lambda kind: "NVIDIA B200")
    assert rates.peak_flops(device, "bf16") == 2250e12
    monkeypatch.undo()
    assert rates.peak_flops(torch.device("cpu"), "bf16") is None
