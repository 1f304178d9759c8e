"""torchtitan's debug model with mics, by the diff of docs/tools.md: beside its FSDP2 run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import errors_of_ranks, run_ranks
from test_readme import blocks, side

import mics
from mics.errors import ConfigError

pytest.importorskip("torchtitan", reason="make torchtitan has it, in an environment of its own")
pytest.importorskip("triton", reason="torchtitan imports it")

import titan

titan.on_the_cpu()
pytestmark = pytest.mark.extra

WORLD, STEPS = 4, 3
UNITS = 8  # six blocks, the embedding, norm and head together
(DIFF,) = (one for one in blocks("docs/tools.md", "diff") if "torchtitan" in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("torchtitan")
    titan.write_assets(made)
    return made


def configured(sign: str, folder: Path, accumulation: int = 1, steps: int = STEPS) -> Any:
    names: dict[str, Any] = {}
    exec(side(DIFF, sign), names)
    config = titan.small(names["debugmodel"](), folder, steps, accumulation, WORLD)
    return titan.with_sums(config) if sign == "-" else config


def hops_of(trainer: Any) -> Any:
    (model,) = trainer.model_parts
    view = mics.ledger(model)

    def ask() -> int:
        counts = view.traffic().counts.items()
        view.reset()
        return sum(count.calls for key, count in counts if key.hop == 2)

    return ask


def _beside_fsdp2(folder: Path, accumulation: int, chunked: bool) -> Any:
    def set_loss(config: Any) -> Any:
        if not chunked:
            config.loss = config.loss.loss_fn
        return config

    right = titan.Run(set_loss(configured("-", folder, accumulation)))
    found = titan.Run(set_loss(configured("+", folder, accumulation)), hops_of)
    return right.losses, right.norms, found.losses, found.norms, found.seen


@pytest.mark.parametrize(("accumulation", "chunked"), [(1, False), (4, True)])
def test_losses_are_those_of_fsdp2_and_hop_2_runs_once_a_step(
    folder: Path, accumulation: int, chunked: bool
) -> None:
    results = run_ranks(_beside_fsdp2, WORLD, folder, accumulation, chunked)
    for losses, norms, own, ours, seen in results:
        assert len(losses) == STEPS
        assert losses[-1] < losses[0] - 0.1
        torch.testing.assert_close(own, losses, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours, norms, rtol=1e-5, atol=0)
        assert seen == [UNITS] * STEPS


# -- going on ------------------------------------------------------------------------------------


def _saved_and_gone_on(folder: Path) -> Any:
    def run(name: str, steps: int) -> list[float]:
        config = configured("+", folder, steps=steps)
        config.dump_folder = str(folder / name)
        config.checkpoint.enable, config.checkpoint.interval = True, 2
        config.checkpoint.last_save_model_only = False
        return titan.Run(config).losses

    return run("whole", 4), run("cut", 2), run("cut", 4)


def test_a_run_goes_on_from_torchtitans_own_checkpoint_to_the_bit(folder: Path) -> None:
    for whole, first, rest in run_ranks(_saved_and_gone_on, WORLD, folder):
        assert whole == first + rest
        assert len(rest) == 2


# -- other meshes --------------------------------------------------------------------------------


def _with_degrees(folder: Path, degrees: dict[str, Any], twin: dict[str, Any]) -> Any:
    losses = []
    for sign, settings in (("-", degrees | twin), ("+", degrees)):
        config = configured(sign, folder, steps=2)
        for name, value in settings.items():
            setattr(config.parallelism, name, value)
        config.training.global_batch_size = -1
        losses.append(titan.Run(config).losses)
    return losses


@pytest.mark.parametrize(
    ("degrees", "twin"),
    [
        ({"tensor_parallel_degree": 2}, {}),
        ({"data_parallel_replicate_degree": 1}, {}),
        # FSDP2 of torch 2.13 takes no plain parameters on a mesh of more axes.
        ({"spmd_backend": "spmd_types"}, {"spmd_backend": "partial_dtensor"}),
    ],
)
def test_other_meshes_have_the_losses_of_fsdp2(
    folder: Path, degrees: dict[str, Any], twin: dict[str, Any]
) -> None:
    for right, found in run_ranks(_with_degrees, WORLD, folder, degrees, twin):
        assert len(found) == 2
        torch.testing.assert_close(found, right, rtol=0, atol=1e-6)


# -- validation ----------------------------------------------------------------------------------


def _validated(folder: Path, accumulation: int) -> Any:
    told = []
    for sign in "-+":
        config = configured(sign, folder, accumulation)
        del config.model_spec.model.layers[2:]
        validator = config.validator
        validator.enable, validator.freq, validator.steps = True, 1, 2
        validator.dataloader.dataset = config.dataloader.dataset
        validator.dataloader.dataset_path = config.dataloader.dataset_path
        run = titan.Run(config)
        told.append((run.losses, run.validated))
    return told


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_after_a_validation_with_the_loss_in_chunks_are_those_of_fsdp2(
    folder: Path, accumulation: int
) -> None:
    for (losses, told), (own, ours) in run_ranks(_validated, WORLD, folder, accumulation):
        assert len(losses) == len(told) == STEPS
        torch.testing.assert_close(own, losses, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours, told, rtol=0, atol=1e-6)


# -- refused -------------------------------------------------------------------------------------


def _build(folder: Path, section: str, name: str, value: Any) -> None:
    config = configured("+", folder)
    setattr(getattr(config, section), name, value)
    if name.endswith("_parallel_degree") and not name.startswith("pipeline"):
        config.parallelism.spmd_backend = "spmd_types"
    config.build()


@pytest.mark.parametrize(
    ("section", "name", "value", "written"),
    [
        ("parallelism", "pipeline_parallel_degree", 2, "pipeline_parallel_degree = 1"),
        ("parallelism", "expert_parallel_degree", 2, '"partial_dtensor"'),
        ("parallelism", "context_parallel_degree", 2, '"partial_dtensor"'),
        ("parallelism", "enable_fsdp_symm_mem", True, "enable_fsdp_symm_mem = False"),
        ("parallelism", "tensor_parallel_degree", 2, '"partial_dtensor"'),
        ("training", "disable_cuda_graphs", False, "disable_cuda_graphs = True"),
    ],
)
def test_what_mics_does_not_do_is_refused_on_every_rank(
    folder: Path, section: str, name: str, value: Any, written: str
) -> None:
    for error in errors_of_ranks(_build, 2, folder, section, name, value):
        assert "ConfigError" in error
        assert written in error


def test_what_is_no_configuration_is_refused(folder: Path) -> None:
    from mics.integrations.torchtitan import with_mics

    with pytest.raises(ConfigError, match="configures no torchtitan trainer"):
        with_mics({"model": "llama3"})
    config = configured("+", folder)
    with pytest.raises(ConfigError, match="stands in no trainer class"):
        with_mics(config)
    config = configured("-", folder)
    config.model_spec.parallelize_fn = len
    with pytest.raises(ConfigError, match="'len' calls by name"):
        with_mics(config).model_spec.parallelize_fn(torch.nn.Linear(1, 1))
