"""SageMaker's model parallelism (its MiCS: ``sharded_data_parallel_degree``) as our options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mics.errors import ConfigError
from mics.training.migrating.conversion import (
    Conversion,
    Fields,
    Kind,
    Rule,
    Verdict,
    account_for_rest,
)
from mics.training.migrating.reading import parse_json

_WRITE = "the parameters of smdistributed.modelparallel"
_C, _N, _U = Verdict.CONVERTED, Verdict.NO_COUNTERPART, Verdict.NOT_NEEDED
_PIPE = "mics shards data parallelism; there is no pipeline"
_TENSOR = "mics train has no tensor parallelism; a loop of your own names the mesh's other axes"
_BLOCKS = "mics gathers a block at a time, one ahead of its use"
_JOB = "a matter of the job, not of training"

_TABLE: tuple[tuple[Verdict, str, Kind, tuple[str, ...]], ...] = (
    (
        *(_N, _PIPE, "any"),
        (
            *("pipeline", "optimize", "auto_partition", "default_partition", "memory_weight"),
            *("active_microbatches", "deterministic_server", "load_partition", "partition_file"),
            *("contiguous", "static_mode", "fast_mode"),
        ),
    ),
    (_N, _TENSOR, "any", ("prescaled_batch", "_match_weights")),
    (_U, _BLOCKS, "number", ("sdp_reduce_bucket_size", "sdp_max_live_parameters")),
    (_U, "every parameter is sharded", "number", ("sdp_param_persistence_threshold",)),
    (_U, "one block is brought back ahead of its use", "number", ("activation_loading_horizon",)),
    (
        *(_U, "one block is brought back ahead of its use", "number"),
        ("task_level_activation_loading_horizon",),
    ),
    (_U, "models are built on the meta device", "any", ("delayed_parameter_initialization",)),
    (_U, "nothing is traced beforehand", "any", ("skip_tracing",)),
    (_U, "weights are kept in fp32", "any", ("fp16_params", "bf16_params")),
    (_U, "NCCL, or what the launcher says", "any", ("ddp_dist_backend", "ddp_port", "horovod")),
    (_U, "parts of any size are sharded", "truth", ("allow_empty_shards",)),
    (_U, "the allocator's growing segments are on", "truth", ("fsdp_cache_flush_warnings",)),
)
_RULES = {name: Rule(verdict, why, kind) for verdict, why, kind, names in _TABLE for name in names}
_CONVERTED = (
    *("sharded_data_parallel_degree", "hybrid_shard_degree", "sdp_hierarchical_allgather"),
    *("sdp_gradient_clipping", "offload_activations", "sm_activation_offloading", "fp16", "bf16"),
    *("random_seed", "ddp", "pipeline_parallel_degree", "partitions", "microbatches"),
    *("tensor_parallel_degree", "expert_parallel_degree", "context_parallel_degree"),
    *("shard_optimizer_state", "placement_strategy"),
)
_AROUND = ("distribution", "smdistributed", "modelparallel", "parameters", "mp_parameters")
KEYS = frozenset([*_RULES, *_CONVERTED, *_AROUND]) - {"pipeline", "fp16", "bf16"}
"""Names by which a configuration is known to be SageMaker's."""


def convert_sagemaker(
    tree: Mapping[str, Any], *, ranks: int | None = None, gpus_per_node: int | None = None
) -> Conversion:
    """Convert the parameters of SageMaker's model parallelism, version 1 or 2.

    Args:
        tree: the parameters, or what is around them: ``distribution``, ``smdistributed``,
            ``modelparallel``, ``mp_parameters``.
        ranks: ranks of the job.
        gpus_per_node: ranks of a node.

    Raises:
        ConfigError: a value is of the wrong kind, or values contradict each other.
    """
    conversion = Conversion("SageMaker", ranks, gpus_per_node)
    parameters = _unwrap(conversion, tree)
    fields = Fields(parameters, (), _WRITE)
    _convert_degrees(conversion, fields)
    _convert_others(conversion, fields)
    account_for_rest(conversion, fields, _RULES, _CONVERTED)
    return conversion


