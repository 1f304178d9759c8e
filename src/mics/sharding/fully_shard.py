"""fully_shard: FSDP2's, with hierarchical collectives, a two-hop schedule and a ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard

from mics import compat
from mics.communication.fewer_bits import Asked, HopTwoBits, check_bits
from mics.communication.forms import Collectives
from mics.errors import ShardError
from mics.ranks.device import default_device_type
from mics.ranks.mesh import Groups, post_forward_mesh, start
from mics.ranks.whereabouts import during
from mics.sharding.at_rest import rest_after_forward
from mics.sharding.belonging import remember_replaced, remember_unit
from mics.sharding.data_axes import Axes, axes_on, groups_on
from mics.sharding.gather_hooks import check_gather_hooks
from mics.sharding.gradient_hooks import refuse_lost_hooks
from mics.sharding.other_axes import refuse_parallel_resharding, unsharded
from mics.sharding.placements import Placements
from mics.sharding.same_model import check_same_model, on_meta
from mics.sharding.same_start import same_start
from mics.sharding.units import Unit
from mics.sharding.wrapping import LeavesNone


@during("mics.fully_shard")
def fully_shard(
    module: Any,
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = None,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    ignored_params: set[nn.Parameter] | None = None,
    dp_mesh_dims: Any = None,
    collectives: Collectives = "auto",
    gpus_per_node: int | None = None,
    overlap: bool = False,
    hop_two: HopTwoBits | None = None,
    error_feedback: bool = True,
) -> Any:
    """Apply FSDP2 to ``module``: same keywords, same return as torch's ``fully_shard``.

    Call it bottom-up, as FSDP2's. The differences are inside: all-gathers and reduce-scatters of a
    partition group that spans nodes may run in two stages, a 2-D mesh's all-reduce becomes hop 2
    (see ``hop_two.py``), in two stages too where nodes have several replicas and that is faster,
    everything is counted, and every rank starts from the same weights.
    Parameters are DTensors on the mesh's shard axis. Collective over the mesh.

    Args:
        module: a module, or a list of modules to be one communication unit.
        mesh: 1-D (shard) or 2-D (replicate, shard); by default 1-D over the world, as FSDP2.
        reshard_after_forward: as FSDP2: True, False, or the ranks to reshard to.
        shard_placement_fn: as FSDP2.
        mp_policy: as FSDP2. ``reduce_dtype`` is always passed on explicitly, because leaving it
            out means another dtype from torch 2.15 on.
        offload_policy: as FSDP2.
        ignored_params: as FSDP2.
        dp_mesh_dims: torch's ``DataParallelMeshDims`` (2.12 and later): which axes of a mesh with
            others beside them to shard and replicate over; several are flattened into one. As
            FSDP2, and for plain parameters and those on the other axes too.
        collectives: "auto" measures flat against hierarchical once; or force one of them.
        gpus_per_node: k, if the mesh did not come from ``mics.init_mesh`` and the launcher's word
            is not right.
        overlap: on the CPU, where FSDP2's streams do nothing and Gloo blocks: gather for backward
            and reduce beside computation, at the price of two units' memory, and reduce inside a
            node with half of Gloo's bytes, at the price of another order of rounding. On a GPU
            FSDP2's streams overlap in any case.
        hop_two: bits of what replicas exchange once a step: "fp32" or "bf16", in which gradients
            are then summed; "fp8" or "int8", blocks of them with a scale each, summed in fp32, for
            parameters of two or more dims; "auto", fp8 where a unit's hop 2 is measured to be
            faster so. ``None`` is the dtype that is reduced in.
        error_feedback: in "fp8" and "int8" send what rounding has held back with the next step's
            gradients, for 4 bytes of memory a value.

    Returns:
        ``module``, now an FSDPModule.

    Raises:
        TopologyError: a mesh whose rank order FSDP2 would corrupt.
        DisagreementError: ranks pass different modules, settings or versions.
        ShardError: an argument that cannot be honoured.
    """
    mesh = mesh if mesh is not None else _world_mesh()
    modules = module if isinstance(module, list) else [module]
    groups = groups_on(mesh, dp_mesh_dims, gpus_per_node)
    ignored = ignored_params or set()
    placements = Placements(shard_placement_fn, groups)
    elsewhere = placements.elsewhere(modules)
    here = {n: p for n, p in unsharded(modules).items() if p not in elsewhere and p not in ignored}
    refuse_parallel_resharding(here, reshard_after_forward, groups.shard.size())
    axes = axes_on(here, mesh, dp_mesh_dims, groups)
    arguments = {
        "reshard_after_forward": reshard_after_forward,
        "mp_policy": mp_policy,
        "collectives": collectives,
        "overlap": overlap,
        "hop_two": hop_two,
        "error_feedback": error_feedback,
    }
    more = {
        "ranks per node": [str(groups.gpus_per_node)],
        "sharding arguments": [f"{name}={value}" for name, value in arguments.items()],
        "tensors on the meta device": on_meta(modules),
        "parameters on other meshes": [
            f"{name} on {tuple(elsewhere[param].whole.shape)}"
            for name, param in unsharded(modules).items()
            if param in elsewhere
        ],
    }
    check_same_model(modules, groups.axes, groups.device, ignored, more)
    check_bits(hop_two)
    policy = mp_policy or MixedPrecisionPolicy()
    refuse_lost_hooks(modules, ignored)
    check_gather_hooks(
        modules,
        placements,
        policy,
        ignored=ignored,
        reshard_after_forward=reshard_after_forward,
    )
    for one in modules:
        same_start(one, groups, ignored, elsewhere)
    options = UnitOptions(
        mp_policy=policy,
        offload_policy=offload_policy or OffloadPolicy(),
        ignored_params=ignored_params,
        axes=axes,
        collectives=collectives,
        overlap=overlap,
        hop_two=Asked(hop_two, error_feedback, collectives),
    )
    return shard_unit(module, placements, options, reshard_after_forward)


@dataclass(frozen=True)
class UnitOptions:
    """What is the same for every unit of a model: FSDP2's arguments and ours."""

    mp_policy: MixedPrecisionPolicy
    offload_policy: OffloadPolicy
    ignored_params: set[nn.Parameter] | None
    collectives: Collectives
    overlap: bool
    hop_two: Asked
    axes: Axes | None = None

    def of_unit(self) -> dict[str, Any]:
        """What a unit is told beside its group."""
        names = ("collectives", "overlap", "hop_two")
        return {name: getattr(self, name) for name in names}


