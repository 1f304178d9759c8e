"""Experts and contexts of torchtitan's models spread over ranks, with mics: beside its FSDP2 run.

Two blocks of its debug models, with narrow experts. What a step sends is what is predicted, where
the head runs once; experts, and everything else, are resumed to the bit.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

import mics

pytest.importorskip("torchtitan", reason="make torchtitan has it, in an environment of its own")
pytest.importorskip("triton", reason="torchtitan imports it")

import titan

titan.on_the_cpu()
pytestmark = pytest.mark.extra

WORLD = 4
EXPERTS = {"expert_parallel_degree": 2}
CONTEXT = {"context_parallel_degree": 2}
FULL = {"data_parallel_replicate_degree": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("torchtitan")
    titan.write_assets(made)
    return made


@dataclass(frozen=True)
class Ran:
    """What a run has told, step by step."""

    losses: list[float]
    norms: list[float]
    seen: list[Any]


def configured(
    model: str,
    folder: Path,
    degrees: dict[str, Any],
    *,
    ours: bool = True,
    steps: int = 3,
    accumulation: int = 1,
    chunked: bool = False,
) -> Any:
    """A run of a debug model, of two sequences on each rank that reads data."""
    from mics.integrations.torchtitan import with_mics

    config = _debug_model(model)
    config.training.disable_cuda_graphs = True
    config = titan.small(
        with_mics(config) if ours else config, folder, steps, accumulation, world=WORLD
    )
    for name, value in degrees.items():
        setattr(config.parallelism, name, value)
    split = config.parallelism.tensor_parallel_degree * config.parallelism.context_parallel_degree
    config.training.global_batch_size = 2 * accumulation * WORLD // split
    if "context_parallel_degree" in degrees:
        titan.set_attention(config, titan.masked_attention())
        config.training.seq_len = 256  # torch cuts masks into blocks of 128 tokens for each rank
    if not chunked:
        config.loss = config.loss.loss_fn
    return config if ours else titan.with_sums(config)


def _debug_model(name: str) -> Any:
    if name == "llama3":
        from torchtitan.models.llama3.config_registry import llama3_debugmodel as make
    elif name == "deepseek_v3":
        from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel as make
    else:
        from torchtitan.models.qwen3.config_registry import qwen3_moe_debug as make
    config = make()
    layers = config.model_spec.model.layers
    del layers[2:]
    for layer in layers:
        if getattr(layer, "moe", None) is not None:
            layer.moe.routed_experts.inner_experts.hidden_dim = 64
    return config


def _traffic_beside_prediction(accumulation: int, hops: tuple[int, ...]) -> Any:
    """Watch whether the calls and bytes of some hops are those predicted."""

    def watch(trainer: Any) -> Any:
        (model,) = trainer.model_parts
        view = mics.ledger(model)

        def ask() -> bool:
            sent, predicted = (
                {key: count for key, count in one.counts.items() if key.hop in hops}
                for one in (
                    view.traffic(),
                    mics.predict_traffic(model, micro_steps=accumulation),
                )
            )
            view.reset()
            return sent == predicted

        return ask

    return watch


def _one(
    model: str,
    folder: Path,
    degrees: dict[str, Any],
    accumulation: int,
    chunked: bool,
    ours: bool,
) -> Ran:
    torch.compiler.set_stance("force_eager")  # masks are made by a compiled function
    config = configured(
        model, folder, degrees, ours=ours, accumulation=accumulation, chunked=chunked
    )
    hops = (2,) if chunked else (0, 1, 2)
    run = titan.Run(config, _traffic_beside_prediction(accumulation, hops) if ours else None)
    return Ran(run.losses, run.norms, run.seen)


def check_beside_fsdp2(*arguments: Any) -> None:
    """Each run in processes of its own: in one torch takes equal meshes for the same."""
    wanted, found = (run_ranks(_one, WORLD, *arguments, ours) for ours in (False, True))
    for right, own in zip(wanted, found, strict=True):
        assert right.losses[-1] < right.losses[0] - 0.1
        torch.testing.assert_close(own.losses, right.losses, rtol=0, atol=1e-6)
        torch.testing.assert_close(own.norms, right.norms, rtol=1e-6, atol=0)
        assert own.seen == [True] * len(right.losses)


# -- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "degrees", "accumulation", "chunked"),
    [
        ("qwen3", EXPERTS, 4, True),  # replicas of two ranks with other experts each
        ("qwen3", EXPERTS, 2, False),
        ("qwen3", EXPERTS | FULL, 1, False),  # two ranks each hold the same experts' shards
        ("qwen3", EXPERTS | {"tensor_parallel_degree": 2}, 1, False),
        ("deepseek_v3", EXPERTS, 1, False),
    ],
)
def test_spread_experts_have_the_losses_of_fsdp2_and_the_bytes_predicted(
    folder: Path, model: str, degrees: dict[str, Any], accumulation: int, chunked: bool
) -> None:
    check_beside_fsdp2(model, folder, degrees, accumulation, chunked)


def _run(
    model: str,
    folder: Path,
    name: str,
    degrees: dict[str, Any],
    steps: int,
    every: int,
    watch: Any = None,
) -> Ran:
    """Go on from the checkpoint of a folder, or begin there, and write one every few steps."""
    torch.compiler.set_stance("force_eager")
    config = configured(model, folder, degrees, steps=steps)
    config.dump_folder = str(folder / name)
    config.training.global_batch_size = -1  # two sequences on each rank that reads data
    config.training.max_norm = 1e9  # the gradients as they come
    config.checkpoint.enable, config.checkpoint.interval = True, every
    config.checkpoint.last_save_model_only = False
    run = titan.Run(config, watch)
    return Ran(run.losses, run.norms, run.seen)


def _stopped_and_not(folder: Path) -> Any:
    return (
        _run("qwen3", folder, "whole", EXPERTS, 4, 2),
        _run("qwen3", folder, "cut", EXPERTS, 2, 2),
        _run("qwen3", folder, "cut", EXPERTS, 4, 2),
    )


def test_a_run_with_spread_experts_goes_on_to_the_bit(folder: Path) -> None:
    for whole, first, rest in run_ranks(_stopped_and_not, WORLD, folder):
        assert len(rest.losses) == 2
        assert whole.losses == first.losses + rest.losses
        assert whole.norms == first.norms + rest.norms


# -- contexts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "degrees"),
    [
        ("llama3", CONTEXT),
        ("llama3", CONTEXT | FULL | {"context_parallel_load_balancer": "ptrr"}),
        ("qwen3", CONTEXT | EXPERTS),
    ],
)
def test_spread_contexts_have_the_losses_of_fsdp2_and_the_bytes_predicted(
    folder: Path, model: str, degrees: dict[str, Any]
) -> None:
    check_beside_fsdp2(model, folder, degrees, 2, False)


def _gradients(trainer: Any) -> Any:
    (model,) = trainer.model_parts

    def ask() -> dict[str, torch.Tensor]:
        return {name: param.grad.full_tensor() for name, param in model.named_parameters()}

    return ask


def test_gradients_of_spread_contexts_are_those_of_whole_ones(folder: Path) -> None:
    """Two replicas of two ranks with half of each sequence go on as two of one rank with all.

    Each rank's loss is a sum over its own tokens, so gradients that were averaged over the halves,
    or reduced over the replicas alone, would be other ones.
    """
    run_ranks(_run, WORLD, "llama3", folder, "spread", CONTEXT, 1, 1)
    shutil.copytree(folder / "spread", folder / "whole ones")
    spread, *_ = run_ranks(_run, WORLD, "llama3", folder, "spread", CONTEXT, 2, 9, _gradients)
    whole = {"context_parallel_degree": 1}
    names = (folder, "whole ones", whole, 2, 9, _gradients)
    right, *_ = run_ranks(_run, WORLD // 2, "llama3", *names)
    torch.testing.assert_close(spread.losses, right.losses, rtol=0, atol=1e-6)
    ((found,), (wanted,)) = spread.seen, right.seen
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        off = (found[name].double() - gradient.double()).norm() / gradient.double().norm()
        assert off < 1e-5, (name, off)


# -- parameters that name all axes ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "degrees"),
    [("llama3", {}), ("llama3", {"tensor_parallel_degree": 2}), ("qwen3", EXPERTS)],
)
def test_parameters_on_all_axes_have_the_losses_of_fsdp2(
    folder: Path, model: str, degrees: dict[str, Any]
) -> None:
    check_beside_fsdp2(model, folder, degrees | {"spmd_backend": "full_dtensor"}, 1, False)
