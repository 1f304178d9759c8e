"""fully_shard: FSDP2's, with hierarchical collectives, a two-hop schedule and a ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard

from mics import compat
from mics.communication.collectives import AllGather, ReduceScatter
from mics.communication.forms import Collectives, decide_by, measure
from mics.communication.hop_two import HopTwo
from mics.communication.landing import Later, reductions_of
from mics.communication.ledger import Ledger
from mics.errors import ShardError
from mics.ranks.agreement import check_agreement
from mics.ranks.device import default_device_type
from mics.ranks.mesh import (
    Groups,
    groups_of,
    post_forward_mesh,
    ranks_of,
    start,
)
from mics.sharding.same_start import same_start
from mics.sharding.units import Unit, attach, units_on
from mics.version import __version__


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
) -> Any:
    """Apply FSDP2 to ``module``: same keywords, same return as torch's ``fully_shard``.

    Call it bottom-up, as FSDP2's. The differences are inside: all-gathers and reduce-scatters of a
    partition group that spans nodes may run in two stages, a 2-D mesh's all-reduce becomes hop 2
    (see ``hop_two.py``), everything is counted, and every rank starts from the same weights.
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
        dp_mesh_dims: as FSDP2 (torch 2.12 and later), one shard and at most one replicate axis.
        collectives: "auto" measures flat against hierarchical once; or force one of them.
        gpus_per_node: k, if the mesh did not come from ``mics.init_mesh`` and the launcher's word
            is not right.
        overlap: on the CPU, where FSDP2's streams do nothing and Gloo blocks: gather for backward
            and reduce beside computation, at the price of two units' memory, and reduce inside a
            node with half of Gloo's bytes, at the price of another order of rounding. On a GPU
            FSDP2's streams overlap in any case.

    Returns:
        ``module``, now an FSDPModule.

    Raises:
        TopologyError: a mesh whose rank order FSDP2 would corrupt.
        DisagreementError: ranks pass different modules, settings or versions.
        ShardError: an argument that cannot be honoured.
    """
    mesh = mesh if mesh is not None else _world_mesh()
    modules = module if isinstance(module, list) else [module]
    if dp_mesh_dims is not None:
        groups = groups_of(_axes(mesh, dp_mesh_dims), gpus_per_node=gpus_per_node)
    else:
        groups = groups_of(mesh, gpus_per_node=gpus_per_node)
    ignored = ignored_params or set()
    arguments = {
        "reshard_after_forward": reshard_after_forward,
        "mp_policy": mp_policy,
        "collectives": collectives,
        "overlap": overlap,
    }
    more = {
        "ranks per node": [str(groups.gpus_per_node)],
        "sharding arguments": [f"{name}={value}" for name, value in arguments.items()],
        "tensors on the meta device": _on_meta(modules),
    }
    check_ranks_agree(modules, groups.axes, groups.device, ignored, more)
    for one in modules:
        same_start(one, groups, ignored)
    smaller = _smaller_group(reshard_after_forward, groups)
    keywords: dict[str, Any] = {
        "mesh": groups.mesh,
        "reshard_after_forward": reshard_after_forward if smaller is None else True,
        "shard_placement_fn": shard_placement_fn,
        "mp_policy": _explicit(mp_policy or MixedPrecisionPolicy()),
        "offload_policy": offload_policy or OffloadPolicy(),
        "ignored_params": ignored_params,
    }
    if dp_mesh_dims is not None:
        # Replication is left out: hop 2 is ours.
        shard_only = type(dp_mesh_dims)(shard=dp_mesh_dims.shard_names[0])
        keywords |= {"mesh": mesh, "dp_mesh_dims": shard_only}
    sharded = torch_fully_shard(module, **keywords)
    for group in compat.param_groups(modules[0]):
        if compat.shard_group(group) is groups.shard:
            if smaller is not None:
                compat.reshard_to(group, smaller)
            _attach(modules[0], group, groups, collectives, overlap)
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


def _attach(
    module: nn.Module, group: Any, groups: Groups, collectives: Collectives, overlap: bool
) -> None:
    """Give one parameter group its communication objects, its hop 2 and its ledger."""
    decide = decide_by(groups, collectives)
    if collectives == "auto":
        _measure(group, groups)
    rank = dist.get_rank()
    ledger = Ledger(rank=rank, gpus_per_node=groups.gpus_per_node)
    hop_two = None
    if groups.replicas is not None and not compat.is_replicated_by_torch(group):
        hop_two = HopTwo(
            group, groups.replicas, ledger, groups.device, lambda: _hops_of_root(group)
        )
        module.register_forward_pre_hook(_before_forward(hop_two.before_forward))
    later = None
    if overlap and groups.device.type == "cpu":
        compat.gather_beside_computation(group)
        later = Later(
            group,
            reductions_of(groups),
            hop_two.start_if_due if hop_two else None,
            in_node=groups.shard.size() <= groups.gpus_per_node,
        )
        module.register_forward_pre_hook(_before_forward(later.before_forward))
    if hop_two is not None:
        hop_two.later = later
    compat.set_comms(
        group,
        AllGather(groups, ledger, decide),
        ReduceScatter(groups, ledger, decide, hop_two.before_reduce if hop_two else None, later),
    )
    exchanges = later is not None and later.in_node
    attach(module, Unit(group, groups, ledger, hop_two, decide, exchanges))


def _measure(group: Any, groups: Groups) -> None:
    shard_ranks = ranks_of(groups.shard)
    p = groups.shard.size()
    gather, reduce = compat.gather_dtype(group), compat.reduce_dtype(group)
    gather_bytes = compat.gathered_shard_bytes(group) * p
    reduce_bytes = compat.trainable_shard_numel(group) * reduce.itemsize * p
    measure(groups, groups.shard, shard_ranks, "all_gather", gather_bytes, gather)
    measure(groups, groups.shard, shard_ranks, "reduce_scatter", reduce_bytes, reduce)
    if compat.reshards_after_forward(group):
        backward = compat.backward_gather_group(group)
        if backward is not groups.shard:
            measure(groups, backward, ranks_of(backward), "all_gather", gather_bytes, gather)


def _before_forward(tell: Callable[[], None]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        tell()

    # As FSDP2's own hooks: not part of any compiled graph.
    outside_graphs: Callable[..., None] = torch.compiler.disable(hook, recursive=True)  # type: ignore[no-untyped-call]
    return outside_graphs


def _hops_of_root(group: Any) -> list[HopTwo]:
    owners = [(g, compat.modules_of(g)[0]) for g in compat.root_param_groups(group)]
    units = [unit for g, module in owners for unit in units_on(module) if unit.group is g]
    return [unit.hop_two for unit in units if unit.hop_two is not None]


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


def _axes(mesh: DeviceMesh, dims: Any) -> DeviceMesh:
    """The (replicate, shard) axes, or the shard axis alone, of a mesh with other axes beside them.

    Raises:
        ShardError: an axis would have to be flattened from several, or there is none to shard on.
    """
    names = [*dims.replicate_names, *dims.shard_names]
    if len(dims.shard_names) != 1 or len(dims.replicate_names) > 1:
        raise ShardError(
            "dp_mesh_dims must name one shard axis and at most one replicate axis.",
            numbers=f"It names shard={dims.shard!r}, replicate={dims.replicate!r}.",
            write="a mesh whose ranks are flattened into those two axes from the start",
        )
    return mesh[tuple(names)]


def check_ranks_agree(
    modules: list[nn.Module],
    axes: Sequence[dist.ProcessGroup],
    device: torch.device,
    ignored: set[nn.Parameter],
    more: Mapping[str, Sequence[str]],
) -> None:
    """Compare versions, parameters and buffers (name, order, shape, dtype), and ``more``.

    Raises:
        DisagreementError: on every rank, naming the ranks that differ from the first and where.
    """
    facts = {
        "version": [f"torch {torch.__version__}", f"mics {__version__}"],
        "model": [f"module {i}: {type(m).__name__}" for i, m in enumerate(modules)]
        + [
            f"{name} {_spelled(param)}"
            f"{'' if param.requires_grad else ' frozen'}{' ignored' if param in ignored else ''}"
            for module in modules
            for name, param in module.named_parameters()
        ]
        + [
            f"{name} {_spelled(buffer)} buffer"
            for module in modules
            for name, buffer in module.named_buffers()
        ],
    }
    check_agreement({**facts, **more}, axes, device)


def _spelled(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _on_meta(modules: list[nn.Module]) -> list[str]:
    return [
        name
        for module in modules
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if tensor.is_meta
    ]
