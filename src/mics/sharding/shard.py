"""shard: a whole model at once, partition size and blocks found, meta device respected."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from mics import compat
from mics.anatomy.blocks import Blocks, find_blocks, units_of_block
from mics.anatomy.memory import states_and_blocks
from mics.anatomy.recipe import Recipe
from mics.anatomy.sizes import units_of_model
from mics.communication.backend import backend_of_mesh
from mics.communication.fewer_bits import Asked, HopTwoBits, check_bits
from mics.communication.forms import Collectives
from mics.errors import ShardError
from mics.quantities import dtype_name
from mics.ranks import issuing
from mics.ranks.console import say
from mics.ranks.device import HOST, communication_device, default_device_type
from mics.ranks.launcher import FULL_WORLD, full_world
from mics.ranks.mesh import (
    Groups,
    groups_of,
    launched_ranks_per_node,
    mesh_of,
    start,
)
from mics.ranks.whereabouts import during, world_group
from mics.sharding.belonging import remember_replaced
from mics.sharding.data_axes import Axes, axes_on, groups_on
from mics.sharding.fully_shard import UnitOptions, shard_unit
from mics.sharding.gather_ahead import gather_ahead
from mics.sharding.gather_hooks import check_gather_hooks
from mics.sharding.gradient_hooks import refuse_lost_hooks
from mics.sharding.initialisers import Initialise
from mics.sharding.materialise import Materialiser
from mics.sharding.offload import Offload, refuse_offload
from mics.sharding.other_axes import (
    refuse_left_out,
    refuse_parallel_on_meta,
    refuse_parallel_resharding,
    refuse_sharded_over_all,
    unsharded,
)
from mics.sharding.partition import FOR_STATES, PartitionChoice, choose_partition, device_memory
from mics.sharding.placements import along_longer_dims
from mics.sharding.same_model import check_same_model, on_meta
from mics.sharding.same_start import same_start
from mics.topology import Topology

Model = TypeVar("Model", bound=nn.Module)


@during("mics.shard")
def shard(
    model: Model,
    *,
    partition: int | Literal["auto"] | PartitionChoice = "auto",
    mesh: DeviceMesh | None = None,
    dp_mesh_dims: Any = None,
    gpus_per_node: int | None = None,
    blocks: Blocks = None,
    reshard_after_forward: bool | int | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    ignored_params: set[nn.Parameter] | None = None,
    initialise: Initialise | None = None,
    activation_checkpointing: bool = False,
    activation_offload: bool = False,
    compile: bool | Mapping[str, Any] = False,
    collectives: Collectives = "auto",
    overlap: bool = True,
    hop_two: HopTwoBits | None = None,
    error_feedback: bool = True,
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
        dp_mesh_dims: as ``fully_shard``: the axes of ``mesh`` to shard and replicate over.
        gpus_per_node: k, by default what the launcher says.
        blocks: block classes, block modules or a predicate, where they cannot be guessed.
        reshard_after_forward: as FSDP2's, for the blocks; the root follows FSDP2's default.
        mp_policy: as FSDP2's; by default bf16 computation and fp32 reduction. Its ``output_dtype``
            is the model's, not the blocks'.
        offload_policy: as FSDP2's.
        ignored_params: as FSDP2's.
        initialise: sets the values of one module that was on the meta device. By default who set
            them when the model was built: transformers' ``_init_weights``, an adapter of peft, or
            the module's ``reset_parameters``; values that somebody else set are refused.
        activation_checkpointing: recompute each block in backward instead of keeping activations.
        activation_offload: keep what each block saves for backward on the host until then; with
            checkpointing that is a block's inputs. Weights and buffers stay; see ``offload.py``.
        compile: ``torch.compile`` each block; a mapping is passed on as its keywords.
        collectives: "auto" measures flat against hierarchical once; or force one of them.
        overlap: on the CPU, where Gloo blocks: gather and reduce beside computation, at the price
            of two blocks' memory; see ``fully_shard``. On a GPU FSDP2's streams do so in any case.
        hop_two: bits of what replicas exchange once a step, as ``fully_shard``.
        error_feedback: whether what "fp8" and "int8" round away is sent later, as ``fully_shard``.

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
    options = UnitOptions(
        mp_policy=policy,
        offload_policy=offload_policy or OffloadPolicy(),
        ignored_params=ignored_params,
        collectives=collectives,
        overlap=overlap,
        hop_two=Asked(hop_two, error_feedback, collectives),
    )
    ignored = ignored_params or set()
    arguments = [
        f"partition={partition}",
        f"gpus_per_node={gpus_per_node}",
        f"blocks={_spelled(blocks)}",
        f"reshard_after_forward={reshard_after_forward}",
        f"mp_policy={mp_policy}",
        f"collectives={collectives}",
        f"overlap={overlap}",
        f"hop_two={hop_two}",
        f"error_feedback={error_feedback}",
        f"{FULL_WORLD}={os.environ.get(FULL_WORLD)}",
    ]
    asked = _Asked(model, blocks, ignored, arguments)
    if mesh is None:
        _refuse_axes_of_no_mesh(dp_mesh_dims)
        found, groups, reason = _on_new_mesh(asked, partition, gpus_per_node, policy)
    else:
        _refuse_partition_of(mesh, partition)
        groups = groups_on(mesh, dp_mesh_dims, gpus_per_node)
        found, axes = asked.agree_on_mesh(mesh, dp_mesh_dims, groups, reshard_after_forward)
        options = replace(options, axes=axes)
        reason = f"partition {groups.shard.size()}: the mesh's"
    check_bits(hop_two)
    placements = along_longer_dims(groups)
    refuse_lost_hooks([model], ignored)
    check_gather_hooks(
        [model], placements, policy, ignored=ignored, reshard_after_forward=reshard_after_forward
    )
    # What a block returns is the next one's input.
    inner = replace(options, mp_policy=replace(policy, output_dtype=None))
    whole = f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
    same_start(model, groups, ignored)
    materialiser = Materialiser(
        model,
        device=_home(groups, offload_policy),
        seed=_agreed_seed(groups),
        initialise=initialise,
    )
    if activation_offload:
        refuse_offload(model)
        Offload(model, found, groups.device)
    with remember_replaced([model]):
        for block in found:
            _materialise(block, materialiser, groups, ignored)
            if activation_checkpointing:
                compat.checkpoint_activations(block)
            if compile:
                block.compile(**({} if compile is True else compile))
            for unit in units_of_block(block, ignored):
                shard_unit(unit, placements, inner, reshard_after_forward)
        _materialise(model, materialiser, groups, ignored)
        for unit in units_of_block(model, ignored | _sharded(model)):
            shard_unit(unit, placements, options if unit is model else inner, None)
    if overlap and backend_of_mesh(groups).blocks:
        gather_ahead(model, found)
    say(_summary(whole, len(found), groups, reason, policy))
    return model


@dataclass(frozen=True)
class _Asked:
    """What one rank was asked to shard, to be compared with what the others were."""

    model: nn.Module
    blocks: Blocks
    ignored: set[nn.Parameter]
    arguments: list[str]

    def agree(
        self, axes: Sequence[dist.ProcessGroup], device: torch.device, gpus_per_node: int
    ) -> list[nn.Module]:
        """Compare everything at once, before anything that an odd rank would not take part in.

        Returns:
            The blocks, in the order they run.

        Raises:
            ShardError: no blocks were found.
            DisagreementError: ranks disagree.
        """
        failed: ShardError | None = None
        found: dict[str, nn.Module] = {}
        try:
            found = find_blocks(self.model, self.blocks)
        except ShardError as error:
            failed = error
        facts = {
            "arguments of shard": self.arguments,
            "ranks per node": [str(gpus_per_node)],
            "blocks found": list(found),
            "tensors on the meta device": on_meta([self.model]),
        }
        check_same_model([self.model], axes, device, self.ignored, facts)
        if failed is not None:
            raise failed
        return list(found.values())

    def agree_on_mesh(
        self,
        mesh: DeviceMesh,
        dims: Any,
        groups: Groups,
        reshard_after_forward: bool | int | None,
    ) -> tuple[list[nn.Module], Axes | None]:
        """The blocks, and which axes of a given mesh the data is on; see ``axes_on``."""
        params = {n: p for n, p in unsharded([self.model]).items() if p not in self.ignored}
        refuse_parallel_on_meta(params)
        refuse_parallel_resharding(params, reshard_after_forward, groups.shard.size())
        refuse_left_out(groups.whole, list(params.values()))
        axes = axes_on(params, mesh, dims, groups)
        return self.agree(groups.axes, groups.device, groups.gpus_per_node), axes


def _materialise(
    module: nn.Module, materialiser: Materialiser, groups: Groups, ignored: set[nn.Parameter]
) -> None:
    """Give a module its values; an ``initialise`` of the user's may give every rank others."""
    if materialiser.materialise(module):
        same_start(module, groups, ignored)


