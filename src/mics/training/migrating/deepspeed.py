"""A DeepSpeed configuration (ZeRO, MiCS) as options of ``mics train``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mics.errors import ConfigError
from mics.training.migrating.batch import convert_batch
from mics.training.migrating.conversion import (
    AUTO,
    Conversion,
    Fields,
    Verdict,
    account_for_rest,
)
from mics.training.migrating.deepspeed_fields import CONVERTED, RULES, SECTIONS
from mics.training.migrating.optimisation import convert_optimizer, convert_scheduler

_WRITE = "DeepSpeed's own documentation has its fields"
_ZERO = "zero_optimization"
_C, _N, _U = Verdict.CONVERTED, Verdict.NO_COUNTERPART, Verdict.NOT_NEEDED


def convert_deepspeed(
    tree: Mapping[str, Any], *, ranks: int | None = None, gpus_per_node: int | None = None
) -> Conversion:
    """Convert a DeepSpeed configuration.

    Args:
        tree: the configuration, as JSON gives it.
        ranks: ranks of the job; without it the batch has to say it, if anything needs it.
        gpus_per_node: ranks of a node.

    Raises:
        ConfigError: a value is of the wrong kind, or values contradict each other.
    """
    fields = Fields(tree, SECTIONS, _WRITE)
    conversion = Conversion("DeepSpeed", ranks, gpus_per_node)
    convert_batch(conversion, fields)
    _convert_zero(conversion, fields)
    _convert_precision(conversion, fields)
    convert_optimizer(conversion, fields)
    convert_scheduler(conversion, fields)
    _convert_clipping(conversion, fields)
    _convert_activations(conversion, fields)
    _convert_records(conversion, fields)
    account_for_rest(conversion, fields, RULES, CONVERTED)
    return conversion


# -- ZeRO and MiCS ---------------------------------------------------------------------------------


def _convert_zero(conversion: Conversion, fields: Fields) -> None:
    stage = _stage(conversion, fields)
    shard = fields.take(f"{_ZERO}.mics_shard_size", "count")
    hierarchical = fields.take(f"{_ZERO}.mics_hierarchical_params_gather", "truth")
    hpz = fields.take(f"{_ZERO}.zero_hpz_partition_size", "count")
    for name, value in (("mics_shard_size", shard), ("zero_hpz_partition_size", hpz)):
        if isinstance(value, int) and (value < -1 or value == 0):
            raise fields.refuse(f"{_ZERO}.{name}", value, "a number of ranks, or -1 for none")
    if isinstance(shard, int) and shard > 0:
        if stage is not None and stage != 3:
            raise ConfigError(
                "mics_shard_size and the ZeRO stage contradict each other.",
                numbers=f"mics_shard_size = {shard}, stage = {stage}.",
                write='"stage": 3, which alone has MiCS, or no mics_shard_size',
            )
        if isinstance(hpz, int) and hpz > 1:
            raise ConfigError(
                "mics_shard_size and zero_hpz_partition_size contradict each other.",
                numbers=f"mics_shard_size = {shard}, zero_hpz_partition_size = {hpz}.",
                write="one of the two",
            )
        _convert_shard_size(conversion, shard, hierarchical)
    else:
        if shard is not None:
            conversion.say(f"{_ZERO}.mics_shard_size", shard, _U, "no MiCS: see the stage")
        if hierarchical is not None:
            why = "read with mics_shard_size only"
            conversion.say(f"{_ZERO}.mics_hierarchical_params_gather", hierarchical, _U, why)
    if hpz is not None:
        words = (
            f"parallel.partition = {hpz} is nearest: it keeps all states on these ranks, not only "
            "a copy of the weights, and sends no gradient further until the step ends"
        )
        none = "one rank: no second copy of the weights"
        many = isinstance(hpz, int) and hpz > 1
        verdict = Verdict.NO_COUNTERPART if many else _U
        conversion.say(f"{_ZERO}.zero_hpz_partition_size", hpz, verdict, words if many else none)
    _convert_offload(conversion, fields)


def _stage(conversion: Conversion, fields: Fields) -> int | None:
    """The ZeRO stage; ``None`` where Hugging Face fills it in."""
    path, value = f"{_ZERO}.stage", None
    if fields.has(_ZERO) and fields.peek(_ZERO) != {}:  # how DeepSpeed once spelled stage 1
        path, value = _ZERO, fields.take(_ZERO, "truth")
        stage: Any = int(value) if isinstance(value, bool) else value
    else:
        value = fields.take(path, "count")
        stage = 0 if value is None else value
    if value == AUTO:
        conversion.leave_open("parallel.partition", "the ZeRO stage that Accelerate fills in")
        conversion.say(path, value, Verdict.FILLED_IN, "parallel.partition")
        return None
    if stage not in (0, 1, 2, 3):
        raise fields.refuse(path, value, "0, 1, 2 or 3")
    if value is None:
        conversion.set("parallel.partition", 1)
        conversion.absent(path, "stage 0: parallel.partition = 1, whole states on every rank")
        return 0
    if stage == 0:
        conversion.set("parallel.partition", 1)
        conversion.say(path, value, _C, "parallel.partition = 1: whole states on every rank")
        return 0
    conversion.set("parallel.partition", "auto")
    whole = f"; ZeRO's own is {conversion.ranks}" if conversion.ranks else ""
    if stage == 3:
        why = "the fewest ranks that hold the model, where ZeRO-3 takes all" + whole
        conversion.say(path, value, _C, f'parallel.partition = "auto": {why}')
    else:
        why = (
            "shards weights too, and the fewest ranks that hold the model; nearest in a loop of "
            "your own: mics.shard(reshard_after_forward=False), gathered until backward"
        )
        conversion.say(path, value, Verdict.NEAREST, f'parallel.partition = "auto": {why}')
    return int(stage)


def _convert_shard_size(conversion: Conversion, shard: int, hierarchical: Any) -> None:
    ranks, node = conversion.ranks, conversion.gpus_per_node
    if ranks is not None and ranks % shard:
        raise ConfigError(
            "mics_shard_size does not divide the number of ranks.",
            numbers=f"mics_shard_size = {shard}, {ranks} ranks.",
            write=f"a divisor of {ranks}, or the right --ranks",
        )
    conversion.set("parallel.partition", shard)
    conversion.say(f"{_ZERO}.mics_shard_size", shard, _C, f"parallel.partition = {shard}")
    if hierarchical is None:
        why = 'parallel.collectives = "auto": measured; DeepSpeed gathers flat'
        conversion.absent(f"{_ZERO}.mics_hierarchical_params_gather", why)
        return
    path = f"{_ZERO}.mics_hierarchical_params_gather"
    if hierarchical is True and node is not None and shard <= node:
        raise ConfigError(
            "mics_hierarchical_params_gather needs a partition group of several nodes.",
            numbers=f"mics_shard_size = {shard}, {node} ranks per node.",
            write="mics_hierarchical_params_gather: false, or a larger mics_shard_size",
        )
    form = "auto" if hierarchical == AUTO else "hierarchical" if hierarchical else "flat"
    conversion.set("parallel.collectives", form)
    also = "; gradients are reduced in two stages too" if form == "hierarchical" else ""
    better = '; "auto" measures which is faster' if form != "auto" else ""
    conversion.say(path, hierarchical, _C, f'parallel.collectives = "{form}"{also}{better}')


def _convert_offload(conversion: Conversion, fields: Fields) -> None:
    moved = False
    for section in ("offload_param", "offload_optimizer"):
        path = f"{_ZERO}.{section}.device"
        device = fields.take(path, "text")
        if device is None:
            continue
        if device not in ("none", "cpu", "nvme", AUTO):
            raise fields.refuse(path, device, '"none", "cpu" or "nvme"')
        moved = moved or device in ("cpu", "nvme")
        _say_offload(conversion, path, device)
    for name in ("cpu_offload", "cpu_offload_param", "cpu_offload_params"):
        path = f"{_ZERO}.{name}"
        value = fields.take(path, "truth")
        if value is not None:
            moved = moved or value is True
            _say_offload(conversion, path, value, "cpu" if value is True else "none")
    if moved:
        conversion.loop_keywords["offload_policy"] = "CPUOffloadPolicy()"


def _say_offload(conversion: Conversion, path: str, value: Any, device: str | None = None) -> None:
    words = {
        "none": "nothing is offloaded",
        AUTO: "nothing is offloaded by default",
        "cpu": "not in mics train; a loop of your own: "
        "mics.shard(offload_policy=CPUOffloadPolicy()), or a larger partition",
        "nvme": "nothing is kept on NVMe; a larger partition holds more, and a loop of your own "
        "can keep states on the host: mics.shard(offload_policy=CPUOffloadPolicy())",
    }
    kind = device or str(value)
    conversion.say(path, value, _N if kind in ("cpu", "nvme") else _U, words[kind])


# -- precision, clipping, activations, records -----------------------------------------------------


def _convert_precision(conversion: Conversion, fields: Fields) -> None:
    asked: dict[str, Any] = {}
    for name in ("fp16", "bf16", "bfloat16"):
        path = f"{name}.enabled"
        if not fields.has(path) and any(not f.endswith(path) for f in fields.below(name)):
            conversion.absent(path, "off, so that the rest of its table is not read")
        asked[name] = fields.take(path, "truth")
    if asked["bf16"] is not None and asked["bfloat16"] not in (None, asked["bf16"]):
        raise ConfigError(
            "bf16 and bfloat16 are one setting, and differ.",
            numbers=f"bf16.enabled = {asked['bf16']}, bfloat16.enabled = {asked['bfloat16']}.",
            write="bf16 alone",
        )
    on = {name for name, value in asked.items() if value is True}
    if "fp16" in on and len(on) > 1:
        raise ConfigError(
            "fp16 and bf16 contradict each other.",
            numbers="Both are enabled.",
            write="one of the two",
        )
    for name, value in asked.items():
        if value is None:
            continue
        path = f"{name}.enabled"
        if value == AUTO:
            conversion.say(path, value, Verdict.FILLED_IN, "parallel.dtype")
        elif value is False:
            conversion.say(path, value, _C, "parallel.dtype is another one")
        elif name == "fp16":
            words = 'parallel.dtype = "bf16": there is no fp16, and bf16 needs no loss scale'
            conversion.say(path, value, Verdict.NEAREST, words)
        else:
            words = 'parallel.dtype = "bf16"; gradients are reduced and weights kept in fp32'
            conversion.say(path, value, _C, words)
    auto = AUTO in asked.values()
    cast = fields.has("torch_autocast.enabled") or fields.has("amp.enabled")
    if on:
        conversion.set("parallel.dtype", "bf16")
    elif auto:
        conversion.leave_open("parallel.dtype", "--bf16 or --fp16 of TrainingArguments")
    elif cast:
        conversion.leave_open("parallel.dtype", "torch_autocast or amp: bf16 is nearest")
    else:
        conversion.set("parallel.dtype", "fp32")
        conversion.absent("bf16.enabled", 'parallel.dtype = "fp32"')


def _convert_clipping(conversion: Conversion, fields: Fields) -> None:
    path = "gradient_clipping"
    value = fields.take(path, "number")
    if value == AUTO:
        conversion.leave_open("optimizer.clip", "--max_grad_norm of TrainingArguments")
        conversion.say(path, value, Verdict.FILLED_IN, "optimizer.clip")
    elif value is None:
        conversion.set("optimizer.clip", 1.0)
        words = "optimizer.clip = 1.0, as DeepSpeed 0.19.8 has it; 0.19.2 did not clip: write 0"
        conversion.absent(path, words)
    else:
        if value < 0:
            raise fields.refuse(path, value, "0 (off) or more")
        conversion.set("optimizer.clip", float(value))
        conversion.say(path, value, _C, f"optimizer.clip = {float(value)}")


def _convert_activations(conversion: Conversion, fields: Fields) -> None:
    name = "activation_checkpointing"
    below = [field.rpartition(".")[2] for field in fields.below(name)]
    if not below:
        return
    on_host = fields.take(f"{name}.cpu_checkpointing", "truth")
    if on_host is not None:
        conversion.say(
            f"{name}.cpu_checkpointing",
            on_host,
            _C,
            'parallel.activation_offload = "on"' if on_host is True else "the inputs stay",
        )
    on = on_host is True or bool(
        {"partition_activations", "partitioned_activations", "number_checkpoints"} & {*below}
        and any(
            fields.has(f"{name}.{key}") and fields.peek(f"{name}.{key}") not in (False, 0)
            for key in ("partition_activations", "partitioned_activations", "number_checkpoints")
        )
    )
    if on_host is True:
        conversion.set("parallel.activation_offload", "on")
    if on:
        conversion.set("parallel.activation_checkpointing", True)
        words = "parallel.activation_checkpointing = true: every block of the model"
    else:
        words = (
            "off: DeepSpeed's table takes no effect unless the model itself calls "
            "deepspeed.checkpointing; where it does, parallel.activation_checkpointing = true"
        )
    conversion.absent(f"{name} as a whole", words)


def _convert_records(conversion: Conversion, fields: Fields) -> None:
    path = "steps_per_print"
    every = fields.take(path, "count")
    if every == AUTO or every is None:
        if every is not None:
            conversion.say(path, every, Verdict.FILLED_IN, "log.every")
    elif 0 < every <= 10**15:
        conversion.set("log.every", every)
        conversion.say(path, every, _C, f"log.every = {every}")
    else:
        raise fields.refuse(path, every, "1 to 10^15")
    board = fields.take("tensorboard.enabled", "truth")
    if board is not None:
        conversion.set("log.tensorboard", board is True)
        words = f"log.tensorboard = {str(board is True).lower()}"
        conversion.say("tensorboard.enabled", board, _C, words)
    wandb = fields.take("wandb.enabled", "truth")
    project = fields.take("wandb.project", "text")
    if wandb is True:
        conversion.set("log.wandb", project or "deepspeed")
        conversion.say("wandb.enabled", wandb, _C, "log.wandb names the project")
    elif wandb is not None:
        conversion.say("wandb.enabled", wandb, _C, "log.wandb stays empty")
    if project is not None:
        words = "log.wandb" if wandb is True else "wandb is off"
        conversion.say("wandb.project", project, _C if wandb is True else _U, words)
    summed = fields.take("gradient_allreduce_op", "text")
    if summed is not None:
        if summed not in ("mean", "sum", AUTO):
            raise fields.refuse("gradient_allreduce_op", summed, '"mean" or "sum"')
        words = "gradients are averaged; a sum is the loss times the number of ranks"
        conversion.say("gradient_allreduce_op", summed, _N if summed == "sum" else _U, words)
