"""shard: a whole model at once, partition size and blocks found, meta device respected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from mics import compat
from mics.anatomy.anatomy import units_of_model
from mics.anatomy.blocks import Blocks, find_blocks, units_of_block
from mics.anatomy.memory import Setup, states_and_blocks
from mics.communication.forms import Collectives
from mics.errors import ShardError
from mics.ranks.agreement import check_agreement
from mics.ranks.console import say
from mics.ranks.device import communication_device, default_device_type
from mics.ranks.mesh import (
    Groups,
    groups_of,
    init_mesh,
    start,
)
from mics.sharding.fully_shard import check_ranks_agree, fully_shard
from mics.sharding.gather_ahead import gather_ahead
from mics.sharding.materialise import Initialise, Materialiser
from mics.sharding.partition import FOR_STATES, PartitionChoice, choose_partition, device_memory

Model = TypeVar("Model", bound=nn.Module)


def shard(
    model: Model,
    *,
    partition: int | Literal["auto"] | PartitionChoice = "auto",
    mesh: DeviceMesh | None = None,
    gpus_per_node: int | None = None,
    blocks: Blocks = None,
    reshard_after_forward: bool | int | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    ignored_params: set[nn.Parameter] | None = None,
    initialise: Initialise | None = None,
    activation_checkpointing: bool = False,
    compile: bool | Mapping[str, Any] = False,
    collectives: Collectives = "auto",
    overlap: bool = True,
) -> Model:
    """Shard a whole model, in place; prints which partition size and why.

    The repeated blocks are found and sharded one by one, what is left becomes the root unit.
    Parameters on the meta device get their values unit by unit, so that at no time more than the
    rank's share and one unit exist. Every rank starts from the same weights. Collective over all
    ranks.

    Args:
        model: any module with repeated blocks, transformers models included.
        partition: p; "auto" takes the smallest that holds the model states and two blocks in 70 %
            of a device. A choice made elsewhere comes with its reason.
        mesh: a mesh to use instead of making one; then ``partition`` must be left alone.
        gpus_per_node: k, by default what the launcher says.
        blocks: block classes, block modules or a predicate, where they cannot be guessed.
        reshard_after_forward: as FSDP2's, for the blocks; the root follows FSDP2's default.
        mp_policy: as FSDP2's; by default bf16 computation and fp32 reduction.
        offload_policy: as FSDP2's.
        ignored_params: as FSDP2's.
        initialise: sets the values of one module that was on the meta device; by default
            transformers' ``_init_weights`` or the module's ``reset_parameters``.
        activation_checkpointing: recompute each block in backward instead of keeping activations.
        compile: ``torch.compile`` each block; a mapping is passed on as its keywords.
        collectives: "auto" measures flat against hierarchical once; or force one of them.
        overlap: on the CPU, where Gloo blocks: gather and reduce beside computation, at the price
            of two blocks' memory; see ``fully_shard``. On a GPU FSDP2's streams do so in any case.

    Returns:
        ``model``, an FSDPModule now; ``state_dict``, optimizers and checkpoints work as on any.

    Raises:
        ShardError: no blocks, does not fit, or a meta parameter nobody initialises.
        TopologyError: p or k do not fit the world.
        DisagreementError: ranks disagree on versions, arguments or the model.
    """
    policy = mp_policy or MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )
    ignored = ignored_params or set()
    arguments = [
        f"partition={partition}",
        f"gpus_per_node={gpus_per_node}",
        f"blocks={_spelled(blocks)}",
    ]
    if mesh is None:
        _check_world_agrees(model, ignored, gpus_per_node, arguments)
        mesh, reason = _mesh_for(model, partition, gpus_per_node, blocks, policy)
        groups = groups_of(mesh, gpus_per_node=gpus_per_node)
    elif partition != "auto":
        raise ShardError(
            "mesh and partition were both given.",
            numbers=f"The mesh has shape {tuple(mesh.shape)}, partition = {partition}.",
            write="one of them",
        )
    else:
        groups = groups_of(mesh, gpus_per_node=gpus_per_node)
        more = {"arguments of shard": arguments}
        check_ranks_agree([model], groups.axes, groups.device, ignored, more)
        reason = f"partition {mesh.size(mesh.ndim - 1)}: the mesh's"
    found = find_blocks(model, blocks)
    check_agreement({"blocks found": list(found)}, groups.axes, groups.device)
    materialiser = Materialiser(
        model,
        device=_home(groups, offload_policy),
        seed=_agreed_seed(groups),
        initialise=initialise,
    )
    keywords: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "offload_policy": offload_policy,
        "ignored_params": ignored_params,
        "collectives": collectives,
        "overlap": overlap,
    }
    whole = f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
    for block in found.values():
        materialiser.materialise(block)
        if activation_checkpointing:
            compat.checkpoint_activations(block)
        if compile:
            block.compile(**({} if compile is True else compile))
        for unit in units_of_block(block, ignored):
            fully_shard(unit, reshard_after_forward=reshard_after_forward, **keywords)
    materialiser.materialise(model)
    for unit in units_of_block(model, ignored | _sharded(model)):
        fully_shard(unit, **keywords)
    if overlap and groups.device.type == "cpu":
        gather_ahead(model, list(found.values()))
    say(_summary(whole, len(found), groups, reason, policy))
    return model


def _check_world_agrees(
    model: nn.Module, ignored: set[nn.Parameter], gpus_per_node: int | None, arguments: list[str]
) -> None:
    """Before anything that a rank with another model or argument would not take part in."""
    _, launched_per_node = start()
    world_group = dist.group.WORLD
    assert world_group is not None
    more = {
        "arguments of shard": arguments,
        "ranks per node": [str(gpus_per_node or launched_per_node)],
    }
    device = communication_device(default_device_type())
    check_ranks_agree([model], [world_group], device, ignored, more)


def _spelled(blocks: Blocks) -> str:
    if blocks is None:
        return "None"
    if isinstance(blocks, Sequence):
        return " ".join(_spelled(block) for block in blocks)
    if isinstance(blocks, nn.Module):
        return type(blocks).__name__
    return blocks.__name__ if isinstance(blocks, type) else "a function"


def _mesh_for(
    model: nn.Module,
    partition: int | Literal["auto"] | PartitionChoice,
    gpus_per_node: int | None,
    blocks: Blocks,
    policy: MixedPrecisionPolicy,
) -> tuple[DeviceMesh, str]:
    world, launched_per_node = start()
    k = gpus_per_node or launched_per_node
    if isinstance(partition, PartitionChoice):
        mesh = init_mesh(partition=partition.partition, gpus_per_node=gpus_per_node)
        return mesh, partition.reason
    if partition != "auto":
        mesh = init_mesh(partition=partition, gpus_per_node=gpus_per_node)
        return mesh, f"partition {partition}: as asked"
    if world % k != 0:
        init_mesh(partition="auto", gpus_per_node=gpus_per_node)  # says what is wrong
    device_type = default_device_type()
    device = torch.device(device_type)
    memory = torch.tensor(device_memory(device, launched_per_node), device=device)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    found = list(find_blocks(model, blocks).values())
    sizes = units_of_model(model, found)

    def need(p: int) -> int:
        return states_and_blocks(*sizes, _setup(model, policy, p)).total

    choice = choose_partition(
        need, int(memory), nodes=world // k, gpus_per_node=k, share=FOR_STATES
    )
    mesh = init_mesh(partition=choice.partition, gpus_per_node=gpus_per_node)
    return mesh, choice.reason


def _setup(model: nn.Module, policy: MixedPrecisionPolicy, partition: int) -> Setup:
    """What of the step is known before the first batch."""
    master = max((p.element_size() for p in model.parameters()), default=4)
    compute = policy.param_dtype.itemsize if policy.param_dtype else master
    reduce = policy.reduce_dtype.itemsize if policy.reduce_dtype else compute
    return Setup(
        partition, master_bytes=master, compute_bytes=compute, reduce_bytes=reduce, micro_steps=2
    )


def _home(groups: Groups, offload_policy: OffloadPolicy | None) -> torch.device:
    """Where parameters live: on the CPU when they are offloaded (``CPUOffloadPolicy``)."""
    offloaded = offload_policy is not None and type(offload_policy) is not OffloadPolicy
    return torch.device("cpu") if offloaded else groups.device


def _agreed_seed(groups: Groups) -> int:
    """The first rank's seed, on every rank."""
    seed = torch.tensor(torch.initial_seed() % 2**63, dtype=torch.int64, device=groups.device)
    for group in groups.axes[::-1]:
        dist.broadcast(seed, group=group, group_src=0)
    return int(seed)


def _sharded(model: nn.Module) -> set[nn.Parameter]:
    return {p for p in model.parameters() if isinstance(p, DTensor)}


def _summary(
    whole: str,
    num_blocks: int,
    groups: Groups,
    reason: str,
    policy: MixedPrecisionPolicy,
) -> str:
    compute = str(policy.param_dtype or "parameter dtype").removeprefix("torch.")
    reduce = str(policy.reduce_dtype or policy.param_dtype or "gradient dtype")
    return (
        f"{whole} in {num_blocks} blocks and a root; "
        f"{groups.num_replicas} replica(s) x partition of {groups.shard.size()}; computes in "
        f"{compute}, reduces in {reduce.removeprefix('torch.')}\nmics: {reason}"
    )
