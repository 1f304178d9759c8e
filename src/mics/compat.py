"""The only file that touches private torch names.

Each entry says which versions need it and why (read in the source of 2.11 to 2.15, run on 2.13).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import (
    Store,
    _coalescing_manager,
    _get_default_store,
)
from torch.distributed.fsdp import FSDPModule, _common_utils
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    TrainingState,
)
from torch.distributed.tensor import DTensor, Placement

# 2.11 to 2.15: seeing every operator, and the leaves of nested containers, have private homes only.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

# 2.11 to 2.15: products of groups of rows: no public operator, no FLOPs in torch's registry.
GROUPED_PRODUCTS = (torch.ops.aten._grouped_mm, torch.ops.aten._scaled_grouped_mm)

ReduceOp = dist.ReduceOp | dist.ReduceOp.RedOpType

_collect_grad_tensors: Any = getattr(_common_utils, "collect_grad_tensors", None)

# torch 2.13 renamed the single-tensor collectives and made the old names warn.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# What Gloo and NCCL both move; float8, complex and short integers are among the others.
_KNOWN_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
}


def as_known(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes where a backend may not know the dtype; for what is not reduced."""
    return tensor if tensor.dtype in _KNOWN_DTYPES else tensor.view(-1).view(torch.uint8)


def all_gather(
    output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
) -> dist.Work | None:
    """All-gather ``input`` of ``group.rank()`` into row ``group.rank()`` of ``output``."""
    whole, shard = as_known(output), as_known(input)
    work: dist.Work | None = _all_gather(whole, shard, group=group, async_op=async_op)
    return work


def reduce_scatter(
    output: torch.Tensor,
    input: torch.Tensor,
    op: ReduceOp,
    group: dist.ProcessGroup,
    async_op: bool = False,
) -> dist.Work | None:
    """Reduce ``input`` over the group, keep row ``group.rank()`` in ``output``."""
    work: dist.Work | None = _reduce_scatter(output, input, op=op, group=group, async_op=async_op)
    return work


def coalesced(group: dist.ProcessGroup) -> Any:
    """Context that issues the collectives inside it as one, on a backend of an accelerator.

    2.11 to 2.15: the only spelling of coalescing. Not for Gloo: a group's two threads note in one
    string what they have done last. Names of coalesced calls are longer than the 15 characters
    that a string of C++ holds in itself, so calls that end at once free its memory twice
    (``runLoop`` in ``ProcessGroupGloo.cpp``), and the process aborts or writes what is another's.
    """
    return _coalescing_manager(group=group)


def job_store() -> Store:
    """The store that the default process group was made with.

    2.11 to 2.15: ``init_process_group`` makes one where the user gives none, and no public name
    returns it.
    """
    store: Store = _get_default_store()
    return store


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """The timeout that a group was made with; a backend without options has torch's default.

    2.11 to 2.15: the options of a group's backend have no public name.
    """
    devices: list[torch.device] = group._device_types
    options: list[Any] = [
        getattr(group._get_backend(device), "options", None) for device in devices
    ]
    limits = [one._timeout for one in options if hasattr(one, "_timeout")]
    return min(limits, default=default_pg_timeout)


def is_premul_sum(op: ReduceOp) -> bool:
    """Whether ``op`` scales its input, which must happen in one stage only.

    2.11 to 2.15: ``PREMUL_SUM`` is a ``ReduceOp`` object whose kind is only readable at ``.op``.
    """
    kinds: Any = dist.ReduceOp.RedOpType
    return bool(getattr(op, "op", op) == kinds.PREMUL_SUM)


def without_torch_functions() -> Any:
    """Context in which no ``TorchFunctionMode`` is asked.

    2.11 to 2.15: the public class covers subclasses only. Without it a mode sees every attribute
    that a dispatch mode reads.
    """
    return torch._C.DisableTorchFunction()


# -- FSDP2 parameter groups ----------------------------------------------------------------------