def _unwrap(conversion: Conversion, tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters inside of what SageMaker puts around them; the rest gets its rows."""
    table, path = tree, ""
    while True:
        inner = [key for key in _AROUND if key in table]
        if not inner:
            return table
        if len(inner) > 1:
            raise ConfigError(
                "The parameters stand in two places.",
                numbers=f"{path}{inner[0]} and {path}{inner[1]}.",
                write=_WRITE,
            )
        for key, value in table.items():
            if key not in inner:
                _say_around(conversion, f"{path}{key}" if key.isidentifier() else ascii(key), value)
        value = table[inner[0]]
        path = f"{path}{inner[0]}."
        if isinstance(value, str):  # how a job's hyperparameters hold them
            value = parse_json(path.rstrip("."), value)
        if not isinstance(value, dict):
            raise ConfigError(
                f"{path.rstrip('.')} is no table.",
                numbers=f"It is a {type(value).__name__}.",
                write=_WRITE,
            )
        table = value


def _say_around(conversion: Conversion, path: str, value: Any) -> None:
    if path.endswith("mpi") and isinstance(value, dict):
        node = value.get("processes_per_host")
        if node is not None:
            if type(node) is not int or not 1 <= node <= 2**20:
                raise ConfigError(
                    f"{path}.processes_per_host has a value that does not fit.",
                    numbers=f"It is {str(node)[:40]!a}.",
                    write="a whole number from 1 on",
                )
            if conversion.gpus_per_node not in (None, node):
                raise ConfigError(
                    "The number of ranks per node contradicts itself.",
                    numbers=f"{path}.processes_per_host = {node}, --gpus-per-node "
                    f"{conversion.gpus_per_node}.",
                    write="one of the two",
                )
            conversion.gpus_per_node = node
            conversion.set("parallel.gpus_per_node", node)
            words = f"parallel.gpus_per_node = {node}, where the launcher does not say"
            conversion.say(f"{path}.processes_per_host", node, _C, words)
        for key, each in value.items():
            if key != "processes_per_host":
                name = key if key.isidentifier() else ascii(key)
                conversion.say(f"{path}.{name}", each, _U, "the launcher's")
        return
    if path.endswith("enabled") and value is False:
        raise ConfigError(
            "SageMaker's model parallelism is switched off here.",
            numbers=f"{path} is false.",
            write="enabled: true, or mics train with --parallel.partition 1",
        )
    conversion.say(path, value, _U, _JOB)


def _positive(fields: Fields, path: str, least: int = 1) -> int | None:
    value = fields.take(path, "count")
    if value is not None and (not isinstance(value, int) or not least <= value <= 10**9):
        raise fields.refuse(path, value, f"{least} or more")
    return value


def _convert_degrees(conversion: Conversion, fields: Fields) -> None:
    sharded = _positive(fields, "sharded_data_parallel_degree")
    hybrid = _positive(fields, "hybrid_shard_degree", 0)
    pipeline = _positive(fields, "pipeline_parallel_degree")
    partitions = _positive(fields, "partitions")
    if sharded is not None and hybrid is not None:
        raise ConfigError(
            "sharded_data_parallel_degree (version 1) and hybrid_shard_degree (version 2) "
            "contradict each other.",
            numbers=f"They are {sharded} and {hybrid}.",
            write="the one of the version that is in use",
        )
    if None not in (pipeline, partitions) and pipeline != partitions:
        raise ConfigError(
            "partitions and pipeline_parallel_degree are one setting, and differ.",
            numbers=f"They are {partitions} and {pipeline}.",
            write="pipeline_parallel_degree alone",
        )
    for name, value in (("pipeline_parallel_degree", pipeline), ("partitions", partitions)):
        if value is not None:
            if value > 1 and (sharded or 1) > 1:
                raise ConfigError(
                    "Sharded data parallelism and a pipeline contradict each other.",
                    numbers=f"sharded_data_parallel_degree = {sharded}, {name} = {value}.",
                    write=f"{name}: 1",
                )
            conversion.say(name, value, _U if value == 1 else _N, _PIPE)
    _refuse_beside_sharding(conversion, fields, sharded)
    _convert_shards(conversion, sharded, hybrid)


def _refuse_beside_sharding(conversion: Conversion, fields: Fields, sharded: int | None) -> None:
    """What may not, or must, stand beside a degree of sharding."""
    many = sharded is not None and sharded > 1
    split = fields.take("shard_optimizer_state", "truth")
    if split is not None:
        if split is True and many:
            raise ConfigError(
                "sharded_data_parallel_degree and shard_optimizer_state contradict each other.",
                numbers=f"sharded_data_parallel_degree = {sharded}, which shards it already.",
                write="shard_optimizer_state: false",
            )
        words = "optimizer state is sharded with its weights"
        conversion.say("shard_optimizer_state", split, Verdict.NEAREST if split else _U, words)
    ddp = fields.take("ddp", "truth")
    if ddp is not None:
        if ddp is False and many:
            raise ConfigError(
                "sharded_data_parallel_degree needs ddp.",
                numbers=f"sharded_data_parallel_degree = {sharded}, ddp = false.",
                write="ddp: true",
            )
        conversion.say("ddp", ddp, _U, "ranks always are data parallel")
    parts = _positive(fields, "microbatches")
    if parts is not None:
        if parts > 1:
            words = "a pipeline's parts of a batch; batch.micro_steps accumulates gradients"
            conversion.say("microbatches", parts, _N, words)
        else:
            conversion.say("microbatches", parts, _U, _PIPE)
    for name in ("tensor_parallel_degree", "expert_parallel_degree", "context_parallel_degree"):
        degree = _positive(fields, name)
        if degree is not None:
            words = _TENSOR if degree > 1 else "one rank: none"
            conversion.say(name, degree, _N if degree > 1 else _U, words)
    place = fields.take("placement_strategy", "text")
    if place is not None:
        near = place in ("cluster", "DPT", "DTP")
        words = "neighbouring ranks hold one replica" + ("" if near else ", always")
        conversion.say("placement_strategy", place, _C if near else _N, words)


def _convert_shards(conversion: Conversion, sharded: int | None, hybrid: int | None) -> None:
    degree = sharded if sharded is not None else hybrid
    name = "sharded_data_parallel_degree" if hybrid is None else "hybrid_shard_degree"
    if degree is None:
        conversion.set("parallel.partition", 1)
        conversion.absent(name, "parallel.partition = 1: whole states on every rank")
        return
    if degree == 0:
        conversion.set("parallel.partition", "auto")
        words = 'parallel.partition = "auto"; version 2 leaves it to the script\'s own FSDP'
        conversion.say(name, degree, Verdict.NEAREST, words)
        return
    ranks = conversion.ranks
    if ranks is not None and ranks % degree:
        raise ConfigError(
            f"{name} does not divide the number of ranks.",
            numbers=f"{name} = {degree}, {ranks} ranks.",
            write=f"a divisor of {ranks}, or the right --ranks",
        )
    conversion.set("parallel.partition", degree)
    conversion.say(name, degree, _C, f"parallel.partition = {degree}")


def _convert_others(conversion: Conversion, fields: Fields) -> None:
    degree = conversion.settings["parallel", "partition"]
    many = isinstance(degree, int) and degree > 1
    staged = fields.take("sdp_hierarchical_allgather", "truth")
    if staged is not None:
        node = conversion.gpus_per_node
        inside = many and node is not None and degree <= node
        form = "flat" if staged is False else "auto" if inside or not many else "hierarchical"
        conversion.set("parallel.collectives", form)
        words = f'parallel.collectives = "{form}"'
        words += '; "auto" measures which is faster' if form != "auto" else ": p fits a node"
        conversion.say("sdp_hierarchical_allgather", staged, _C, words)
    elif many:
        words = 'parallel.collectives = "auto": measured; SageMaker gathers hierarchically'
        conversion.absent("sdp_hierarchical_allgather", words)
    clip = fields.take("sdp_gradient_clipping", "number")
    if clip is not None:
        if not isinstance(clip, int | float) or clip < 0:
            raise fields.refuse("sdp_gradient_clipping", clip, "0 (off) or more")
        conversion.set("optimizer.clip", float(clip))
        conversion.say("sdp_gradient_clipping", clip, _C, f"optimizer.clip = {float(clip)}")
    else:
        conversion.set("optimizer.clip", 1.0)
        conversion.absent("sdp_gradient_clipping", "optimizer.clip = 1.0, SageMaker's default")
    _convert_precision(conversion, fields)
    for name in ("offload_activations", "sm_activation_offloading"):
        value = fields.take(name, "truth")
        if value is not None:
            if value is True:
                conversion.set("parallel.activation_offload", "on")
                conversion.set("parallel.activation_checkpointing", True)
            words = "parallel.activation_offload and parallel.activation_checkpointing, which "
            words += "SageMaker wants beside it" if value is True else "stay off"
            conversion.say(name, value, _C, words)
    seed = fields.take("random_seed", "count")
    if seed is not None:
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise fields.refuse("random_seed", seed, "0 to 2^63 - 1")
        conversion.set("run.seed", seed)
        conversion.say("random_seed", seed, _C, f"run.seed = {seed}")


def _convert_precision(conversion: Conversion, fields: Fields) -> None:
    half, brain = (fields.take(name, "truth") for name in ("fp16", "bf16"))
    if half is True and brain is True:
        raise ConfigError(
            "fp16 and bf16 contradict each other.",
            numbers="Both are true.",
            write="one of the two",
        )
    on = half is True or brain is True
    words = 'parallel.dtype = "bf16"'
    if half is not None:
        nearest = f"{words}: there is no fp16, and bf16 needs no loss scale"
        verdict = Verdict.NEAREST if half else _C
        conversion.say("fp16", half, verdict, nearest if half else "parallel.dtype is another one")
    if brain is not None:
        conversion.say("bf16", brain, _C, words if brain else "parallel.dtype is another one")
    if on:
        conversion.set("parallel.dtype", "bf16")
    else:
        conversion.leave_open("parallel.dtype", "what the script trained in")
        conversion.absent("bf16", "parallel.dtype: what the script trained in")