def _spelled(blocks: Blocks) -> str:
    if blocks is None:
        return "None"
    if isinstance(blocks, Sequence):
        return " ".join(_spelled(block) for block in blocks)
    if isinstance(blocks, nn.Module):
        return type(blocks).__name__
    return blocks.__name__ if isinstance(blocks, type) else "a function"


def _refuse_partition_of(
    mesh: DeviceMesh, partition: int | Literal["auto"] | PartitionChoice
) -> None:
    if partition != "auto":
        raise ShardError(
            "mesh and partition were both given.",
            numbers=f"The mesh has shape {tuple(mesh.shape)}, partition = {partition}.",
            write="one of them",
        )


def _refuse_axes_of_no_mesh(dims: Any) -> None:
    if dims is not None:
        raise ShardError(
            "dp_mesh_dims names axes of a mesh, and no mesh was given.",
            numbers=f"It names shard={dims.shard!r}, replicate={dims.replicate!r}.",
            write="mesh= and dp_mesh_dims=, or partition= alone",
        )


def _on_new_mesh(
    asked: _Asked,
    partition: int | Literal["auto"] | PartitionChoice,
    gpus_per_node: int | None,
    policy: MixedPrecisionPolicy,
) -> tuple[list[nn.Module], Groups, str]:
    """The blocks, the groups of a mesh over all ranks, and why the partition is what it is."""
    world, launched_per_node = start()
    k = gpus_per_node or launched_per_node
    device = communication_device(default_device_type())
    refuse_sharded_over_all(asked.model)
    found = asked.agree([world_group()], device, k)
    nodes = Topology.from_world(full_world(world), k, k)  # "auto" is the same while some are away
    choice = _choose(asked.model, partition, nodes, found, policy)
    mesh = mesh_of(Topology.from_world(world, k, choice.partition))
    return found, groups_of(mesh, gpus_per_node=k), choice.reason


