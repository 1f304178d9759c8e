"""``--dry-run``: what a run would be, from its options alone; no weights, no data, no ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.blocks import find_blocks
from mics.anatomy.flops import model_flops
from mics.anatomy.memory import NOT_MODELLED, Setup, memory
from mics.hardware.cluster import Cluster
from mics.hardware.lookup import find_node
from mics.models.building import (
    build,
    check_fits,
    load_config,
    num_parameters,
    num_positions,
    task_of,
)
from mics.models.presets import PRESETS
from mics.planning.nearest import check_any
from mics.planning.plan import Plan, search
from mics.planning.question import Question
from mics.planning.subject import subject
from mics.quantities import count, size
from mics.ranks.drawing import draw
from mics.ranks.launcher import read_launch
from mics.topology import Topology, possible_partitions
from mics.training import optimisation
from mics.training.batching import Batching, sequence_length, solve
from mics.training.config import TrainConfig
from mics.training.expectation import fastest
from mics.training.launching import num_ranks
from mics.training.settings import as_toml

_BYTE_IDS = 259  # bytes and the special ids


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
    anatomy = subject(shape, dtype=torch.bfloat16 if _in_bf16(config) else torch.float32)
    best = _fastest(config, anatomy, topology, sequence, batch)
    if best is not None:
        topology = Topology(topology.nodes, k, best.way.partition)
    lines = [
        as_toml(config),
        f"model   {config.model.name}: {type(model).__name__} ({task_of(shape)}), "
        f"{count(num_parameters(model))} parameters in {len(find_blocks(model, None))} blocks, "
        f"{positions if positions is not None else 'any number of'} positions",
        f"batch   {batch}; {count(batch.global_batch * sequence)} tokens per step, "
        f"{sequence} per sequence",
        _work(anatomy, sequence, batch),
        "",
        draw(topology),
        *_choice(config, best),
        "",
        *_memory(config, anatomy, topology, sequence, batch),
    ]
    return "\n".join(lines)


def _in_bf16(config: TrainConfig) -> bool:
    return config.parallel.dtype == "bf16"


def _fastest(
    config: TrainConfig, anatomy: Anatomy, topology: Topology, sequence: int, batch: Batching
) -> Plan | None:
    """What the run would take on the nodes that were named.

    Raises:
        PlanError: there are no such nodes, or nothing fits them.
    """
    options = config.parallel
    if options.node is None:
        return None
    node = replace(find_node(options.node), gpus_per_node=topology.gpus_per_node)
    question = Question(
        sequence,
        micro_steps=batch.micro_steps,
        micro_batches=(batch.micro_batch,),
        partitions=None if options.partition == "auto" else (options.partition,),
        checkpointing=(options.activation_checkpointing,),
        optimizer=optimisation.MEMORY,
        compute_bytes=2 if _in_bf16(config) else 4,
        stack="fused" if options.compile else "eager",
    )
    cluster = Cluster(node, topology.nodes)
    best = fastest(anatomy, cluster, question, options.collectives)
    if best is None:
        check_any(anatomy, cluster, question, search(anatomy, cluster, question))
    return best


def _choice(config: TrainConfig, best: Plan | None) -> list[str]:
    """Which partition it is, and the time of a step, where that is known."""
    if best is not None:
        return [f"  {best.reason}", f"  a step would take {best.seconds:.3f} s"]
    if config.parallel.partition == "auto":
        return ["  (a whole node; the run takes the smallest partition that fits its memory)"]
    return []


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


def _work(anatomy: Anatomy, sequence: int, batch: Batching) -> str:
    micro_step = model_flops(anatomy.trace(batch.micro_batch, sequence))
    per_token = micro_step / (batch.micro_batch * sequence)
    per_step = per_token * sequence * batch.global_batch
    return (
        f"work    {per_token / 1e9:.3g} GFLOPs per token, {per_step / 1e12:.3g} TFLOPs per step "
        "(products of forward and backward, masked scores and checkpointing not counted)"
    )


def _memory(
    config: TrainConfig, anatomy: Anatomy, topology: Topology, sequence: int, batch: Batching
) -> list[str]:
    known = config.parallel.partition != "auto" or config.parallel.node is not None
    trace = anatomy.trace(batch.micro_batch, sequence)
    checkpointing = config.parallel.activation_checkpointing
    lines = [
        f"memory per GPU, micro-batch {batch.micro_batch}, "
        f"{'with' if checkpointing else 'without'} activation checkpointing "
        "(fp32 weights, gradients and Adam; `mics plan` for more)",
        f"  {'partition':>9}{'replicas':>10}{'states':>14}{'gathered':>14}{'activations':>14}"
        f"{'together':>14}  largest in",
    ]
    for p in possible_partitions(topology.nodes, topology.gpus_per_node):
        setup = Setup(
            p,
            checkpointing,
            optimisation.MEMORY,
            compute_bytes=2 if _in_bf16(config) else 4,
            micro_steps=batch.micro_steps,
        )
        found = memory(anatomy, trace, setup)
        need = found.phases[found.phase]
        states = need.parameters + need.optimizer + need.gradients
        gathered = need.unsharded_blocks + need.prefetched_blocks + need.communication_buffers
        mark = "  <- chosen" if known and p == topology.partition else ""
        lines.append(
            f"  {p:>9}{topology.world // p:>10}{size(states):>14}{size(gathered):>14}"
            f"{size(need.activations + need.logits):>14}{size(need.total):>14}  {found.phase}{mark}"
        )
    return [*lines, f"  not modelled: {NOT_MODELLED}"]
