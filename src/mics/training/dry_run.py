"""``--dry-run``: what a run would be, from its options alone; no weights, no data, no ranks."""

from __future__ import annotations

from pathlib import Path

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.blocks import find_blocks
from mics.anatomy.flops import model_flops
from mics.anatomy.memory import NOT_MODELLED, memory
from mics.hardware.cluster import Cluster
from mics.models.building import (
    BYTE_IDS,
    build,
    check_fits,
    load_config,
    num_parameters,
    num_positions,
    task_of,
)
from mics.models.experts import ask_for_router_loss
from mics.models.presets import PRESETS, rule_of
from mics.planning.figures import figures_of
from mics.planning.nearest import check_any
from mics.planning.plan import Plan, search
from mics.planning.question import Question
from mics.quantities import count, size
from mics.ranks.columns import Column, as_table, fitted
from mics.ranks.drawing import draw
from mics.ranks.launcher import read_launch
from mics.topology import Topology, possible_partitions
from mics.training.batching import Batching, sequence_length, solve
from mics.training.config import TrainConfig
from mics.training.data.token_folder import is_token_folder, read_token_folder
from mics.training.expectation import (
    cluster_of,
    fastest,
    question_of,
    recipes_of,
)
from mics.training.launching import num_ranks
from mics.training.lora import anatomy_of, check_lora
from mics.training.measuring import sources_by_name
from mics.training.settings import as_toml

_PARTS = (Column("states", 2), Column("gathered", 2), Column("activations", 2), Column("together"))


def describe(config: TrainConfig) -> str:
    """Show configuration, model, batch, groups, and memory per GPU for every partition size.

    Ranks and GPUs per node may be more than this machine has.

    Raises:
        ConfigError: an option does not fit.
        TopologyError: partition or GPUs per node do not fit the ranks.
    """
    check_lora(config)
    sources_by_name(config)
    launch = read_launch()
    ranks = config.parallel.ranks or num_ranks(config, launch)
    k = config.parallel.gpus_per_node or (launch.ranks_per_node if launch else ranks)
    shape = load_config(config.model.name, vocabulary=_vocabulary(config), separator=0)
    ask_for_router_loss(shape, config.model.router_loss)
    positions = num_positions(shape)
    sequence = sequence_length(config.data.sequence, positions)
    check_fits(shape, sequence=sequence, vocabulary=0)
    anatomy = anatomy_of(config, shape)
    batch = solve(config.batch, ranks)
    wanted = config.parallel.partition
    topology = Topology.from_world(ranks, k, k if wanted == "auto" else wanted)
    cluster = cluster_of(config, ranks, k)
    question = question_of(config, batch, sequence)
    best = _fastest(config, anatomy, cluster, question)
    offload = best.way.offload if best is not None else min(question.offload)
    if best is not None:
        topology = Topology(topology.nodes, k, best.way.partition)
    recipes = recipes_of(question, cluster, topology.partition, offload)
    model = anatomy.model
    lines = [
        f"model   {config.model.name}: {type(model).__name__} ({task_of(shape)}), "
        f"{count(num_parameters(model))} parameters in {len(find_blocks(model, None))} blocks, "
        f"{positions if positions is not None else 'any number of'} positions",
        *(f"shape   {words}" for words in rule_of(config.model.name)),
        *_data(config),
        f"batch   {batch}; {count(batch.global_batch * sequence)} tokens per step, "
        f"{sequence} per sequence",
        _work(anatomy, sequence, batch),
        f"plan    {figures_of(anatomy, cluster, recipes)}",
        "",
        draw(topology),
        *_choice(config, best),
        "",
        *_memory(config, anatomy, cluster, question, topology.partition, offload),
    ]
    return "\n".join([as_toml(config), fitted("\n".join(lines))])


def _data(config: TrainConfig) -> list[str]:
    """Say what a run would train on, where that is not written down."""
    if config.data.sources or config.data.source:
        return []
    if config.data.source is None:
        return ["data    stdlib, the source of Python itself, as no data.source is named"]
    return ["data    data.source is empty, and has to be filled in before the run"]