def _choose(
    model: nn.Module,
    partition: int | Literal["auto"] | PartitionChoice,
    nodes: Topology,
    blocks: Sequence[nn.Module],
    policy: MixedPrecisionPolicy,
) -> PartitionChoice:
    """The partition size and why; collective where it depends on the ranks' memory."""
    if isinstance(partition, PartitionChoice):
        return partition
    if partition != "auto":
        return PartitionChoice(partition, f"partition {partition}: as asked")
    device = torch.device(default_device_type())
    memory = torch.tensor(device_memory(device, launched_ranks_per_node()), device=device)
    issuing.all_reduce(memory, dist.ReduceOp.MIN)
    sizes = units_of_model(model, blocks)

    def need(p: int) -> int:
        return states_and_blocks(*sizes, _recipe(model, policy, p)).total

    return choose_partition(
        need,
        int(memory),
        nodes=nodes.nodes,
        gpus_per_node=nodes.gpus_per_node,
        share=FOR_STATES,
    )


def _recipe(model: nn.Module, policy: MixedPrecisionPolicy, partition: int) -> Recipe:
    """Write down what of a step is known before the first batch."""
    master = max((p.element_size() for p in model.parameters()), default=4)
    compute = policy.param_dtype.itemsize if policy.param_dtype else master
    reduce = policy.reduce_dtype.itemsize if policy.reduce_dtype else compute
    return Recipe(
        partition, master_bytes=master, compute_bytes=compute, reduce_bytes=reduce, micro_steps=2
    )


def _home(groups: Groups, offload_policy: OffloadPolicy | None) -> torch.device:
    """Where parameters live: on the CPU when they are offloaded (``CPUOffloadPolicy``)."""
    offloaded = offload_policy is not None and type(offload_policy) is not OffloadPolicy
    return torch.device(HOST) if offloaded else groups.device


def _agreed_seed(groups: Groups) -> int:
    """The first rank's seed, on every rank."""
    seed = torch.tensor(torch.initial_seed() % 2**63, dtype=torch.int64, device=groups.device)
    for group in groups.axes[::-1]:
        issuing.broadcast(seed, group)
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
    compute = dtype_name(policy.param_dtype or "parameter dtype")
    reduce = str(policy.reduce_dtype or policy.param_dtype or "gradient dtype")
    return (
        f"{whole} in {num_blocks} blocks and a root; "
        f"{groups.num_replicas} replica(s) x partition of {groups.shard.size()}; computes in "
        f"{compute}, reduces in {reduce.removeprefix('torch.')}\nmics: {reason}"
    )