def shard_unit(
    module: Any,
    placements: Placements,
    options: UnitOptions,
    reshard_after_forward: bool | int | None,
) -> Any:
    """Make one unit of a module, or of a list of modules, on ranks that have agreed on it.

    Args:
        module: as ``fully_shard``.
        placements: the ranks it is sharded and replicated over; one unit for each mesh of them.
        options: of the model.
        reshard_after_forward: as ``fully_shard``.

    Returns:
        ``module``, now an FSDPModule.

    Raises:
        ShardError: an argument that cannot be honoured.
    """
    groups = placements.home
    smaller = _smaller_group(reshard_after_forward, groups)
    keywords: dict[str, Any] = {
        "mesh": groups.mesh,
        "reshard_after_forward": reshard_after_forward if smaller is None else True,
        "shard_placement_fn": placements.for_torch(),
        "mp_policy": _explicit(options.mp_policy),
        "offload_policy": options.offload_policy,
        "ignored_params": options.ignored_params,
    }
    if options.axes is not None:
        # Replication is left out: hop 2 is ours.
        dims = options.axes.dims
        shard_only = type(dims)(shard=dims.shard_names)
        keywords |= {"mesh": options.axes.mesh, "dp_mesh_dims": shard_only}
    modules = module if isinstance(module, list) else [module]
    with remember_replaced(modules):
        sharded = torch_fully_shard(module, **keywords)
    for one in modules:
        rest_after_forward(one)
        compat.leave_alone(one, LeavesNone())
    owner, units = modules[0], []
    for group in compat.param_groups(owner):
        if options.axes is not None:
            compat.reduce_gradients_over(group, options.axes.dims.replicate_names)
        own = placements.of_group(compat.shard_group(group))
        if smaller is not None and own is groups:
            compat.reshard_to(group, smaller)
        unit = Unit(owner, group, own, **options.of_unit())
        remember_unit(unit)
        units.append(unit)
    for unit in reversed(units):  # so that they arrive in the order in which FSDP2 gathers them
        unit.stand_first()
    return sharded


def _smaller_group(reshard_after_forward: bool | int | None, groups: Groups) -> DeviceMesh | None:
    """The mesh to reshard to after forward, when that is fewer ranks than the partition group.

    FSDP2 makes one, with new communicators, in every call; here all units share it.
    """
    if reshard_after_forward is None or isinstance(reshard_after_forward, bool):
        return None
    p = groups.shard.size()
    possible = [size for size in range(2, p) if p % size == 0]
    if reshard_after_forward in (1, p):
        return None  # FSDP2 reads these as False and True
    if reshard_after_forward not in possible:
        raise ShardError(
            f"reshard_after_forward = {reshard_after_forward} does not divide the partition group "
            f"of {p} ranks.",
            numbers=f"Possible: {' '.join(map(str, possible)) or 'none'}, True and False.",
            write="reshard_after_forward=True",
        )
    return post_forward_mesh(groups, reshard_after_forward)


def _explicit(policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """Spell out the reduce dtype that torch up to 2.14 takes when it is left out."""
    if policy.reduce_dtype is not None or policy.param_dtype is None:
        return policy
    return MixedPrecisionPolicy(
        param_dtype=policy.param_dtype,
        reduce_dtype=policy.param_dtype,
        output_dtype=policy.output_dtype,
        cast_forward_inputs=policy.cast_forward_inputs,
    )


def _world_mesh() -> DeviceMesh:
    world, _ = start()
    return init_device_mesh(default_device_type(), (world,), mesh_dim_names=("shard",))