def _fastest(
    config: TrainConfig, anatomy: Anatomy, cluster: Cluster, question: Question
) -> Plan | None:
    """Find what the run would take on the nodes that were named.

    Raises:
        PlanError: there are no such nodes, or nothing fits them.
    """
    if config.parallel.node is None:
        return None
    best = fastest(anatomy, cluster, question)
    if best is None:
        check_any(anatomy, cluster, question, search(anatomy, cluster, question))
    return best


def _choice(config: TrainConfig, best: Plan | None) -> list[str]:
    """Say which partition it is, and how long a step takes, where that is known."""
    if best is not None:
        lines = [f"  {best.reason}", f"  a step would take {best.seconds:.3f} s"]
        return [*lines, *_on_host(best)]
    if config.parallel.partition == "auto":
        return ["  (a whole node; the run takes the smallest partition that fits its memory)"]
    return []


def _on_host(best: Plan) -> list[str]:
    """Say what the hosts hold, where activations leave."""
    host = best.cluster.node.host
    if not best.way.offload or host is None:
        return []
    return [
        f"  activations leave: {best.simulated.step.exposed[3]:.3f} s of the step waits for copies",
        f"  of its own memory {best.host.text(host.memory)}",
    ]


def list_models() -> str:
    """List the presets, one per line."""
    columns = (
        Column("name", left=True),
        Column("parameters"),
        Column("layers", 2),
        Column("hidden", 3),
        Column("positions", 1),
        Column("about", left=True),
    )
    rows = []
    for name, preset in PRESETS.items():
        shape = load_config(name, vocabulary=BYTE_IDS, separator=0)
        parameters = count(num_parameters(build(shape)))
        sizes = (shape.num_hidden_layers, shape.hidden_size, num_positions(shape))
        rows.append((name, parameters, *map(str, sizes), preset.about))
    sizes_too = "Or a number of parameters, as 350m, 13b: " + rule_of("13b")[0] + "."
    return "\n".join([*as_table(columns, rows), fitted(sizes_too)])


def _vocabulary(config: TrainConfig) -> int:
    """Count the ids of a tokenizer that may not exist yet; presets without a vocabulary ask."""
    for one in config.data.sources or (config.data,):
        if one.source and is_token_folder(folder := Path(one.source).expanduser()):
            return read_token_folder(folder).vocabulary
    return config.data.vocabulary if config.data.tokenizer == "bpe" else BYTE_IDS


def _work(anatomy: Anatomy, sequence: int, batch: Batching) -> str:
    micro_step = model_flops(anatomy.trace(batch.micro_batch, sequence))
    per_token = micro_step / (batch.micro_batch * sequence)
    per_step = per_token * sequence * batch.global_batch
    return (
        f"work    {per_token / 1e9:.3g} GFLOPs per token, {per_step / 1e12:.3g} TFLOPs per step "
        "(products of forward and backward, masked scores and checkpointing not counted)"
    )


def _memory(
    config: TrainConfig,
    anatomy: Anatomy,
    cluster: Cluster,
    question: Question,
    chosen: int,
    offload: bool,
) -> list[str]:
    """Write the memory of a GPU for every partition size, tensors alone."""
    known = config.parallel.partition != "auto" or config.parallel.node is not None
    checkpointing = "with" if config.parallel.activation_checkpointing else "without"
    away = ", activations on the host" if offload else ""
    columns = (Column("partition"), Column("replicas", 3), *_PARTS, Column("largest", left=True))
    rows = []
    for p in possible_partitions(cluster.nodes, cluster.node.gpus_per_node):
        phases = memory(anatomy, recipes_of(question, cluster, p, offload)[0])
        need = phases.phases[phases.phase]
        states = need.parameters + need.optimizer + need.gradients
        gathered = need.unsharded_blocks + need.prefetched_blocks + need.communication_buffers
        parts = (states, gathered, need.activations + need.logits, need.total)
        mark = "  <- chosen" if known and p == chosen else ""
        rows.append((f"{p}", f"{cluster.gpus // p}", *map(size, parts), f"{phases.phase}{mark}"))
    return [
        f"memory per GPU, micro-batch {question.micro_batches[0]}, {checkpointing} activation "
        f"checkpointing{away} (fp32 weights, gradients and Adam; tensors alone, `mics plan` for "
        "more)",
        *as_table(columns, rows),
        f"not modelled: {NOT_MODELLED}",
    ]