def multi_head_attention_with(attend: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """torch's ``multi_head_attention_forward`` with another kernel of attention inside.

    2.11 to 2.15: it offers itself to the active modes and then runs without any, so that no mode
    sees which kernel it calls. This is a copy in which two names mean something else.
    """
    own = nn.functional.multi_head_attention_forward
    names = {
        **own.__globals__,
        "has_torch_function": lambda _: False,
        "scaled_dot_product_attention": attend,
    }
    copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return copy


def param_groups(module: nn.Module) -> list[Any]:
    """The FSDP2 parameter groups of one module ([] when it is not sharded).

    2.11 keeps a single ``_fsdp_param_group``, 2.12 and later a list. Needed because the setters
    for communication objects refuse modules with several groups.
    """
    if not isinstance(module, FSDPModule):
        return []
    return list(_groups_of_state(module._get_fsdp_state()))


def modules_under(module: nn.Module) -> list[nn.Module]:
    """``list(module.modules())``, for what every step looks through.

    2.11 to 2.15: that hands every module up through a generator of each one above it, and spells
    its name.
    """
    found: dict[nn.Module, None] = {}  # in order
    waiting: list[nn.Module] = [module]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found[one] = None
            waiting += [inner for inner in reversed(one._modules.values()) if inner is not None]
    return list(found)


def own_params(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module itself; one that is registered twice comes twice. As above."""
    return [param for param in module._parameters.values() if param is not None]


def modules_of(group: Any) -> tuple[nn.Module, ...]:
    """The modules that share one parameter group."""
    modules: tuple[nn.Module, ...] = group.modules
    return modules


def shard_group(group: Any) -> dist.ProcessGroup:
    """The partition group a parameter group is sharded over."""
    shard: dist.ProcessGroup = group.mesh_info.shard_process_group
    return shard


# 2.12 and later: parameters of one module on several meshes; the result has a private home only.
_Placement: Any = getattr(_fsdp_common, "ShardPlacementResult", None)


def mesh_of_placement(result: Any) -> DeviceMesh | None:
    """The mesh that a ``ShardPlacementResult`` names, with its replicate axis; else ``None``."""
    if _Placement is None or not isinstance(result, _Placement):
        return None
    mesh: DeviceMesh = result.mesh_info.mesh
    return mesh


def shard_of_placement(result: Any) -> Any:
    """The dimension that a ``ShardPlacementResult`` shards, for the module's own mesh."""
    return result.placement


def names_its_axes(result: Any) -> bool:
    """Whether a ``ShardPlacementResult`` is for DTensors on a whole mesh (``dp_mesh_dims``)."""
    return result.mesh_info.dp_mesh_dims is not None


def shard_info(mesh: DeviceMesh, result: Any) -> Any:
    """What FSDP2 knows of a 1-D mesh to shard over, in place of what a placement says."""
    given = result.mesh_info
    if given.dp_mesh_dims is None:
        return FSDPMeshInfo(mesh, shard_mesh_dim=0)
    dims = type(given.dp_mesh_dims)(shard=given.dp_mesh_dims.shard)
    return FSDPMeshInfo(mesh, shard_mesh_dim=0, dp_mesh_dims=dims, spmd_mesh=given.spmd_mesh)


def placement_on(result: Any, info: Any) -> Any:
    """The same ``ShardPlacementResult`` on another mesh, see ``shard_info``."""
    return _Placement(placement=result.placement, mesh_info=info)


def root_of(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that a mesh was cut out of; itself if of none.

    2.11 to 2.15: a mesh tells nobody what else there is beside its axes.
    """
    root: DeviceMesh = mesh._get_root_mesh()
    return root


def flattened(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    """One axis of several, made once; collective over the mesh the first time.

    2.11 to 2.15: what FSDP2 does with several names in ``dp_mesh_dims`` (2.12 and later), by the
    same name, so that both share one group.
    """
    return mesh[names[0]] if len(names) == 1 else mesh[names]._flatten("_".join(names))


def side_by_side(axes: list[DeviceMesh]) -> DeviceMesh:
    """A mesh of axes of one mesh; 2.11 to 2.15: of flattened ones nothing public makes one."""
    return axes[0] if len(axes) == 1 else DeviceMesh._concatenate(axes)


def reduce_gradients_over(group: Any, names: tuple[str, ...]) -> None:
    """Leave gradients that are partial sums over some axes to the group's reductions.

    2.12 and later: FSDP2 does so for the axes that it reduces over, and completes the sums over
    others itself. Hop 2 is ours.
    """
    for fsdp_param in group.fsdp_params:
        axes = fsdp_param._spmd_mesh.mesh_dim_names
        fsdp_param._dp_dim_indices |= {axes.index(name) for name in names}


def is_replicated_by_torch(group: Any) -> bool:
    """Whether torch itself runs hop 2 for this parameter group (a 2-D mesh of its own)."""
    return bool(group._is_hsdp)


def set_comms(group: Any, all_gather: Any, reduce_scatter: Any) -> None:
    """Give one parameter group its communication objects.

    The public ``set_custom_all_gather`` is per module and refuses modules with several groups;
    these are the two assignments it makes.
    """
    group._all_gather_comm = all_gather
    group._reduce_scatter_comm = reduce_scatter


def sharded_params(group: Any) -> list[nn.Parameter]:
    """The sharded parameters of a group, in the order FSDP2 communicates them."""
    return [fsdp_param.sharded_param for fsdp_param in group.fsdp_params]


def trainable_params(group: Any) -> list[nn.Parameter]:
    """Those of the sharded parameters that need a gradient, in the same order."""
    return [one.sharded_param for one in group.fsdp_params if one.sharded_param.requires_grad]


def has_trainable_shard(group: Any) -> bool:
    """Whether ``trainable_shard_numel`` is not 0; the first parameter nearly always tells."""
    for one in group.fsdp_params:
        if one.sharded_param.requires_grad and one.padded_sharded_param_size.numel():
            return True
    return False


def trainable_shard_numel(group: Any) -> int:
    """Elements of one rank's padded shard of a group's trainable parameters."""
    return sum(trainable_shard_numels(group))


def trainable_shard_numels(group: Any) -> list[int]:
    """Elements of one rank's padded shard of each trainable parameter, in FSDP2's order."""
    return [
        fsdp_param.padded_sharded_param_size.numel()
        for fsdp_param in group.fsdp_params
        if fsdp_param.sharded_param.requires_grad
    ]


def fill_unused_gradients(group: Any) -> list[bool]:
    """Give zeros to the trainable parameters that a backward pass has not used on this rank.

    FSDP2 leaves such out of a reduce-scatter, whose size then differs between ranks that use other
    parameters. 2.13's ``set_reduce_scatter_unused_params`` does the same, but nobody learns which
    they were; 2.11 and 2.12 have nothing.

    Returns:
        For each trainable parameter whether it was used.
    """
    trainable = [one for one in group.fsdp_params if one.sharded_param.requires_grad]
    wholes = [getattr(one, "_unsharded_param", None) for one in trainable]
    used = [
        one.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None)
        for one, whole in zip(trainable, wholes, strict=True)
    ]
    for whole, is_used in zip(wholes, used, strict=True):
        if whole is not None and not is_used:
            whole.grad = _zeros_of(whole)
    return used


def _zeros_of(whole: torch.Tensor) -> torch.Tensor:
    """A gradient of zeros, of plain tensors as every gradient is; a float8 weight makes none."""
    local = whole.to_local() if isinstance(whole, DTensor) else whole
    zeros = torch.zeros(local.shape, dtype=local.dtype, device=local.device)
    if not isinstance(whole, DTensor):
        return zeros
    return DTensor.from_local(
        zeros,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def whole_gradients(group: Any) -> list[torch.Tensor | None]:
    """What a backward pass has left on each trainable whole parameter, before it is reduced."""
    wholes = [
        getattr(one, "_unsharded_param", None)
        for one in group.fsdp_params
        if one.sharded_param.requires_grad
    ]
    return [None if whole is None else whole.grad for whole in wholes]


def has_whole_gradients(group: Any) -> bool:
    """Whether it has left something, on a trainable one or not."""
    for one in group.fsdp_params:
        whole = getattr(one, "_unsharded_param", None)
        if whole is not None and whole.grad is not None:
            return True
    return False


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; a plain one is all here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """``local_of`` many tensors that nothing is to be differentiated by, such as gradients.

    2.11 to 2.15: ``to_local`` makes a view of each where autograd is on, and asks whether it is.
    """
    return [one._local_tensor if type(one) is DTensor else one for one in tensors]


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy many tensors in one call.

    2.11 to 2.15: ``_foreach_copy_`` has no public name; a call for each of a thousand small tensors
    takes longer than their bytes.
    """
    if targets:
        torch._foreach_copy_(targets, sources)


def box_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of this rank's part of a tensor.

    2.11 to 2.15: ``__create_chunk_list__`` is what torch's own checkpoints ask a DTensor, and
    nothing public knows where the parts of strided shards are.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    (box,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return tuple(box.offsets), tuple(box.sizes)


def give_gradient(group: Any, index: int, shard: torch.Tensor) -> None:
    """Make ``shard`` the gradient of the group's trainable parameter number ``index``.

    Args:
        group: an FSDP2 parameter group.
        index: among its trainable parameters.
        shard: this rank's, flat; at least as long as the unpadded shard.
    """
    fsdp_param = [p for p in group.fsdp_params if p.sharded_param.requires_grad][index]
    size = fsdp_param.sharded_size
    local = shard[: size.numel()].view(size).to(fsdp_param.sharded_param.dtype)
    if fsdp_param.offload_to_cpu:
        local = local.cpu()
    fsdp_param.sharded_param.grad = fsdp_param.to_sharded_dtensor(local)


# 2.11 to 2.15: FSDP2 copies the shards of a group of one rank into buffers of its own before every
# pass, and the gradients twice behind it. Nothing public lets it use what is there.


def can_stay_whole(group: Any) -> bool:
    """Whether the shards of a group are its whole parameters: one rank, nothing cast or moved."""
    if shard_group(group).size() > 1:
        return False
    for one in group.fsdp_params:
        if one.param_dtype is not None or one.offload_to_cpu:
            return False
        if type(one._sharded_param_data) is not torch.Tensor:
            return False
    return not with_gather_hook(group)


def stay_whole(group: Any) -> None:
    """Register the memory of the shards as the whole parameters, and never free it.

    FSDP2 makes a parameter of its buffer in the first gather; here the shard takes the buffer's
    place for that moment. What it has no buffer of it can not free.
    """
    drop_gather(group)
    for one in group.fsdp_params:
        shard = one._sharded_param_data
        whole = getattr(one, "_unsharded_param", None)
        there = whole._local_tensor if type(whole) is DTensor else whole
        if there is None or there.data_ptr() != shard.data_ptr():
            if whole is not None:
                del one._unsharded_param
            one.all_gather_outputs = [shard]
            one.init_unsharded_param()
        one.all_gather_outputs = []
    group.post_forward_mesh_info = None
    group.reshard_after_backward = False
    group._to_unsharded()


def whole_gradients_are_sums(group: Any) -> bool:
    """Whether FSDP2 would add a group's whole gradients to the shards' as they are.

    That is where a replica is one rank, and nothing divides, rounds or reads them on the way.
    """
    if shard_group(group).size() > 1 or reads_gradients_at_once(group) or not wants_reduce(group):
        return False
    if divide_factor(group) is not None:
        return False
    travels = reduce_dtype(group)
    for one in group.fsdp_params:
        if not one.sharded_param.requires_grad:
            continue
        whole = getattr(one, "_unsharded_param", None)
        if one.unsharded_accumulated_grad is not None or whole is None or whole.grad is None:
            return False
        made = whole.grad.dtype
        if made != travels and torch.promote_types(made, travels) != travels:
            return False
        if one.sharded_param.dtype != travels:
            return False
    return True


def take_whole_gradients(group: Any) -> list[torch.Tensor]:
    """Take the gradients off the whole trainable parameters, in FSDP2's order."""
    taken = []
    for one in group.fsdp_params:
        if one.sharded_param.requires_grad:
            gradient = one._unsharded_param.grad
            taken.append(gradient if type(gradient) is torch.Tensor else one.unsharded_grad_data)
            one._unsharded_param.grad = None
    return taken


def give_gradients(group: Any, flat: torch.Tensor) -> None:
    """Make views of a flat buffer the gradients of a group's trainable parameters."""
    offset = 0
    for one in group.fsdp_params:
        if one.sharded_param.requires_grad:
            local = flat.as_strided(one.sharded_size, one.contiguous_sharded_stride, offset)
            one.sharded_param.grad = one.to_sharded_dtensor(local)
            offset += one.padded_sharded_param_size.numel()


def run_gradient_hooks(group: Any) -> None:
    """Run the post-accumulate hooks of a group's trainable parameters, as FSDP2 does."""
    for param in trainable_params(group):
        hooks: dict[int, Any] = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        for hook in list(hooks.values()):
            hook(param)


def add_all(targets: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """Add many tensors in place in one call; 2.11 to 2.15: what torch's optimizers use."""
    torch._foreach_add_(targets, others)


def param_names(group: Any) -> list[str]:
    """Names of a group's parameters; local to their module before the first forward."""
    return [p._param_fqn or p._module_info.param_name for p in group.fsdp_params]


def module_name(group: Any) -> str:
    """The name of a group's module under its root; empty for the root, or before its forward."""
    name: str | None = group._module_fqn
    return name or ""


def has_gather_hook(param: torch.Tensor) -> bool:
    """Whether a parameter's tensor says itself what FSDP2 gathers of it.

    2.11 to 2.15: ``DTensor.to_local`` makes a view, which not every such tensor can be asked for.
    """
    return hasattr(getattr(param, "_local_tensor", param), "fsdp_pre_all_gather")


def with_gather_hook(group: Any) -> list[Any]:
    """Those of a group's parameters that do, as FSDP2 keeps them."""
    # Asked before every gather, so without the calls of ``has_gather_hook``; these are DTensors.
    hook = "fsdp_pre_all_gather"
    return [one for one in group.fsdp_params if hasattr(one.sharded_param._local_tensor, hook)]


def sent_as_they_are(group: Any) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and padded shape of what one rank gathers of the other parameters of a group."""
    return [
        sent_as_it_is(group, one)
        for one in group.fsdp_params
        if not has_gather_hook(one.sharded_param)
    ]


def sent_as_it_is(group: Any, fsdp_param: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and padded shape of one rank's shard of a parameter on its way."""
    dtype = _travel_dtype(group, fsdp_param.sharded_param)
    return dtype, tuple(fsdp_param.padded_sharded_param_size)


def gathered_of_hook(group: Any, fsdp_param: Any) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and elements of what one rank gave to the last gather of a parameter; [] before it."""
    p = shard_group(group).size()
    return [(whole.dtype, (whole.numel() // p,)) for whole in fsdp_param.all_gather_outputs]


def arguments_of_hook(fsdp_param: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """This rank's part of a parameter, and what FSDP2 calls its ``fsdp_pre_all_gather`` with."""
    return fsdp_param._sharded_local_tensor, (
        fsdp_param.shard_mesh_from_root,
        fsdp_param._orig_size,
        fsdp_param._contiguous_orig_stride,
        fsdp_param._module_info.module,
        fsdp_param.mp_policy,
    )


def asked_for_gather(fsdp_param: Any) -> torch.Tensor:
    """The tensor whose hook FSDP2 calls: this rank's part, moved to the device if offloaded.

    2.11 to 2.15: what a library's type keeps beside its values need not survive the move.
    """
    local: torch.Tensor = fsdp_param._sharded_local_tensor
    return local.to(fsdp_param.device) if fsdp_param.offload_to_cpu else local


def split_of(placement: Placement) -> tuple[int | None, int]:
    """The dim that a placement splits, ``None`` if it splits none, and its split factor.

    2.11 to 2.15: the placement of an axis that splits what later ones have split is private.
    """
    if not hasattr(placement, "dim"):
        return None, 1
    dim: int = placement.dim
    return dim, getattr(placement, "split_factor", 1)


def scales_beforehand(param: torch.Tensor) -> bool:
    """Whether a parameter is a float8 weight whose scale can be worked out before its gathers.

    torchao 0.17 and 0.18: its weight type has no public name, nor has what says so.
    """
    return hasattr(getattr(param, "_local_tensor", param), "_precomputed_scale")


def kind_of_state(local: torch.Tensor) -> str:
    """Which of torchao's quantised states of optimizers a tensor is, by its name; "" for none.

    torchao 0.17 and 0.18: ``torchao.optim`` exports its optimizers, not the types of their state.
    """
    kind = type(local)
    known = kind.__name__ in ("OptimState8bit", "OptimState4bit", "OptimStateFp8")
    return kind.__name__ if known and kind.__module__.startswith("torchao.optim.") else ""


def new_state(optimizer: Any, like: torch.Tensor, signed: bool) -> torch.Tensor | None:
    """What an optimizer of torchao begins the state of a parameter with; ``None`` for others.

    torchao 0.17 and 0.18: nothing else says from how many elements on a shard is quantised.
    """
    of_torchao = any(k.__module__.startswith("torchao.optim.") for k in type(optimizer).__mro__)
    if not of_torchao or not hasattr(optimizer, "_new_buffer"):
        return None
    new: torch.Tensor = optimizer._new_buffer(like, signed)
    return new


def names_of_arguments(func: Any) -> list[str]:
    """Names of an operator's arguments, in order; 2.11 to 2.15: its schema is private."""
    return [argument.name for argument in func._schema.arguments]


def ranks_of_call(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """World ranks of the group that an operator of c10d is called with; () where it has none."""
    group = group_of_call(func, args, kwargs)
    return () if group is None else tuple(dist.get_process_group_ranks(group))


def group_of_call(func: Any, args: Any, kwargs: dict[str, Any]) -> dist.ProcessGroup | None:
    """The group that an operator of c10d is called with; ``None`` where it has none.

    2.11 to 2.15: operators of c10d take the group itself, functional ones its name.
    """
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    for number, argument in enumerate(func._schema.arguments):
        value: Any = args[number] if number < len(args) else kwargs.get(argument.name)
        if argument.name == "process_group":
            unboxed: dist.ProcessGroup = dist.ProcessGroup.unbox(value)
            return unboxed
        if argument.name == "group_name":
            group: dist.ProcessGroup = resolve(value) if isinstance(value, str) else value
            return group
    return None


def reduce_dtype(group: Any) -> torch.dtype:
    """The dtype a group's gradients are reduced in (what ``MixedPrecisionPolicy`` documents)."""
    if group.mp_policy.reduce_dtype is not None:
        dtype: torch.dtype = group.mp_policy.reduce_dtype
        return dtype
    params = sharded_params(group)
    # Frozen parameters may have another dtype (LoRA on a bf16 base); gradients have not.
    first = next((param for param in params if param.requires_grad), params[0])
    return _travel_dtype(group, first)


def _travel_dtype(group: Any, param: nn.Parameter) -> torch.dtype:
    wanted: torch.dtype | None = group.mp_policy.param_dtype
    return wanted if wanted is not None and param.dtype.is_floating_point else param.dtype


def reshards_after_forward(group: Any) -> bool:
    """Whether the parameters are freed after forward and gathered again in backward."""
    return bool(group._reshard_after_forward)


def becomes_root(group: Any, model: nn.Module) -> bool:
    """Whether FSDP2's first forward will make this group a root's, and stop resharding it.

    That is the fate of every sharded module under ``model`` that no other sharded module contains,
    if ``reshard_after_forward`` was left out.
    """
    (first, *_) = modules_of(group)
    if not isinstance(first, FSDPModule):
        return False
    state = first._get_fsdp_state()
    if state._is_root is not None or not state._auto_reshard_after_forward:
        return False
    outer = (m for m in model.modules() if isinstance(m, FSDPModule) and m is not first)
    return not any(inner is first for m in outer for inner in m.modules())


def outermost(group: Any, model: nn.Module) -> nn.Module:
    """The sharded module under ``model`` that a group's module is in and no other one contains."""
    (first, *_) = modules_of(group)
    sharded = (m for m in model.modules() if isinstance(m, FSDPModule))
    return next(m for m in sharded if any(inner is first for inner in m.modules()))


def backward_gather_group(group: Any) -> dist.ProcessGroup:
    """The group of the all-gather in backward: smaller when ``reshard_after_forward`` is an int."""
    shard: dist.ProcessGroup = group.post_forward_mesh_info.shard_process_group
    return shard


def reshard_to(group: Any, mesh: DeviceMesh) -> None:
    """Let a group reshard to the second axis of ``mesh`` after forward.

    2.11 to 2.15: ``reshard_after_forward=int`` makes a mesh and its communicators in every call
    (pytorch#147179), and makes them from the shard axis alone, so that partition groups side by
    side would use one rendezvous key for different groups. The group must have been made with
    ``reshard_after_forward=True``.
    """
    info = HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    group.post_forward_mesh_info = info
    for fsdp_param in group.fsdp_params:
        fsdp_param.post_forward_mesh_info = info
        whole = torch.empty(fsdp_param._orig_size, device="meta")
        fsdp_param._init_sharded_post_forward_param_metadata(whole)


def wants_all_reduce(group: Any) -> bool:
    """The flag ``FSDPModule.set_requires_all_reduce`` sets; it has no getter."""
    return bool(group.all_reduce_grads)


# 2.11 to 2.15: what FSDP2 has not reduced over replicas yet is in no .grad.
def has_partial_reduction(group: Any) -> bool:
    """Whether gradients wait that FSDP2 has reduced over the shard axis alone."""
    return getattr(group, "_partial_reduce_output", None) is not None


def drop_partial_reduction(group: Any) -> None:
    """Forget them, as ``zero_grad`` does not."""
    group._partial_reduce_output = None


def wants_reduce(group: Any) -> bool:
    """The flag ``FSDPModule.set_requires_gradient_sync`` sets; it has no getter."""
    return bool(group.reduce_grads)


def divide_factor(group: Any) -> float | None:
    """What ``FSDPModule.set_gradient_divide_factor`` set; it has no getter."""
    factor: float | None = group.gradient_divide_factor
    return factor


def divide_by(group: Any, ranks: int) -> None:
    """Divide the sum over ranks by a number of them, on every backend.

    What ``FSDPModule.set_gradient_divide_factor`` does to all groups of a module; Gloo has no sum
    of products, which FSDP2 then takes unless sums are forced. 2.11 to 2.15: with one rank it takes
    none, and divides twice if they are.
    """
    group.gradient_divide_factor = float(ranks)
    group.force_sum_reduction_for_comms = shard_group(group).size() > 1


def sums_only(group: Any) -> bool:
    """What ``FSDPModule.set_force_sum_reduction_for_comms`` set; it has no getter."""
    return bool(group.force_sum_reduction_for_comms)


def reads_gradients_at_once(group: Any) -> bool:
    """Whether FSDP2 itself reads what a reduce-scatter returns: offloading, or a user's hook.

    ``FSDPModule.set_all_reduce_hook`` has no getter.
    """
    offloads = [one for one in group.fsdp_params if one.offload_to_cpu]
    return bool(offloads) or group._all_reduce_hook is not None


def gather_beside_computation(group: Any) -> None:
    """Let the all-gathers of a group be waited for, not blocked on.

    2.11 to 2.15: the assignment that the private ``FSDPModule._set_unshard_async_op`` makes; its
    warning that only explicit prefetching overlaps does not hold on the CPU, which has no streams.
    """
    group.unshard_async_op = True


def start_unshard(group: Any) -> None:
    """Issue a group's all-gather for forward, unless it is under way or not needed.

    2.11 to 2.15: what ``FSDPModule.set_modules_to_forward_prefetch`` does, but decided anew in
    every forward: a gather that nobody waits for would leave this step's weights to the next.
    """
    group._prefetch_unshard(group, "forward")


def enters_forward(group: Any) -> bool:
    """Whether no module of a group has begun this use of it; to be asked before FSDP2's hook."""
    return bool(group._training_state != TrainingState.FORWARD)


def completes_forward(group: Any, module: nn.Module) -> bool:
    """Whether no other module of a group is to end before this use of it has."""
    if len(modules_of(group)) == 1:
        return True
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    return bool(state._modules_to_run_forward == {module})


def is_whole(group: Any) -> bool:
    """Whether a group is gathered."""
    return bool(group.is_unsharded)


def is_in_backward(group: Any) -> bool:
    """Whether FSDP2 has gathered a group for backward and not reduced its gradients since."""
    return bool(group._training_state == TrainingState.PRE_BACKWARD)


def begin_empty_forward(group: Any) -> None:
    """Gather a group as the forward of its modules does."""
    group.pre_forward(modules_of(group)[0], (), {})


def end_empty_forward(group: Any) -> None:
    """Free a group as the forward of its modules does."""
    group.post_forward(modules_of(group)[0], None, None)


def begin_empty_backward(group: Any) -> None:
    """Gather a group as the backward of its modules does; inside a backward pass."""
    state: Any = modules_of(group)[0]._get_fsdp_state()  # type: ignore[operator]
    state._pre_backward(None)


def end_empty_backward(group: Any) -> None:
    """Reduce a group's gradients as the backward of its modules does; inside a backward pass."""
    group.post_backward()


def tensors_with_grad(tree: Any) -> tuple[torch.Tensor, ...]:
    """The tensors in a nested structure that require a gradient.

    2.13 and later look into dataclasses too, as their FSDP2 does; 2.11 and 2.12 do not.
    """
    found: list[torch.Tensor] = []
    _add_with_grad((tree,), found)
    return tuple(found)


_WITHOUT_TENSORS = (bool, int, float, str)


def _add_with_grad(items: Iterable[Any], found: list[torch.Tensor]) -> None:
    """Add those of some structures; torch asks each value of a block's inputs a dozen questions."""
    for one in items:
        if one is None:  # most of what a block is given
            continue
        kind = type(one)
        if kind is torch.Tensor:
            if one.requires_grad:
                found.append(one)
        elif kind is tuple or kind is list:
            _add_with_grad(one, found)
        elif kind is dict:
            _add_with_grad(one.values(), found)
        elif kind not in _WITHOUT_TENSORS:
            found.extend(_with_grad_by_torch(one))


def _with_grad_by_torch(tree: Any) -> Iterable[torch.Tensor]:
    if _collect_grad_tensors is not None:
        collected: Iterable[torch.Tensor] = _collect_grad_tensors(tree)
        return collected
    leaves: list[Any] = tree_leaves(tree)
    return [leaf for leaf in leaves if getattr(leaf, "requires_grad", False)]


def outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A forward hook that, as FSDP2's own, is part of no compiled graph."""
    outside: Callable[..., Any] = torch.compiler.disable(hook, recursive=True)  # type: ignore[no-untyped-call]
    return outside


def root_module(group: Any) -> nn.Module | None:
    """The root of the FSDP2 tree a group is in; ``None`` before its first forward."""
    (first, *_) = modules_of(group)
    states = first._get_fsdp_state()._state_ctx.all_states if isinstance(first, FSDPModule) else []
    return states[0]._modules[0] if states else None


def root_param_groups(group: Any) -> list[Any]:
    """Every parameter group under the root of ``group``, in module order (after lazy init)."""
    for module in modules_of(group):
        if isinstance(module, FSDPModule):
            states = module._get_fsdp_state()._state_ctx.all_states
            return [g for state in states for g in _groups_of_state(state)]
    return [group]


def _groups_of_state(state: Any) -> Iterator[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        yield from state._fsdp_param_groups
    elif state._fsdp_param_group is not None:
        yield state._fsdp_param_group


def knows_root(state: Any) -> bool:
    """Whether the first forward has told a sharded module's state who its root is."""
    return state._is_root is not None


def is_initialised(module: nn.Module) -> bool:
    """Whether the first forward has told this module who its root is."""
    return isinstance(module, FSDPModule) and knows_root(state_of(module))


def is_root(module: FSDPModule) -> bool:
    """Whether the first forward made this module the root of its FSDP2 tree."""
    return bool(module._get_fsdp_state()._is_root)


def reset_iteration(root: nn.Module) -> None:
    """Bring FSDP2 back to rest after an exception inside forward or backward.

    2.13 and later: the public ``reset_iter_state``; 2.11 and 2.12 have none, so what it resets is
    reset here. No version drops the whole gradients of a unit whose backward was cut short; they
    would be added to the next ones.
    """
    assert isinstance(root, FSDPModule)
    groups = [group for module in root.modules() for group in param_groups(module)]
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
    else:
        _reset_by_hand(root, groups)
    for group in groups:
        for fsdp_param in group.fsdp_params:
            fsdp_param.unsharded_accumulated_grad = None
            if hasattr(fsdp_param, "_unsharded_param"):
                fsdp_param._unsharded_param.grad = None


def _reset_by_hand(root: FSDPModule, groups: list[Any]) -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # an error path: nothing is overlapped with it
    for module in root.modules():  # type: ignore[attr-defined]
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        state._comm_ctx.all_gather_state = None
        state._comm_ctx.reduce_scatter_state = None
        state._comm_ctx.post_forward_order.clear()
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
        state._modules_to_run_forward.clear()
        state._training_state = TrainingState.IDLE
    for group in groups:
        gathered = group._all_gather_result
        if gathered is not None and isinstance(gathered.all_gather_work, dist.Work):
            gathered.all_gather_work.wait()
        group._all_gather_result = None
        group._post_reduce_event = None
        group._all_reduce_state = None
        group._reshard_after_forward_event = None
        group._post_forward_indices.clear()
        group._training_state = TrainingState.IDLE
        group._to_sharded()


# 2.11 to 2.15: what is registered on the modules of a group, and what is in memory, are one state
# there, and nothing public tells it or sets one without the other.


def state_of(module: nn.Module) -> Any:
    """What FSDP2 keeps of a sharded module, the same as long as that lasts."""
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    return state


def is_outermost(state: Any) -> bool:
    """Whether no other sharded module's forward is around this one's, as FSDP2 keeps count."""
    around = state._state_ctx.iter_forward_root
    return around is None or around is state


def runs_on(state: Any) -> bool:
    """Whether a forward of a module's state is under way that began before."""
    return bool(state._state_ctx.iter_forward_root is state)


def groups_beside(module: nn.Module) -> list[Any]:
    """Every group under the root of a sharded module; under the module itself before lazy init."""
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    if state._state_ctx.all_states:
        return [group for one in state._state_ctx.all_states for group in _groups_of_state(one)]
    found = [group for inner in module.modules() for group in param_groups(inner)]
    return list({id(group): group for group in found}.values())


def initialise(module: nn.Module) -> None:
    """Run FSDP2's lazy init outside of inference mode: it may make shards anew, to be trained."""
    if not is_initialised(module):
        with torch.inference_mode(False):
            module._get_fsdp_state()._lazy_init()  # type: ignore[operator]


def lazily_initialised(group: Any) -> bool:
    """Whether the first forward has taken the parameters of a group for good."""
    return bool(group._reset_sharded_params)


def first_param(group: Any) -> nn.Parameter:
    """The first sharded parameter of a group."""
    param: nn.Parameter = group.fsdp_params[0].sharded_param
    return param


def first_dtype(group: Any) -> torch.dtype:
    """The dtype of a group's first parameter when FSDP2 made its buffers, in the first forward."""
    dtype: torch.dtype = group.fsdp_params[0].orig_dtype
    return dtype


def is_untouched(group: Any) -> bool:
    """Whether the modules of a group have what FSDP2 registered last, the sharded parameters."""
    if not group.is_sharded:
        return False
    for one in group.fsdp_params:
        place = one._module_info
        if place.module._parameters.get(place.param_name) is not one.sharded_param:
            return False
    return True


def registered_params(group: Any) -> list[nn.Parameter | None]:
    """What stands on the modules where the parameters of a group should be."""
    places = [fsdp_param._module_info for fsdp_param in group.fsdp_params]
    return [place.module._parameters.get(place.param_name) for place in places]


def expected_params(group: Any) -> list[nn.Parameter]:
    """What FSDP2 registered last on the modules of a group, unless it is kept."""
    if group.is_unsharded:
        return [fsdp_param._unsharded_param for fsdp_param in group.fsdp_params]
    return sharded_params(group)


def gathered_params(group: Any) -> list[nn.Parameter]:
    """The whole parameters that autograd saw of a group, in memory or not."""
    found = [getattr(fsdp_param, "_unsharded_param", None) for fsdp_param in group.fsdp_params]
    return [param for param in found if param is not None]


def whole_gradient_bytes(group: Any) -> int:
    """Bytes of the gradients of a group that a backward pass has left unreduced."""
    wholes = [p.grad for p in gathered_params(group)]
    wholes += [fsdp_param.unsharded_accumulated_grad for fsdp_param in group.fsdp_params]
    return sum(whole.nbytes for whole in wholes if whole is not None)


def is_kept(group: Any) -> bool:
    """Whether its sharded parameters are registered, but more of them is in memory."""
    if group.is_sharded or not group.fsdp_params:
        return False
    first = group.fsdp_params[0]
    place = first._module_info
    return place.module._parameters.get(place.param_name) is first.sharded_param


def register_sharded(group: Any) -> None:
    """Register the sharded parameters, and leave in memory what is there."""
    drop_gather(group)
    if not group.is_sharded:
        for fsdp_param in group.fsdp_params:
            fsdp_param._setattr_on_modules(fsdp_param.sharded_param)


def register_gathered(group: Any) -> None:
    """Register the whole parameters of a group that has them in memory.

    They need gradients as the shards do by now; FSDP2 sees to it only where it gathers.
    """
    if group.is_unsharded:
        for one in group.fsdp_params:
            if one._unsharded_param.requires_grad != one.sharded_param.requires_grad:
                one._unsharded_param.requires_grad_(one.sharded_param.requires_grad)
            one._setattr_on_modules(one._unsharded_param)


def num_uses(groups: list[Any]) -> int:
    """How many uses in forward FSDP2 remembers of the groups of a tree, to gather them in backward.

    2.11 to 2.15: it remembers those without gradients too, and gathers one of them once more at the
    end of the next backward, for nothing.
    """
    made = getattr(groups[0].comm_ctx, "post_forward_order", ())  # there is none before lazy init
    return len(made)


def forget_uses(groups: list[Any], first: int) -> None:
    """Forget those that came after the first ones."""
    for group in groups:
        del group.comm_ctx.post_forward_order[first:]
        indices = group._post_forward_indices
        indices[:] = [index for index in indices if index < first]


def free(group: Any) -> None:
    """Reshard a group, whatever FSDP2 takes it to be doing."""
    drop_gather(group)
    group._to_sharded()


def drop_gather(group: Any) -> None:
    """Wait for a gather that nobody has waited for, and drop it: it ages."""
    gathered = group._all_gather_result
    if gathered is None:
        return
    if gathered.all_gather_event is not None:
        group.device_handle.current_stream().wait_event(gathered.all_gather_event)
    if isinstance(gathered.all_gather_work, dist.Work):
        gathered.all_gather_work.wait()
    group._all_gather_result = None


def make_buffers_of_one(group: Any) -> None:
    """Make the buffers of a group of one rank outside of inference mode.

    2.11 to 2.15: FSDP2 copies into them in a way that buffers made under it refuse.
    """
    if group._all_gather_process_group.size() > 1:
        return
    with torch.inference_mode(False), torch.no_grad():
        for fsdp_param in group.fsdp_params:
            if fsdp_param.all_gather_outputs:  # it may be gathered
                continue
            (shard,) = fsdp_param.all_gather_inputs
            fsdp_param.init_all_gather_outputs([shard.numel()], [shard.dtype], 1, group.device)


def drop_inference_buffers(group: Any) -> None:
    """Drop buffers made under ``inference_mode``, which autograd would refuse ever after."""
    for fsdp_param in group.fsdp_params:
        made = [*fsdp_param.all_gather_outputs, getattr(fsdp_param, "_unsharded_param", None)]
        if any(buffer is not None and buffer.is_inference() for buffer in made):
            fsdp_param.all_gather_outputs = []
            fsdp_param._unsharded_inner_tensors = []
            del fsdp_param._unsharded_param


def reshards_after_backward(group: Any) -> bool:
    """The flag ``FSDPModule.set_reshard_after_backward`` sets; it has no getter."""
    return bool(group.reshard_after_backward)


def reset_around(module: nn.Module) -> None:
    """Bring the root that a sharded module is under back to rest after an exception."""
    states = module._get_fsdp_state()._state_ctx.all_states  # type: ignore[operator]
    if states:
        reset_iteration(states[0]._modules[0])


def checkpoint_activations(block: nn.Module) -> None:
    """Make ``block`` recompute its activations in backward, its structure and names unchanged.

    2.11 to 2.15: the composable form lives at a private path; the wrapper form, private too,
    renames every parameter.
    """
    checkpoint(block)


# -- autograd ------------------------------------------------------------------------------------


def in_backward() -> bool:
    """Whether this thread is inside a backward pass (activation recomputation included)."""
    return bool(torch._C._current_graph_task_id() != -1)  # asked in every hook


def backward_id() -> int:
    """A number for the backward pass this thread is in, -1 outside; no two have the same."""
    number: int = torch._C._current_graph_task_id()
    return number


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run ``callback`` once when the current backward pass has finished.

    2.11 to 2.15: how FSDP2 and DDP end their own backward; autograd has no public form.
    """
    Variable._execution_engine.queue_callback(callback)


def nums_of_gradient_hooks(params: Iterable[torch.Tensor]) -> list[int]:
    """How many post-accumulate-gradient hooks each has; torch only offers to add one.

    Every reduction asks it of all parameters of a unit.
    """
    return [len(param._post_accumulate_grad_hooks or ()) for param in params]


def have_tensor_hooks(params: Iterable[torch.Tensor]) -> bool:
    """Whether one has a hook of ``Tensor.register_hook``, which torch does not tell."""
    return any(param._backward_hooks for param in params)


def num_hooks(param: torch.Tensor) -> int:
    """How many hooks ``param`` has that see or replace its gradient."""
    return nums_of_gradient_hooks([param])[0] + len(param._backward_hooks or ())


def as_plain_tensors() -> Any:
    """Take subclasses of tensors for plain ones, and give plain results.

    2.11 to 2.15: what torch's documentation of ``__torch_function__`` has under this private name.
    """
    return torch._C.DisableTorchFunctionSubclass()


def times_written(tensor: torch.Tensor) -> int:
    """How often a tensor was written in place.

    2.11 to 2.15: autograd's own counter, the only sign that a value was set or edited.
    """
    return int(tensor._version)


def times_group_written(group: Any) -> int:
    """How often the sharded parameters of a group were written, all together; see above."""
    return sum([one.sharded_param._version for one in group.fsdp_params])


def viewed(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor is a view of, or itself: all views of it are counted by ``times_written``.

    2.11 to 2.15: autograd's own record, which has no public name.
    """
    base: torch.Tensor | None = tensor._base
    return tensor if base is None else base


def divide_all(tensors: list[torch.Tensor], divisor: float) -> None:
    """Divide tensors in place by one kernel; 2.11 to 2.15: what torch's optimizers use."""
    torch._foreach_div_(tensors, divisor)


def multiply_all(tensors: list[torch.Tensor], factor: float | torch.Tensor) -> None:
    """Multiply tensors in place by one kernel; 2.11 to 2.15: what torch's optimizers use."""
    torch._foreach_mul_(tensors, factor)


def norms(tensors: list[torch.Tensor], order: float, foreach: bool | None) -> list[torch.Tensor]:
    """The norms of tensors, one by one or by one kernel for those of a device and dtype.

    2.11 to 2.15: what ``torch.nn.utils.get_total_norm`` uses, which cannot be told to add up
    16-bit values in 32 bits.
    """
    found: list[torch.Tensor] = []
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        real = tensor.abs() if tensor.is_complex() else tensor
        alike.setdefault((real.device, real.dtype), []).append(real)
    for (_, dtype), group in alike.items():
        wide = torch.promote_types(dtype, torch.float32)
        if foreach is False:
            found += [torch.linalg.vector_norm(one, order, dtype=wide) for one in group]
        else:
            found += torch._foreach_norm(group, order, dtype=wide)
    return found


# -- modules and operators -----------------------------------------------------------------------

# 2.11 to 2.15: what ``Tensor.item`` runs; no public operator reads a value.
READ_VALUE = torch.ops.aten._local_scalar_dense.default


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Whether ``state_dict`` holds a buffer; 2.11 to 2.15: ``register_buffer`` has no getter."""
    return buffer not in module._non_persistent_buffers_set


def reset_of(module: nn.Module) -> Callable[[], None] | None:
    """What sets a module's own values anew; 2.11 to 2.15: ``nn.MultiheadAttention`` hides its."""
    reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    return reset or getattr(module, "_reset_parameters", None)


def leave_alone(module: nn.Module, names: Iterable[str]) -> None:
    """Tell DistributedDataParallel around a module what of it to leave alone.

    2.11 to 2.15: a workaround of torch's, as it says, until there is a public way.
    """
    module.__dict__["_ddp_params_and_buffers_to_ignore"] = names


def operator_of(overload: Any) -> Any:
    """The operator an overload belongs to; 2.11 to 2.15: FLOPs are registered by it alone."""
    return overload._overloadpacket


def writes_its_input(overload: Any) -> bool:
    """Whether an overload writes one of its arguments; 2.11 to 2.15: only its schema says so."""
    return bool(overload._schema.is_mutable)


def register_fake_backend() -> None:
    """Make the backend "fake" known, whose collectives move nothing.

    2.11 to 2.15: it is registered by a module of torch's own tests, when that is imported.

    Raises:
        ImportError: this torch has none.
    """
    import torch.testing._internal.distributed.fake_pg  # noqa: F401


def watch_compilation(begins: Callable[[], None], ends: Callable[[], None]) -> None:
    """Be called when torch.compile begins and ends to compile, from now on.

    2.11 to 2.15: its callbacks are in a module without underscore of a package with one. Where it
    is not loaded nothing has been compiled yet, and nobody is called.
    """
    callbacks: Any = sys.modules.get("torch._dynamo.callback")
    if callbacks is not None:
        callbacks.on_compile_start(lambda _: begins())
        callbacks.on_compile_end(lambda _: ends())
