"""``--dry-run``: what a run would be, from its options alone; no weights, no data, no ranks."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from mics.blocks import find_blocks
from mics.drawing import draw
from mics.launch import read_launch
from mics.models.building import (
    build,
    check_fits,
    flops_per_token,
    load_config,
    num_parameters,
    num_positions,
    task_of,
)
from mics.models.presets import PRESETS
from mics.topology import Topology, possible_partitions
from mics.training.batching import sequence_length, solve
from mics.training.config import TrainConfig
from mics.training.launching import num_ranks
from mics.training.record import count, size
from mics.training.settings import as_toml

_BYTE_IDS = 259  # bytes and the special ids
_ADAM_BYTES = 16  # per parameter, fp32: itself, its gradient, two moments


def describe(config: TrainConfig) -> str:
    """Configuration, model, batch, groups, and model states per GPU for every partition size.

    Ranks and GPUs per node may be more than this machine has.

    Raises:
        ConfigError: an option does not fit.
        TopologyError: partition or GPUs per node do not fit the ranks.
    """
    launch = read_launch()
    ranks = config.parallel.ranks or num_ranks(config, launch)
    k = config.parallel.gpus_per_node or (launch.ranks_per_node if launch else ranks)
    shape = load_config(config.model.name, vocabulary=_vocabulary(config), separator=0)
    positions = num_positions(shape)
    sequence = sequence_length(config.data.sequence, positions)
    check_fits(shape, sequence=sequence, vocabulary=0)
    model = build(shape)
    batch = solve(config.batch, ranks)
    wanted = config.parallel.partition
    topology = Topology.from_world(ranks, k, k if wanted == "auto" else wanted)
    lines = [
        as_toml(config),
        f"model   {config.model.name}: {type(model).__name__} ({task_of(shape)}), "
        f"{count(num_parameters(model))} parameters in {len(find_blocks(model, None))} blocks, "
        f"{positions if positions is not None else 'any number of'} positions",
        f"batch   {batch}; {count(batch.global_batch * sequence)} tokens per step, "
        f"{sequence} per sequence",
        _work(shape, model, sequence, batch.global_batch),
        "",
        draw(topology),
        *(
            ["  (a whole node; the run takes the smallest partition that fits its memory)"]
            if wanted == "auto"
            else []
        ),
        "",
        *_memory(config, model, topology),
    ]
    return "\n".join(lines)


def list_models() -> str:
    """The presets, one per line."""
    rows = [f"{'name':<14}{'parameters':>12}{'layers':>8}{'hidden':>8}{'positions':>11}  about"]
    for name, preset in PRESETS.items():
        shape = load_config(name, vocabulary=_BYTE_IDS, separator=0)
        parameters = count(num_parameters(build(shape)))
        rows.append(
            f"{name:<14}{parameters:>12}{shape.num_hidden_layers:>8}{shape.hidden_size:>8}"
            f"{num_positions(shape):>11}  {preset.about}"
        )
    return "\n".join(rows)


def _vocabulary(config: TrainConfig) -> int:
    """Ids of a tokenizer that may not exist yet; only presets without a vocabulary ask."""
    return config.data.vocabulary if config.data.tokenizer == "bpe" else _BYTE_IDS


def _work(shape: PretrainedConfig, model: nn.Module, sequence: int, global_batch: int) -> str:
    per_token = flops_per_token(shape, model, sequence)
    per_step = per_token * sequence * global_batch
    return (
        f"work    {per_token / 1e9:.3g} GFLOPs per token, {per_step / 1e12:.3g} TFLOPs per step "
        "(forward and backward, recomputation not counted)"
    )


def _memory(config: TrainConfig, model: nn.Module, topology: Topology) -> list[str]:
    parameters = num_parameters(model)
    itemsize = 2 if config.parallel.dtype == "bf16" else 4
    blocks = find_blocks(model, None).values()
    block = max(num_parameters(each) for each in blocks) * itemsize
    lines = [
        "memory per GPU of model states (fp32 weights, gradients and Adam: 16 bytes a parameter)",
        f"and of one unsharded block ({config.parallel.dtype}); activations: n/a, not modelled",
        f"  {'partition':>9}{'replicas':>10}{'states':>14}{'one block':>14}{'together':>14}",
    ]
    for p in possible_partitions(topology.nodes, topology.gpus_per_node):
        states = -(-parameters * _ADAM_BYTES // p)
        mark = "  <- chosen" if p == config.parallel.partition else ""
        lines.append(
            f"  {p:>9}{topology.world // p:>10}{size(states):>14}{size(block):>14}"
            f"{size(states + block):>14}{mark}"
        )
    return lines
